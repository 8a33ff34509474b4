"""Measuring latency: a server for the original and each artifact in turn, again and again, each under the same loads."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from compress.eval.concurrency import find_best
from compress.eval.latency import LatencySettings, LoadPoint
from compress.eval.latency_figures import estimates, pool, ratios, summarize
from compress.eval.latency_results import Best, ComponentTable, Latency, LoadResult, ModelLatency, PointLatency, Telemetry
from compress.eval.load_generator import Load, make_prompts
from compress.eval.server_under_load import Loading, loading
from compress.eval.telemetry import combine
from compress.hardware import describe, gpus
from compress.progress import Progress
from compress.runtimes.onnxruntime import Onnxruntime
from compress.runtimes.runtime import OpenContext, Runtime
from compress.runtimes.vllm import Vllm
from compress.runtimes.vllm_ladder import LadderStep, carried


@dataclass(frozen=True)
class LatencyContext:
    """Where logs belong, who watches, and whether the artifacts' own code may run."""

    logs: Path
    progress: Progress
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Model:
    """A model that is measured, and what was measured so far: per point a load and its telemetry of each round, and searches."""

    name: str
    path: Path
    loads: dict[LoadPoint, list[Load]] = field(default_factory=lambda: dict[LoadPoint, list[Load]]())
    telemetry: dict[LoadPoint, list[Telemetry]] = field(default_factory=lambda: dict[LoadPoint, list[Telemetry]]())
    best: list[Best] = field(default_factory=lambda: list[Best]())

    def discard(self) -> None:
        self.loads.clear()
        self.telemetry.clear()
        self.best.clear()


class _LoweredError(Exception):
    """A server came up with less than those that were measured before it."""


def measure_latency(
    runtime: Runtime, original: Path, artifacts: Mapping[str, Path], settings: LatencySettings, context: LatencyContext
) -> Latency:
    """Put the same loads on a server for the original and for each artifact, in alternation on this machine, and compare.

    Each round starts a server per model, in turn, and in the opposite order every second round, so that what drifts in a machine
    falls on all alike. Every load is preceded by requests that do not count. Where a server runs out of memory while it loads,
    every model is measured with what that one came up with. Requests that fail are counted, and are in no time.

    Raises:
        UsageError: the runtime has no server.
        MissingError: the runtime is not installed, or an artifact has no tokenizer.
        ServerError: a server did not come up, does not answer requests of such a size, or ended under load.
    """
    measuring = _Measuring(runtime, original, artifacts, settings, context)
    measuring.run()
    return measuring.result()


