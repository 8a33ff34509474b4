"""The guard that everything from outside passes: files of a folder, JSON, text for a terminal; every failure is one clear error."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, cast

from compress.errors import CheckpointError, CompressError
from compress.limits import limits

_AGAIN = "fetch the file again"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks that turn the direction of writing, line separators, lone surrogates."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """Return foreign text as it may be shown: what would steer a terminal or cannot be encoded is written as an escape."""
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def inside(folder: Path, path: Path, error: type[CompressError] = CheckpointError) -> Path:
    """Return the path with its links resolved, after checking that it lies in the folder, or in the hub cache's `blobs` beside it.

    A snapshot of the hub's cache is a folder of links to `blobs`: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.

    Raises:
        CompressError: of the type given: it leads out of the folder, or round in a circle.
    """
    try:
        real, base = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as fault:
        raise error(f"{printable(str(path))}: leads nowhere ({printable(str(fault))}); do not use this folder") from fault
    blobs = [parent.parent.parent / "blobs" for parent in (base, *base.parents) if parent.parent.name == "snapshots"]
    if any(real.is_relative_to(place) for place in (base, *blobs)):
        return real
    raise error(f"{printable(str(path))}: leads out of its folder, to {printable(str(real))}; put a copy there if you trust it")


def read_bytes(
    path: Path, most: int, error: type[CompressError] = CheckpointError, *, name: str = "json_bytes", root: Path | None = None
) -> bytes:
    """Return a regular file's content of at most `most` bytes; `name` is the limit that says so, `root` the folder it must lie in.

    Raises:
        FileNotFoundError: there is none.
        CompressError: of the type given: it leads out of `root`, is no regular file, too large, or cannot be read.
    """
    place = path if root is None else inside(root, path, error)
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not be waited for
        with os.fdopen(descriptor, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise error(f"{printable(str(path))}: is no regular file; put a copy of it there")
            if state.st_size > most:
                raise error(f"{printable(str(path))}: has {state.st_size:,} bytes ({limits().set_by(name)})")
            return file.read(most + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as fault:
        raise error(f"{printable(str(path))}: cannot be read ({fault}); {_AGAIN}") from fault


def read_json(path: Path, error: type[CompressError] = CheckpointError, *, root: Path | None = None, remedy: str = _AGAIN) -> Any:
    """Return a JSON file's value.

    Raises:
        FileNotFoundError: there is none.
        CompressError: of the type given, as `read_bytes` and `parse_json` raise it.
    """
    return parse_json(read_bytes(path, limits().json_bytes, error, root=root), str(path), error, remedy)


def read_object(
    path: Path, error: type[CompressError] = CheckpointError, *, root: Path | None = None, remedy: str = _AGAIN
) -> dict[str, Any]:
    """Return a JSON file's object; raises as `read_json` does, and where it is something else."""
    value: object = read_json(path, error, root=root, remedy=remedy)
    if not isinstance(value, dict):
        raise error(f"{printable(str(path))}: holds no JSON object; {remedy}")
    return cast("dict[str, Any]", value)


def parse_json(text: str | bytes, where: str, error: type[CompressError] = CheckpointError, remedy: str = _AGAIN) -> Any:
    """Return the value that a JSON text gives; `where` is what a message names, `remedy` what it says to do.

    Refused beside what is no JSON: NaN and infinities, integers with more digits than any float, lone surrogates and NUL
    characters, and more depth than the limit.

    Raises:
        CompressError: of the type given.
    """
    try:
        content = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value: object = json.loads(content, parse_int=_integer, parse_constant=_refuse)
        _check(value)
    except json.JSONDecodeError as fault:
        place = f"line {fault.lineno}, column {fault.colno}"
        raise error(f"{printable(where)}: not readable as JSON ({fault.msg} at {place}); {remedy}") from fault
    except RecursionError as fault:
        raise error(f"{printable(where)}: nests too deep ({limits().set_by('json_depth')})") from fault
    except (UnicodeDecodeError, ValueError) as fault:
        raise error(f"{printable(where)}: not readable as JSON ({printable(str(fault))}); {remedy}") from fault
    return value


def _integer(digits: str) -> int:
    if len(digits) > limits().integer_digits + digits.startswith("-"):
        raise ValueError(f"an integer of {len(digits):,} digits; {limits().set_by('integer_digits')}")
    return int(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _check(value: object) -> None:
    """Refuse what JSON's grammar allows and nothing that reads the value could bear.

    Raises:
        ValueError, RecursionError: it is there.
    """
    most = limits().json_depth
    level: list[object] = [value]
    for _ in range(most + 1):
        for item in level:
            _check_scalar(item)
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise RecursionError


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value)
        return [*pairs.keys(), *pairs.values()]
    return cast("list[object]", value) if isinstance(value, list) else []


def _check_scalar(value: object) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a text holds a NUL character")
        if _SURROGATE.search(value):
            raise ValueError("a text holds half of a surrogate pair")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large for a float")
