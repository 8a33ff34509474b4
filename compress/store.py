"""The content-addressed cache of step outputs, shared by all runs and safe against crashes and each other.

store/
  entries/<key>/entry.json     what the step was, every file's size and SHA-256
  entries/<key>/data/          what it wrote
  aside/<key>/                 an output that is being written; renamed to entries/<key> when whole
  aside/<key>.<random>/        an entry that was replaced or pruned, on its way out
  locks/<key>.lock             held by the process that writes the entry
  active/<random>.json         the keys a living run depends on, beside a lock that the run holds
  fingerprints.json            digests of files outside the store, by path, size and time of change
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from compress.artifact import file_digest
from compress.errors import MissingError, StoreError
from compress.files import telling_where, write_json

_ENTRY = "entry.json"
_DAMAGED = "damaged.json"
_WORTH_REMEMBERING = 1_000_000


@dataclass(frozen=True)
class StoredFile:
    """One file of an entry; `changed` is its modification time in nanoseconds when the entry was made."""

    size: int
    sha256: str
    changed: int


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

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(file.size for file in self.files.values())


def default_store() -> Path:
    """Return `$COMPRESS_STORE`, or the user's cache folder."""
    if os.environ.get("COMPRESS_STORE"):
        return Path(os.environ["COMPRESS_STORE"])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vlm-compress" / "store"


