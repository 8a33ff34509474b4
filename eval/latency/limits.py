"""The gate's limits on latency and memory, and the figures that they are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from compress.recipe.schema import Frozen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Limit = Positive | None


@dataclass(frozen=True)
class LimitedFigure:
    """The figure that a limit is on; the limit's name has the rest: direction, unit, ratio."""

    figure: str
    """Its name in `PointLatency.figures` and `ratios`."""

    description: str


class LatencyLimit(Frozen):
    """Limits at every measured point, which the figure's confidence interval must meet as a whole.

    `max_…_ratio` and `min_…_ratio` are over the original's figure under the same load; `max_p50_ratio`, `max_p95_ratio` and
    `max_p99_ratio` are of the end-to-end time of a request. `…_ms`, `min_output_tokens_per_second` and `min_goodput` are the
    artifact's own figures. `max_failed_share` is the share of requests that may fail.
    """

    max_p50_ratio: Annotated[Limit, LimitedFigure("e2el_p50", "median time of a request")] = None
    max_p95_ratio: Annotated[Limit, LimitedFigure("e2el_p95", "95th percentile of the time of a request")] = None
    max_p99_ratio: Annotated[Limit, LimitedFigure("e2el_p99", "99th percentile of the time of a request")] = None
    max_ttft_p50_ratio: Annotated[Limit, LimitedFigure("ttft_p50", "median time to the first token")] = None
    max_ttft_p95_ratio: Annotated[Limit, LimitedFigure("ttft_p95", "95th percentile of the time to the first token")] = None
    max_tpot_p50_ratio: Annotated[Limit, LimitedFigure("tpot_p50", "median time per further token")] = None
    max_tpot_p95_ratio: Annotated[Limit, LimitedFigure("tpot_p95", "95th percentile of the time per further token")] = None
    max_itl_p95_ratio: Annotated[Limit, LimitedFigure("itl_p95", "95th percentile of the time between tokens")] = None
    min_throughput_ratio: Annotated[Limit, LimitedFigure("output_token_rate", "output tokens per second")] = None
    min_goodput_ratio: Annotated[Limit, LimitedFigure("goodput", "requests per second that keep the goal")] = None
    max_e2el_p95_ms: Annotated[Limit, LimitedFigure("e2el_p95", "95th percentile of the time of a request")] = None
    max_ttft_p95_ms: Annotated[Limit, LimitedFigure("ttft_p95", "95th percentile of the time to the first token")] = None
    max_tpot_p95_ms: Annotated[Limit, LimitedFigure("tpot_p95", "95th percentile of the time per further token")] = None
    min_output_tokens_per_second: Annotated[Limit, LimitedFigure("output_token_rate", "output tokens per second")] = None
    min_goodput: Annotated[Limit, LimitedFigure("goodput", "requests per second that keep the goal")] = None
    # 0 by default: percentiles are of answered requests, so that failures must not go unnoticed.
    max_failed_share: Share = 0.0

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not self.limits:
            raise ValueError(f"sets no limit; write at least one of {', '.join(limited_figures())}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {name: getattr(self, name) for name in limited_figures()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def needs_goal(self) -> bool:
        """Whether a limit is on goodput, which only a measurement with a goal has."""
        return any(limited_figures()[name].figure == "goodput" for name in self.limits)


def limited_figures() -> dict[str, LimitedFigure]:
    """Return the figure of each limit, by the limit's name."""
    fields = LatencyLimit.model_fields.items()
    return {name: figure for name, field in fields for figure in field.metadata if isinstance(figure, LimitedFigure)}


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
