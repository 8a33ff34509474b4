"""The gate's limits on latency and memory, and what a measurement says of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compress.eval.latency_results import Estimate, Latency, ModelLatency, PointLatency
from compress.eval.statistics import Outcome, two_sided
from compress.schema import Frozen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Kind = Literal["ratio", "absolute"]

_GIB = 1024**3


@dataclass(frozen=True)
class _Rule:
    """What a limit is about: which figure, of the artifact alone or over the original's, and in which words."""

    figure: str
    kind: Kind
    words: str
    most: bool = True
    unit: str = ""


_RULES = {
    "max_p50_ratio": _Rule("e2el_p50", "ratio", "median time of a request"),
    "max_p95_ratio": _Rule("e2el_p95", "ratio", "95th percentile of the time of a request"),
    "max_p99_ratio": _Rule("e2el_p99", "ratio", "99th percentile of the time of a request"),
    "max_ttft_p50_ratio": _Rule("ttft_p50", "ratio", "median time to the first token"),
    "max_ttft_p95_ratio": _Rule("ttft_p95", "ratio", "95th percentile of the time to the first token"),
    "max_tpot_p50_ratio": _Rule("tpot_p50", "ratio", "median time per further token"),
    "max_tpot_p95_ratio": _Rule("tpot_p95", "ratio", "95th percentile of the time per further token"),
    "max_itl_p95_ratio": _Rule("itl_p95", "ratio", "95th percentile of the time between tokens"),
    "min_throughput_ratio": _Rule("output_token_rate", "ratio", "output tokens per second", most=False),
    "min_goodput_ratio": _Rule("goodput", "ratio", "requests per second that keep the goal", most=False),
    "max_e2el_p95_ms": _Rule("e2el_p95", "absolute", "95th percentile of the time of a request", unit=" ms"),
    "max_ttft_p95_ms": _Rule("ttft_p95", "absolute", "95th percentile of the time to the first token", unit=" ms"),
    "max_tpot_p95_ms": _Rule("tpot_p95", "absolute", "95th percentile of the time per further token", unit=" ms"),
    "min_output_tokens_per_second": _Rule("output_token_rate", "absolute", "output tokens per second", most=False),
    "min_goodput": _Rule("goodput", "absolute", "requests per second that keep the goal", most=False),
}


