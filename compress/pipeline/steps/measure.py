"""The measurement of the original or an artifact on a target: answers, likelihoods, grounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compress.eval.measure import MeasureContext, measure
from compress.eval.results import ItemizedMeasurement, read_measurement
from compress.families import Family
from compress.gate.gate import Gate
from compress.pipeline.steps.calibration import PinnedTask, settings_of
from compress.pipeline.steps.export import ExportArtifact
from compress.pipeline.steps.model import ExistingArtifact
from compress.pipeline.steps.step import ORIGINAL, Input, Step, StepContext
from compress.recipe.model import AnyEvaluation, Target
from compress.runtimes.runtime import OpenContext, Served

AnyArtifact = ExportArtifact | ExistingArtifact
"""An artifact that is measured."""


@dataclass(frozen=True, eq=False)
class Measure(Step):
    """The items of every task, with answers and scores, of one model on one target."""

    revision: ClassVar[int] = 6
    resumes: ClassVar[bool] = True  # answers are journalled
    feeds_verdict: ClassVar[bool] = True

    name: str
    evaluation: AnyEvaluation
    tasks: tuple[PinnedTask, ...]
    target: Target
    family: Family
    devices: tuple[str, ...]

    weights: Input
    """The original in safetensors."""

    artifact: AnyArtifact | None
    """The artifact that is measured; None for the original."""

    original: Measure | None
    """The measurement of the original on the same target; None for the original's own."""

    @property
    def model(self) -> str:
        """The name of the model that is measured."""
        return ORIGINAL if self.artifact is None else self.artifact.artifact

    @property
    def gate(self) -> Gate:
        """The limits that stop a measurement once they are decided."""
        return self.evaluation.gate

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The model that is measured, and the original's measurement."""
        if self.artifact is None or self.original is None:
            return (self.weights,)
        return (self.artifact, self.original)

    @property
    def noise_samples(self) -> int:
        """How many items of each task are asked again: of the original alone, at a server."""
        # In process the same batches give the same bits: there is no noise to measure.
        return self.evaluation.eval.noise if self.original is None and Served in self.target.runtime.offers else 0

    def key_fields(self) -> object:
        """Return the tasks, what is compared and when it stops, the runtime with its settings and versions, and the devices."""
        stopping = self.gate.stopping(self.target.name, self.evaluation.eval.judged_tasks)
        # Of the original only how many looks there are shapes its records; it is measured on all items, whatever the limits.
        looks = {name: rule.looks if self.original is None else rule.describe() for name, rule in stopping.items()}
        check = self.evaluation.eval.grounding
        # An artifact that fails grounding is measured on nothing else, so that this limit shapes its measurement.
        confidence = None if self.original is None else self.gate.grounding_confidence(self.target.name)
        comparison = [looks, self.noise_samples, None if check is None else check.model_dump(mode="json"), confidence]
        runtime = self.target.runtime
        return [
            settings_of(self.tasks),
            comparison,
            [runtime.settings(self.model), runtime.revision, runtime.versions(), list(self.devices)],
        ]

    def make(self, run: StepContext, target: Path) -> None:
        """Measure the model; what an interrupted measurement has journalled is not asked again."""
        logs = run.logs(self.name.removeprefix("measure "))
        context = MeasureContext(
            original_checkpoint=self.weights.at(run),
            data={task.name: pin.files(run.progress) for task, pin in self.tasks if pin is not None},
            output_dir=target,
            original_measurement=None if self.original is None else self.original.at(run),
            progress=run.progress,
            logs=logs,
            stopping=self.gate.stopping(self.target.name, self.evaluation.eval.judged_tasks),
            noise_samples=self.noise_samples,
            grounding=self.evaluation.eval.grounding,
            grounding_confidence=self.gate.grounding_confidence(self.target.name),
        )
        opening = OpenContext(
            artifact=(self.artifact or self.weights).at(run),
            logs=logs,
            progress=run.progress,
            family=self.family,
            trust_remote_code=run.trust_remote_code,
            name=self.model,
        )
        with self.target.runtime.open(opening) as session:
            measure(session, self.evaluation.eval.tasks, context)

    def read(self, folder: Path) -> ItemizedMeasurement:
        """Return the measurement.

        Raises:
            DataError: it cannot be read.
        """
        return read_measurement(folder)
