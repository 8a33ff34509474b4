"""LLaVA-NeXT (1.6): LLaVA on the tiles of an image of any resolution, a learned vector at the end of each row of tiles."""

from dataclasses import replace

from compress.families.llava import LLAVA, RENAMES

LLAVA_NEXT = replace(
    LLAVA,
    name="llava-next",
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    tied_by=("tie_word_embeddings",),
    # a parameter of the model itself, which no prefix above covers
    renames=(*RENAMES, (r"^image_newline$", "model.image_newline")),
)
