"""The latencies of the original and its artifacts at a target's server, measured side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compress.eval.latency.results import Latency, read_latency
from compress.families import Family
from compress.hardware import describe
from compress.pipeline.steps.measure import AnyArtifact
from compress.pipeline.steps.step import ORIGINAL, Input, Step, StepContext
from compress.runtimes.runtime import ServingRuntime

if TYPE_CHECKING:
    from compress.eval.latency.settings import LatencySettings


@dataclass(frozen=True, eq=False)
class MeasureLatency(Step):
    """The latencies and throughputs of the models that a target runs."""

    revision: ClassVar[int] = 2
    feeds_verdict: ClassVar[bool] = True

    name: str
    settings: LatencySettings
    runtime: ServingRuntime
    """The target's runtime."""

    family: Family

    weights: Input
    """The original in safetensors."""

    artifacts: tuple[AnyArtifact, ...]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The models."""
        return (self.weights, *self.artifacts)

    def key_fields(self) -> object:
        """Return the load, the runtime's settings, speed fields and versions, and the machine that measures or is measured."""
        runtime = self.runtime
        speed_fields = runtime.model_dump(mode="json", include=set(runtime.speed_fields))
        names = [ORIGINAL, *(artifact.artifact for artifact in self.artifacts)]
        models = [[name, runtime.settings(name) | speed_fields] for name in names]
        return [
            models,
            self.settings.model_dump(mode="json"),
            self.settings.revision,
            runtime.revision,
            runtime.versions(),
            # The whole machine: a latency of another processor, memory size or GPU is another figure.
            describe(),
        ]

    def make(self, run: StepContext, target: Path) -> None:
        """Measure the models."""
        from compress.eval.latency.measure import LatencyContext, measure_latency
        from compress.eval.latency.results import write_latency

        context = LatencyContext(run.logs(self.name), run.progress, self.family, run.trust_remote_code)
        artifacts = {artifact.artifact: artifact.at(run) for artifact in self.artifacts}
        write_latency(target, measure_latency(self.runtime, self.weights.at(run), artifacts, self.settings, context))

    def read(self, folder: Path) -> Latency:
        """Return the latencies.

        Raises:
            DataError: they cannot be read.
        """
        return read_latency(folder)
