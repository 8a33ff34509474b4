"""Folders that artifacts are published to: replaced atomically, and only where everything in them was published by this program.

A folder is a published artifact where its record parses and lists every file in it with its digest; a folder with anything else is
not touched. New and replaced files lie in a working folder with a random name beside it:

  <to>/<recipe>/<artifact>/                     the artifact
  <to>/<recipe>/.publishing-<random>/place.json names the artifact; marks the folder as one that a later call may remove
  <to>/<recipe>/.publishing-<random>/new/       the new artifact
  <to>/<recipe>/.publishing-<random>/old/       the replaced artifact
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from filelock import FileLock

from compress.checkpoints.artifact import RECORD, file_digest
from compress.errors import StoreError
from compress.files import check_writable, disk_errors, one_error, write_json
from compress.untrusted.reading import printable, read_object

_LOCK = ".publishing.lock"
_WORK = ".publishing-"
_MARK = "place.json"
"""The files of a publication in progress; the names stay, so that leftovers of older versions are recognized."""
_REMEDY = "move it away, or name another publish.to"


def publish_folder(to: Path, recipe: str, artifact: str) -> Path:
    """Return the folder that an artifact is published to, its links resolved.

    Raises:
        StoreError: the links lead round in a circle.
    """
    folder = to / recipe / artifact
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{folder}: its links lead round in a circle; {_REMEDY}") from error


def check_publish_folders(to: Path, recipe: str, artifacts: Iterable[str], digest: Callable[[Path], str] = file_digest) -> None:
    """Check that every artifact of a recipe can be published; writes nothing. `digest` returns a file's SHA-256, and may cache it.

    Raises:
        StoreError: a folder cannot be written, has something that was not published there, or is another artifact's too.
    """
    owners: dict[Path, str] = {}
    for artifact in artifacts:
        folder = publish_folder(to, recipe, artifact)
        if folder in owners:
            raise StoreError(f"{folder}: both {owners[folder]} and {artifact} would be published there; {_REMEDY}")
        owners[folder] = artifact
        check_writable(folder.parent)
        published_files(folder, digest)


def published_files(folder: Path, digest: Callable[[Path], str] = file_digest) -> frozenset[str]:
    """Return the files of the artifact that was published to a folder; none where it is missing or empty.

    Raises:
        StoreError: a file was not published by this program, or was changed since; the message names the first.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return frozenset()
    listed = _recorded_digests(folder)
    files: set[str] = set()
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        published = name in folders if path.is_dir() else path.is_file() and (name in listed or name == RECORD)
        # Links count as foreign: removing through one would reach outside the folder.
        if path.is_symlink() or not published:
            raise StoreError(f"{printable(str(path))}: was not published by this program, and would be lost; {_REMEDY}")
        if path.is_dir():
            continue
        if name != RECORD and digest(path) != listed[name]:
            raise StoreError(f"{printable(str(path))}: was changed since it was published, and would be lost; {_REMEDY}")
        files.add(name)
    return frozenset(files)  # not the listed names: a record written by hand may name anything


def _recorded_digests(folder: Path) -> dict[str, str]:
    """Return the digests in a published artifact's record, by file name."""
    try:
        record = read_object(folder / RECORD, StoreError, root=folder, remedy=_REMEDY)
    except OSError as error:
        raise StoreError(f"{folder}: holds something else than a published artifact; {_REMEDY}") from error
    files: object = record.get("files")
    rows = cast("dict[str, object]", files) if isinstance(files, dict) else {}
    if not rows or not all(isinstance(digest, str) for digest in rows.values()):
        raise StoreError(f"{folder / RECORD}: lists no files, so {folder} is no published artifact; {_REMEDY}")
    return cast("dict[str, str]", rows)


@contextmanager
def replace_folder(folder: Path) -> Generator[Path]:
    """Yield an empty folder to fill; when the block ends without an error it replaces the published folder.

    Raises:
        StoreError: the folder cannot be written, or has something that was not published there.
    """
    with disk_errors(folder), one_error():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / _LOCK):
            # Under the lock no publication is active, so that any working folder is a killed one's.
            for leftover in folder.parent.glob(f"{_WORK}*"):
                _clean_up(leftover)
            published_files(folder)
            # Beside the target, on its file system: only there a rename is atomic.
            work = folder.with_name(f"{_WORK}{secrets.token_hex(16)}")
            work.mkdir()
            try:
                # Before anything else: it tells a later call whose folder this is, and that it may clean up.
                write_json(work / _MARK, {"place": folder.name, "work": work.name})
                (work / "new").mkdir()
                yield work / "new"
                files = published_files(folder)  # again: it may have changed during the copy
                if folder.exists():
                    # Two renames: a reader may find nothing for a moment, and never half an artifact.
                    folder.replace(work / "old")
                (work / "new").replace(folder)
                _remove(work / "old", files)
            finally:
                _clean_up(work)


def _clean_up(work: Path) -> None:
    """Remove the working folder of a call that ended or was killed; the caller has the lock, so that no call is active.

    A published folder that the call had moved away is moved back unless it was replaced.
    """
    try:
        mark = read_object(work / _MARK, StoreError, root=work)
    except (OSError, StoreError):
        with suppress(OSError):  # killed before the mark was written: it is empty
            work.rmdir()
        return
    name = str(mark.get("place"))
    # A mark that was copied, or names a path: deleting by it could remove a folder of the user's.
    if mark.get("work") != work.name or Path(name).name != name:
        return
    old, folder = work / "old", work.with_name(name)
    if old.is_dir():
        if not folder.exists():
            old.replace(folder)
        else:
            with suppress(StoreError):  # it was changed, and stays
                _remove(old, published_files(old))
    shutil.rmtree(work / "new", ignore_errors=True)
    if not old.exists():
        shutil.rmtree(work, ignore_errors=True)


def _remove(folder: Path, files: Iterable[str]) -> None:
    """Remove files and the folders that are then empty; other files in them stay."""
    if not folder.is_dir():
        return
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for subfolder in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            subfolder.rmdir()
    with suppress(OSError):
        folder.rmdir()
