"""What the gate's limits on KL and equal top tokens say of one artifact, where KL may be known from below alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compress.eval.noise import kl_above_noise
from compress.eval.results import Fidelity, ScoreMetrics, TaskMeasurement, WholeKl
from compress.eval.statistics import Finding, Outcome
from compress.eval.task import FIDELITY_CONFIDENCE
from compress.gate import Check, FidelityLimit
from compress.gate_held import ArtifactChecks, bounds_told


@dataclass(frozen=True)
class _Said:
    """What a figure says of its limit; `at_least`: the figure is a lower bound."""

    finding: Finding
    shown: str
    why: str = ""
    at_least: bool = False


def fidelity_checks(held: ArtifactChecks, limit: FidelityLimit) -> Iterator[Check]:
    """Yield the checks of every limit on every task whose predictions can be compared."""
    written = {"max_kl": limit.max_kl, "max_kl_p99": limit.max_kl_p99, "min_top1": limit.min_top1}
    for name, value in written.items():
        if value is None:
            continue
        check = f"fidelity.{name}"
        names = [task for task, found in held.original.measured.tasks.items() if _comparable(found)]
        if not names:
            yield held.unmeasured(check, value)
        for task in names:
            found = held.artifact.measured.tasks.get(task)
            if found is None or found.fidelity is None:
                reason = (
                    held.skipped(task) or f"{task}: was not compared with the original; measure it against the original's record"
                )
                yield held.leave_open(check, value, reason, task)
            else:
                yield _alike(held, name, value, task, found.fidelity)


def _comparable(task: TaskMeasurement) -> bool:
    return not (isinstance(task.metrics, ScoreMetrics) and task.metrics.task == "adapter")


def _alike(held: ArtifactChecks, name: str, limit: float, task: str, fidelity: Fidelity) -> Check:
    if name == "min_top1":
        said = _top1(held, limit, task, fidelity)
    elif name == "max_kl_p99":
        said = _p99(held, limit, task, fidelity)
    else:
        said = _mean(held, limit, task, fidelity)
    asked = f"{100 * limit:g} %" if name == "min_top1" else f"{limit:g}"
    reason = f"{task}: {said.shown}, {fidelity.tokens:,} {fidelity.unit}s; the limit is {asked}{said.why}"
    return held.decide(f"fidelity.{name}", limit, said.finding, reason, task).model_copy(update={"at_least": said.at_least})


def _top1(held: ArtifactChecks, limit: float, task: str, fidelity: Fidelity) -> _Said:
    value, noise = fidelity.top1_agreement, held.original.measured.tasks[task].noise
    outcome: Outcome = "pass" if value >= limit else "fail"
    what = "token" if fidelity.unit == "token" else "class"
    shown = f"the same top {what} for {100 * value:.2f} % of {fidelity.unit}s"
    if noise is not None:
        shown += f" (the original asked again: {100 * noise.top1_agreement:.2f} %)"
    if outcome == "fail" and noise is not None and noise.top1_agreement <= value:
        return _Said(Finding(value, None, "inconclusive", None), shown, _no_more_than_noise())
    return _Said(Finding(value, None, outcome, None), shown)


def _p99(held: ArtifactChecks, limit: float, task: str, fidelity: Fidelity) -> _Said:
    noise, value = held.original.measured.tasks[task].noise, fidelity.kl_p99
    shown = f"KL at most {value:.5f} nats for 99 % of {fidelity.unit}s"
    if fidelity.at_least:
        shown = f"99th percentile of KL at least {value:.5f} nats"
    if noise is not None:
        shown += f" (the original asked again: {_told(noise, noise.kl_p99)})"
    if value > limit:
        if noise is not None and noise.kl_p99 >= value:
            return _Said(Finding(value, None, "inconclusive", None), shown, _no_more_than_noise(), fidelity.at_least)
        return _Said(Finding(value, None, "fail", None), shown, at_least=fidelity.at_least)
    if not fidelity.at_least:
        return _Said(Finding(value, None, "pass", None), shown)
    whole = fidelity.whole
    if whole is None or whole.kl_p99_at_most is None:
        return _Said(Finding(value, None, "inconclusive", None), shown, _unknown_above(whole), at_least=True)
    shown += f", and at most {whole.kl_p99_at_most:.5f} with 95 % confidence by {whole.tokens:,} over the whole vocabulary"
    if whole.kl_p99_at_most <= limit:
        return _Said(Finding(value, (value, whole.kl_p99_at_most), "pass", None, level=0.95), shown, at_least=True)
    return _Said(Finding(value, None, "inconclusive", None), shown, _raise_whole(), at_least=True)


def _mean(held: ArtifactChecks, limit: float, task: str, fidelity: Fidelity) -> _Said:
    whole, noise = fidelity.whole, held.original.measured.tasks[task].noise
    told = bounds_told(fidelity.kl_interval, fidelity.interval_level, _five)
    shown = f"mean KL {_told(fidelity, fidelity.kl_mean)}{told} nats per {fidelity.unit}"
    if whole is not None:
        bounds = bounds_told(whole.kl_interval, whole.interval_level, _five)
        shown += f", over the whole vocabulary {whole.kl_mean:.5f} for the same {fidelity.unit}s, "
        shown += f"as {whole.tokens:,} of them show{bounds}"
    if noise is not None:
        shown += f" (the original asked again: {_told(noise, noise.kl_mean)})"
    finding, why = _mean_finding(fidelity, limit)
    if finding.outcome == "fail":
        above = kl_above_noise(held.original.measured, held.artifact.measured, task, FIDELITY_CONFIDENCE)
        if above is not None and not above.above:
            finding = Finding(finding.value, finding.interval, "inconclusive", None, level=finding.level)
            why = f"{_no_more_than_noise()} (p = {above.p_value:.2g})"
    return _Said(finding, shown, why, at_least=fidelity.at_least and whole is None)


def _mean_finding(fidelity: Fidelity, limit: float) -> tuple[Finding, str]:
    """Judge the mean; a lower bound may fail, and only what is known of the whole vocabulary may pass."""
    value, whole = fidelity.kl_mean, fidelity.whole
    if not fidelity.at_least:
        outcome: Outcome = "pass" if value <= limit else "fail"
        return Finding(value, fidelity.kl_interval, outcome, None, level=fidelity.interval_level), ""
    if whole is None:
        outcome = "fail" if value > limit else "inconclusive"
        finding = Finding(value, fidelity.kl_interval, outcome, None, level=fidelity.interval_level)
        return finding, "" if outcome == "fail" else _unknown_above(whole)
    if value > limit or (whole.kl_interval is not None and whole.kl_interval[0] > limit):
        return Finding(whole.kl_mean, whole.kl_interval, "fail", None, level=whole.interval_level), ""
    if whole.kl_interval is None:
        return Finding(whole.kl_mean, None, "inconclusive", None), _unknown_above(whole)
    outcome = "pass" if whole.kl_interval[1] <= limit else "inconclusive"
    finding = Finding(whole.kl_mean, whole.kl_interval, outcome, None, level=whole.interval_level)
    return finding, "" if outcome == "pass" else _raise_whole()


def _told(fidelity: Fidelity, value: float) -> str:
    return f"{'at least ' if fidelity.at_least else ''}{_five(value)}"


def _five(value: float) -> str:
    return f"{value:.5f}"


def _no_more_than_noise() -> str:
    return ": but it is not shown to be further off than the original is from itself, asked in another order and batch"


def _unknown_above(whole: WholeKl | None) -> str:
    if whole is not None:
        return f": {whole.tokens:,} over the whole vocabulary are too few for an upper bound; raise the runtime's whole_tokens"
    return (
        ": over the likeliest tokens alone KL is known from below, which may fail a limit but cannot pass it; set the runtime's "
        "whole_tokens (a server elsewhere must be started with --max-logprobs -1)"
    )


def _raise_whole() -> str:
    return ": the limit lies within what so few tokens over the whole vocabulary leave open; raise the runtime's whole_tokens"
