"""CLIP (arXiv 2103.00020): a vision and a text tower whose results are projected into one space and compared there."""

from compress.families.family import Family, ScalePair

_PAIRS = (
    ScalePair("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ScalePair("self_attn.v_proj", ("self_attn.out_proj",)),
    # none from fc1 to fc2: between them is a GELU, which passes no scale
    ScalePair("layer_norm2", ("mlp.fc1",)),
)

CLIP = Family(
    name="clip",
    model_type="clip",
    architecture="CLIPModel",
    renames=(),
    vision=("vision_model", "visual_projection"),
    # text_projection is none of `vision`: it runs after the text tower's blocks, which stand in the decoder's place
    projector=("visual_projection", "text_projection"),
    vision_blocks=("vision_model.encoder.layers",),
    embeddings="text_model.embeddings.token_embedding",
    blocks="text_model.encoder.layers",
    head=None,
    image_token_keys=(),
    scale_pairs=_PAIRS,
    vision_scale_pairs=_PAIRS,
    single_image=True,
    text_model="text_model",
    served_unquantized=("visual_projection", "text_projection"),
    defaults=(("max_position_embeddings", 77),),
)
