"""How reports write numbers down: sizes, scores, and the value and limit of each of the gate's checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compress.eval.results import Fidelity, Metrics, ScoreMetrics

if TYPE_CHECKING:
    from compress.gate import Check

_SHARES = ("min_recovery", "overall", "min_top1", "max_share", "max_failed_share")
_SHARES_IN_FULL = ("size.max_ratio", "memory.max_ratio", "grounding")


def size(count: float) -> str:
    """Return a number of bytes the way people say it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 item, 2 items, 3 entries, 4 classes."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return a regular English noun's plural."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun.removesuffix("y") + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def singular(nouns: str) -> str:
    """Return what `plural` makes this of, where it is regular and no single one ends in "se" or "xe"."""
    if nouns.endswith("ies"):
        return nouns.removesuffix("ies") + "y"
    return nouns.removesuffix("es") if nouns.endswith(("sses", "xes", "ches", "shes")) else nouns.removesuffix("s")


def share(value: float) -> str:
    """Return a share in per cent, with two decimals."""
    return f"{value:.2%}"


def milliseconds(value: float) -> str:
    """Return a time with three digits that matter."""
    return f"{rate(value)} ms"


def divergence(value: float) -> str:
    """Return a divergence with two digits that matter."""
    return f"{value:#.2g}".rstrip(".") if value else "0"


def kl_value(found: Fidelity) -> str:
    """Return a mean KL: of the whole vocabulary, or the lower bound that is known of it."""
    return divergence(found.whole.kl_mean) if found.whole is not None else bounded(found, found.kl_mean)


def bounded(found: Fidelity, value: float) -> str:
    """Return one of the figures over the likeliest tokens, told as the lower bound that it is."""
    return f"{'at least ' if found.at_least else ''}{divergence(value)}"


def level_name(level: float | None) -> str:
    """Return what to call an interval by the confidence of both its bounds together."""
    return "interval" if level is None else f"{100 * level:.3g}% interval"


def rate(value: float) -> str:
    """Return a number per second with three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 100 or not value else f"{value:#.3g}".rstrip(".")


def main_figure(metrics: Metrics) -> float:
    """Return the one figure a task's measurement comes down to: its score, or its perplexity."""
    return metrics.score if isinstance(metrics, ScoreMetrics) else metrics.perplexity


def metric_value(metrics: Metrics) -> str:
    """Return a task's figure as tables show it."""
    return share(metrics.score) if isinstance(metrics, ScoreMetrics) else f"{metrics.perplexity:.4g}"


def kept(original: Metrics, artifact: Metrics) -> float | None:
    """Return how many times the original's figure an artifact has; None where that says nothing.

    An artifact that was asked fewer items, because they settled its verdict, is not compared with the original's figure over all.
    """
    before, after = main_figure(original), main_figure(artifact)
    same = original.task == artifact.task and asked(original) == asked(artifact)
    return after / before if same and before > 0 else None


def asked(metrics: Metrics) -> int:
    """Return of how many items, or windows, a task's figure is."""
    return metrics.items if isinstance(metrics, ScoreMetrics) else metrics.windows


def kept_value(original: Metrics, artifact: Metrics) -> str:
    """Return `kept` as tables show it: a share of a score, a multiple of a perplexity; empty where it says nothing."""
    found = kept(original, artifact)
    if found is None:
        return ""
    return share(found) if isinstance(artifact, ScoreMetrics) else f"×{found:.4f}"


def check_values(check: Check) -> tuple[str, str, str]:
    """Return a check's value, interval and limit as tables show them; empty where there is none."""
    tell = _teller(check.check)
    value = "" if check.value is None else f"{'at least ' if check.at_least else ''}{tell(check.value)}"
    interval = "" if check.interval is None else "–".join(tell(bound) for bound in check.interval)
    return value, interval, _limit(check.check, check.limit)


def _teller(check: str) -> Callable[[float], str]:
    name = check.rpartition(".")[2]
    if name in _SHARES or check in _SHARES_IN_FULL:
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
    """Return a limit with its sign; empty for what has none because nothing was measured."""
    tell, name = _teller(check), check.rpartition(".")[2]
    if check == "grounding":
        return "> 0%"
    if name == check:
        return ""
    told = f"{100 * limit:g}%" if tell is share else tell(limit) if tell in (size, milliseconds) else f"{limit:g}"
    return f"{'≤' if name.startswith('max_') else '≥'} {told}"
