"""The one place that says how a prompt becomes a conversation, for calibration and the in-process runtime alike."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from compress.errors import CheckpointError, DataError
from compress.runtimes.runtime import Prompt


def messages(prompt: Prompt, answer: str | None = None) -> list[dict[str, Any]]:
    """Return the conversation as a chat template reads it: one user turn, images first, then the text.

    With `answer`, the assistant's turn follows. An image stands as `{"type": "image"}`; the pictures themselves go to the
    processor in the same order, as `open_images` gives them.
    """
    content = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": prompt.text}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def check_template(processor: Any, folder: Path) -> None:
    """Write a short conversation with the chat template of the checkpoint at `folder`.

    Raises:
        CheckpointError: the template is broken.
    """
    from jinja2 import TemplateError

    turns = messages(Prompt("trial", "What is it?", (b"",)), "red")
    try:
        for shown, begun in ((turns, False), (turns[:1], True)):
            processor.apply_chat_template(shown, tokenize=False, add_generation_prompt=begun)
    except (TemplateError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its chat template cannot be used ({error}); correct it, or fetch it again") from error


def check_reserved(texts: Iterable[str], reserved: Iterable[str], name: str) -> None:
    """Check that a question's texts hold none of the model's special tokens, which would be read as such.

    Raises:
        DataError: one is there; `name` says in which question.
    """
    held = list(texts)
    for token in sorted(reserved):
        if any(token in text for text in held):
            raise DataError(f"{name}: holds {token!r}, a special token of the model; remove the row")


def open_images(prompt: Prompt) -> list[Image.Image]:
    """Decode a prompt's images, in order, each to RGB, as vLLM does: RGBA is laid on white, EXIF rotation is not applied.

    Raises:
        DataError: an image cannot be decoded; names the prompt and which of its images.
    """
    return [decode_image(image, f"{prompt.id}: image {place}") for place, image in enumerate(prompt.images)]


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode one encoded image to RGB.

    Raises:
        DataError: the bytes are no whole image; `name` says which.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "RGBA":
                ground = Image.new("RGB", image.size, "white")
                ground.paste(image, mask=image.getchannel("A"))
                return ground
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name}: cannot be read as an image ({image_fault(error)}); replace the file or leave the sample out"
        ) from error


def image_fault(error: Exception) -> str:
    """Return what a failure to read an image says, without the object in memory that Pillow names in place of a file."""
    return "its format is not known" if isinstance(error, UnidentifiedImageError) else str(error)
