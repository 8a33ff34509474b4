"""The interface of a step: what it depends on, the key of its output, and how the output is made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from compress.pipeline.store_entries import Entry
from compress.progress import Progress

ORIGINAL = "original"
"""The name of the uncompressed model among the artifacts."""


def digest_of(*parts: object) -> str:
    """Return the SHA-256 of plain JSON values."""
    # Sorted keys: the order in which fields were added must not change a key.
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def versions_of(*names: str) -> dict[str, str]:
    """Return the installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in names}


@dataclass(frozen=True)
class StepContext:
    """The run that a step is made in."""

    folder: Path
    """The run's folder."""

    progress: Progress

    entries: Mapping[str, Entry]
    """The store entries of finished steps, by step name; the run adds to them."""

    trust_remote_code: bool = False

    fetched: dict[str, Path] = field(default_factory=lambda: dict[str, Path]())
    """The folders of published models that were fetched in this run, by their keys."""

    def logs(self, name: str) -> Path:
        """Return the folder for the logs of a step's programs, made where it is missing."""
        logs = self.folder / "logs" / name
        logs.mkdir(parents=True, exist_ok=True)
        return logs


class Input(Protocol):
    """What a step reads: the published model, an artifact that is there already, or the output of another step."""

    @property
    def key(self) -> str:
        """The digest of the content."""
        ...

    def at(self, run: StepContext) -> Path:
        """Return its folder."""
        ...


class Step(ABC):
    """One step of a plan; a frozen dataclass whose fields are its settings and inputs.

    Its key covers its kind, its revision, the keys of its inputs and `key_fields`.
    """

    revision: ClassVar[int]
    """Raised whenever the package's own code for such a step gives another output for the same settings."""

    resumes: ClassVar[bool] = False
    """Whether it goes on where it was killed; the others start anew."""

    verifies_inputs: ClassVar[bool] = False
    """Whether its inputs are read byte by byte before it is made: times and sizes of files do not show bits that a disk lost."""

    feeds_verdict: ClassVar[bool] = False
    """Whether a verdict depends on its output, so that a cached one is read byte by byte, and by `read`."""

    name: str
    """Its name in events and reports."""

    expected_bytes: int | None = None
    """The predicted size of its output, where known."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[Input, ...]:
        """What it reads: other steps, and models that are there already."""

    @abstractmethod
    def key_fields(self) -> object:
        """Return, as plain JSON values, what shapes its output beside its inputs."""

    @abstractmethod
    def make(self, run: StepContext, target: Path) -> None:
        """Fill the folder `target` with its output."""

    def read(self, folder: Path) -> object:
        """Return what an output says.

        Raises:
            DataError: it cannot be read as this step's output.
        """
        del folder

    @property
    def key(self) -> str:
        """The key of its output in the store."""
        return self._key

    # Versions of other environments and servers are in it: computed once, a plan and its run cannot disagree.
    @cached_property
    def _key(self) -> str:
        # The kind first: two steps with equal settings and inputs must not share an output.
        return digest_of(type(self).__name__, self.revision, self.input_keys(), self.key_fields())

    def input_keys(self) -> list[str]:
        """Return the keys of what of its inputs shapes its output."""
        return [source.key for source in self.inputs]

    @property
    def steps(self) -> tuple[Step, ...]:
        """Those of its inputs that are steps."""
        return tuple(source for source in self.inputs if isinstance(source, Step))

    def at(self, run: StepContext) -> Path:
        """Return the folder of its output, once it is made."""
        return run.entries[self.name].folder
