"""Folders that artifacts are published to: whose each is, and how what stands there is replaced, so that nothing of others is lost.

A published artifact's folder is ours where its record parses and lists, with its digest, every file that is there; of a folder that
holds anything else nothing is touched. What is being written, and what is replaced, lies in a folder of a random name beside it:

  <to>/<recipe>/<artifact>/                     the artifact
  <to>/<recipe>/.publishing-<random>/place.json which artifact is being published; tells a later call that the folder is ours
  <to>/<recipe>/.publishing-<random>/new/       the artifact as it is copied
  <to>/<recipe>/.publishing-<random>/old/       what stood in its place
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from filelock import FileLock

from compress.artifact import RECORD, file_digest
from compress.errors import StoreError
from compress.files import check_writable, one_error, telling_where, write_json
from compress.untrusted import printable, read_object

_LOCK = ".publishing.lock"
_WORK = ".publishing-"
_MARK = "place.json"
_REMEDY = "move it away, or name another publish.to"


def place_of(to: Path, recipe: str, artifact: str) -> Path:
    """Return the folder that an artifact is published to, its links resolved.

    Raises:
        StoreError: the links lead round in a circle.
    """
    place = to / recipe / artifact
    try:
        return place.resolve()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{place}: its links lead round in a circle; {_REMEDY}") from error


def check_places(to: Path, recipe: str, artifacts: Iterable[str], digest: Callable[[Path], str] = file_digest) -> None:
    """Check that every artifact of a recipe could be published; writes nothing. `digest` may remember files' SHA-256.

    Raises:
        StoreError: a place cannot be written, holds something that was not published there, or is another artifact's too.
    """
    places: dict[Path, str] = {}
    for artifact in artifacts:
        place = place_of(to, recipe, artifact)
        if place in places:
            raise StoreError(f"{place}: both {places[place]} and {artifact} would be published there; {_REMEDY}")
        places[place] = artifact
        check_writable(place.parent)
        published_files(place, digest)


def published_files(place: Path, digest: Callable[[Path], str] = file_digest) -> frozenset[str]:
    """Return the files of the artifact that was published to a place, none where there is nothing.

    Raises:
        StoreError: something is there that was not published, or that was changed since; names the first.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return frozenset()
    listed = _listed(place)
    found: set[str] = set()
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        known = name in folders if path.is_dir() else path.is_file() and (name in listed or name == RECORD)
        if path.is_symlink() or not known:
            raise StoreError(f"{printable(str(path))}: was not published by this program, and would be lost; {_REMEDY}")
        if path.is_dir():
            continue
        if name != RECORD and digest(path) != listed[name]:
            raise StoreError(f"{printable(str(path))}: was changed since it was published, and would be lost; {_REMEDY}")
        found.add(name)
    return frozenset(found)  # not what is listed: a record written by hand may name anything


def _listed(place: Path) -> dict[str, str]:
    """Return the digests that a published artifact's record lists, by its files' names."""
    try:
        record = read_object(place / RECORD, StoreError, root=place, remedy=_REMEDY)
    except OSError as error:
        raise StoreError(f"{place}: holds something else than a published artifact; {_REMEDY}") from error
    files: object = record.get("files")
    rows = cast("dict[str, object]", files) if isinstance(files, dict) else {}
    if not rows or not all(isinstance(digest, str) for digest in rows.values()):
        raise StoreError(f"{place / RECORD}: lists no files, so {place} is no published artifact; {_REMEDY}")
    return cast("dict[str, str]", rows)


@contextmanager
def replacing(place: Path) -> Generator[Path]:
    """Give an empty folder to fill; when the block ends well it stands at the place, and what was published there before is gone.

    Raises:
        StoreError: the place cannot be written, or holds something that was not published there.
    """
    with telling_where(place), one_error():
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / _LOCK):
            for left in place.parent.glob(f"{_WORK}*"):
                _sweep(left)
            published_files(place)
            work = place.with_name(f"{_WORK}{secrets.token_hex(16)}")
            work.mkdir()
            try:
                write_json(work / _MARK, {"place": place.name, "work": work.name})
                (work / "new").mkdir()
                yield work / "new"
                files = published_files(place)  # again: copying takes long
                if place.exists():
                    place.replace(work / "old")
                (work / "new").replace(place)
                _remove(work / "old", files)
            finally:
                _sweep(work)


def _sweep(work: Path) -> None:
    """Remove what a call that is over, or was killed, left beside the places; the lock is held, so that none goes on.

    What it had moved out of a place goes back where nothing has come in its stead.
    """
    try:
        mark = read_object(work / _MARK, StoreError, root=work)
    except (OSError, StoreError):
        with suppress(OSError):  # killed before it was marked: then it is empty
            work.rmdir()
        return
    name = str(mark.get("place"))
    if mark.get("work") != work.name or Path(name).name != name:
        return
    old, place = work / "old", work.with_name(name)
    if old.is_dir():
        if not place.exists():
            old.replace(place)
        else:
            with suppress(StoreError):  # then it stays
                _remove(old, published_files(old))
    shutil.rmtree(work / "new", ignore_errors=True)
    if not old.exists():
        shutil.rmtree(work, ignore_errors=True)


def _remove(folder: Path, files: Iterable[str]) -> None:
    """Remove these files and the folders that are empty then; whatever else has come into them stays."""
    if not folder.is_dir():
        return
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            below.rmdir()
    with suppress(OSError):
        folder.rmdir()
