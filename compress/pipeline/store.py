"""The content-addressed cache of step outputs, shared by all runs and safe against crashes and each other.

store/
  entries/<key>/entry.json     the step, the size and SHA-256 of every file, the model and recipe it was first computed for
  entries/<key>/data/          the step's output
  aside/<key>/                 an unfinished output, of a running or interrupted step; renamed to entries/<key> when complete
  aside/<key>.<random>/        a replaced or pruned entry that is being deleted
  locks/<key>.lock             locked by the process that writes the entry
  active/<random>.json         the keys that a running run depends on, beside a lock of the run
  active.lock                  locked while such marks are written or removed
  fingerprints.json            digests of files outside the store, by path, size and modification time
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

from compress.checkpoints.artifact import file_digest
from compress.errors import MissingError, StoreError
from compress.files import disk_errors, write_json
from compress.pipeline.store_entries import (
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
from compress.untrusted.reading import read_json, read_object

_DAMAGED = "damaged.json"
"""The record of a damaged entry, renamed from `entry.json`."""

_MIN_CACHED_BYTES = 1_000_000
"""Digests of smaller files are not cached: hashing a megabyte takes a millisecond, reading the cache about as long."""


def default_store() -> Path:
    """Return `$COMPRESS_STORE`, or the user's cache folder."""
    if os.environ.get("COMPRESS_STORE"):
        return Path(os.environ["COMPRESS_STORE"])
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vlm-compress" / "store"


