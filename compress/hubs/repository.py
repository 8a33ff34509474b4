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
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable, reason

Report = Callable[[int], None]
"""A progress callback: takes the number of bytes received since the last call."""

# Their own errors are translated by their callers; some derive from ValueError as a parser's errors do.
_CLIENTS = ("huggingface_hub", "modelscope_hub", "requests", "httpx")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it."""

    name: str
    size: int

    content: str
    """Its digest: `sha256:…`, or `git:…` (the blob's id) where the hub lists no SHA-256."""

    @property
    def sha256(self) -> str | None:
        """The SHA-256 of its content, where the hub lists it."""
        kind, _, digest = self.content.partition(":")
        return digest if kind == "sha256" else None


@dataclass(frozen=True)
class Repository:
    """A model or dataset repository at one commit.

    Raises:
        MissingError: a file has no name or size, or its name, or the commit's, would lead out of the folder that it is fetched to.
    """

    kind: Literal["model", "dataset"]
    source: str

    revision: str
    """The requested branch, tag or commit."""

    commit: str
    """The commit that it resolved to."""

    files: tuple[RemoteFile, ...]

    def __post_init__(self) -> None:
        for file in self.files:
            name, size = cast("tuple[object, object]", (file.name, file.size))  # the hub's JSON, which its client does not check
            if not (isinstance(name, str) and isinstance(size, int) and size >= 0):
                raise MissingError(f"{self.source}: the hub lists a file without name or size; use another source")
        for name in (self.commit, *(file.name for file in self.files)):
            path = PurePosixPath(name)
            # Names become paths in the cache: a hostile mirror could otherwise write anywhere this user can.
            if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
                raise MissingError(
                    f"{self.source}: the hub lists {printable(repr(name))}, which leads out of a folder; use another source"
                )

    @cached_property
    def by_name(self) -> dict[str, RemoteFile]:
        """The files by their path in the repository."""
        return {file.name: file for file in self.files}


def content_digest(contents: dict[str, str]) -> str:
    """Return one SHA-256 over files, from each one's digest by name."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def range_deadline() -> float:
    """Return the deadline, by `time.monotonic`, of a range request that starts now."""
    return time.monotonic() + limits().hub_seconds


def take_range(source: str, chunks: Iterable[bytes], skipped: int, count: int, deadline: float) -> bytes:
    """Return `count` bytes of a response after the first `skipped`, fewer where it ends before, without buffering more.

    Raises:
        MissingError: they did not arrive before the deadline.
    """
    data = bytearray()
    for chunk in chunks:
        # Cut as it arrives: a server without ranges would send gigabytes for a header.
        data += chunk[skipped : skipped + count - len(data)]
        skipped = max(0, skipped - len(chunk))
        if len(data) == count:
            break
        if time.monotonic() > deadline:
            raise MissingError(
                f"{source}: a part of a file has not come in time ({limits().set_by('hub_seconds')}); check the network, "
                "or fetch the model first"
            )
    return bytes(data)


@contextmanager
def valid_response(source: str, remedy: str) -> Generator[None]:
    """Translate what a hub's client raises on a malformed response; errors of the client's own pass.

    Raises:
        MissingError: the response is malformed; ends with the remedy.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
        if type(error).__module__.startswith(_CLIENTS):  # some of its own are ValueErrors too
            raise
        raise MissingError(f"{source}: what the hub says of it cannot be read ({reason(error)}); {remedy}") from error
