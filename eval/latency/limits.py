"""The gate's limits on latency and memory, and the figures that they are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compress.recipe.schema import Frozen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["ratio", "absolute"]


@dataclass(frozen=True)
class LimitedFigure:
    """The figure that a limit is on."""

    figure: str
    """Its name in `PointLatency.figures` and `ratios`."""

    kind: Kind
    """Whether it is the artifact's figure, or that over the original's."""

    description: str
    is_upper: bool = True
    """Whether the limit is an upper one."""

    unit: str = ""


LIMITED_FIGURES = {
    "max_p50_ratio": LimitedFigure("e2el_p50", "ratio", "median time of a request"),
    "max_p95_ratio": LimitedFigure("e2el_p95", "ratio", "95th percentile of the time of a request"),
    "max_p99_ratio": LimitedFigure("e2el_p99", "ratio", "99th percentile of the time of a request"),
    "max_ttft_p50_ratio": LimitedFigure("ttft_p50", "ratio", "median time to the first token"),
    "max_ttft_p95_ratio": LimitedFigure("ttft_p95", "ratio", "95th percentile of the time to the first token"),
    "max_tpot_p50_ratio": LimitedFigure("tpot_p50", "ratio", "median time per further token"),
    "max_tpot_p95_ratio": LimitedFigure("tpot_p95", "ratio", "95th percentile of the time per further token"),
    "max_itl_p95_ratio": LimitedFigure("itl_p95", "ratio", "95th percentile of the time between tokens"),
    "min_throughput_ratio": LimitedFigure("output_token_rate", "ratio", "output tokens per second", is_upper=False),
    "min_goodput_ratio": LimitedFigure("goodput", "ratio", "requests per second that keep the goal", is_upper=False),
    "max_e2el_p95_ms": LimitedFigure("e2el_p95", "absolute", "95th percentile of the time of a request", unit=" ms"),
    "max_ttft_p95_ms": LimitedFigure("ttft_p95", "absolute", "95th percentile of the time to the first token", unit=" ms"),
    "max_tpot_p95_ms": LimitedFigure("tpot_p95", "absolute", "95th percentile of the time per further token", unit=" ms"),
    "min_output_tokens_per_second": LimitedFigure("output_token_rate", "absolute", "output tokens per second", is_upper=False),
    "min_goodput": LimitedFigure("goodput", "absolute", "requests per second that keep the goal", is_upper=False),
}
"""Each limit's figure."""


class LatencyLimit(Frozen):
    """Limits at every measured point, which the figure's confidence interval must meet as a whole.

    `max_…_ratio` and `min_…_ratio` are over the original's figure under the same load; `max_p50_ratio`, `max_p95_ratio` and
    `max_p99_ratio` are of the end-to-end time of a request. `…_ms`, `min_output_tokens_per_second` and `min_goodput` are the
    artifact's own figures. `max_failed_share` is the share of requests that may fail.
    """

    max_p50_ratio: Positive | None = None
    max_p95_ratio: Positive | None = None
    max_p99_ratio: Positive | None = None
    max_ttft_p50_ratio: Positive | None = None
    max_ttft_p95_ratio: Positive | None = None
    max_tpot_p50_ratio: Positive | None = None
    max_tpot_p95_ratio: Positive | None = None
    max_itl_p95_ratio: Positive | None = None
    min_throughput_ratio: Positive | None = None
    min_goodput_ratio: Positive | None = None
    max_e2el_p95_ms: Positive | None = None
    max_ttft_p95_ms: Positive | None = None
    max_tpot_p95_ms: Positive | None = None
    min_output_tokens_per_second: Positive | None = None
    min_goodput: Positive | None = None
    max_failed_share: Share = 0.0

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not self.limits:
            raise ValueError(f"sets no limit; write at least one of {', '.join(LIMITED_FIGURES)}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {name: getattr(self, name) for name in LIMITED_FIGURES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def needs_goal(self) -> bool:
        """Whether a limit is on goodput, which only a measurement with a goal has."""
        return any(LIMITED_FIGURES[name].figure == "goodput" for name in self.limits)


class MemoryLimit(Frozen):
    """Limits on the server's peak memory, over the original's and in bytes.

    On a GPU it is the processes' device memory without the KV cache, which takes the share it is given.
    """

    max_ratio: Positive | None = None
    max_bytes: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if self.max_ratio is None and self.max_bytes is None:
            raise ValueError("sets no limit; write max_ratio, max_bytes or both")
        return self
