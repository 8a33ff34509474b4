"""Decoding of images as vLLM decodes them: the first frame, rotated by its EXIF orientation, transparent parts on white."""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from itertools import islice

from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from compress.data.tiff_tags import numeric_bytes
from compress.errors import DataError
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The formats that are decoded, as Pillow names them.

Pillow knows some forty more. Some start another program on what they are given (EPS runs Ghostscript), the others are rare, and
servers differ in which of them they take.
"""

_TIFF = rb"II[*+]\0|MM\0[*+]"
_EXIF = b"Exif\0\0"
_STARTS = {
    "png": rb"\x89PNG",
    "jpeg": rb"\xff\xd8\xff",
    "webp": rb"(?s)RIFF....WEBP",
    "gif": rb"GIF8",
    "bmp": rb"BM",
    "tiff": _TIFF,
    "avif": rb"(?s)....ftyp(avif|avis|mif1|msf1)",
}
"""How a file of each format begins, by the second half of its media type."""

_MPO = "MPO"
"""Pillow's name for a JPEG followed by further images, as phones write them; the first is read like any other JPEG."""

_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError),
    *(ValueError, struct.error),
    MemoryError,  # of a buffer as large as a header claims
)
"""Exceptions that Pillow and its libraries raise on damaged images."""

_QUIET = threading.Lock()
"""Held while Pillow's warnings are off, which is a setting of the whole process."""

_SCAN = b"\xff\xda"
"""The marker that begins a scan of a JPEG; it cannot occur in entropy-coded data."""


class _Counted(io.BytesIO):
    """An image's bytes, readable in a limited number of parts.

    Pillow reads headers in Python, one chunk, segment or block after the other: millions of empty ones would take minutes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = limits().image_parts

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise OSError(f"it is in too many parts; {limits().set_by('image_parts')}")
        return super().read(size)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Return an encoded image as RGB: its first frame, rotated by its EXIF orientation, transparent parts on white.

    This is pixel for pixel what vLLM makes of the same bytes (`vllm/multimodal/media/image.py`), so what it does not do is not
    done here either: an RGB image with one transparent colour keeps that colour.

    Raises:
        DataError: it is no whole image in one of the `FORMATS`, or exceeds a limit; `name` says which it is.
    """
    with _telling(name, data):
        with _opened(data) as image:
            upright: Image.Image = image
            with suppress(*_FAULTS):  # vLLM ignores damaged EXIF data, and leaves the image unrotated
                image.load()
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # a copy of what stands upright is spared
                    upright = ImageOps.exif_transpose(image)
            upright.load()  # what could not be read is raised here
        del image  # with its decoder, which holds further copies
        return _on_white(upright)


def check_image(data: bytes, name: str) -> None:
    """Check what can be known of an encoded image without decoding it: its format, its size, a PNG's checksums.

    Raises:
        DataError: as `decode_image` does.
    """
    with _telling(name, data), _opened(data) as image:
        image.verify()


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return an encoded image's width and height in pixels as they are stored, not turned, without decoding it.

    Raises:
        DataError: as `decode_image` does.
    """
    with _telling(name, data), _opened(data) as image:
        return image.size


def media_type(data: bytes) -> str:
    """Return an encoded image's media type by how it begins; of what is in none of the `FORMATS`, that of bytes."""
    return next((f"image/{kind}" for kind, start in _STARTS.items() if re.match(start, data)), "application/octet-stream")


@contextmanager
def _telling(name: str, data: bytes) -> Generator[None]:
    """Translate Pillow's errors into one that names the image."""
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damage that is ignored, or sizes that are refused here
            yield
    except UnidentifiedImageError as error:
        why = f"is none of {', '.join(FORMATS)}); convert the file" if data else "has no bytes); fetch the file again"
        raise DataError(f"{name}: cannot be read as an image (it {why}, or leave the sample out") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: cannot be read as an image (it has too many pixels; {limits().set_by('image_pixels')})"
        ) from error
    except _FAULTS as error:
        words = printable(str(error)) or type(error).__name__
        raise DataError(f"{name}: cannot be read as an image ({words}); replace the file or leave the sample out") from error


@contextmanager
def _opened(data: bytes) -> Generator[Image.Image]:
    """Open an image after checking its header; nothing is decoded yet.

    Raises:
        ValueError: it exceeds a limit.
    """
    most = limits()
    if len(data) > most.image_bytes:
        raise ValueError(f"it has {len(data):,} bytes; {most.set_by('image_bytes')}")
    # before Pillow opens it, as opening already reads every tag into Python objects
    _check_tags(data)
    with Image.open(_Counted(data), formats=FORMATS) as image:
        pixels, size = image.width * image.height, f"{image.width:,} × {image.height:,} pixels"
        if pixels > most.image_pixels:
            raise ValueError(f"it has {size}; {most.set_by('image_pixels')}")
        # each scan of a progressive JPEG is decoded over the whole image: a small file may hold thousands
        scans = data.count(_SCAN) if image.format in ("JPEG", _MPO) else 0
        if pixels * scans > most.jpeg_scan_pixels:
            raise ValueError(f"it has {size} in {scans:,} scans; {most.set_by('jpeg_scan_pixels')}")
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiles(image)
        _check_numbers(image.info.get("exif", b""))
        yield image


def _check_tags(data: bytes) -> None:
    """Check the tags that Pillow reads when it opens a file: a TIFF's, and the EXIF data of a JPEG and an AVIF.

    Raises:
        ValueError: they exceed a limit.
    """
    most, kind = limits(), media_type(data)
    if kind == "image/tiff":
        _check_numbers(data)
    if kind not in ("image/jpeg", "image/avif"):
        return
    begins = [
        found.start() for found in islice(re.finditer(_EXIF if kind == "image/jpeg" else _TIFF, data), most.exif_segments + 1)
    ]
    if len(begins) > most.exif_segments:
        raise ValueError(f"it has too many segments of EXIF data; {most.set_by('exif_segments')}")
    for begin in begins if kind == "image/avif" else ():
        _check_numbers(data, begin)


def _check_tiles(image: TiffImagePlugin.TiffImageFile) -> None:
    """Check the size of a TIFF's tiles, which are decoded whole however small the image is.

    Raises:
        ValueError: it exceeds a limit.
    """
    width, height = (image.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    if not isinstance(width, int) or not isinstance(height, int) or width * height > limits().image_pixels:
        raise ValueError(f"its tiles have {width} × {height} pixels; {limits().set_by('image_pixels')}")


def _check_numbers(data: bytes, start: int = 0) -> None:
    if data.startswith(_EXIF):
        start = len(_EXIF)
    if (found := numeric_bytes(data, start)) > limits().image_tag_bytes:
        raise ValueError(f"the numbers of its tags have {found:,} bytes; {limits().set_by('image_tag_bytes')}")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    # palettes and greys with one transparent colour get an alpha channel by conversion
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=image.getchannel("A"))
    return ground