class Store:
    """The cache in one folder, which is created when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self._entries = self.folder / "entries"
        self._aside = self.folder / "aside"
        self._locks = self.folder / "locks"
        self._active = self.folder / "active"

    def prepare(self) -> None:
        """Create the store's folders.

        Raises:
            StoreError: they cannot be created.
        """
        with disk_errors(self.folder, making=True):
            for folder in (self._entries, self._aside, self._locks, self._active):
                folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: str, warn: Callable[[str], None], *, thorough: bool = False) -> Entry | None:
        """Return a key's entry, None where it is missing or (with a warning) damaged.

        Files with unchanged size and modification time are trusted, unless `thorough`: then every file is read.
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
        with contextlib.suppress(OSError):  # a read-only store can be used
            # The record's modification time is when the entry was last used, by which `prune` chooses.
            os.utime(entry.folder.parent / ENTRY)
        return entry

    def distrust(self, key: str) -> None:
        """Mark an entry as damaged, so that `find` no longer returns it."""
        # Renamed, not deleted: the entry is gone for `find` in one atomic step, and its files stay for a look.
        record = self._entries / key / ENTRY
        with contextlib.suppress(OSError):  # removed meanwhile, or a read-only store
            record.rename(record.with_name(_DAMAGED))

    @contextmanager
    def lock(self, key: str, wait: Callable[[], None]) -> Generator[None]:
        """Hold the lock of a key's entry for writing; `wait` is called once if another process holds it."""
        self.prepare()
        lock = FileLock(self._locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            wait()
            lock.acquire()
        try:
            for leftover in self._aside.glob(f"{key}.*"):  # of a killed process, as this one holds the lock
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            lock.release()

    @contextmanager
    def write(
        self, key: str, step: str, origin: Origin = UNKNOWN_ORIGIN, *, resume: bool = False, warnings: Sequence[str] = ()
    ) -> Generator[Path]:
        """Yield a folder to fill; when the block ends without an error it becomes the key's entry.

        The caller holds the key's lock. With `resume` the folder has the unfinished output of the same step where that was killed
        or interrupted, or found the disk full or the device too small; otherwise it is empty. A step that fails for any other
        reason leaves nothing. `warnings` is read when the block ends.

        Raises:
            StoreError: the disk is full or cannot be written.
        """
        aside = self._aside / key
        data = aside / "data"
        keep = False
        try:
            with disk_errors(self.folder):
                if not resume:
                    shutil.rmtree(aside, ignore_errors=True)
                data.mkdir(parents=True, exist_ok=True)
                write_json(aside / STARTED, {"step": step, **asdict(origin)})
                yield data
                now = time.time()
                # `files_of` syncs the data before the record is written: after a power failure no record describes lost data.
                entry = Entry(key, step, data, files_of(data), tuple(warnings), now, now, origin)
                write_json(aside / ENTRY, record_of(entry))
                (aside / STARTED).unlink()
                self._publish(aside, key)
        except (KeyboardInterrupt, StoreError, MissingError):
            # A stop, a full disk or a small device says nothing against the work so far; another error may have spoilt it.
            keep = resume
            raise
        finally:
            if not keep:
                shutil.rmtree(aside, ignore_errors=True)

    def _publish(self, aside: Path, key: str) -> None:
        folder = self._entries / key
        if folder.exists():
            old = self._aside / f"{key}.{secrets.token_hex(4)}"
            folder.replace(old)
            aside.replace(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.replace(folder)

    def entries(self) -> list[Entry]:
        """Return all readable entries, the most recently used first."""
        entries = [read_entry(path) for path in _folders(self._entries)]
        return sorted((entry for entry in entries if entry), key=lambda entry: entry.used, reverse=True)

    def items(self) -> list[StoreItem]:
        """Return all outputs, unfinished outputs and unreadable entries, the most recently used first."""
        entries = {path: read_entry(path) for path in _folders(self._entries)}
        items = [item_of(entry) if entry else unreadable_at(path) for path, entry in entries.items()]
        items += [unfinished_at(path) for path in _folders(self._aside)]
        return sorted(items, key=lambda item: item.used, reverse=True)

    def verify(self) -> dict[str, str]:
        """Read every file of every entry and return the faults, by key.

        A damaged entry is marked, so that the next run computes it again. An unreadable one, which another version may have
        written, is only reported.
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
        """Protect these keys from `prune` while the block runs; marks of killed runs are removed.

        Raises:
            StoreError: the store cannot be written.
        """
        self.prepare()
        mark = self._active / f"{secrets.token_hex(8)}.json"
        lock = FileLock(mark.with_suffix(".lock"))
        with disk_errors(self.folder), self._marks_locked():
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
        """Remove items unused for `unused_for` seconds (0: all), then the least recently used until `keep_bytes` are left.

        Items that a running run depends on or is writing stay. With `dry` nothing is removed. Returns the removed items.

        Raises:
            StoreError: an item cannot be removed, or the mark of a running run cannot be read.
        """
        self.prepare()
        with disk_errors(self.folder), self._marks_locked():
            protected = self._sweep_marks()
        removed: list[StoreItem] = []
        items = self.items()
        total = sum(item.bytes for item in items)
        for item in reversed(items):
            stale = unused_for <= 0 or time.time() - item.used >= unused_for
            surplus = keep_bytes is not None and total > keep_bytes
            # A key with a suffix is an entry whose deletion was killed: it goes whatever the limits are.
            being_deleted = item.kind == "unfinished" and "." in item.key
            if (being_deleted or (item.key not in protected and (stale or surplus))) and self._remove(item, dry=dry):
                total -= item.bytes
                removed.append(item)
        return removed

    def _remove(self, item: StoreItem, *, dry: bool) -> bool:
        """Remove an item unless it is being written; return whether it was, or with `dry` would be, removed."""
        folder = (self._aside if item.kind == "unfinished" else self._entries) / item.key
        key = item.key.partition(".")[0]
        try:
            # Not waited for: whoever holds the lock is writing this entry.
            with FileLock(self._locks / f"{key}.lock", timeout=0), disk_errors(self.folder):
                if not dry:
                    old = self._aside / f"{key}.{secrets.token_hex(4)}"
                    # Out of `entries` in one rename: a killed deletion leaves no entry with half of its files.
                    folder.replace(old)
                    shutil.rmtree(old)
        except (Timeout, FileNotFoundError):  # or another process removed it meanwhile
            return False
        return True

    @contextmanager
    def _marks_locked(self) -> Generator[None]:
        """Hold the lock of all marks, so that one that is being written is not mistaken for a killed run's."""
        with FileLock(self.folder / "active.lock"):
            yield

    def _sweep_marks(self) -> set[str]:
        """Remove the marks of killed runs; return the keys that running ones depend on.

        Raises:
            StoreError: the mark of a running run cannot be read.
        """
        keys: set[str] = set()
        for mark in {path.with_suffix(".json") for path in self._active.glob("[!.]*")}:
            try:
                with FileLock(mark.with_suffix(".lock"), timeout=0):  # not locked: the run was killed
                    mark.unlink(missing_ok=True)
                    mark.with_suffix(".lock").unlink(missing_ok=True)
            except Timeout:
                with contextlib.suppress(FileNotFoundError):  # the run ended just now
                    keys |= _keys_of(mark)
        for unwritten in self._active.glob(".*"):  # of killed runs, as no mark is being written now
            unwritten.unlink(missing_ok=True)
        return keys

    def fingerprint(self, path: Path) -> str:
        """Return the SHA-256 of a file outside the store, cached for large files by size and modification time.

        Raises:
            StoreError: the file cannot be read.
        """
        with disk_errors(path):
            status = path.stat()
            if status.st_size < _MIN_CACHED_BYTES:
                return file_digest(path)
            # The change time too: tools that restore modification times (rsync, tar) cannot set it.
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            row = self._fingerprints().get(str(path))
            if isinstance(row, list) and row[:-1] == state and isinstance(row[-1], str):
                return row[-1]
            digest = file_digest(path)
        with contextlib.suppress(OSError):  # the cache only saves time
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "fingerprints.json", {**self._fingerprints(), str(path): [*state, digest]})
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
