from __future__ import annotations

import io

import pytest
from PIL import Image

from compress.data.images import decode_image
from compress.data.prompts import Prompt, messages, open_images
from compress.errors import DataError
from tests.tiny import picture


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_images_come_first_and_the_answer_last() -> None:
    prompt = Prompt("a", "What is it?", (b"1", b"2"))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]}
    assert messages(prompt) == [user]
    assert messages(prompt, "red") == [user, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]


@pytest.mark.parametrize(
    ("mode", "color", "expected"), [("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("L", 7, (7, 7, 7)), ("1", 1, (255,) * 3)]
)
def test_every_mode_becomes_rgb(mode: str, color: tuple[int, ...] | int, expected: tuple[int, ...]) -> None:
    found = decode_image(encoded(Image.new(mode, (4, 3), color)), "a")
    assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (4, 3), expected)


def test_a_damaged_image_is_named() -> None:
    whole = picture(0)
    assert len(open_images(Prompt("a", "?", (whole, whole)))) == 2
    with pytest.raises(DataError, match=r"a: image 1: cannot be read as an image \(.*\); replace the file or leave the sample out"):
        open_images(Prompt("a", "?", (whole, whole[: len(whole) // 2])))
    with pytest.raises(DataError, match=r"a: image 0: cannot be read as an image \(it is none of PNG, .*\); convert the file"):
        open_images(Prompt("a", "?", (b"no image",)))