class LatencyLimit(Frozen):
    """What every artifact must keep at every point that was measured, shown by the interval of what was measured.

    `max_…_ratio` and `min_…_ratio` are over the original's under the same load; `max_p50_ratio`, `max_p95_ratio` and
    `max_p99_ratio` are of the time from sending a request to its last token. `…_ms`, `min_output_tokens_per_second` and
    `min_goodput` are the artifact's own.
    `max_failed_share` is how many of the requests may go without an answer.
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
            raise ValueError(f"sets no limit; write at least one of {', '.join(_RULES)}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by their names."""
        values = {name: getattr(self, name) for name in _RULES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def needs_goal(self) -> bool:
        """Whether a limit is about goodput, which only a measurement with a goal has."""
        return any(_RULES[name].figure == "goodput" for name in self.limits)


class MemoryLimit(Frozen):
    """The server's peak memory is at most this many times the original's, and at most so many bytes.

    On a GPU it is what its processes hold there without the cache for keys and values, which takes the share it is given.
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
    """One limit held against one artifact at one point; `check` is the limit's place in the gate, `point` empty for memory.

    `value` is None where nothing was measured; `interval` are its bounds, where it has any, and `level` the confidence of both.
    """

    check: str
    point: str
    value: float | None
    interval: tuple[float, float] | None
    limit: float
    outcome: Outcome
    reason: str
    level: float | None = None


def judge_latency(limit: LatencyLimit, latency: Latency, name: str) -> list[LatencyFinding]:
    """Hold every limit against an artifact at every point; what was not measured is inconclusive, never left out."""
    model = latency.artifacts.get(name)
    level = two_sided(latency.settings.confidence)
    found = [
        replace(row, level=level) if row.interval is not None else row
        for row in (_at_points(limit, latency.original, model) if model is not None else ())
    ]
    unmeasured = "was not measured: there is no load; set eval.latency"
    return found or [_open(f"latency.{check}", "", value, unmeasured) for check, value in limit.limits.items()]


def judge_memory(limit: MemoryLimit, latency: Latency, name: str) -> list[LatencyFinding]:
    """Hold the limits on the server's memory against an artifact."""
    model = latency.artifacts.get(name)
    own = model.memory_bytes if model is not None else None
    before = latency.original.memory_bytes
    found: list[LatencyFinding] = []
    if limit.max_ratio is not None:
        if own is None or not before:
            found.append(_unseen("memory.max_ratio", limit.max_ratio))
        else:
            ratio = own / before
            reason = f"the server holds {_gib(own)} at most, {ratio:.1%} of the original's {_gib(before)}"
            found.append(_exact("memory.max_ratio", ratio, limit.max_ratio, f"{reason}; the limit is {limit.max_ratio:.1%}"))
    if limit.max_bytes is not None:
        if own is None:
            found.append(_unseen("memory.max_bytes", limit.max_bytes))
        else:
            reason = f"the server holds {_gib(own)} at most; the limit is {_gib(limit.max_bytes)}"
            found.append(_exact("memory.max_bytes", own, limit.max_bytes, reason))
    return found


def _at_points(limit: LatencyLimit, original: ModelLatency, model: ModelLatency) -> Iterator[LatencyFinding]:
    for row in model.points:
        failed, asked = row.pooled.failed, row.pooled.requests
        share = failed / asked
        if share > limit.max_failed_share:
            words = next(iter(row.pooled.faults), "")
            reason = f"{failed:,} of {asked:,} requests had no answer ({words}); {limit.max_failed_share:.1%} may"
            most = limit.max_failed_share
            yield LatencyFinding("latency.max_failed_share", row.point.label, share, None, most, "fail", reason)
        before = original.at(row.point)
        for check, value in limit.limits.items():
            yield _hold(check, value, row, before)


def _hold(check: str, limit: float, row: PointLatency, before: PointLatency | None) -> LatencyFinding:
    rule, label, name = _RULES[check], row.point.label, f"latency.{check}"
    own = row.figures.get(rule.figure)
    if rule.kind == "ratio" and before is not None and before.pooled.failed:
        missing = f"{before.pooled.failed:,} of the original's {before.pooled.requests:,} requests had no answer"
        return _open(name, label, limit, f"{rule.words}: {missing}, so there is nothing sound to compare with")
    estimate = row.ratios.get(rule.figure) if rule.kind == "ratio" else own
    if estimate is None:
        missing = "set eval.latency.goal" if rule.figure == "goodput" else "no request gave it"
        return _open(name, label, limit, f"{rule.words}: was not measured ({missing})")
    outcome = _outcome(estimate, limit, most=rule.most)
    reason = _reason(rule, estimate, limit, own) + (
        "; more requests or rounds would settle it" if outcome == "inconclusive" else ""
    )
    return LatencyFinding(name, label, estimate.value, estimate.interval, limit, outcome, reason)


def _outcome(estimate: Estimate, limit: float, *, most: bool) -> Outcome:
    """Return what the interval proves: pass where all of it keeps the limit, fail where none of it does."""
    if estimate.interval is None:
        return "inconclusive"
    low, high = estimate.interval
    kept, missed = (high <= limit, low > limit) if most else (low >= limit, high < limit)
    if kept:
        return "pass"
    return "fail" if missed else "inconclusive"


def _reason(rule: _Rule, estimate: Estimate, limit: float, own: Estimate | None) -> str:
    bounds = f" ({_number(estimate.interval[0])} to {_number(estimate.interval[1])})" if estimate.interval else ""
    named = "limit is at most" if rule.most else "limit is at least"
    if rule.kind == "absolute":
        return f"{rule.words}: {_number(estimate.value)}{rule.unit}{bounds}; the {named} {limit:g}{rule.unit}"
    absolute = f", {_number(own.value)}{' ms' if _is_time(rule.figure) else ''} itself" if own is not None else ""
    return f"{rule.words}: {_number(estimate.value)}{bounds} times the original's{absolute}; the {named} {limit:g}"


def _is_time(figure: str) -> bool:
    return figure.partition("_")[0] in {"ttft", "tpot", "itl", "e2el"}


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _gib(number: float) -> str:
    return f"{number / _GIB:.2f} GiB"


def _exact(check: str, value: float, limit: float, reason: str) -> LatencyFinding:
    return LatencyFinding(check, "", value, None, limit, "pass" if value <= limit else "fail", reason)


def _open(check: str, point: str, limit: float, reason: str) -> LatencyFinding:
    return LatencyFinding(check, point, None, None, limit, "inconclusive", reason)


def _unseen(check: str, limit: float) -> LatencyFinding:
    reason = "the server's memory was not seen: it does not run on this machine, or nothing was measured"
    return _open(check, "", limit, reason)
