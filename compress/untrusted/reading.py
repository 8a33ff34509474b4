"""The guard that everything from outside passes: files of a folder, JSON, text for a terminal, and what libraries make of them.

Every failure is one clear error. YAML is read by `compress/untrusted/yaml.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from compress.errors import CheckpointError, CompressError
from compress.untrusted.limits import limits

_FLOAT_BITS = 1024
"""How many bits a whole number has that the largest float holds. Python writes none of more than 4,300 digits."""
_AGAIN = "fetch the file again"
# A library's message may quote a file of megabytes; its first line says what is wrong.
_MOST_SAID = 300
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks that turn the direction of writing, line separators, lone surrogates."""
_SURROGATE = re.compile("[\ud800-\udfff]")
# JSON may write a surrogate or a NUL as an escape, which no look at the raw text would find.
_ESCAPED = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_LONG = 300
# Shorter integers are within any float: texts without such a run need no reader of their own for integers.
_DIGITS = re.compile("[0-9]{300}")
# 1e999 parses to infinity.
_HUGE = re.compile(r"[eE]\+?[0-9]{3}")


def printable(text: str) -> str:
    """Return foreign text as it may be shown: what would steer a terminal or cannot be encoded is written as an escape."""
    # A terminal obeys escape sequences in whatever is printed: a file's name could rewrite lines above it, or hide what it is.
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def inside(folder: Path, path: Path, error: type[CompressError] = CheckpointError) -> Path:
    """Return the path with its links resolved, after checking that it lies in the folder, or in the hub cache's `blobs` beside it.

    A snapshot of the hub's cache is a folder of links to `blobs`: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    Earlier versions of its client filled folders elsewhere with links to them too.

    Raises:
        CompressError: of the type given: it leads out of the folder, or round in a circle.
    """
    try:
        # Links are resolved before they are compared: "folder/../../etc" and a link to /etc begin with the folder's own name.
        real, base = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as fault:
        raise error(f"{printable(str(path))}: leads nowhere ({printable(str(fault))}); do not use this folder") from fault
    blobs = [parent.parent.parent / "blobs" for parent in (base, *base.parents) if parent.parent.name == "snapshots"]
    # A model's folder could otherwise link to ~/.ssh or to a token's file, which would be read, and published with the artifact.
    if any(real.is_relative_to(place) for place in (base, *blobs)) or _in_hub_cache(real):
        return real
    raise error(f"{printable(str(path))}: leads out of its folder, to {printable(str(real))}; put a copy there if you trust it")


def _in_hub_cache(real: Path) -> bool:
    """Return whether a file is a blob of the hub's cache: models--org--name/blobs/digest."""
    if real.parent.name != "blobs":
        return False
    from huggingface_hub import constants

    return real.parents[2] == Path(constants.HF_HUB_CACHE).resolve()


def check_folder(folder: Path, error: type[CompressError] = CheckpointError) -> None:
    """Check all that a reader may open of a folder: its files and those one level below are files, and lie in it.

    It is for readers that open a folder's files by themselves, as transformers does. Deeper ones are nobody's to read.

    Raises:
        CompressError: of the type given: a link leads out, or a pipe or the like stands in place of a file.
    """
    try:
        for entry in _entries(folder):
            path = Path(entry.path)
            real = inside(folder, path, error) if entry.is_symlink() else path
            if real.exists() and not (real.is_file() or real.is_dir()):
                raise error(f"{printable(str(path))}: is no regular file; put a copy of it there")
    except OSError as fault:
        raise error(f"{printable(str(folder))}: cannot be read ({fault}); name a folder you can read") from fault


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as top:
        for entry in top:
            yield entry
            # A linked folder is judged as a link: following it could lead out, or round in a circle.
            if entry.is_dir(follow_symlinks=False):
                with os.scandir(entry.path) as below:
                    yield from below


@contextmanager
def library_errors(what: str, error: type[CompressError] = CheckpointError, remedy: str = _AGAIN) -> Generator[None]:
    """Turn whatever a library raises on content from outside into one message: `what` (the reason); `remedy`.

    For calls into transformers, tokenizers, safetensors, jinja and the like alone: with a config, a template or a file that a
    stranger wrote they may raise anything.

    Raises:
        CompressError: of the type given, or as it came from within.
    """
    try:
        yield
    # What such libraries raise is listed nowhere, changes from one version to the next, and depends on the content: a list would
    # have holes, and each would be a traceback. PanicException, which libraries in Rust raise, is no subclass of Exception.
    except BaseException as fault:
        is_theirs = isinstance(fault, Exception) or type(fault).__name__ == "PanicException"
        if isinstance(fault, CompressError) or not is_theirs:
            raise
        raise error(f"{printable(what)} ({reason(fault)}); {remedy}") from fault


