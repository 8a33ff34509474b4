"""Inputs for verification: generated images of odd sizes and questions about them, the same every time."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from compress.data.prompts import Prompt
from compress.families import Family
from compress.runtimes.runtime import ImageInput

_COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 89, 200),
    "yellow": (240, 200, 40),
    "purple": (130, 60, 170),
    "black": (20, 20, 20),
    "orange": (250, 130, 20),
    "white": (250, 250, 250),
}
_QUESTIONS = (
    "What colour is the largest shape in this picture?",
    "How many shapes are there?",
    "Describe the picture.",
    "Is there a circle? Answer yes or no.",
    "What is in the upper left corner?",
    "Which colours can be seen?",
    "Name one thing that this shows.",
    "What colour is the background?",
)
_SIZES = ((150, 113), (97, 61), (252, 140), (84, 196), (131, 131), (203, 90), (59, 118), (177, 164))
"""Widths and heights: none a multiple of a 112-pixel window, hardly one of a patch, so that padding and resizing are exercised."""


@dataclass(frozen=True)
class VerificationPrompt:
    """A prompt on which components are compared."""

    prompt: Prompt
    description: str
    """Its images, for messages and reports."""


def draw(seed: int, width: int, height: int) -> bytes:
    """Return a PNG of a few coloured shapes on a background of another colour; deterministic in its arguments."""
    generator = random.Random(seed)  # noqa: S311 - no secret
    # without repetition: every shape differs from the background and from the others
    background, *colours = generator.sample(sorted(_COLOURS), 5)
    image = Image.new("RGB", (width, height), _COLOURS[background])
    canvas = ImageDraw.Draw(image)
    for colour in colours:
        side = generator.randint(min(width, height) // 4, min(width, height) // 2)
        left, top = generator.randint(0, width - side), generator.randint(0, height - side)
        box = (left, top, left + side, top + side)
        shape = generator.choice(("circle", "square", "triangle"))
        if shape == "circle":
            canvas.ellipse(box, fill=_COLOURS[colour])
        elif shape == "square":
            canvas.rectangle(box, fill=_COLOURS[colour])
        else:
            canvas.polygon(((left + side // 2, top), (left, top + side), (left + side, top + side)), fill=_COLOURS[colour])
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def samples(family: Family) -> list[VerificationPrompt]:
    """Return prompts with no image, one image, and two images of different sizes where the family takes two.

    The first three, which are compared as one batch, have none, one and (where possible) two images, and different lengths.
    """
    sizes = [(), (0,), (1,) if family.single_image else (1, 2), (3,), (2,)]
    return [_sample(index, indices) for index, indices in enumerate(sizes)]


def _sample(index: int, images: Sequence[int]) -> VerificationPrompt:
    """Return the prompt with the question of this index, about images of these indices in `_SIZES`."""
    encoded = tuple(draw(image, *_SIZES[image]) for image in images)
    sizes = [f"{width}×{height}" for width, height in (_SIZES[image] for image in images)]
    descriptions = {0: "a prompt without an image", 1: f"an image of {' '.join(sizes)} pixels"}
    return VerificationPrompt(
        Prompt(f"sample {index}", _QUESTIONS[index], encoded),
        descriptions.get(len(sizes), f"images of {' and '.join(sizes)} pixels"),
    )


def questions(family: Family, seed: int = 100) -> list[Prompt]:
    """Return questions, each about an image of its own; the last two about two images where the family takes two.

    Another `seed` gives the same questions about images of the same sizes with other content.
    """
    images = [draw(seed + index, *size) for index, size in enumerate(_SIZES)]
    # several images of different sizes in one prompt exercise their order and the features' places
    pairs = 0 if family.single_image else 2
    attached = [(images[index], *([images[0]] if index >= len(images) - pairs else [])) for index in range(len(images))]
    return [Prompt(f"question {index}", text, attached[index]) for index, text in enumerate(_QUESTIONS)]


def without_images(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return each prompt without its images."""
    return [Prompt(prompt.id, prompt.text) for prompt in prompts]


def sample_images() -> list[ImageInput]:
    """Return images of odd sizes; their ids are descriptions."""
    return [
        ImageInput(f"an image of {width}×{height} pixels", draw(200 + index, width, height))
        for index, (width, height) in enumerate(_SIZES)
    ]


def captions() -> list[str]:
    """Return captions of different lengths."""
    return [*(f"a {colour} shape" for colour in _COLOURS), "a picture", "a drawing of several shapes of many colours and sizes"]
