"""A repository on a hub, pinned to one state of its files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal, cast

from compress.errors import MissingError
from compress.limits import limits
from compress.untrusted import printable, reason

Report = Callable[[int], None]
"""Is told how many more bytes have arrived."""

_CLIENTS = ("huggingface_hub", "modelscope_hub", "requests", "httpx")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it; `content` is its `sha256:…`, or `git:…` where the hub only gives git's name of it."""

    name: str
    size: int
    content: str

    @property
    def sha256(self) -> str | None:
        """The SHA-256 of its content, where the hub tells it."""
        kind, _, digest = self.content.partition(":")
        return digest if kind == "sha256" else None


@dataclass(frozen=True)
class Repository:
    """A model or dataset repository: `revision` is what was asked for, `commit` what that was when it was asked.

    Raises:
        MissingError: a file has no name or size, or its name, or the commit's, would lead out of the folder that it is fetched to.
    """

    kind: Literal["model", "dataset"]
    source: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    def __post_init__(self) -> None:
        for file in self.files:
            told = cast("tuple[object, object]", (file.name, file.size))  # which a hub's client passes on as they came
            if not (isinstance(told[0], str) and isinstance(told[1], int) and told[1] >= 0):
                raise MissingError(f"{self.source}: the hub lists a file without name or size; use another source")
        for name in (self.commit, *(file.name for file in self.files)):
            path = PurePosixPath(name)
            if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
                raise MissingError(
                    f"{self.source}: the hub lists {printable(repr(name))}, which leads out of a folder; use another source"
                )

    @cached_property
    def by_name(self) -> dict[str, RemoteFile]:
        """The files by their path in the repository."""
        return {file.name: file for file in self.files}


def content_digest(contents: dict[str, str]) -> str:
    """Return one SHA-256 for some files, from a digest of each by its name."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def part_deadline() -> float:
    """Return until when, by `time.monotonic`, a part of a file that is asked for now must have come."""
    return time.monotonic() + limits().hub_seconds


def take_part(source: str, arriving: Iterable[bytes], skipped: int, count: int, deadline: float) -> bytes:
    """Return `count` bytes of an answer after the first `skipped`, fewer where it ends before; holds no more than these.

    Raises:
        MissingError: they have not come in time.
    """
    held = bytearray()
    for portion in arriving:
        held += portion[skipped : skipped + count - len(held)]
        skipped = max(0, skipped - len(portion))
        if len(held) == count:
            break
        if time.monotonic() > deadline:
            raise MissingError(
                f"{source}: a part of a file has not come in time ({limits().set_by('hub_seconds')}); check the network, "
                "or fetch the model first"
            )
    return bytes(held)


@contextmanager
def readable(source: str, remedy: str) -> Generator[None]:
    """Tell of what a hub's client raises where the hub's JSON is not as it should be; errors of its own pass.

    Raises:
        MissingError: the client stumbled over what the hub says; ends with the remedy.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
        if type(error).__module__.startswith(_CLIENTS):  # some of its own are ValueErrors too
            raise
        raise MissingError(f"{source}: what the hub says of it cannot be read ({reason(error)}); {remedy}") from error
