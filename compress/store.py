"""The content-addressed cache of step outputs, shared by all runs and safe against crashes and each other.

store/
  entries/<key>/entry.json     what the step was, every file's size and SHA-256, the model and recipe it was first made for
  entries/<key>/data/          what it wrote
  aside/<key>/                 an output that is being written, or what an interrupted step keeps of it; renamed to entries/<key>
                               when whole
  aside/<key>.<random>/        an entry that was replaced or pruned, on its way out
  locks/<key>.lock             held by the process that writes the entry
  active/<random>.json         the keys a living run depends on, beside a lock that the run holds
  active.lock                  held while such a mark is made or swept
  fingerprints.json            digests of files outside the store, by path, size and time of change
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

from filelock import FileLock, Timeout

from compress.artifact import file_digest
from compress.errors import MissingError, StoreError
from compress.files import telling_where, write_json
from compress.store_entries import (
    ENTRY,
    STARTED,
    UNKNOWN_ORIGIN,
    Entry,
    Origin,
    StoreItem,
    damage_of,
    files_of,
    item_of,
    read_entry,
    record_of,
    unfinished_at,
    unreadable_at,
)
from compress.untrusted import read_json, read_object

_DAMAGED = "damaged.json"
_WORTH_REMEMBERING = 1_000_000


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

    def find(self, key: str, warn: Callable[[str], None], *, thorough: bool = False) -> Entry | None:
        """Return a key's entry if it is there and whole; a damaged one is a miss, with a warning.

        Files of unchanged size and time are trusted, unless it is to be `thorough`: then every file is read.
        """
        entry = read_entry(self._entries / key)
        if entry is None:
            if (self._entries / key).exists():
                warn(f"{self._entries / key}: has no readable {ENTRY}; the step is made again")
            return None
        if damage := damage_of(entry, thorough=thorough):
            self.distrust(key)
            warn(f"{entry.step}: {damage}; the step is made again")
            return None
        with contextlib.suppress(OSError):  # a store that can only be read still serves
            os.utime(entry.folder.parent / ENTRY)
        return entry

    def distrust(self, key: str) -> None:
        """Mark an entry as damaged, so that it is a miss from now on."""
        record = self._entries / key / ENTRY
        with contextlib.suppress(OSError):  # gone meanwhile, or the store can only be read: then nothing is made either
            record.rename(record.with_name(_DAMAGED))

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
    def write(
        self, key: str, step: str, origin: Origin = UNKNOWN_ORIGIN, *, resume: bool = False, warnings: Sequence[str] = ()
    ) -> Generator[Path]:
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
                write_json(aside / STARTED, {"step": step, **asdict(origin)})
                yield data
                made = time.time()
                entry = Entry(key, step, data, files_of(data), tuple(warnings), made, made, origin)
                write_json(aside / ENTRY, record_of(entry))
                (aside / STARTED).unlink()
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

    def entries(self) -> list[Entry]:
        """Return all readable entries, the one used last first."""
        found = [read_entry(path) for path in _folders(self._entries)]
        return sorted((entry for entry in found if entry), key=lambda entry: entry.used, reverse=True)

    def held(self) -> list[StoreItem]:
        """Return everything that takes room: outputs, what interrupted steps keep, unreadable entries; the one used last first."""
        entries = {path: read_entry(path) for path in _folders(self._entries)}
        found = [item_of(entry) if entry else unreadable_at(path) for path, entry in entries.items()]
        found += [unfinished_at(path) for path in _folders(self._aside)]
        return sorted(found, key=lambda held: held.used, reverse=True)

    def verify(self) -> dict[str, str]:
        """Read every file of every entry again; return what is wrong, by key.

        A damaged entry is marked, so that the next run makes it again. One that cannot be read, which another version may have
        written, is only told of.
        """
        faults: dict[str, str] = {}
        for path in _folders(self._entries):
            entry = read_entry(path)
            damage = damage_of(entry, thorough=True) if entry else f"no readable {ENTRY}"
            if damage:
                faults[path.name] = damage
            if damage and entry:
                self.distrust(path.name)
        return faults

    @contextmanager
    def using(self, keys: Iterable[str]) -> Generator[None]:
        """Keep `prune` from removing these keys while the block runs; marks that killed runs left are swept.

        Raises:
            StoreError: the store cannot be written.
        """
        self.prepare()
        mark = self._active / f"{secrets.token_hex(8)}.json"
        lock = FileLock(mark.with_suffix(".lock"))
        with telling_where(self.folder), self._marks_locked():
            self._sweep_marks()
            lock.acquire()
            write_json(mark, sorted(keys))
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)
            lock.release()
            mark.with_suffix(".lock").unlink(missing_ok=True)

    def prune(self, *, unused_for: float, keep_bytes: int | None, dry: bool = False) -> list[StoreItem]:
        """Remove what was not used for `unused_for` seconds (0: everything), then the longest unused until `keep_bytes` are left.

        What a living run depends on stays, and so does what is being written. With `dry` nothing is removed. Returns what was, or
        would be.

        Raises:
            StoreError: something cannot be removed, or a living run's mark cannot be read.
        """
        self.prepare()
        with telling_where(self.folder), self._marks_locked():
            kept = self._sweep_marks()
        removed: list[StoreItem] = []
        found = self.held()
        total = sum(held.bytes for held in found)
        for held in reversed(found):
            stale = unused_for <= 0 or time.time() - held.used >= unused_for
            surplus = keep_bytes is not None and total > keep_bytes
            leaving = held.kind == "unfinished" and "." in held.key
            if (leaving or (held.key not in kept and (stale or surplus))) and self._remove(held, dry=dry):
                total -= held.bytes
                removed.append(held)
        return removed

    def _remove(self, held: StoreItem, *, dry: bool) -> bool:
        """Remove something, unless it is being written just now; return whether it was, or with `dry` would be."""
        place = (self._aside if held.kind == "unfinished" else self._entries) / held.key
        key = held.key.partition(".")[0]
        try:
            with FileLock(self._locks / f"{key}.lock", timeout=0), telling_where(self.folder):
                if not dry:
                    gone = self._aside / f"{key}.{secrets.token_hex(4)}"
                    place.replace(gone)
                    shutil.rmtree(gone)
        except (Timeout, FileNotFoundError):  # or another process removed it meanwhile
            return False
        return True

    @contextmanager
    def _marks_locked(self) -> Generator[None]:
        """Hold the right to make and sweep marks, so that one that is being made is not taken for a dead run's."""
        with FileLock(self.folder / "active.lock"):
            yield

    def _sweep_marks(self) -> set[str]:
        """Remove the marks of dead runs; return the keys that living ones depend on.

        Raises:
            StoreError: a living run's mark cannot be read.
        """
        keys: set[str] = set()
        for mark in {path.with_suffix(".json") for path in self._active.glob("[!.]*")}:
            try:
                with FileLock(mark.with_suffix(".lock"), timeout=0):  # nobody holds it: the run is dead
                    mark.unlink(missing_ok=True)
                    mark.with_suffix(".lock").unlink(missing_ok=True)
            except Timeout:
                with contextlib.suppress(FileNotFoundError):  # the run ended just now
                    keys |= _keys_of(mark)
        for unwritten in self._active.glob(".*"):  # by runs that were killed: no mark is being made now
            unwritten.unlink(missing_ok=True)
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
            row = self._fingerprints().get(str(path))
            if isinstance(row, list) and row[:-1] == mark and isinstance(row[-1], str):
                return row[-1]
            digest = file_digest(path)
        with contextlib.suppress(OSError):  # only saves time
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "fingerprints.json", {**self._fingerprints(), str(path): [*mark, digest]})
        return digest

    def _fingerprints(self) -> dict[str, object]:
        try:
            return read_object(self.folder / "fingerprints.json", StoreError)
        except (OSError, StoreError):
            return {}


def _keys_of(mark: Path) -> set[str]:
    keys: object = read_json(mark, StoreError, remedy="end the run that uses this store first")
    if not isinstance(keys, list):
        raise StoreError(f"{mark}: is no list of keys; end the run that uses this store first")
    return {str(key) for key in cast("list[object]", keys)}


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir())
