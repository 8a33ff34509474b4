"""The interface of a compression method: an entry of a recipe's `stages` that turns one checkpoint into another."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compress.checkpoints.checkpoint import Checkpoint
from compress.families import Family
from compress.numerics.scheme import Scheme
from compress.progress import Progress
from compress.recipe.schema import Frozen


@dataclass(frozen=True)
class StageContext:
    """The inputs of a stage's run beside its settings."""

    source: Path
    """The checkpoint it reads."""

    target: Path
    """The folder it writes a complete checkpoint to: empty, or with what the same stage had finished before it was killed."""

    calibration: Path | None
    """The folder that `compress.calibration.collect` wrote; None where the stage needs no samples."""

    family: Family
    device: str
    seed: int
    progress: Progress
    trust_remote_code: bool = False

    logs: Path | None = None
    """The folder for the output of programs that the stage starts; made when needed."""


class Stage(Frozen, ABC):
    """One compression method with its settings; it has no state beyond its fields."""

    stage: Any
    """Its name in a recipe and in `STAGES`."""

    revision: ClassVar[int]
    """Raised whenever the same settings give another result, so that stored outputs of the old code are not used."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    """The distributions whose versions shape the result."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the distributions that shape the result.

        Raises:
            MissingError: it runs in an environment of its own, which is not installed.
        """
        return {name: importlib.metadata.version(name) for name in self.libraries}

    @property
    def calibrated(self) -> bool:
        """Whether the stage reads calibration samples."""
        return True

    @abstractmethod
    def check(self, checkpoint: Checkpoint, family: Family) -> list[str]:
        """Return the incompatibilities with this checkpoint, one line each with its remedy; reads headers only."""

    def schemes(self, checkpoint: Checkpoint, family: Family) -> dict[str, Scheme] | None:
        """Return the scheme of each linear that it quantizes, by name on disk; empty for a stage that quantizes none.

        None where only the run can tell; see `possible_schemes`.
        """
        del checkpoint, family
        return {}

    def reads_images(self, family: Family) -> bool:
        """Return whether the calibration samples must contain images."""
        del family
        return False

    def possible_schemes(self, checkpoint: Checkpoint, family: Family) -> list[dict[str, Scheme]]:
        """Return examples of the schemes of the result: an export that supports all of them supports every result of the stage.

        Empty where nothing is known before the run.
        """
        schemes = self.schemes(checkpoint, family)
        return [] if schemes is None else [schemes]

    @abstractmethod
    def predict_bytes(self, checkpoint: Checkpoint, family: Family) -> int | None:
        """Return the size of the weights it will write, in bytes; None where only the run can tell."""

    @abstractmethod
    def apply(self, context: StageContext) -> None:
        """Read the checkpoint at `context.source` and write the compressed one to `context.target`.

        Raises:
            CheckpointError: the weights cannot be used, NaN or infinite ones included.
        """
