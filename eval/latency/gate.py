"""The gate's limits on latency and memory, and their checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compress.eval.latency.results import Estimate, Latency, ModelLatency, PointLatency
from compress.eval.statistics.estimates import Outcome, two_sided
from compress.recipe.schema import Frozen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["ratio", "absolute"]

_GIB = 1024**3


@dataclass(frozen=True)
class _LimitedFigure:
    """The figure that a limit is on."""

    figure: str
    """Its name in `PointLatency.figures` and `ratios`."""

    kind: Kind
    """Whether it is the artifact's figure, or that over the original's."""

    description: str
    is_upper: bool = True
    """Whether the limit is an upper one."""

    unit: str = ""


_LIMITED_FIGURES = {
    "max_p50_ratio": _LimitedFigure("e2el_p50", "ratio", "median time of a request"),
    "max_p95_ratio": _LimitedFigure("e2el_p95", "ratio", "95th percentile of the time of a request"),
    "max_p99_ratio": _LimitedFigure("e2el_p99", "ratio", "99th percentile of the time of a request"),
    "max_ttft_p50_ratio": _LimitedFigure("ttft_p50", "ratio", "median time to the first token"),
    "max_ttft_p95_ratio": _LimitedFigure("ttft_p95", "ratio", "95th percentile of the time to the first token"),
    "max_tpot_p50_ratio": _LimitedFigure("tpot_p50", "ratio", "median time per further token"),
    "max_tpot_p95_ratio": _LimitedFigure("tpot_p95", "ratio", "95th percentile of the time per further token"),
    "max_itl_p95_ratio": _LimitedFigure("itl_p95", "ratio", "95th percentile of the time between tokens"),
    "min_throughput_ratio": _LimitedFigure("output_token_rate", "ratio", "output tokens per second", is_upper=False),
    "min_goodput_ratio": _LimitedFigure("goodput", "ratio", "requests per second that keep the goal", is_upper=False),
    "max_e2el_p95_ms": _LimitedFigure("e2el_p95", "absolute", "95th percentile of the time of a request", unit=" ms"),
    "max_ttft_p95_ms": _LimitedFigure("ttft_p95", "absolute", "95th percentile of the time to the first token", unit=" ms"),
    "max_tpot_p95_ms": _LimitedFigure("tpot_p95", "absolute", "95th percentile of the time per further token", unit=" ms"),
    "min_output_tokens_per_second": _LimitedFigure("output_token_rate", "absolute", "output tokens per second", is_upper=False),
    "min_goodput": _LimitedFigure("goodput", "absolute", "requests per second that keep the goal", is_upper=False),
}


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
            raise ValueError(f"sets no limit; write at least one of {', '.join(_LIMITED_FIGURES)}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {name: getattr(self, name) for name in _LIMITED_FIGURES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def needs_goal(self) -> bool:
        """Whether a limit is on goodput, which only a measurement with a goal has."""
        return any(_LIMITED_FIGURES[name].figure == "goodput" for name in self.limits)


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


@dataclass(frozen=True)
class LatencyFinding:
    """The result of one limit for one artifact at one point."""

    check: str
    """The limit's key in the gate."""

    point: str
    """The point's label; empty for memory."""

    value: float | None
    """None where nothing was measured."""

    interval: tuple[float, float] | None
    limit: float
    outcome: Outcome
    reason: str
    level: float | None = None
    """The confidence of the interval as a whole."""


def judge_latency(limit: LatencyLimit, latency: Latency, name: str) -> list[LatencyFinding]:
    """Check an artifact against every limit at every point; a figure that was not measured is inconclusive, never left out."""
    model = latency.artifacts.get(name)
    level = two_sided(latency.settings.confidence)
    findings = [
        replace(finding, level=level) if finding.interval is not None else finding
        for finding in (_at_points(limit, latency.original, model) if model is not None else ())
    ]
    unmeasured = "was not measured: there is no load; set eval.latency"
    return findings or [_inconclusive(f"latency.{check}", "", value, unmeasured) for check, value in limit.limits.items()]


