"""The selection of calibration samples, and the check that none of them is among the evaluation's items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.enough import enough_for
from compress.data.overlap import check_overlap
from compress.files import write_json
from compress.pipeline.steps.data import DataPin
from compress.pipeline.steps.model import PublishedModel
from compress.pipeline.steps.step import Input, Step, StepContext, versions_of
from compress.recipe.model import Calibration

if TYPE_CHECKING:
    from compress.eval.tasks.task import Task

_PLACES = {"source", "revision", "subset", "split", "image_folder"}
"""The fields of a set that say where its data lie; the digest of their content stands for them."""

PinnedTask = tuple["Task", DataPin | None]
"""A task and its data; None for a task without."""


def settings_of(tasks: Sequence[PinnedTask]) -> list[Any]:
    """Return what shapes the items of tasks, as plain JSON values."""
    return [[task.settings(), None if pin is None else pin.digest] for task, pin in tasks]


@dataclass(frozen=True, eq=False)
class Calibrate(Step):
    """Calibration samples, drawn and rendered with the model's own tokenizer and processor."""

    revision: ClassVar[int] = 4

    calibration: Calibration
    sets: tuple[DataPin, ...]
    model: PublishedModel
    weights: Input
    """The original in safetensors."""

    name: str = "calibration"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The original."""
        return (self.weights,)

    def input_keys(self) -> list[str]:
        """Return no key: of the original only the files beside the weights shape the samples."""
        return []

    @property
    def seed(self) -> int:
        """The seed that the samples are drawn with."""
        return self.calibration.seed

    def key_fields(self) -> object:
        """Return the sets, the digests of their data and of the tokenizer and processor, and the versions that render them."""
        sets = [
            [entry.model_dump(mode="json", exclude=_PLACES), pin.digest]
            for entry, pin in zip(self.calibration.sets, self.sets, strict=True)
        ]
        # Versions, as chat templates and image sizes are rendered by these libraries.
        return [sets, self.seed, self.model.side_key, versions_of("transformers", "tokenizers")]

    def make(self, run: StepContext, target: Path) -> None:
        """Draw the samples."""
        sets = tuple(
            PinnedSet(spec, pin.files(run.progress, enough_for(spec)), pin.label)
            for spec, pin in zip(self.calibration.sets, self.sets, strict=True)
        )
        collect(CalibrationSelection(self.seed, sets), self.weights.at(run), target, run.progress, run.trust_remote_code)


@dataclass(frozen=True, eq=False)
class CheckOverlap(Step):
    """The check that calibration samples and evaluation items have nothing in common."""

    revision: ClassVar[int] = 2

    calibration: Calibrate
    tasks: tuple[PinnedTask, ...]
    name: str = "overlap of calibration and evaluation"

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The calibration samples."""
        return (self.calibration,)

    def key_fields(self) -> object:
        """Return the tasks and the digests of their data."""
        return settings_of(self.tasks)

    def make(self, run: StepContext, target: Path) -> None:
        """Check the items of every task.

        Raises:
            DataError: a sample is among them.
        """
        warnings: list[str] = []
        for task, pin in self.tasks:
            if pin is not None:
                questions, documents = task.contents(pin.files(run.progress))
                warnings += check_overlap(self.calibration.at(run), questions, documents)
        for warning in warnings[:1]:
            others = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
            run.progress.warn(warning + others)
        write_json(target / "overlap.json", {"overlap": [], "warnings": warnings})
