"""The checks of the limits on latency and memory, at every point of the load."""

from __future__ import annotations

from collections.abc import Iterator

from compress.eval.latency.limits import LatencyLimit, LimitedFigure, MemoryLimit, limited_figures
from compress.eval.latency.results import Estimate, PointLatency
from compress.eval.statistics.estimates import Finding, Outcome, two_sided
from compress.gate.artifact import ArtifactChecks
from compress.gate.gate import Check

_GIB = 1024**3


def latency_checks(checks: ArtifactChecks, limit: LatencyLimit) -> Iterator[Check]:
    """Yield every limit's check at every point; a figure that was not measured is inconclusive, never left out."""
    latency = checks.artifact.latency
    if latency is None:
        yield _no_load(checks, "latency")
        return
    model, level = latency.artifacts.get(checks.artifact.artifact), two_sided(latency.settings.confidence)
    if model is None or not model.points:
        for check, value in limit.limits.items():
            yield checks.inconclusive(f"latency.{check}", value, "was not measured: there is no load; set eval.latency")
        return
    figures = limited_figures()
    for row in model.points:
        failed, requests = row.pooled.failed, row.pooled.requests
        # First: percentiles are over answered requests, so a server that drops slow ones would look fast.
        if failed / requests > limit.max_failed_share:
            fault = next(iter(row.pooled.faults), "")
            reason = f"{failed:,} of {requests:,} requests had no answer ({fault}); {limit.max_failed_share:.1%} may"
            finding = Finding(failed / requests, None, "fail", None)
            yield checks.decide("latency.max_failed_share", limit.max_failed_share, finding, reason, row.point.label)
        original = latency.original.at(row.point)
        for check, value in limit.limits.items():
            limited, label = figures[check], row.point.label
            estimate = _estimate(check, limited, row, original)
            if isinstance(estimate, str):
                yield checks.inconclusive(f"latency.{check}", value, f"{limited.description}: {estimate}", label)
                continue
            outcome = _outcome(estimate, value, is_upper=check.startswith("max_"))
            reason = _reason(check, limited, estimate, value, row.figures.get(limited.figure))
            reason += "; more requests or rounds would settle it" if outcome == "inconclusive" else ""
            finding = Finding(estimate.value, estimate.interval, outcome, None, level=level)
            yield checks.decide(f"latency.{check}", value, finding, reason, label)


def memory_checks(checks: ArtifactChecks, limit: MemoryLimit) -> Iterator[Check]:
    """Yield the checks of the limits on the server's memory."""
    latency = checks.artifact.latency
    if latency is None:
        yield _no_load(checks, "memory")
        return
    model, original = latency.artifacts.get(checks.artifact.artifact), latency.original.memory_bytes
    memory = model.memory_bytes if model is not None else None
    ratio = None if memory is None or not original else memory / original
    held = f"the server holds {_gib(memory or 0)} at most"
    ratio_text = f"{held}, {ratio or 0:.1%} of the original's {_gib(original or 0)}"
    for name, allowed, value, text, limit_text in (
        ("max_ratio", limit.max_ratio, ratio, ratio_text, f"{limit.max_ratio or 0:.1%}"),
        ("max_bytes", limit.max_bytes, memory, held, _gib(limit.max_bytes or 0)),
    ):
        if allowed is None:
            continue
        if value is None:
            reason = "the server's memory was not seen: it does not run on this machine, or nothing was measured"
            yield checks.inconclusive(f"memory.{name}", allowed, reason)
        else:
            finding = Finding(value, None, "pass" if value <= allowed else "fail", None)
            yield checks.decide(f"memory.{name}", allowed, finding, f"{text}; the limit is {limit_text}")


def _no_load(checks: ArtifactChecks, check: str) -> Check:
    return checks.inconclusive(check, 0.0, f"no load was put on a server at target {checks.target}, so its {check} is not known")


def _estimate(check: str, limited: LimitedFigure, row: PointLatency, original: PointLatency | None) -> Estimate | str:
    """Return the figure that a limit is on, or why there is none."""
    # The original's failed requests have no times, and it would look slower or faster than it is.
    if check.endswith("_ratio") and original is not None and original.pooled.failed:
        missing = f"{original.pooled.failed:,} of the original's {original.pooled.requests:,} requests had no answer"
        return f"{missing}, so there is nothing sound to compare with"
    estimate = (row.ratios if check.endswith("_ratio") else row.figures).get(limited.figure)
    missing = "set eval.latency.goal" if limited.figure == "goodput" else "no request gave it"
    return f"was not measured ({missing})" if estimate is None else estimate


def _outcome(estimate: Estimate, limit: float, *, is_upper: bool) -> Outcome:
    """Return pass where the whole interval meets the limit, fail where none of it does, else inconclusive."""
    # Without an interval a figure decides nothing: two rounds may differ by more than the limit's margin.
    if estimate.interval is None:
        return "inconclusive"
    low, high = estimate.interval
    meets, misses = (high <= limit, low > limit) if is_upper else (low >= limit, high < limit)
    if meets:
        return "pass"
    return "fail" if misses else "inconclusive"


def _reason(check: str, limited: LimitedFigure, estimate: Estimate, limit: float, artifact_figure: Estimate | None) -> str:
    interval = f" ({_number(estimate.interval[0])} to {_number(estimate.interval[1])})" if estimate.interval else ""
    limit_text = "limit is at most" if check.startswith("max_") else "limit is at least"
    if not check.endswith("_ratio"):
        unit = " ms" if check.endswith("_ms") else ""
        return f"{limited.description}: {_number(estimate.value)}{unit}{interval}; the {limit_text} {limit:g}{unit}"
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
