"""Measuring latency: the same loads on a server of the original and of each artifact, in alternation over several rounds."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from compress.eval.latency.concurrency import find_best
from compress.eval.latency.figures import estimates, pool, ratios, summarize
from compress.eval.latency.load_generator import Load, make_prompts
from compress.eval.latency.results import Best, ComponentTable, Latency, LoadResult, ModelLatency, PointLatency, Telemetry
from compress.eval.latency.server_under_load import ServerUnderLoad, serve_under_load
from compress.eval.latency.settings import LatencySettings, LoadPoint
from compress.eval.latency.telemetry import combine
from compress.families import Family
from compress.hardware import describe
from compress.progress import Progress
from compress.runtimes.runtime import OpenContext, ServingRuntime
from compress.runtimes.vllm.memory_fallback import MemoryFallback


@dataclass(frozen=True)
class LatencyContext:
    """The folder for logs, the progress, the models' family, and whether the artifacts' own code may run."""

    logs: Path
    progress: Progress
    family: Family
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Model:
    """A model with its measurements so far: each round's load and telemetry by point, and the searches for concurrency."""

    name: str
    path: Path
    loads: dict[LoadPoint, list[Load]] = field(default_factory=lambda: dict[LoadPoint, list[Load]]())
    telemetry: dict[LoadPoint, list[Telemetry]] = field(default_factory=lambda: dict[LoadPoint, list[Telemetry]]())
    best: list[Best] = field(default_factory=lambda: list[Best]())

    # What was measured with more memory does not compare with what follows.
    def discard(self) -> None:
        self.loads.clear()
        self.telemetry.clear()
        self.best.clear()


class _LoweredError(Exception):
    """A server came up only with lowered settings, after others were measured with higher ones."""


def measure_latency(
    runtime: ServingRuntime, original: Path, artifacts: Mapping[str, Path], settings: LatencySettings, context: LatencyContext
) -> Latency:
    """Run the same loads on a server of the original and of each artifact, in alternation on this machine, and compare.

    Each round starts a server per model, in turn, and in the opposite order every second round, so that drift of the machine
    affects all models alike. Warm-up requests precede every load. Where a server runs out of memory while it loads, every model
    is measured with the settings that this one came up with. Failed requests are counted, and have no times.

    Raises:
        MissingError: the runtime is not installed, or an artifact has no tokenizer.
        ServerError: a server did not come up, does not answer requests of such a size, or ended under load.
    """
    measurement = _LatencyMeasurement(runtime, original, artifacts, settings, context)
    measurement.run()
    return measurement.result()


class _LatencyMeasurement:
    def __init__(
        self,
        runtime: ServingRuntime,
        original: Path,
        artifacts: Mapping[str, Path],
        settings: LatencySettings,
        context: LatencyContext,
    ) -> None:
        self._runtime = runtime
        self._original = _Model("original", original)
        self._models = (self._original, *(_Model(name, path) for name, path in artifacts.items()))
        self._settings = settings
        self._context = context
        self._steps: list[MemoryFallback] = []

    def run(self) -> None:
        """Measure every model, and all of them again where one needs lower settings than those before it."""
        while True:
            for model in self._models:
                model.discard()
            try:
                self._measure(self._settings.points if self._settings.concurrency != "auto" else self._search())
            except _LoweredError:
                continue
            return

    def result(self) -> Latency:
        """Return the results, with the times of the models' components."""
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
                # Reversed every second round: a machine that warms up slows whatever is measured last.
                for model in self._models if number % 2 == 0 else reversed(self._models):
                    with self._serving(model) as server:
                        for point in points:
                            title = f"{model.name} at concurrency {point.concurrency}, round {number + 1} of {rounds}"
                            with self._context.progress.task(title, 1, "loads") as done:
                                load, telemetry = server.run_load(point, f"round {number}")
                                done(1)
                            model.loads.setdefault(point, []).append(load)
                            model.telemetry.setdefault(point, []).append(telemetry)
                            advance(1)

    def _search(self) -> tuple[LoadPoint, ...]:
        """Find each model's best concurrency for each shape; return the points that were best for any model, and concurrency 1."""
        points: list[LoadPoint] = []
        with self._context.progress.task("find concurrency", len(self._models), "models") as advance:
            for model in self._models:
                with self._serving(model) as server:

                    def measure(point: LoadPoint, server: ServerUnderLoad = server) -> LoadResult:
                        return summarize(server.run_load(point, "search")[0], self._settings.goal)

                    for shape in self._settings.shapes:
                        model.best.append(find_best(shape, self._settings.max_concurrency, measure))
                advance(1)
        # Every model is measured at every model's best: a figure at one's own best alone could not be compared.
        for index, shape in enumerate(self._settings.shapes):
            best = {model.best[index].concurrency or 1 for model in self._models}
            # 1 as well: the latency that a single user sees.
            points += [shape.at(concurrency) for concurrency in sorted({1, *best})]
        return tuple(points)

    @contextmanager
    def _serving(self, model: _Model) -> Generator[ServerUnderLoad]:
        """Start a model's server; settings that it lowers to come up apply to every server after it."""
        context, steps = self._context, list[MemoryFallback]()
        with serve_under_load(
            self._runtime, replace(self._open_context(model), on_fallback=steps.append), self._settings
        ) as server:
            if steps:
                self._steps += steps
                self._runtime = self._runtime.lowered(steps)
                # The lowered settings stay for all: a smaller cache or batch is another server.
                if any(other.loads or other.best for other in self._models):
                    context.progress.warn("the models measured so far are measured anew, with as little memory as this one has")
                    raise _LoweredError
            yield server

    def _open_context(self, model: _Model) -> OpenContext:
        context = self._context
        logs = context.logs / model.name
        return OpenContext(model.path, logs, context.progress, context.family, context.trust_remote_code, model.name)

    def _model_latency(self, model: _Model, original: ModelLatency | None) -> ModelLatency:
        points = tuple(self._point_latency(model, point, compared=original is not None) for point in model.loads)
        # The highest over all points: a limit on memory is about what a machine must have.
        peaks = [row.telemetry.memory_bytes for row in points if row.telemetry and row.telemetry.memory_bytes]
        memory = max(peaks, default=None)
        original_memory = original.memory_bytes if original is not None else None
        return ModelLatency(
            name=model.name,
            points=points,
            best=tuple(model.best),
            memory_bytes=memory,
            memory_ratio=memory / original_memory if memory and original_memory else None,
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
        return self._runtime.time_components(self._open_context(model), shape, prompt, settings.component_repeats)

    def _notes(self) -> list[str]:
        notes: list[str] = []
        clients = {load.client for model in self._models for loads in model.loads.values() for load in loads}
        if len(clients) > 1:
            notes.append("Not all loads were put on by the same client: servers of this target differ in the requests they take.")
        return [*notes, *self._runtime.latency_notes(components=self._settings.component_repeats > 0)]
