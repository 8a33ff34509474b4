"""Images of a question: encoded bytes, a data URI or bare base64, or a path inside an allowed folder."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from compress.data.images import check_image
from compress.errors import DataError
from compress.untrusted.limits import limits
from compress.untrusted.reading import inside, printable, read_bytes

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}+=*+\s*+")
"""Base64 of a length that is unlikely for a path; possessive, so that matching takes linear time."""

_SIGNATURES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL)
"""The first bytes of supported image formats: they tell bare base64 from a path (a JPEG in base64 begins with a slash)."""

_MAX_NAME = 80
"""Characters of a path or address in a message."""


@dataclass(frozen=True)
class ImageFolders:
    """The folders that paths of images may point into."""

    beside: Path | None
    """The question file's own folder; None for formats that must contain their images."""

    folder: Path | None = None
    """The recipe's `image_folder`, instead of the file's own."""

    def resolve(self, text: str, name: str) -> Path:
        """Return the file of a path, relative to the recipe's folder, or to the question file's if it does not exist there.

        Raises:
            DataError: there is no such file, or it is outside of the folder; the message names the recipe's key that allows it.
        """
        # an untrusted file must not make this machine fetch addresses (internal ones included)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            raise DataError(f"{name}: is an address, and nothing is fetched from there; store the image, and write its path")
        if self.beside is None:
            raise DataError(f"{name}: holds no image's bytes; store the image in the file, or use JSONL with paths")
        allowed = self.folder or self.beside
        candidates = [base / text for base in dict.fromkeys((allowed, self.beside))]
        try:
            path = next((path for path in candidates if path.exists()), candidates[0])
            # after links are resolved: "../" and links would otherwise read any file, and its content reach a model or a report
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


def read_images(values: Sequence[object], folders: ImageFolders, where: str) -> tuple[bytes, ...]:
    """Return the encoded images of a row's values; empty values are skipped.

    Raises:
        DataError: an image is missing, unreadable, invalid, or exceeds a limit; the message names it.
    """
    images = list[bytes]()
    for value in values:
        if isinstance(value, str) and not value.strip():
            continue
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            value = fields.get("bytes") if fields.get("bytes") is not None else fields.get("path")
            if value is None:
                continue
        if len(images) == limits().question_images:
            raise DataError(f"{where}: has more than {len(images)} images ({limits().set_by('question_images')}); remove the row")
        name = image_name(value, len(images), where)
        data = _encoded(value, name)
        if data is None and isinstance(value, str):
            data = read_bytes(folders.resolve(value, name), limits().image_bytes, DataError, name="image_bytes")
        if data is None:
            raise DataError(f"{name}: holds no image's bytes; store the image in the file, or use JSONL with paths")
        # headers only: images are decoded where they are used, one at a time
        check_image(data, name)
        images.append(data)
    return tuple(images)


def image_name(value: object, number: int, where: str) -> str:
    """Return an image's name in messages: its path, or else its number within the row."""
    if not isinstance(value, str) or is_encoded(value):
        return f"{where}: image {number}"
    return f"{where}: image {printable(value if len(value) <= _MAX_NAME else f'{value[:_MAX_NAME]}…')}"


def is_encoded(text: str) -> bool:
    """Return whether a text is an encoded image, not a path."""
    if text[:5].lower() == "data:":
        return True
    # 16 characters are 12 bytes, the longest signature; white space may be anywhere in base64
    return _BASE64.fullmatch(text) is not None and _SIGNATURES.match(base64.b64decode("".join(text[:40].split())[:16])) is not None


def _encoded(value: object, name: str) -> bytes | None:
    """Return a value's encoded image; None where it is neither bytes nor an encoded text."""
    if isinstance(value, bytes):
        _check_size(len(value), name)
        return value
    if not isinstance(value, str) or not is_encoded(value):
        return None
    head, comma, data = value.partition(",") if value[:5].lower() == "data:" else ("", "", value)
    # before decoding, which makes a copy
    _check_size(len(data) * 3 // 4, name)
    if comma and not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    # padding is added anew: many writers leave it out
    data = "".join(data.split()).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: is no base64 ({error}); encode the image again") from error


def _check_size(size: int, name: str) -> None:
    if size > limits().image_bytes:
        raise DataError(f"{name}: has {size:,} bytes ({limits().set_by('image_bytes')}); use a smaller image, or remove the row")
