"""What the store holds: finished outputs with every file's size and digest, read without trust, and what of others is left."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from compress.artifact import file_digest
from compress.errors import StoreError
from compress.schema import Frozen
from compress.untrusted import read_object

ENTRY = "entry.json"
STARTED = "started.json"
"""What stands beside an output that is being written, until it is whole: of which step it is."""

Kind = Literal["output", "unfinished", "unreadable"]


@dataclass(frozen=True)
class StoredFile:
    """One file of an entry; `changed` is its modification time in nanoseconds when the entry was made."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    changed: int


@dataclass(frozen=True)
class Origin:
    """The model and the recipe that an output was first made for; others that need the same find it too."""

    model: str = ""
    recipe: str = ""


UNKNOWN_ORIGIN = Origin()
"""The origin of what does not say."""


@dataclass(frozen=True)
class Entry:
    """A step's finished output: its files lie in `folder`; `made` and `used` are seconds since the epoch.

    `warnings` are what making it had to say, to be said again when it is found.
    """

    key: str
    step: str
    folder: Path
    files: Mapping[str, StoredFile]
    warnings: tuple[str, ...]
    made: float
    used: float
    origin: Origin = UNKNOWN_ORIGIN

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class StoreItem:
    """Something that takes room in the store.

    `kind` says what it is: a finished output; what an interrupted step keeps, to go on from; or an entry without a readable record.
    """

    key: str
    kind: Kind
    step: str
    origin: Origin
    folder: Path
    bytes: int
    used: float


def _within(name: str) -> str:
    """Check that a file's name leads nowhere else than below its entry's folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is no file of an entry")
    return name


class UnfinishedEntry(Frozen):
    """The content of `started.json`: what is being written beside it."""

    step: str
    model: str = ""
    recipe: str = ""


class _EntryRecord(Frozen):
    """The content of `entry.json`; entries of before models and recipes were noted hold none."""

    key: str
    step: str
    made: float
    warnings: tuple[str, ...]
    files: Annotated[Mapping[Annotated[str, AfterValidator(_within)], StoredFile], Field(min_length=1)]
    model: str = ""
    recipe: str = ""


def record_of(entry: Entry) -> dict[str, object]:
    """Return what `entry.json` holds of an entry."""
    return {
        "key": entry.key,
        "step": entry.step,
        "made": entry.made,
        "warnings": list(entry.warnings),
        "files": {name: asdict(file) for name, file in entry.files.items()},
        **asdict(entry.origin),
    }


def read_entry(folder: Path) -> Entry | None:
    """Return the entry that lies in a folder under its key; None where its record is missing, damaged, or not of this package."""
    path = folder / ENTRY
    try:
        record = _EntryRecord.model_validate(read_object(path, StoreError))
        used = path.stat().st_mtime
    except (OSError, StoreError, ValidationError):
        return None
    if record.key != folder.name:
        return None
    origin = Origin(record.model, record.recipe)
    return Entry(record.key, record.step, folder / "data", record.files, record.warnings, record.made, used, origin)


def files_of(data: Path) -> dict[str, StoredFile]:
    """Bring every file below a folder to the disk, and return its size, digest and time."""
    return {name: _synced(data / name) for name in sorted(_names(data))}


def _synced(path: Path) -> StoredFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # the entry must not outlive its data when the power fails
    status = path.stat()
    return StoredFile(size=status.st_size, sha256=file_digest(path), changed=status.st_mtime_ns)


def _names(data: Path) -> set[str]:
    return {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}


def damage_of(entry: Entry, *, thorough: bool) -> str | None:
    """Return what is wrong with an entry's files; without `thorough`, a file of unchanged size and time is trusted."""
    for name, stored in entry.files.items():
        path = entry.folder / name
        try:
            status = path.stat()
            if status.st_size != stored.size:
                return f"{path} has {status.st_size} bytes, not {stored.size}"
            if (thorough or status.st_mtime_ns != stored.changed) and file_digest(path) != stored.sha256:
                return f"{path} was changed: its digest is not the recorded one"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    unknown = sorted(_names(entry.folder) - set(entry.files))
    return f"{entry.folder / unknown[0]} is no part of it" if unknown else None


def item_of(entry: Entry) -> StoreItem:
    """Return what a finished output takes."""
    return StoreItem(entry.key, "output", entry.step, entry.origin, entry.folder, entry.bytes, entry.used)


def unreadable_at(folder: Path) -> StoreItem:
    """Return what an entry without a readable record takes."""
    return StoreItem(folder.name, "unreadable", "", UNKNOWN_ORIGIN, folder, _size(folder), _used(folder))


def unfinished_at(folder: Path) -> StoreItem:
    """Return what the step whose output is being written to a folder, or was when it was interrupted, keeps there."""
    try:
        started = UnfinishedEntry.model_validate(read_object(folder / STARTED, StoreError))
    except (OSError, StoreError, ValidationError):  # it was killed before it could say; its size counts all the same
        started = UnfinishedEntry(step="")
    origin = Origin(started.model, started.recipe)
    return StoreItem(folder.name, "unfinished", started.step, origin, folder, _size(folder), _used(folder))


def _size(folder: Path) -> int:
    return sum(status.st_size for status in _statuses(folder) if stat.S_ISREG(status.st_mode))


def _used(folder: Path) -> float:
    return max((status.st_mtime for status in _statuses(folder)), default=0.0)


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    """Yield what the system says of a folder and all below it, but for what goes meanwhile: another process may be writing."""
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            yield path.lstat()