def reason(fault: BaseException) -> str:
    """Return what an error says as one printable line of at most 300 characters, its type where it says nothing."""
    if isinstance(fault, MemoryError):
        return "it needs more memory than there is"
    said = " ".join(str(fault).partition("\n\n")[0].split())
    short = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]} …"
    return printable(short) if said else type(fault).__name__


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
            # Of the open file: the path may be another file by now.
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise error(f"{printable(str(path))}: is no regular file; put a copy of it there")
            if state.st_size > most:
                raise error(f"{printable(str(path))}: has {state.st_size:,} bytes ({limits().set_by(name)})")
            # One byte more shows that there is more, whatever size the file system gave.
            content = file.read(most + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as fault:
        raise error(f"{printable(str(path))}: cannot be read ({fault}); {_AGAIN}") from fault
    if len(content) > most:  # of a file that says it has none, as those of the system do
        raise error(f"{printable(str(path))}: has more than {most:,} bytes ({limits().set_by(name)})")
    return content


def read_text(
    path: Path, most: int, error: type[CompressError] = CheckpointError, *, name: str = "json_bytes", root: Path | None = None
) -> str:
    """Return a text file's content; raises as `read_bytes` does, and where it is no UTF-8."""
    try:
        return read_bytes(path, most, error, name=name, root=root).decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{printable(str(path))}: cannot be read as text ({fault}); {_AGAIN}") from fault


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
        # Before parsing: Python builds objects of up to a hundred times a text's bytes. Marks within strings are counted too, which
        # errs on the safe side.
        items = content.count(",") + content.count("[") + content.count("{")
        if items > limits().json_items:
            raise error(f"{printable(where)}: has about {items:,} values ({limits().set_by('json_items')})")
        most = limits().integer_digits
        long = most < _LONG or _DIGITS.search(content) is not None  # looking at every integer is slow
        # Python's parser takes NaN and Infinity, which no other JSON reader does and every comparison with fails silently.
        value: object = json.loads(content, parse_int=_integers(most) if long else None, parse_constant=_refuse)
        _check(value, scalars=_suspect(content))
    except json.JSONDecodeError as fault:
        place = f"line {fault.lineno}, column {fault.colno}"
        raise error(f"{printable(where)}: not readable as JSON ({fault.msg} at {place}); {remedy}") from fault
    except RecursionError as fault:
        raise error(f"{printable(where)}: nests too deep ({limits().set_by('json_depth')})") from fault
    except (UnicodeDecodeError, ValueError) as fault:
        raise error(f"{printable(where)}: not readable as JSON ({printable(str(fault))}); {remedy}") from fault
    return value


def _integers(most: int) -> Callable[[str], int]:
    """Return what reads an integer of at most so many digits."""

    def read(digits: str) -> int:
        if len(digits) > most + digits.startswith("-"):
            raise ValueError(f"an integer of {len(digits):,} digits; {limits().set_by('integer_digits')}")
        return int(digits)

    return read


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _suspect(text: str) -> bool:
    """Return whether a JSON text could hold a lone surrogate, a NUL character or an infinity; few do, and looking is slow."""
    return "\0" in text or any(pattern.search(text) for pattern in (_ESCAPED, _SURROGATE, _HUGE))


def check_plain(value: object) -> None:
    """Refuse what a grammar allows and nothing that reads the value could bear: depth, infinities, NaN, NUL, lone surrogates.

    Raises:
        ValueError, RecursionError: it is there.
    """
    _check(value, scalars=True)


def _check(value: object, *, scalars: bool) -> None:
    # Level by level, not recursively: the depth is what is in question.
    level: list[object] = [[value]]
    for _ in range(limits().json_depth + 1):
        parts: list[object] = []
        for item in level:
            if isinstance(item, dict):
                pairs = cast("dict[object, object]", item)
                parts += [*pairs.keys(), *pairs.values()] if scalars else pairs.values()
            else:
                parts += cast("list[object]", item)
        level = [part for part in parts if isinstance(part, dict | list)]
        for part in parts if scalars else ():
            _check_scalar(part)
        if not level:
            return
    raise RecursionError


def _check_scalar(value: object) -> None:
    if isinstance(value, str):
        # The system's calls end a path at NUL, so that a checked name and an opened one would differ.
        if "\0" in value:
            raise ValueError("a text holds a NUL character")
        # Half of a surrogate pair cannot be encoded as UTF-8: it would raise where the text is written, far from its source.
        if _SURROGATE.search(value):
            raise ValueError("a text holds half of a surrogate pair")
    elif isinstance(value, int) and value.bit_length() > _FLOAT_BITS:
        raise ValueError("an integer has more digits than any float")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is infinite, too large for a float, or none")
