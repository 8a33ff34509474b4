"""The interface of every export: an entry of a recipe that turns the last checkpoint into a runtime's format."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compress.checkpoints.artifact import artifact_format
from compress.checkpoints.spec import CheckpointSpec
from compress.export import FORMATS
from compress.families import Family
from compress.progress import Progress
from compress.recipe.schema import Frozen, load_row

if TYPE_CHECKING:
    from compress.verification.results import Verification


@dataclass(frozen=True)
class ExportContext:
    """The inputs of an export beside its own fields."""

    source: Path
    """The checkpoint's folder."""

    target: Path
    """The empty folder to write the artifact to."""

    family: Family
    progress: Progress


@dataclass(frozen=True)
class VerifyContext:
    """The inputs of a verification."""

    artifact: Path
    source: Path
    """The checkpoint that the artifact was exported from."""

    family: Family
    progress: Progress
    logs: Path
    """The folder for a runtime's logs."""

    trust_remote_code: bool = False


class Export(Frozen, ABC):
    """One format with its settings; the fields are the recipe's keys."""

    format: Any
    """The format's name: its key in the table `FORMATS`."""

    revision: ClassVar[int]
    """Raised whenever the same settings write something else, so that stored artifacts are not reused."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors")
    """The distributions in this environment whose versions affect the result."""

    runtimes: ClassVar[frozenset[str]]
    """The names of the runtimes that can run the artifact."""

    def versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that affect the result; imports nothing heavy.

        Raises:
            MissingError: the export needs an environment of its own that is not installed.
        """
        return {name: importlib.metadata.version(name) for name in self.libraries}

    @property
    @abstractmethod
    def artifact(self) -> str:
        """The artifact's name in reports and folders; unique among a recipe's exports."""

    @abstractmethod
    def check(self, spec: CheckpointSpec) -> list[str]:
        """Return why this export is not possible, one line each with its remedy; empty where it is. Reads headers only."""

    def notes(self, spec: CheckpointSpec, original_bytes: int | None = None) -> list[str]:
        """Return caveats for users of the artifact, one line each; `original_bytes` of the original's weights in a plan."""
        del spec, original_bytes
        return []

    @classmethod
    def warnings(cls, folder: Path, family: Family) -> list[str]:
        """Return known problems of an existing artifact, one line each with its remedy; reads headers only."""
        del cls, folder, family
        return []

    @abstractmethod
    def predict_bytes(self, spec: CheckpointSpec) -> int:
        """Return the expected size of the artifact's weights, in bytes."""

    @abstractmethod
    def apply(self, context: ExportContext) -> None:
        """Export the checkpoint at `context.source` to `context.target`.

        Raises:
            CheckpointError: this format does not support the checkpoint.
        """


class VerifiedExport(Export, ABC):
    """A format whose artifacts are verified against their checkpoint, in a step of its own."""

    verification_revision: ClassVar[int] = 2
    """Raised whenever the same artifact is compared differently, or with other limits."""

    @abstractmethod
    def verification_versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that affect the verification's result; imports nothing heavy.

        Raises:
            MissingError: the runtime that it needs is not installed.
        """

    @abstractmethod
    def verify(self, context: VerifyContext) -> Verification:
        """Compare the artifact's components and answers with its checkpoint's.

        Raises:
            VerificationError: a difference exceeds its limit; names the first such component.
        """


def runtimes_of(folder: Path) -> frozenset[str]:
    """Return the names of the runtimes that can run the artifact in a folder."""
    return _export_of(folder).runtimes


def warnings_of(folder: Path, family: Family) -> list[str]:
    """Return known problems of the artifact in a folder, one line each with its remedy."""
    return _export_of(folder).warnings(folder, family)


def _export_of(folder: Path) -> type[Export]:
    return cast("type[Export]", load_row(FORMATS, artifact_format(folder)))