class Store:
    """The cache at one folder, which is made when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self._entries = self.folder / "entries"
        self._aside = self.folder / "aside"
        self._locks = self.folder / "locks"
        self._active = self.folder / "active"

    def prepare(self) -> None:
        """Make the store's folders.

        Raises:
            StoreError: they cannot be made.
        """
        with telling_where(self.folder, making=True):
            for folder in (self._entries, self._aside, self._locks, self._active):
                folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: str, warn: Callable[[str], None]) -> Entry | None:
        """Return a key's entry if it is there and whole; a damaged one is a miss, with a warning."""
        entry = self._read(key)
        if entry is None:
            if (self._entries / key).exists():
                warn(f"{self._entries / key}: has no readable {_ENTRY}; the step is made again")
            return None
        damage = _damage(entry, thorough=False)
        if damage:
            warn(f"{entry.step}: {damage}; the step is made again")
            return None
        with contextlib.suppress(OSError):  # a store that can only be read still serves
            os.utime(entry.folder.parent / _ENTRY)
        return entry

    @contextmanager
    def lock(self, key: str, wait: Callable[[], None]) -> Generator[None]:
        """Hold the right to write a key's entry; `wait` is called once if another process has it."""
        self.prepare()
        lock = FileLock(self._locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            wait()
            lock.acquire()
        try:
            for left in self._aside.glob(f"{key}.*"):  # by a process that was killed: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            lock.release()

    @contextmanager
    def write(self, key: str, step: str, *, resume: bool = False, warnings: Sequence[str] = ()) -> Generator[Path]:
        """Give a folder to fill; when the block ends well it becomes the key's entry.

        The caller holds the key's lock. With `resume` the folder holds what a process that was killed or interrupted had
        written of the same step, or one that found the disk full or a device too small; otherwise it is empty. A step that fails
        for any other reason leaves nothing. `warnings` is read when the block ends.

        Raises:
            StoreError: the disk is full or cannot be written.
        """
        aside = self._aside / key
        data = aside / "data"
        kept = False
        try:
            with telling_where(self.folder):
                if not resume:
                    shutil.rmtree(aside, ignore_errors=True)
                data.mkdir(parents=True, exist_ok=True)
                yield data
                files = {path.relative_to(data).as_posix(): _stored(path) for path in sorted(data.rglob("*")) if path.is_file()}
                content = {
                    "key": key,
                    "step": step,
                    "made": time.time(),
                    "warnings": list(warnings),
                    "files": {name: asdict(file) for name, file in files.items()},
                }
                write_json(aside / _ENTRY, content)
                self._put(aside, key)
        except (KeyboardInterrupt, StoreError, MissingError):
            kept = resume
            raise
        finally:
            if not kept:
                shutil.rmtree(aside, ignore_errors=True)

    def _put(self, aside: Path, key: str) -> None:
        place = self._entries / key
        if place.exists():
            old = self._aside / f"{key}.{secrets.token_hex(4)}"
            place.replace(old)
            aside.replace(place)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.replace(place)

    def _read(self, key: str) -> Entry | None:
        path = self._entries / key / _ENTRY
        try:
            content = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
            files = {name: StoredFile(**fields) for name, fields in content["files"].items()}
            warnings = tuple(str(warning) for warning in content["warnings"])
            made, used = float(content["made"]), path.stat().st_mtime
            return Entry(key, str(content["step"]), path.parent / "data", files, warnings, made, used)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def entries(self) -> list[Entry]:
        """Return all readable entries, the one used last first."""
        found = [self._read(path.name) for path in self._entries.glob("*")] if self._entries.is_dir() else []
        return sorted((entry for entry in found if entry), key=lambda entry: entry.used, reverse=True)

    def verify(self) -> dict[str, str]:
        """Read every file of every entry again; return what is wrong, by key.

        A damaged entry is marked, so that the next run makes it again. One that cannot be read, which another version may have
        written, is only told of.
        """
        faults: dict[str, str] = {}
        for path in sorted(self._entries.glob("*")) if self._entries.is_dir() else []:
            entry = self._read(path.name)
            damage = _damage(entry, thorough=True) if entry else f"no readable {_ENTRY}"
            if damage:
                faults[path.name] = damage
            if damage and entry:
                (path / _ENTRY).rename(path / _DAMAGED)
        return faults

    @contextmanager
    def using(self, keys: Iterable[str]) -> Generator[None]:
        """Keep `prune` from removing these keys while the block runs."""
        self.prepare()
        with telling_where(self.folder):
            mark = self._active / f"{secrets.token_hex(8)}.json"
            lock = FileLock(mark.with_suffix(".lock"))
            lock.acquire()
            write_json(mark, sorted(keys))
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)
            lock.release()
            mark.with_suffix(".lock").unlink(missing_ok=True)

    def prune(self, *, unused_for: float, keep_bytes: int | None) -> list[Entry]:
        """Remove entries not used for `unused_for` seconds, and then the longest unused until `keep_bytes` are left.

        What a living run depends on stays. What killed processes left half-written goes too.
        """
        self.prepare()
        kept = self._keys_in_use()
        removed: list[Entry] = []
        total = sum(entry.bytes for entry in self.entries())
        for entry in reversed(self.entries()):
            stale = time.time() - entry.used >= unused_for
            surplus = keep_bytes is not None and total > keep_bytes
            if entry.key not in kept and (stale or surplus) and self._remove(entry.key):
                total -= entry.bytes
                removed.append(entry)
        for path in self._entries.glob("*"):
            if self._read(path.name) is None and time.time() - path.stat().st_mtime >= unused_for:
                self._remove(path.name)
        for left in self._aside.glob("*"):
            self._sweep(left)
        return removed

    def _remove(self, key: str) -> bool:
        try:
            with FileLock(self._locks / f"{key}.lock", timeout=0), telling_where(self.folder):
                gone = self._aside / f"{key}.{secrets.token_hex(4)}"
                (self._entries / key).replace(gone)
                shutil.rmtree(gone)
        except Timeout:  # being written just now
            return False
        return True

    def _sweep(self, left: Path) -> None:
        with contextlib.suppress(Timeout), FileLock(self._locks / f"{left.name.partition('.')[0]}.lock", timeout=0):
            shutil.rmtree(left, ignore_errors=True)

    def _keys_in_use(self) -> set[str]:
        keys: set[str] = set()
        for mark in self._active.glob("*.json"):
            try:
                with FileLock(mark.with_suffix(".lock"), timeout=0):  # nobody holds it: the run is dead
                    mark.unlink(missing_ok=True)
            except Timeout:
                with contextlib.suppress(FileNotFoundError):  # the run ended just now
                    keys |= set(cast("list[str]", json.loads(mark.read_text(encoding="utf-8"))))
        return keys

    def fingerprint(self, path: Path) -> str:
        """Return the SHA-256 of a file outside the store; a large one is read again only when its size or time of change differs.

        Raises:
            StoreError: the file cannot be read.
        """
        with telling_where(path):
            status = path.stat()
            if status.st_size < _WORTH_REMEMBERING:
                return file_digest(path)
            mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            known = self._fingerprints()
            row = known.get(str(path))
            if row and row[:-1] == mark:
                return cast("str", row[-1])
            digest = file_digest(path)
        with contextlib.suppress(OSError):  # only saves time
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "fingerprints.json", {**self._fingerprints(), str(path): [*mark, digest]})
        return digest

    def _fingerprints(self) -> dict[str, list[Any]]:
        try:
            return cast("dict[str, list[Any]]", json.loads((self.folder / "fingerprints.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}


def _stored(path: Path) -> StoredFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # the entry must not outlive its data when the power fails
    status = path.stat()
    return StoredFile(size=status.st_size, sha256=file_digest(path), changed=status.st_mtime_ns)


def _damage(entry: Entry, *, thorough: bool) -> str | None:
    """Return what is wrong with an entry's files; without `thorough`, a file of unchanged size and time is trusted."""
    for name, stored in entry.files.items():
        path = entry.folder / name
        try:
            status = path.stat()
        except OSError:
            return f"{path} is missing"
        if status.st_size != stored.size:
            return f"{path} has {status.st_size} bytes, not {stored.size}"
        if (thorough or status.st_mtime_ns != stored.changed) and file_digest(path) != stored.sha256:
            return f"{path} was changed: its digest is not the recorded one"
    return None
