"""Llama 3.2 Vision (arXiv 2407.21783, section 7): blocks of cross-attention in a Llama decoder read the image features."""

from compress.families.family import Family, ScalePair

MLLAMA = Family(
    name="mllama",
    model_type="mllama",
    architecture="MllamaForConditionalGeneration",
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(?=vision_model\.|multi_modal_projector\.)", "model."),
    ),
    vision=("model.vision_model", "model.multi_modal_projector"),
    projector=("model.multi_modal_projector",),
    vision_blocks=("model.vision_model.transformer.layers", "model.vision_model.global_transformer.layers"),
    embeddings="model.language_model.embed_tokens",
    blocks="model.language_model.layers",
    head="lm_head",
    image_token_keys=("image_token_index", "image_token_id"),
    scale_pairs=(
        ScalePair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScalePair("self_attn.v_proj", ("self_attn.o_proj",), grouped=True),
        # the queries alone: keys and values of cross-attention read the image features, not this norm's output
        ScalePair("input_layernorm", ("cross_attn.q_proj",)),
        ScalePair("cross_attn.v_proj", ("cross_attn.o_proj",), grouped=True),
        ScalePair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ScalePair("mlp.up_proj", ("mlp.down_proj",)),
    ),
    vision_scale_pairs=(
        ScalePair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ScalePair("self_attn.v_proj", ("self_attn.o_proj",)),
        ScalePair("post_attention_layernorm", ("mlp.fc1",)),
    ),
    cross_attention_linears=("cross_attn.k_proj", "cross_attn.v_proj"),
    image_mask="cross_attention_mask",
    tied_by=(),  # transformers 5 never ties it, whatever the config says
    served_until="0.10.2",
)
