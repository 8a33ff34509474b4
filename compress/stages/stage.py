"""The interface of a compression method: an entry of a recipe's `stages` that turns one checkpoint into another."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compress.checkpoints.spec import CheckpointSpec
from compress.families import Family
from compress.progress import Progress
from compress.recipe.schema import Frozen


@dataclass(frozen=True)
class StagePlan:
    """What a stage does to a checkpoint of a given spec, from headers alone."""

    faults: tuple[str, ...] = ()
    """The incompatibilities with the checkpoint, one line each with its remedy; other fields count only without any."""

    after: tuple[CheckpointSpec, ...] = ()
    """The spec of the checkpoint that it leaves.

    Several where the run decides: examples, so that a stage or export which supports all of them supports every result. None where
    nothing is known before the run.
    """

    exact: bool = True
    """Whether the one spec of `after` is what the stage will leave, rather than an example."""

    max_bytes: int | None = None
    """The largest size of the weights that it can leave, in bytes; None where only the run can tell."""

    reads_images: bool = False
    """Whether its calibration samples must contain images."""

    notes: tuple[str, ...] = ()
    """What a user should know of its settings."""


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
        """Whether the stage reads calibration samples: known from its settings, before there is a model to plan with."""
        return True

    @abstractmethod
    def plan(self, before: CheckpointSpec) -> StagePlan:
        """Return what it needs of a checkpoint and leaves of it."""

    @abstractmethod
    def apply(self, context: StageContext) -> None:
        """Read the checkpoint at `context.source` and write the compressed one to `context.target`.

        Raises:
            CheckpointError: the weights cannot be used, NaN or infinite ones included.
        """
