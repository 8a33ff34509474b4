"""Images of a question's row: encoded bytes, a data URI or bare base64, or a path that stays below a folder."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from compress.errors import DataError
from compress.limits import limits
from compress.pictures import check_image
from compress.untrusted import inside, printable, read_bytes

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}+=*+\s*+")
"""Letters of base64, more than a path is likely to have; possessive, so that no text is gone over twice."""

_BEGINS = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL)
"""How images of the formats that are decoded begin: it tells bare base64 from a path, which may begin with a slash as JPEGs do."""

_SHOWN = 80
"""How many characters of a path or address a message shows."""


@dataclass(frozen=True)
class ImagePlaces:
    """Where paths may lead: below the folder that the recipe names, or else below the file's own; nowhere without either."""

    beside: Path | None
    folder: Path | None = None

    def find(self, text: str, name: str) -> Path:
        """Return the file that a path names: relative to the recipe's folder, or to the file's where there is none such.

        Raises:
            DataError: there is no such file, or it leads out of the folder; says which key of the recipe allows it.
        """
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            raise DataError(f"{name}: is an address, and nothing is fetched from there; store the image, and write its path")
        if self.beside is None:
            raise DataError(f"{name}: holds no image's bytes; store the image in the file, or use JSONL with paths")
        allowed = self.folder or self.beside
        tried = [base / text for base in dict.fromkeys((allowed, self.beside))]
        try:
            path = next((path for path in tried if path.exists()), tried[0])
            real = inside(allowed, path, DataError)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no path"
            raise DataError(f"{name}: cannot be read ({reason}); correct the path or remove the row") from error
        except DataError as error:
            raise DataError(
                f"{name}: leads out of {printable(str(allowed))}; put the image there, or set image_folder in the recipe to a "
                "folder that holds all of them"
            ) from error
        if not path.is_file():
            raise DataError(f"{name}: no such file as {printable(str(path))}; correct the path or remove the row")
        _check_size(real.stat().st_size, name)
        return real


def read_images(found: Sequence[object], places: ImagePlaces, place: str) -> tuple[bytes, ...]:
    """Return the encoded images of a row's values; a value that holds nothing is passed over.

    Raises:
        DataError: one cannot be found or read, is none, or exceeds a limit; names it.
    """
    images = list[bytes]()
    for value in found:
        if isinstance(value, str) and not value.strip():
            continue
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            value = fields.get("bytes") if fields.get("bytes") is not None else fields.get("path")
            if value is None:
                continue
        if len(images) == limits().question_images:
            raise DataError(f"{place}: has more than {len(images)} images ({limits().set_by('question_images')}); remove the row")
        name = image_name(value, len(images), place)
        data = _encoded(value, name)
        if data is None and isinstance(value, str):
            data = read_bytes(places.find(value, name), limits().image_bytes, DataError, name="image_bytes")
        if data is None:
            raise DataError(f"{name}: holds no image's bytes; store the image in the file, or use JSONL with paths")
        check_image(data, name)
        images.append(data)
    return tuple(images)


def image_name(value: object, number: int, place: str) -> str:
    """Return how messages name an image: by its path where it has one, else by its number within the row."""
    if not isinstance(value, str) or is_encoded(value):
        return f"{place}: image {number}"
    return f"{place}: image {printable(value if len(value) <= _SHOWN else f'{value[:_SHOWN]}…')}"


def is_encoded(text: str) -> bool:
    """Return whether a text is an image itself, not a path to one."""
    if text[:5].lower() == "data:":
        return True
    return _BASE64.fullmatch(text) is not None and _BEGINS.match(base64.b64decode("".join(text[:40].split())[:16])) is not None


def _encoded(value: object, name: str) -> bytes | None:
    """Return the bytes that a value is or writes out, None where it is neither bytes nor such a text."""
    if isinstance(value, bytes):
        _check_size(len(value), name)
        return value
    if not isinstance(value, str) or not is_encoded(value):
        return None
    head, comma, data = value.partition(",") if value[:5].lower() == "data:" else ("", "", value)
    _check_size(len(data) * 3 // 4, name)
    if comma and not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    data = "".join(data.split()).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: is no base64 ({error}); encode the image again") from error


def _check_size(size: int, name: str) -> None:
    if size > limits().image_bytes:
        raise DataError(f"{name}: has {size:,} bytes ({limits().set_by('image_bytes')}); use a smaller image, or remove the row")
