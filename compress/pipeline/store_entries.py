"""The items of the store: finished outputs with the size and digest of every file, unfinished ones, and unreadable entries."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from compress.checkpoints.artifact import file_digest
from compress.errors import StoreError
from compress.recipe.schema import Frozen
from compress.untrusted.reading import read_object

ENTRY = "entry.json"
STARTED = "started.json"
"""The record of an unfinished output, which names its step."""

Kind = Literal["output", "unfinished", "unreadable"]


@dataclass(frozen=True)
class StoredFile:
    """One file of an entry; `changed` is its modification time in nanoseconds when the entry was written."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    changed: int


@dataclass(frozen=True)
class Origin:
    """The model and recipe that an output was first computed for; other recipes may share it."""

    model: str = ""
    recipe: str = ""


UNKNOWN_ORIGIN = Origin()
"""The origin of outputs whose record does not name it."""


@dataclass(frozen=True)
class Entry:
    """A step's finished output."""

    key: str
    step: str

    folder: Path
    """The folder of its files."""

    files: Mapping[str, StoredFile]
    """By path relative to `folder`."""

    warnings: tuple[str, ...]
    """Warnings of the step, repeated by every run that uses the output."""

    made: float
    """When it was written, in seconds since the epoch."""

    used: float
    """When it was last used, in seconds since the epoch."""

    origin: Origin = UNKNOWN_ORIGIN

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class StoreItem:
    """An item of the store and its size on disk."""

    key: str

    kind: Kind
    """A finished output, the unfinished output of a running or interrupted step, or an entry without a readable record."""

    step: str
    origin: Origin
    folder: Path
    bytes: int
    used: float


def _check_relative(name: str) -> str:
    """Check that a file's path stays inside its entry's folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is no file of an entry")
    return name


class UnfinishedEntry(Frozen):
    """The content of `started.json`."""

    step: str
    model: str = ""
    recipe: str = ""


class _EntryRecord(Frozen):
    """The content of `entry.json`; old entries have no model and recipe."""

    key: str
    step: str
    made: float
    warnings: tuple[str, ...]
    files: Annotated[Mapping[Annotated[str, AfterValidator(_check_relative)], StoredFile], Field(min_length=1)]
    model: str = ""
    recipe: str = ""


def record_of(entry: Entry) -> dict[str, object]:
    """Return the content of an entry's `entry.json`."""
    return {
        "key": entry.key,
        "step": entry.step,
        "made": entry.made,
        "warnings": list(entry.warnings),
        "files": {name: asdict(file) for name, file in entry.files.items()},
        **asdict(entry.origin),
    }


def read_entry(folder: Path) -> Entry | None:
    """Return the entry in a folder; None where its record is missing, damaged, not of this package, or of another key."""
    path = folder / ENTRY
    try:
        record = _EntryRecord.model_validate(read_object(path, StoreError))
        used = path.stat().st_mtime
    except (OSError, StoreError, ValidationError):
        return None
    # A folder that was copied or renamed by hand is another key's output.
    if record.key != folder.name:
        return None
    origin = Origin(record.model, record.recipe)
    return Entry(record.key, record.step, folder / "data", record.files, record.warnings, record.made, used, origin)


def files_of(data: Path) -> dict[str, StoredFile]:
    """Sync every file below a folder to the disk, and return its size, digest and modification time."""
    return {name: _synced(data / name) for name in sorted(_names(data))}


def _synced(path: Path) -> StoredFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # after a power failure no entry may exist without its data
    status = path.stat()
    return StoredFile(size=status.st_size, sha256=file_digest(path), changed=status.st_mtime_ns)


def _names(data: Path) -> set[str]:
    return {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}


def damage_of(entry: Entry, *, thorough: bool) -> str | None:
    """Return the first fault of an entry's files; without `thorough`, files with unchanged size and time are trusted."""
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
    # Files that were added count as damage: a reader that lists the folder would take them for part of the output.
    unexpected = sorted(_names(entry.folder) - set(entry.files))
    return f"{entry.folder / unexpected[0]} is no part of it" if unexpected else None


def item_of(entry: Entry) -> StoreItem:
    """Return the item of a finished output."""
    return StoreItem(entry.key, "output", entry.step, entry.origin, entry.folder, entry.bytes, entry.used)


def unreadable_at(folder: Path) -> StoreItem:
    """Return the item of an entry without a readable record."""
    return StoreItem(folder.name, "unreadable", "", UNKNOWN_ORIGIN, folder, _size(folder), _used(folder))


def unfinished_at(folder: Path) -> StoreItem:
    """Return the item of an unfinished output."""
    try:
        started = UnfinishedEntry.model_validate(read_object(folder / STARTED, StoreError))
    except (OSError, StoreError, ValidationError):  # killed before the record was written
        started = UnfinishedEntry(step="")
    origin = Origin(started.model, started.recipe)
    return StoreItem(folder.name, "unfinished", started.step, origin, folder, _size(folder), _used(folder))


def _size(folder: Path) -> int:
    return sum(status.st_size for status in _statuses(folder) if stat.S_ISREG(status.st_mode))


def _used(folder: Path) -> float:
    return max((status.st_mtime for status in _statuses(folder)), default=0.0)


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    """Yield the status of a folder and everything in it, except what another process removes meanwhile."""
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            yield path.lstat()
