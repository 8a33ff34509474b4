"""The results of latency measurements: the content of `latency.json`, whose keys are the field names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.eval.latency.settings import LatencySettings, LoadPoint
from compress.eval.results import read_record
from compress.files import write_text
from compress.recipe.schema import Frozen
from compress.runtimes.vllm.memory_fallback import MemoryFallback

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
    """The results of one load, over the answered requests; figures are None where there are none."""

    requests: int
    failed: int
    """Requests without an answer."""

    seconds: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    itl: Percentiles | None
    e2el: Percentiles | None
    request_rate: float
    """Requests per second."""

    output_token_rate: float
    """Output tokens per second."""

    goodput: float | None = None
    """Requests per second that meet the goal, None without one."""

    within_goal: float | None = None
    """The share of all requests that meet the goal, None without one."""

    faults: Mapping[str, int] = Field(default_factory=lambda: dict[str, int]())
    """The number of failed requests by message."""

    client: Literal["vllm bench serve", "compress"]
    """The load generator."""

    def figure(self, figure: str) -> Percentiles | None:
        """Return a figure by its name."""
        percentiles: Percentiles | None = getattr(self, figure)
        return percentiles


class Estimate(Frozen):
    """An estimate and its bounds, each with the confidence of the settings; None where the data allow none."""

    value: float
    interval: tuple[float, float] | None = None


class Telemetry(Frozen):
    """A server's resources under load; what could not be read is None."""

    seconds: float
    cpu_seconds: float | None = None
    """Of all its processes."""

    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    cache_bytes: int | None = None
    gpu_utilisation: float | None = None
    mean_watts: float | None = None
    energy_joules: float | None = None
    """Of the GPUs that it ran on."""

    joules_per_request: float | None = None
    cpu_seconds_per_request: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """The server's peak memory: on the device without its KV cache, which takes the share it is given; else in host memory."""
        if self.peak_device_bytes is None:
            return self.peak_host_bytes
        # vLLM fills its share of the GPU with cache whatever the weights: with it, all artifacts would have the original's size.
        return max(self.peak_device_bytes - (self.cache_bytes or 0), 0)


class PointLatency(Frozen):
    """One model's results at one point."""

    point: LoadPoint
    pooled: LoadResult
    """Over all rounds."""

    rounds: tuple[LoadResult, ...]
    figures: Mapping[str, Estimate]
    """`ttft_p50`, … in milliseconds, the rates, and with a goal `goodput`."""

    ratios: Mapping[str, Estimate] = Field(default_factory=lambda: dict[str, Estimate]())
    """The figures over the original's; empty for the original itself."""

    telemetry: Telemetry | None = None


class Trial(Frozen):
    """One concurrency that was tried."""

    concurrency: int
    held: bool
    """Whether at least 95 % of the requests met the goal."""

    result: LoadResult


class Best(Frozen):
    """The concurrency with the most output tokens per second that met the goal, for one kind of requests."""

    shape: LoadPoint
    concurrency: int | None
    """None where even one request at a time missed the goal."""

    output_token_rate: float | None
    trials: tuple[Trial, ...]
    """In the order of the search."""


class Component(Frozen):
    """The time of one component of the model, in milliseconds: the median and the minimum over the repeats."""

    component: Literal["vision", "projector", "prefill", "decode"]
    median_ms: float
    least_ms: float
    repeats: int


class ComponentTable(Frozen):
    """The time of each component of the model, run in this process; see `Runtime.time_components`.

    `prefill` is the decoder over the prompt, without the vision tower and the projector; `decode` is one further token.
    """

    runtime: str
    """What ran them."""

    device: str
    dtype: str
    point: LoadPoint
    sequence_tokens: int
    components: tuple[Component, ...]


class ModelLatency(Frozen):
    """One model's results."""

    name: str
    points: tuple[PointLatency, ...]
    best: tuple[Best, ...] = ()
    """What `concurrency: auto` found, by shape."""

    memory_bytes: int | None = None
    """The server's peak memory over all points; see `Telemetry.memory_bytes`."""

    memory_ratio: float | None = None
    """The peak over the original's."""

    components: ComponentTable | None = None

    def at(self, point: LoadPoint) -> PointLatency | None:
        """Return the results at a point, None where there are none."""
        return next((row for row in self.points if row.point == point), None)


class Latency(Frozen):
    """The results of one target: the original and every artifact under the same loads, in alternation."""

    revision: int
    runtime: str
    settings: LatencySettings
    hardware: Mapping[str, object]
    versions: Mapping[str, str]
    original: ModelLatency
    artifacts: Mapping[str, ModelLatency]
    steps: tuple[MemoryFallback, ...] = ()
    """Settings that were lowered, for every model alike, because a server ran out of memory while it loaded."""

    notes: tuple[str, ...] = ()


def write_latency(folder: Path, latency: Latency) -> None:
    """Write `latency.json`."""
    write_text(folder / LATENCY, latency.model_dump_json(indent=2) + "\n")


def read_latency(folder: Path) -> Latency:
    """Read `latency.json`.

    Raises:
        DataError: it is not there or damaged; run the measurement again.
    """
    return read_record(folder / LATENCY, Latency, "latency measurement")
