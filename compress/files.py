"""Writing so that a reader sees the old or the new, never a part; and errors of the file system that say what to do."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP}

_PATH_MARKS = ("/", "./", "../", "~")
_FILE_SUFFIXES = {".txt", ".tokens", ".raw", ".parquet", ".jsonl", ".json", ".yaml", ".yml"}


def is_path(text: str) -> bool:
    """Return whether what names a source is written as a path, and not as a hub id or the name of something that ships."""
    return text.startswith(_PATH_MARKS) or Path(text).suffix.lower() in _FILE_SUFFIXES


def write_json(path: Path, value: object) -> None:
    """Write JSON aside and rename it into place."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it into place."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside, bring it to the disk, and rename it into place."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path, *, making: bool = False) -> Generator[None]:
    """Turn the system's own error on writing below a folder into one that says what to do; with `making` it, any error.

    Raises:
        StoreError: the disk is full, the folder read-only, or the like.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        if error.errno in _FULL:
            remedy = "free some space, or name a folder on another disk"
        elif making or error.errno in _REFUSED:
            remedy = "name a folder you can write"
        else:
            raise
        raise StoreError(f"{where}: {error.strerror or error}; {remedy} (--store, --runs, publish.to)") from error


@contextmanager
def one_error() -> Generator[None]:
    """Turn the list of faults that copying a folder gives into the first of them, as the system told it."""
    try:
        yield
    except shutil.Error as error:
        _, target, reason = error.args[0][0]
        number = next((code for code in (*_FULL, *_REFUSED) if os.strerror(code) in str(reason)), errno.EIO)
        raise OSError(number, str(reason), str(target)) from error


def check_writable(folder: Path) -> None:
    """Check that something could be written below a folder that may not exist yet; writes nothing.

    Raises:
        StoreError: it could not.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise StoreError(f"{place}: cannot be written; name a folder you can write (--store, --runs, publish.to)")
