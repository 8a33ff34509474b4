"""What every export is: a part of a recipe that turns the last checkpoint into what a runtime loads."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compress.artifact import artifact_format
from compress.checkpoint import Checkpoint
from compress.export import FORMATS
from compress.families import Family
from compress.numerics.scheme import Scheme
from compress.progress import Progress
from compress.schema import Frozen, load_row

if TYPE_CHECKING:
    from compress.verification.results import Verification


@dataclass(frozen=True)
class Outlook:
    """What is to be exported, known from headers alone: before any stage ran, or of the checkpoint that the last one wrote.

    `schemes` says how each quantized linear of `checkpoint` is held, or will be, by its name on disk; `kv_cache` whether there are
    scales to keep keys and values in 8 bits.
    """

    checkpoint: Checkpoint
    family: Family
    schemes: Mapping[str, Scheme]
    kv_cache: bool = False


@dataclass(frozen=True)
class ExportContext:
    """What an export is given beside its own fields: the checkpoint at `source` and the empty folder `target` to fill."""

    source: Path
    target: Path
    family: Family
    progress: Progress


@dataclass(frozen=True)
class VerifyContext:
    """What a verification is given: the `artifact`, the checkpoint at `source` that it was made of, and where logs belong."""

    artifact: Path
    source: Path
    family: Family
    progress: Progress
    logs: Path
    trust_remote_code: bool = False


class Export(Frozen, ABC):
    """One format with its settings; the fields are the recipe's keys."""

    format: Any
    """The row it stands for in the table of formats."""

    revision: ClassVar[int]
    """Raised whenever the same settings write something else, so that the store forgets the old artifact."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors")
    """The distributions in this environment whose versions shape the result."""

    runtimes: ClassVar[frozenset[str]]
    """The rows of the table of runtimes that run what it writes."""

    def versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that shape the result; imports nothing heavy.

        Raises:
            MissingError: something that makes it lives in an environment of its own, which is not installed.
        """
        return {name: importlib.metadata.version(name) for name in self.libraries}

    @property
    @abstractmethod
    def artifact(self) -> str:
        """What reports and folders call what it writes; unique among a recipe's exports."""

    @abstractmethod
    def check(self, outlook: Outlook) -> list[str]:
        """Return what stands against this export, one line each with its remedy; reads headers only."""

    def notes(self, outlook: Outlook) -> list[str]:
        """Return what one should know before using the artifact, one line each; reads headers only."""
        del outlook
        return []

    @classmethod
    def warnings(cls, folder: Path, family: Family) -> list[str]:
        """Return what is wrong with an artifact that was written before, one line each with its remedy; reads headers only."""
        del cls, folder, family
        return []

    @abstractmethod
    def predict_bytes(self, outlook: Outlook) -> int:
        """Return the expected size of the weights it writes, in bytes."""

    @abstractmethod
    def apply(self, context: ExportContext) -> None:
        """Write the artifact of the checkpoint at `context.source` to `context.target`.

        Raises:
            CheckpointError: the checkpoint cannot be held by this format.
        """


class VerifiedExport(Export, ABC):
    """A format whose artifacts are compared, once written, with the checkpoint they came from, in a step of its own."""

    verification_revision: ClassVar[int] = 2
    """Raised whenever the same artifact is compared in another way, or by other limits."""

    @abstractmethod
    def verification_versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that shape what a verification finds; imports nothing heavy.

        Raises:
            MissingError: the runtime that it is done with is not installed.
        """

    @abstractmethod
    def verify(self, context: VerifyContext) -> Verification:
        """Return how far the artifact's parts and answers are from those of the checkpoint it came from.

        Raises:
            VerificationError: further than the limits allow; names the first part that differs.
        """


def runtimes_of(folder: Path) -> frozenset[str]:
    """Return the rows of the table of runtimes that run the artifact in a folder, by its files."""
    return _export_of(folder).runtimes


def warnings_of(folder: Path, family: Family) -> list[str]:
    """Return what is wrong with the artifact in a folder, which its format knows; one line each."""
    return _export_of(folder).warnings(folder, family)


def _export_of(folder: Path) -> type[Export]:
    return cast("type[Export]", load_row(FORMATS, artifact_format(folder)))
