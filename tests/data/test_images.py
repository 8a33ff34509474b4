"""What is seen of a picture: upright, on white, and nothing that would take minutes or gigabytes."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from compress.data.images import check_image, decode_image, image_size, media_type
from compress.data.tiff_tags import numeric_bytes
from compress.errors import DataError
from compress.progress import Silent
from compress.untrusted.limits import PREFIX
from compress.workers.environment import install
from tests.fuzz.harness import MOST_BYTES, MOST_SECONDS, Harness, make_decoys
from tests.pictures import encoded, hostile, large, matrix, png, tiff

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Return 4 × 2 pixels, red at the left and blue at the right."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(BLUE, (2, 0, 4, 2))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(kind: str) -> None:
    """Orientation 6: what is stored at the left is shown at the top, 3: at the right."""
    settings = {"lossless": True} if kind == "WEBP" else {}
    turned = decode_image(encoded(halves(), kind, 6, **settings), "a")
    assert (turned.size, turned.getpixel((0, 0)), turned.getpixel((1, 3))) == ((2, 4), RED, BLUE)
    upside = decode_image(encoded(halves(), kind, 3, **settings), "a")
    assert (upside.size, upside.getpixel((0, 0)), upside.getpixel((3, 1))) == ((4, 2), BLUE, RED)


def test_what_is_transparent_is_white() -> None:
    clear = halves("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    palette = halves("P")
    grey = Image.new("L", (4, 2), 9)
    red, nine = cast("int", palette.getpixel((0, 0))), 9
    for data in (
        encoded(clear),
        encoded(clear.convert("LA")),
        encoded(palette, transparency=red),
        encoded(palette, "GIF", transparency=red),
        encoded(grey, transparency=nine),
        encoded(clear, "WEBP", lossless=True),
    ):
        assert decode_image(data, "a").getpixel((0, 0)) == WHITE
    assert decode_image(encoded(halves(), transparency=RED), "a").getpixel((0, 0)) == RED  # so does vLLM


def test_a_media_type_is_by_content() -> None:
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    assert [media_type(encoded(halves(), kind)) for kind in kinds] == [f"image/{kind.lower()}" for kind in kinds]
    assert media_type(b"<svg/>") == "application/octet-stream"


def test_a_phone_s_several_pictures_are_the_first() -> None:
    data = encoded(halves(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert image_size(data, "a") == (4, 2)
    assert decode_image(data, "a").size == (4, 2)


def test_numbers_of_tags_are_counted_without_reading_them() -> None:
    strips = tiff({273: (4, 1000, 200)}, b"")
    assert numeric_bytes(strips) == 1000 * 4 + 4 * 4 + 4 * 2  # the strips' places; four other numbers of 32 bits and four of 16
    assert numeric_bytes(b"before" + strips, 6) == numeric_bytes(strips)
    nested = b"MM\0*\0\0\0\x08" + struct.pack(">HHHII4x", 1, 0x8769, 4, 1, 26) + struct.pack(">HHHII4x", 1, 0x9000, 5, 77, 0)
    assert numeric_bytes(nested) == 4 + 8 * 77
    short = nested.replace(struct.pack(">HII", 4, 1, 26), struct.pack(">HIHH", 3, 1, 26, 0xFFFF))
    assert numeric_bytes(short) == 2 + 8 * 77
    assert (
        numeric_bytes(nested.replace(struct.pack(">HII", 4, 1, 26), struct.pack(">HII", 5, 1, 26))) == 8
    )  # a fraction is no offset
    big = b"MM\0+\0\x08\0\0" + struct.pack(">QQHHQQ8x", 16, 1, 273, 16, 500, 0)
    assert numeric_bytes(big) == 8 * 500
    circle = b"MM\0*\0\0\0\x08" + struct.pack(">HHHII4x", 1, 0x8769, 4, 1, 8)
    assert numeric_bytes(circle) == 3 * 4
    assert [numeric_bytes(data) for data in (b"", b"II", b"II*\0\xff\0\0\0", b"MM\0*\0\0\0\x08\xff\xff")] == [0] * 4


def test_a_limit_is_met_from_the_header_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(100, 100)
    for check in (check_image, decode_image, image_size):
        check(data, "a")
    monkeypatch.setenv(f"{PREFIX}IMAGE_PIXELS", "9999")
    for check in (check_image, decode_image, image_size):
        with pytest.raises(
            DataError, match=r"^a: cannot be read as an image \(it has 100 × 100 pixels; limit image_pixels = 9,999, set by COMP"
        ):
            check(data, "a")


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Generator[Harness]:
    folder = tmp_path_factory.mktemp("decoys")
    home = {"HF_HOME": str(tmp_path_factory.getbasetemp())}  # a token kept there is looked for, to be taken out of messages
    with Harness(["tests.pictures"], make_decoys(folder / "decoys"), home) as opened:
        yield opened


def test_hostile_pictures_are_refused_in_seconds(harness: Harness, tmp_path: Path) -> None:
    """Each by one line that says what it is, before it takes more than 5 seconds or 1 GB."""
    assert len(hostile()) >= 5
    for name, (data, words) in hostile().items():
        path = tmp_path / "picture"
        path.write_bytes(data)
        outcome = harness.call("tests.pictures:see", str(path))
        assert outcome.faults([2], [tmp_path, tmp_path.parent]) == [], name
        assert outcome.stdout.startswith("the picture: cannot be read as an image ("), name
        assert words in outcome.stdout, (name, outcome.stdout)
        assert outcome.stdout.count("\n") == 1, name


def test_large_pictures_are_seen_in_seconds(harness: Harness, tmp_path: Path) -> None:
    assert len(large()) >= 2
    for name, data in large().items():
        path = tmp_path / "picture"
        path.write_bytes(data)
        outcome = harness.call("tests.pictures:see", str(path))
        assert (outcome.code, outcome.stdout) == (0, ""), (name, outcome)
        assert outcome.seconds < MOST_SECONDS, name
        assert outcome.grown < MOST_BYTES, name


PRELOADED = ("vllm",)

VLLM = """
import sys
from pathlib import Path
import numpy as np
from vllm.multimodal.media.image import ImageMediaIO
folder = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    image = ImageMediaIO().load_bytes((folder / str(number)).read_bytes()).media
    np.save(folder / f"{number}.npy", np.asarray(image))
"""


@pytest.mark.slow
def test_every_picture_is_what_vllm_makes_of_it(tmp_path: Path) -> None:
    """Of every mode, format and orientation, pixel by pixel, by the decoder of the installed vLLM in its own environment."""
    install("vllm", Silent())
    pictures = matrix()
    assert len(pictures) > 700
    for number, data in enumerate(pictures.values()):
        (tmp_path / str(number)).write_bytes(data)
    command = [str(install("vllm", Silent()).python), "-c", VLLM, str(tmp_path), str(len(pictures))]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    different = [
        name
        for number, (name, data) in enumerate(pictures.items())
        if not np.array_equal(np.asarray(decode_image(data, name)), np.load(tmp_path / f"{number}.npy"))
    ]
    assert different == []
