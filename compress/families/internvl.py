"""InternVL3 (arXiv 2504.10479) in transformers' format, from the repositories whose names end in `-hf`."""

from dataclasses import replace

from compress.families.family import ScalePair
from compress.families.llava import LLAVA

INTERNVL3 = replace(
    LLAVA,
    name="internvl3",
    model_type="internvl",
    architecture="InternVLForConditionalGeneration",
    vision_blocks=("model.vision_tower.encoder.layer",),
    image_token_keys=("image_token_id",),
    vision_scale_pairs=(
        ScalePair("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
        ScalePair("attention.v_proj", ("attention.projection_layer",)),
        ScalePair("layernorm_after", ("mlp.fc1",)),
    ),
    served_unquantized=("model.multi_modal_projector",),
    requires=(("text_config.model_type", ("qwen2", "qwen3", "llama")), ("vision_config.model_type", ("internvl_vision",))),
    defaults=(),
    tied_by=("tie_word_embeddings",),
    # InternVLConfig's default, unlike that of the architectures it is derived from
    tied_default=True,
)