class _Measuring:
    def __init__(
        self, runtime: Runtime, original: Path, artifacts: Mapping[str, Path], settings: LatencySettings, context: LatencyContext
    ) -> None:
        self._runtime = runtime
        self._original = _Model("original", original)
        self._models = (self._original, *(_Model(name, path) for name, path in artifacts.items()))
        self._settings = settings
        self._context = context
        self._steps: list[LadderStep] = []

    def run(self) -> None:
        """Measure every model, and all anew where one of them makes do with less memory than those before it."""
        while True:
            for model in self._models:
                model.discard()
            try:
                self._measure(self._settings.points if self._settings.concurrency != "auto" else self._search())
            except _LoweredError:
                continue
            return

    def result(self) -> Latency:
        """Return what was measured, and the time that each part of the models takes."""
        original = self._model_latency(self._original, None)
        return Latency(
            revision=LatencySettings.revision,
            runtime=str(self._runtime.runtime),
            settings=self._settings,
            hardware=describe(),
            versions=self._runtime.versions(),
            original=original,
            artifacts={model.name: self._model_latency(model, original) for model in self._models[1:]},
            steps=tuple(self._steps),
            notes=tuple(self._notes()),
        )

    def _measure(self, points: tuple[LoadPoint, ...]) -> None:
        rounds = self._settings.rounds
        with self._context.progress.task("measure latency", rounds * len(self._models) * len(points), "loads") as advance:
            for number in range(rounds):
                for model in self._models if number % 2 == 0 else reversed(self._models):
                    with self._serving(model) as server:
                        for point in points:
                            what = f"{model.name} at concurrency {point.concurrency}, round {number + 1} of {rounds}"
                            with self._context.progress.task(what, 1, "loads") as done:
                                load, telemetry = server.put(point, f"round {number}")
                                done(1)
                            model.loads.setdefault(point, []).append(load)
                            model.telemetry.setdefault(point, []).append(telemetry)
                            advance(1)

    def _search(self) -> tuple[LoadPoint, ...]:
        """Find each model's best concurrency for each shape; return the points that were best for any, and one at a time."""
        points: list[LoadPoint] = []
        with self._context.progress.task("find concurrency", len(self._models), "models") as advance:
            for model in self._models:
                with self._serving(model) as server:

                    def measure(point: LoadPoint, server: Loading = server) -> LoadResult:
                        return summarize(server.put(point, "search")[0], self._settings.goal)

                    for shape in self._settings.shapes:
                        model.best.append(find_best(shape, self._settings.max_concurrency, measure))
                advance(1)
        for place, shape in enumerate(self._settings.shapes):
            found = {model.best[place].concurrency or 1 for model in self._models}
            points += [shape.at(concurrency) for concurrency in sorted({1, *found})]
        return tuple(points)

    @contextmanager
    def _serving(self, model: _Model) -> Generator[Loading]:
        """Bring up a model's server; what it lowered to come up holds for every server after it."""
        context, steps = self._context, list[LadderStep]()
        with loading(self._runtime, replace(self._opening(model), lowered=steps.append), self._settings) as server:
            if steps:
                self._steps += steps
                if isinstance(self._runtime, Vllm):
                    self._runtime = self._runtime.model_copy(update=carried(self._runtime.model_dump(), steps))
                if any(other.loads or other.best for other in self._models):
                    context.progress.warn("the models measured so far are measured anew, with as little memory as this one has")
                    raise _LoweredError
            yield server

    def _opening(self, model: _Model) -> OpenContext:
        context = self._context
        return OpenContext(model.path, context.logs / model.name, context.progress, context.trust_remote_code, model.name)

    def _model_latency(self, model: _Model, original: ModelLatency | None) -> ModelLatency:
        points = tuple(self._point_latency(model, point, compared=original is not None) for point in model.loads)
        peaks = [row.telemetry.memory_bytes for row in points if row.telemetry and row.telemetry.memory_bytes]
        memory = max(peaks, default=None)
        before = original.memory_bytes if original is not None else None
        return ModelLatency(
            name=model.name,
            points=points,
            best=tuple(model.best),
            memory_bytes=memory,
            memory_ratio=memory / before if memory and before else None,
            components=self._components(model),
        )

    def _point_latency(self, model: _Model, point: LoadPoint, *, compared: bool) -> PointLatency:
        goal, confidence, loads = self._settings.goal, self._settings.confidence, model.loads[point]
        pooled = summarize(pool(loads), goal)
        return PointLatency(
            point=point,
            pooled=pooled,
            rounds=tuple(summarize(load, goal) for load in loads),
            figures=estimates(loads, goal, confidence),
            ratios=ratios(self._original.loads[point], loads, goal, confidence) if compared else {},
            telemetry=combine(model.telemetry[point], pooled.requests - pooled.failed),
        )

    def _components(self, model: _Model) -> ComponentTable | None:
        settings = self._settings
        if not settings.component_repeats:
            return None
        shape = settings.shapes[0]
        prompt = make_prompts(model.path, shape, 1, settings.seed_of(shape, "components"))[0]
        return self._runtime.time_components(self._opening(model), shape, prompt, settings.component_repeats)

    def _notes(self) -> list[str]:
        notes: list[str] = []
        clients = {load.client for model in self._models for loads in model.loads.values() for load in loads}
        if len(clients) > 1:
            notes.append("Not all loads were put on by the same client: servers of this target differ in the requests they take.")
        if isinstance(self._runtime, Vllm) and self._runtime.url is None and self._runtime.eager and gpus():
            notes.append("The server ran with eager: true, without CUDA graphs; eager: false is what a deployment would set.")
        if isinstance(self._runtime, Onnxruntime):
            notes.append(
                "The server makes one answer after the other: requests queue. Its memory includes the libraries that prepare "
                "prompts, which draws ratios of memory towards one."
            )
        elif self._settings.component_repeats:
            notes.append("The components are of the dense model: quantized weights are unpacked before they are timed.")
        return notes
