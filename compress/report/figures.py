"""Formatting of numbers in reports: sizes, scores, and the value and limit of each check of the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compress.eval.results import Fidelity, Metrics

if TYPE_CHECKING:
    from compress.gate.gate import Check

_PERCENT_LIMITS = ("min_recovery", "overall", "min_top1", "max_share", "max_failed_share")
_PERCENT_CHECKS = ("size.max_ratio", "memory.max_ratio", "grounding")
"""Limits and whole checks that are shown in per cent; the name `max_ratio` alone is also that of perplexity, which is not."""


def size(count: float) -> str:
    """Return a number of bytes with its unit, in powers of 1000."""
    # Powers of 1000, as hubs and disks state sizes.
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 item, 2 items, 3 entries, 4 classes."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return a regular English noun's plural."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun.removesuffix("y") + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def singular(nouns: str) -> str:
    """Return the inverse of `plural`, for regular nouns whose singular does not end in "se" or "xe"."""
    if nouns.endswith("ies"):
        return nouns.removesuffix("ies") + "y"
    return nouns.removesuffix("es") if nouns.endswith(("sses", "xes", "ches", "shes")) else nouns.removesuffix("s")


def share(value: float) -> str:
    """Return a share in per cent, with two decimals."""
    return f"{value:.2%}"


def milliseconds(value: float) -> str:
    """Return a time with three significant digits."""
    return f"{rate(value)} ms"


def duration(seconds: float) -> str:
    """Return a time the way people say it: 0.4 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def divergence(value: float) -> str:
    """Return a divergence with two significant digits."""
    return f"{value:#.2g}".rstrip(".") if value else "0"


def kl_value(fidelity: Fidelity) -> str:
    """Return the mean KL over the full vocabulary, or its lower bound where only that is known."""
    return divergence(fidelity.whole.kl_mean) if fidelity.whole is not None else format_kl(fidelity, fidelity.kl_mean)


def format_kl(fidelity: Fidelity, value: float) -> str:
    """Return a KL figure, marked where it is a lower bound over the top tokens."""
    return f"{'at least ' if fidelity.at_least else ''}{divergence(value)}"


def level_name(level: float | None) -> str:
    """Return the name of an interval by its confidence as a whole."""
    return "interval" if level is None else f"{100 * level:.3g}% interval"


def rate(value: float) -> str:
    """Return a rate with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 or not value else f"{value:#.3g}".rstrip(".")


def metric_value(metrics: Metrics) -> str:
    """Return a task's figure as tables show it."""
    return metrics.record.show(metrics.figure)


def recovery(original: Metrics, artifact: Metrics) -> float | None:
    """Return the artifact's figure over the original's; None where they cannot be compared.

    That is so where the artifact was measured on fewer items, because its verdict was decided early.
    """
    # A mean over fewer items over a mean over all of them is no recovery: the gate has the paired one.
    comparable = original.task == artifact.task and original.count == artifact.count
    return artifact.figure / original.figure if comparable and original.figure > 0 else None


def format_recovery(original: Metrics, artifact: Metrics) -> str:
    """Return `recovery` as tables show it: per cent of a score, a multiple of a perplexity; empty where there is none."""
    ratio = recovery(original, artifact)
    return "" if ratio is None else artifact.record.show_ratio(ratio)


def check_values(check: Check) -> tuple[str, str, str]:
    """Return a check's value, interval and limit as tables show them; empty where there is none."""
    format_value = _formatter(check.check)
    value = "" if check.value is None else f"{'at least ' if check.at_least else ''}{format_value(check.value)}"
    interval = "" if check.interval is None else "–".join(format_value(bound) for bound in check.interval)
    return value, interval, _limit(check.check, check.limit)


def _formatter(check: str) -> Callable[[float], str]:
    name = check.rpartition(".")[2]
    if name in _PERCENT_LIMITS or check in _PERCENT_CHECKS:
        return share
    if name.endswith("bytes"):
        return size
    if name.endswith("_ms"):
        return milliseconds
    return _five_decimals if name in ("max_kl", "max_kl_p99") else _four_digits


def _five_decimals(value: float) -> str:
    return f"{value:.5f}"


def _four_digits(value: float) -> str:
    return f"{value:.4f}" if 0.1 <= abs(value) < 100 else f"{value:,.4g}"


def _limit(check: str, limit: float) -> str:
    """Return a limit with its sign; empty for a check that stands for missing measurements."""
    format_value, name = _formatter(check), check.rpartition(".")[2]
    if check == "grounding":
        return "> 0%"
    if name == check:
        return ""
    text = (
        f"{100 * limit:g}%"
        if format_value is share
        else format_value(limit)
        if format_value in (size, milliseconds)
        else f"{limit:g}"
    )
    return f"{'≤' if name.startswith('max_') else '≥'} {text}"
