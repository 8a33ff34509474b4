"""The interface of every export: an entry of a recipe that turns the last checkpoint into a runtime's format."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compress.checkpoints.artifact import side_files
from compress.checkpoints.quantization_config import KernelKind
from compress.checkpoints.spec import CheckpointSpec
from compress.export import FORMATS
from compress.families import Family
from compress.hardware import processor
from compress.numerics.scheme import Scheme
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
class Usage:
    """The usage section of an artifact's model card."""

    library: str
    """The hub's `library_name`."""

    instructions: str
    """Markdown."""


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

    usage: ClassVar[Usage]
    """How a user runs the artifact."""

    own_files: ClassVar[tuple[str, ...]] = ()
    """The names of its files beside weights, config.json, and the files of tokenizer and processor."""

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path) -> bool:
        """Return whether a folder is of this format, by the names of its files; see `FORMATS` for the order of the formats."""

    @classmethod
    @abstractmethod
    def weight_files(cls, folder: Path) -> list[Path]:
        """Return the files of an artifact's weights, sorted."""

    @classmethod
    def weight_bytes(cls, folder: Path) -> int:
        """Return the size of an artifact's weights, in bytes."""
        return sum(path.stat().st_size for path in cls.weight_files(folder))

    @classmethod
    def files(cls, folder: Path) -> list[Path]:
        """Return an artifact's files: config, weights, and the files of tokenizer and processor; other files do not count."""
        # Not README.md and compress.json, which publishing writes and extends: a size would change by being published.
        named = [folder / name for name in ("config.json", *cls.own_files) if (folder / name).is_file()]
        return sorted([*named, *cls.weight_files(folder), *(folder / name for name in side_files(folder))])

    @classmethod
    def total_bytes(cls, folder: Path) -> int:
        """Return the size of an artifact's files, in bytes."""
        return sum(path.stat().st_size for path in cls.files(folder))

    @classmethod
    @abstractmethod
    def check_artifact(cls, folder: Path, family: Family) -> None:
        """Check an existing artifact before anything is measured, without reading its weights.

        Raises:
            CheckpointError: a file is missing or damaged, or a setting is not supported.
        """

    @classmethod
    def kernel_kinds_in(cls, folder: Path) -> frozenset[KernelKind]:
        """Return the matrix products of an existing artifact that its runtime needs kernels for; reads headers only."""
        del cls, folder
        return frozenset()

    def kernel_kinds(self, schemes: Iterable[Scheme]) -> frozenset[KernelKind]:
        """Return the matrix products that linears of these schemes will need kernels for; none where the operators are its own."""
        del schemes
        return frozenset()

    def key_fields(self) -> list[Any]:
        """Return what shapes the artifact beside checkpoint and settings, as JSON values for its key.

        No device is among it: these exports compute on the CPU, without rounding floats. A format whose artifact fits one device
        adds that.
        """
        return [self.revision, self.versions()]

    # The libraries are in the key because a new release may compute other buffers or write other headers from the same settings.
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

    def verification_shaping(self) -> list[Any]:
        """Return what shapes a verification's result beside the artifact, as JSON values for its key; graphs run on the CPU."""
        # The processor decides which kernels ONNX Runtime picks, and with them the last bits that are held against the limits.
        return [self.verification_revision, self.verification_versions(), processor()]

    @abstractmethod
    def verify(self, context: VerifyContext) -> Verification:
        """Compare the artifact's components and answers with its checkpoint's.

        Raises:
            VerificationError: a difference exceeds its limit; names the first such component.
        """


def format_named(name: str) -> type[Export]:
    """Return the format of a name in the table `FORMATS`."""
    return cast("type[Export]", load_row(FORMATS, name))


def format_name(folder: Path) -> str:
    """Return the name of the format of a folder that this run has not made, by its files."""
    return next(name for name in FORMATS if format_named(name).recognises(folder))


def format_of(folder: Path) -> type[Export]:
    """Return the format of a folder that this run has not made, by its files."""
    return format_named(format_name(folder))
