"""What an artifact is tried on: pictures drawn here, of odd sizes, and questions about them; the same every time."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from compress.families import Family
from compress.runtimes.runtime import ImageInput, Prompt

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
"""Widths and heights: none a multiple of a window of 112 pixels, and hardly one of a patch."""


@dataclass(frozen=True)
class VerificationPrompt:
    """A prompt that the parts are compared on; `shown` says in words what it has."""

    prompt: Prompt
    shown: str


def draw(seed: int, width: int, height: int) -> bytes:
    """Return a PNG of a few coloured shapes on a ground of another colour; the same for the same arguments."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    ground, *colours = chance.sample(sorted(_COLOURS), 5)
    image = Image.new("RGB", (width, height), _COLOURS[ground])
    canvas = ImageDraw.Draw(image)
    for colour in colours:
        side = chance.randint(min(width, height) // 4, min(width, height) // 2)
        left, top = chance.randint(0, width - side), chance.randint(0, height - side)
        box = (left, top, left + side, top + side)
        shape = chance.choice(("circle", "square", "triangle"))
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
    """Return prompts without an image, with one of several odd sizes, and with two of different sizes where the family takes two.

    The first three have none, one and (where it can be) two images, and different lengths.
    """
    shown = [(), (0,), (1,) if family.single_image else (1, 2), (3,), (2,)]
    return [_sample(place, pictures) for place, pictures in enumerate(shown)]


def _sample(place: int, pictures: Sequence[int]) -> VerificationPrompt:
    images = tuple(draw(picture, *_SIZES[picture]) for picture in pictures)
    sizes = [f"{width}×{height}" for width, height in (_SIZES[picture] for picture in pictures)]
    told = {0: "a prompt without an image", 1: f"an image of {' '.join(sizes)} pixels"}
    return VerificationPrompt(
        Prompt(f"sample {place}", _QUESTIONS[place], images), told.get(len(sizes), f"images of {' and '.join(sizes)} pixels")
    )


def questions(family: Family, seed: int = 100) -> list[Prompt]:
    """Return questions, each about a picture of its own; the last two about two of different sizes where the family takes two.

    Another `seed` gives the same questions about other pictures of the same sizes: what changes then is what is in them alone.
    """
    drawn = [draw(seed + place, *size) for place, size in enumerate(_SIZES)]
    double = 0 if family.single_image else 2
    shown = [(drawn[place], *([drawn[0]] if place >= len(drawn) - double else [])) for place in range(len(drawn))]
    return [Prompt(f"question {place}", text, shown[place]) for place, text in enumerate(_QUESTIONS)]


def without_images(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return each prompt without its images."""
    return [Prompt(prompt.id, prompt.text) for prompt in prompts]


def pictures() -> list[ImageInput]:
    """Return pictures of odd sizes."""
    return [
        ImageInput(f"an image of {width}×{height} pixels", draw(200 + place, width, height))
        for place, (width, height) in enumerate(_SIZES)
    ]


def captions() -> list[str]:
    """Return texts of different lengths that a picture may show."""
    return [*(f"a {colour} shape" for colour in _COLOURS), "a picture", "a drawing of several shapes of many colours and sizes"]
