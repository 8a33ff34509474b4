"""Qwen2-VL (arXiv 2409.12191)."""

from compress.families.family import Family, ScalePair

RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model."),
)
"""Published checkpoints have the names of transformers before 4.52; newer ones the module names."""

DECODER_PAIRS = (
    ScalePair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ScalePair("self_attn.v_proj", ("self_attn.o_proj",), grouped=True),
    ScalePair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    # the gate multiplies up_proj's output, so a scale passes; through the gate itself (SiLU) none does
    ScalePair("mlp.up_proj", ("mlp.down_proj",)),
)

QWEN2_VL = Family(
    name="qwen2-vl",
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    renames=RENAMES,
    vision=("model.visual",),
    projector=("model.visual.merger",),
    vision_blocks=("model.visual.blocks",),
    embeddings="model.language_model.embed_tokens",
    blocks="model.language_model.layers",
    head="lm_head",
    image_token_keys=("image_token_id", "video_token_id"),
    scale_pairs=DECODER_PAIRS,
    # none from qkv to proj (the values are a part of its rows only), none from fc1 to fc2 (a GELU passes no scale)
    vision_scale_pairs=(ScalePair("norm1", ("attn.qkv",)), ScalePair("norm2", ("mlp.fc1",))),
    # files from before transformers 5 have it in the text section, which transformers 5 still honours
    tied_by=("tie_word_embeddings", "text_config.tie_word_embeddings"),
)
