"""LLaVA 1.5 (arXiv 2310.03744): CLIP's vision tower, a two-layer projector, a Llama-like decoder."""

from compress.families.family import Family, ScalePair
from compress.families.qwen2_vl import DECODER_PAIRS

RENAMES = (
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
"""Published checkpoints have the names of transformers before 4.52, the tower those of before 5."""

LLAVA = Family(
    name="llava",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    renames=RENAMES,
    vision=("model.vision_tower", "model.multi_modal_projector"),
    projector=("model.multi_modal_projector",),
    vision_blocks=("model.vision_tower.encoder.layers",),
    embeddings="model.language_model.embed_tokens",
    blocks="model.language_model.layers",
    head="lm_head",
    # transformers takes either key for the same setting
    image_token_keys=("image_token_index", "image_token_id"),
    scale_pairs=DECODER_PAIRS,
    vision_scale_pairs=(
        ScalePair("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScalePair("self_attn.v_proj", ("self_attn.out_proj",)),
        ScalePair("layer_norm2", ("mlp.fc1",)),
    ),
    # decoders whose blocks have Llama's module names, towers whose blocks have CLIP's
    requires=(
        ("text_config.model_type", ("llama", "mistral", "qwen2", "qwen3")),
        ("vision_config.model_type", ("clip_vision_model", "siglip_vision_model")),
    ),
    # LlamaConfig's: published files name only what differs from them
    defaults=(("num_attention_heads", 32), ("num_hidden_layers", 32)),
    # files from before transformers 5 have it in the text section, which transformers 5 still honours
    tied_by=("tie_word_embeddings", "text_config.tie_word_embeddings"),
)
