"""A repository on a hub, pinned to one state of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Report = Callable[[int], None]
"""Is told how many more bytes have arrived."""


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
    """A model or dataset repository: `revision` is what was asked for, `commit` what that was when it was asked."""

    kind: Literal["model", "dataset"]
    source: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    @cached_property
    def by_name(self) -> dict[str, RemoteFile]:
        """The files by their path in the repository."""
        return {file.name: file for file in self.files}


def content_digest(contents: dict[str, str]) -> str:
    """Return one SHA-256 for some files, from a digest of each by its name."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
