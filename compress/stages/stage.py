"""What every compression method is: a part of a recipe that turns one checkpoint into another."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compress.checkpoint import Checkpoint
from compress.families import Family
from compress.numerics.scheme import Scheme
from compress.progress import Progress
from compress.schema import Frozen


@dataclass(frozen=True)
class StageContext:
    """What a stage is given beside its own fields.

    `source` is the checkpoint it reads, `target` the folder it fills with a whole checkpoint, `calibration` the folder
    that `compress.calibration.collect` wrote (None where the stage needs none). `target`
    is empty, or holds what the same stage had finished there when it was killed. `logs` is a folder, made when needed, where
    a program that the stage starts leaves what it prints.
    """

    source: Path
    target: Path
    calibration: Path | None
    family: Family
    device: str
    seed: int
    progress: Progress
    trust_remote_code: bool = False
    logs: Path | None = None


class Stage(Frozen, ABC):
    """One compression method with its settings; keeps nothing beyond its fields."""

    stage: Any
    """The row it stands for in the table of stages."""

    revision: ClassVar[int]
    """Raised whenever the same settings give another result, so that the store forgets the old one."""

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    """The distributions whose versions shape the result."""

    def versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that shape the result.

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
        """Return what stands against running on this checkpoint, one line each with its remedy; reads headers only."""

    def schemes(self, checkpoint: Checkpoint, family: Family) -> dict[str, Scheme] | None:
        """Return how each linear that it quantizes will be held, by its name on disk; empty for a stage that quantizes none.

        None where only the run can tell; exports are checked then.
        """
        del checkpoint, family
        return {}

    def reads_images(self, family: Family) -> bool:
        """Return whether it cannot be done without images among the calibration samples."""
        del family
        return False

    def possible_schemes(self, checkpoint: Checkpoint, family: Family) -> list[dict[str, Scheme]]:
        """Return samples of how the linears may be held, such that an export which takes them takes every result of the stage.

        Empty where nothing can be said before the run.
        """
        made = self.schemes(checkpoint, family)
        return [] if made is None else [made]

    @abstractmethod
    def predict_bytes(self, checkpoint: Checkpoint, family: Family) -> int | None:
        """Return the expected size of the weights it writes, in bytes; None where only the run can tell."""

    @abstractmethod
    def apply(self, context: StageContext) -> None:
        """Read the checkpoint at `context.source` and write the compressed one to `context.target`.

        Raises:
            CheckpointError: the weights cannot be used, NaN or infinite ones included.
        """
