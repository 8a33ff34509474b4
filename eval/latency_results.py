"""What was measured of latency: the content of `latency.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from compress.errors import DataError
from compress.eval.latency import LatencySettings, LoadPoint
from compress.files import write_text
from compress.runtimes.vllm_ladder import LadderStep
from compress.schema import Frozen

LATENCY = "latency.json"

Figure = Literal["ttft", "tpot", "itl", "e2el"]
FIGURES: tuple[Figure, ...] = ("ttft", "tpot", "itl", "e2el")
"""Time to the first token; mean time per further token of a request; time between two tokens; end to end."""
Statistic = Literal["mean", "p50", "p90", "p95", "p99"]
STATISTICS: tuple[Statistic, ...] = ("mean", "p50", "p90", "p95", "p99")
RATES = ("request_rate", "output_token_rate")
"""Requests and output tokens per second."""


class Percentiles(Frozen):
    """A figure over all requests, in milliseconds; percentiles are interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


class LoadResult(Frozen):
    """What one load gave: figures over the requests that were answered, None where there is none to take them from.

    `request_rate`, `output_token_rate` and `goodput` (requests that keep the goal) are per second, `within_goal` is the share of
    all requests that keep it; both None without one. `faults` counts the failed by what was said of them. `client` put the load on.
    """

    requests: int
    failed: int
    seconds: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    itl: Percentiles | None
    e2el: Percentiles | None
    request_rate: float
    output_token_rate: float
    goodput: float | None = None
    within_goal: float | None = None
    faults: Mapping[str, int] = Field(default_factory=lambda: dict[str, int]())
    client: Literal["vllm bench serve", "compress"]

    def figure(self, figure: str) -> Percentiles | None:
        """Return a figure by its name."""
        found: Percentiles | None = getattr(self, figure)
        return found


class Estimate(Frozen):
    """A number and its bounds, each with the confidence of the settings; None where the data allow none."""

    value: float
    interval: tuple[float, float] | None = None


class Telemetry(Frozen):
    """What a server used while it was under load; what could not be read is None.

    `memory_bytes` is the most that its processes held at once: on a GPU without the cache for keys and values, which takes whatever
    share of the memory it is given. `cpu_seconds` are of all its processes; `energy_joules` of the GPUs it ran on.
    """

    seconds: float
    cpu_seconds: float | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    cache_bytes: int | None = None
    gpu_utilisation: float | None = None
    mean_watts: float | None = None
    energy_joules: float | None = None
    joules_per_request: float | None = None
    cpu_seconds_per_request: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """The server's peak: on the device, less its cache, where it has one; else in the host's memory."""
        if self.peak_device_bytes is None:
            return self.peak_host_bytes
        return max(self.peak_device_bytes - (self.cache_bytes or 0), 0)


class PointLatency(Frozen):
    """One model at one point: `pooled` over all rounds, `rounds` each by itself.

    `figures` are `ttft_p50`, … in milliseconds and the rates; `ratios` are the same over the original's, empty for the original
    itself. A `goodput` is among them where a goal is set.
    """

    point: LoadPoint
    pooled: LoadResult
    rounds: tuple[LoadResult, ...]
    figures: Mapping[str, Estimate]
    ratios: Mapping[str, Estimate] = Field(default_factory=lambda: dict[str, Estimate]())
    telemetry: Telemetry | None = None


class Trial(Frozen):
    """One concurrency that was tried, and whether at least 95 % of the requests kept the goal."""

    concurrency: int
    held: bool
    result: LoadResult


class Best(Frozen):
    """The concurrency found for one kind of requests: with the most output tokens per second among those that kept the goal.

    `concurrency` is None where even one request at a time missed it. `trials` are in the order they were made.
    """

    shape: LoadPoint
    concurrency: int | None
    output_token_rate: float | None
    trials: tuple[Trial, ...]


class Component(Frozen):
    """The time that one part of the model took, in milliseconds: the median over the repeats and the least."""

    component: Literal["vision", "projector", "prefill", "decode"]
    median_ms: float
    least_ms: float
    repeats: int


class ComponentTable(Frozen):
    """Where the time goes within the model, computed in this process by transformers with dense weights, or by ONNX Runtime.

    `prefill` is the decoder over the whole prompt, without what is done of images; `decode` is one further token.
    """

    runtime: Literal["transformers", "onnxruntime"] = "transformers"
    device: str
    dtype: str
    point: LoadPoint
    sequence_tokens: int
    components: tuple[Component, ...]


class ModelLatency(Frozen):
    """All of one model: the points, what `auto` found, what its server used at most, and where the time goes."""

    name: str
    points: tuple[PointLatency, ...]
    best: tuple[Best, ...] = ()
    memory_bytes: int | None = None
    memory_ratio: float | None = None
    components: ComponentTable | None = None

    def at(self, point: LoadPoint) -> PointLatency | None:
        """Return what was measured at a point."""
        return next((row for row in self.points if row.point == point), None)


class Latency(Frozen):
    """All of one target: the original and every artifact under the same loads, in alternation.

    `steps` are what was lowered, for every model alike, because a server ran out of memory while it loaded.
    """

    revision: int
    runtime: str
    settings: LatencySettings
    hardware: Mapping[str, object]
    versions: Mapping[str, str]
    original: ModelLatency
    artifacts: Mapping[str, ModelLatency]
    steps: tuple[LadderStep, ...] = ()
    notes: tuple[str, ...] = ()


def write_latency(folder: Path, latency: Latency) -> None:
    """Write what was measured as `latency.json`."""
    write_text(folder / LATENCY, latency.model_dump_json(indent=2) + "\n")


def read_latency(folder: Path) -> Latency:
    """Read what was measured.

    Raises:
        DataError: it is not there or damaged; run the measurement again.
    """
    path = folder / LATENCY
    try:
        return Latency.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure again with --fresh") from error
    except ValidationError as error:
        raise DataError(f"{path}: no latency measurement; measure again with --fresh") from error