def judge_memory(limit: MemoryLimit, latency: Latency, name: str) -> list[LatencyFinding]:
    """Check an artifact against the limits on the server's memory."""
    model = latency.artifacts.get(name)
    artifact_bytes = model.memory_bytes if model is not None else None
    original_bytes = latency.original.memory_bytes
    findings: list[LatencyFinding] = []
    if limit.max_ratio is not None:
        if artifact_bytes is None or not original_bytes:
            findings.append(_memory_unknown("memory.max_ratio", limit.max_ratio))
        else:
            ratio = artifact_bytes / original_bytes
            reason = f"the server holds {_gib(artifact_bytes)} at most, {ratio:.1%} of the original's {_gib(original_bytes)}"
            findings.append(
                _exact_finding("memory.max_ratio", ratio, limit.max_ratio, f"{reason}; the limit is {limit.max_ratio:.1%}")
            )
    if limit.max_bytes is not None:
        if artifact_bytes is None:
            findings.append(_memory_unknown("memory.max_bytes", limit.max_bytes))
        else:
            reason = f"the server holds {_gib(artifact_bytes)} at most; the limit is {_gib(limit.max_bytes)}"
            findings.append(_exact_finding("memory.max_bytes", artifact_bytes, limit.max_bytes, reason))
    return findings


def _at_points(limit: LatencyLimit, original: ModelLatency, model: ModelLatency) -> Iterator[LatencyFinding]:
    for row in model.points:
        failed, requests = row.pooled.failed, row.pooled.requests
        share = failed / requests
        if share > limit.max_failed_share:
            fault = next(iter(row.pooled.faults), "")
            reason = f"{failed:,} of {requests:,} requests had no answer ({fault}); {limit.max_failed_share:.1%} may"
            limit_share = limit.max_failed_share
            yield LatencyFinding("latency.max_failed_share", row.point.label, share, None, limit_share, "fail", reason)
        original_row = original.at(row.point)
        for check, value in limit.limits.items():
            yield _check_figure(check, value, row, original_row)


def _check_figure(check: str, limit: float, row: PointLatency, original: PointLatency | None) -> LatencyFinding:
    limited, label, name = _LIMITED_FIGURES[check], row.point.label, f"latency.{check}"
    artifact_figure = row.figures.get(limited.figure)
    if limited.kind == "ratio" and original is not None and original.pooled.failed:
        missing = f"{original.pooled.failed:,} of the original's {original.pooled.requests:,} requests had no answer"
        return _inconclusive(name, label, limit, f"{limited.description}: {missing}, so there is nothing sound to compare with")
    estimate = row.ratios.get(limited.figure) if limited.kind == "ratio" else artifact_figure
    if estimate is None:
        missing = "set eval.latency.goal" if limited.figure == "goodput" else "no request gave it"
        return _inconclusive(name, label, limit, f"{limited.description}: was not measured ({missing})")
    outcome = _outcome(estimate, limit, is_upper=limited.is_upper)
    reason = _reason(limited, estimate, limit, artifact_figure) + (
        "; more requests or rounds would settle it" if outcome == "inconclusive" else ""
    )
    return LatencyFinding(name, label, estimate.value, estimate.interval, limit, outcome, reason)


def _outcome(estimate: Estimate, limit: float, *, is_upper: bool) -> Outcome:
    """Return pass where the whole interval meets the limit, fail where none of it does, else inconclusive."""
    if estimate.interval is None:
        return "inconclusive"
    low, high = estimate.interval
    meets, misses = (high <= limit, low > limit) if is_upper else (low >= limit, high < limit)
    if meets:
        return "pass"
    return "fail" if misses else "inconclusive"


def _reason(limited: _LimitedFigure, estimate: Estimate, limit: float, artifact_figure: Estimate | None) -> str:
    interval = f" ({_number(estimate.interval[0])} to {_number(estimate.interval[1])})" if estimate.interval else ""
    limit_text = "limit is at most" if limited.is_upper else "limit is at least"
    if limited.kind == "absolute":
        return f"{limited.description}: {_number(estimate.value)}{limited.unit}{interval}; the {limit_text} {limit:g}{limited.unit}"
    absolute = (
        f", {_number(artifact_figure.value)}{' ms' if _is_time(limited.figure) else ''} itself"
        if artifact_figure is not None
        else ""
    )
    return f"{limited.description}: {_number(estimate.value)}{interval} times the original's{absolute}; the {limit_text} {limit:g}"


def _is_time(figure: str) -> bool:
    return figure.partition("_")[0] in {"ttft", "tpot", "itl", "e2el"}


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _gib(number: float) -> str:
    return f"{number / _GIB:.2f} GiB"


def _exact_finding(check: str, value: float, limit: float, reason: str) -> LatencyFinding:
    return LatencyFinding(check, "", value, None, limit, "pass" if value <= limit else "fail", reason)


def _inconclusive(check: str, point: str, limit: float, reason: str) -> LatencyFinding:
    return LatencyFinding(check, point, None, None, limit, "inconclusive", reason)


def _memory_unknown(check: str, limit: float) -> LatencyFinding:
    reason = "the server's memory was not seen: it does not run on this machine, or nothing was measured"
    return _inconclusive(check, "", limit, reason)
