"""The checks of the limits on KL and top-1 agreement. KL may be a lower bound only: it can fail a limit then, but not pass it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from compress.eval.results import Fidelity, WholeKl
from compress.eval.statistics.estimates import Finding, Outcome
from compress.eval.statistics.noise import kl_above_noise
from compress.eval.tasks.task import FIDELITY_CONFIDENCE
from compress.gate.artifact import ArtifactChecks, format_interval
from compress.gate.gate import Check, FidelityLimit
from compress.gate.noise import NoiseFloor


@dataclass(frozen=True)
class _Judgement:
    """The outcome of one figure, with the text of its reason."""

    finding: Finding
    figure: str
    """The figure in words, with its bounds."""

    remark: str = ""
    """Follows the limit in the reason: why the outcome is inconclusive, and the remedy."""

    at_least: bool = False
    """Whether the figure is a lower bound."""


def fidelity_checks(checks: ArtifactChecks, limit: FidelityLimit) -> Iterator[Check]:
    """Yield the checks of every limit for every task with compared predictions."""
    for name in _JUDGES:
        limit_value: float | None = getattr(limit, name)
        if limit_value is None:
            continue
        yield from checks.of_each_task(f"fidelity.{name}", limit_value, partial(_check, checks, name, limit_value))


def _check(checks: ArtifactChecks, name: str, limit: float, task: str) -> Check:
    fidelity = checks.artifact.measurement.tasks[task].fidelity
    if fidelity is None:
        reason = f"{task}: was not compared with the original; measure it against the original's record"
        return checks.inconclusive(f"fidelity.{name}", limit, reason, task)
    judgement = _JUDGES[name](limit, fidelity)
    figure, remark, finding = judgement.figure, judgement.remark, judgement.finding
    floor = _noise_floor(checks, name, task, fidelity)
    if floor is not None:
        figure += f" (the original asked again: {floor.text})"
        if name == "min_top1":
            finding, noise_remark = floor.hold(finding, 1 - limit, f"lower it to {floor.text} or less")
        else:
            finding, noise_remark = floor.hold(finding, limit, f"raise it above {_five_decimals(floor.floor)}")
        remark = noise_remark or remark
    limit_text = f"{100 * limit:g} %" if name == "min_top1" else f"{limit:g}"
    reason = f"{task}: {figure}, {fidelity.tokens:,} {fidelity.unit}s; the limit is {limit_text}{remark}"
    check = checks.decide(f"fidelity.{name}", limit, finding, reason, task)
    return check.model_copy(update={"at_least": judgement.at_least})


def _noise_floor(checks: ArtifactChecks, name: str, task: str, fidelity: Fidelity) -> NoiseFloor | None:
    """Return the noise floor of a figure; None where the original was not asked again."""
    noise = checks.original.measurement.tasks[task].noise
    if noise is None:
        return None
    if name == "min_top1":
        return NoiseFloor.of(1 - fidelity.top1_agreement, 1 - noise.top1_agreement, f"{100 * noise.top1_agreement:.2f} %")
    if name == "max_kl_p99":
        return NoiseFloor.of(fidelity.kl_p99, noise.kl_p99, _format_kl(noise, noise.kl_p99))
    excess = kl_above_noise(checks.original.measurement, checks.artifact.measurement, task, FIDELITY_CONFIDENCE)
    return NoiseFloor.of(fidelity.kl_mean, noise.kl_mean, _format_kl(noise, noise.kl_mean), excess)


def _top1(limit: float, fidelity: Fidelity) -> _Judgement:
    value = fidelity.top1_agreement
    noun = "token" if fidelity.unit == "token" else "class"
    figure = f"the same top {noun} for {100 * value:.2f} % of {fidelity.unit}s"
    return _Judgement(Finding(value, None, "pass" if value >= limit else "fail", None), figure)


def _p99(limit: float, fidelity: Fidelity) -> _Judgement:
    value, full = fidelity.kl_p99, fidelity.whole
    if not fidelity.at_least:
        figure = f"KL at most {value:.5f} nats for 99 % of {fidelity.unit}s"
        # An exact percentile has no bounds here: it is compared as a fact about these tokens.
        return _Judgement(Finding(value, None, "pass" if value <= limit else "fail", None), figure)
    figure = f"99th percentile of KL at least {value:.5f} nats"
    # A lower bound above the limit decides: the exact figure can only be larger. The reverse proves nothing.
    if value > limit:
        return _Judgement(Finding(value, None, "fail", None), figure, at_least=True)
    if full is None or full.kl_p99_at_most is None:
        return _Judgement(Finding(value, None, "inconclusive", None), figure, _no_upper_bound_remark(full), at_least=True)
    figure += f", and at most {full.kl_p99_at_most:.5f} with 95 % confidence by {full.tokens:,} over the whole vocabulary"
    if full.kl_p99_at_most <= limit:
        return _Judgement(Finding(value, (value, full.kl_p99_at_most), "pass", None, level=0.95), figure, at_least=True)
    return _Judgement(Finding(value, None, "inconclusive", None), figure, _larger_sample_remark(), at_least=True)


def _mean(limit: float, fidelity: Fidelity) -> _Judgement:
    full = fidelity.whole
    interval = format_interval(fidelity.kl_interval, fidelity.interval_level, _five_decimals)
    figure = f"mean KL {_format_kl(fidelity, fidelity.kl_mean)}{interval} nats per {fidelity.unit}"
    if full is not None:
        full_interval = format_interval(full.kl_interval, full.interval_level, _five_decimals)
        figure += f", over the whole vocabulary {full.kl_mean:.5f} for the same {fidelity.unit}s, "
        figure += f"as {full.tokens:,} of them show{full_interval}"
    finding, remark = _mean_finding(fidelity, limit)
    return _Judgement(finding, figure, remark, at_least=fidelity.at_least and full is None)


_JUDGES = {"max_kl": _mean, "max_kl_p99": _p99, "min_top1": _top1}
"""How each limit is judged, without regard to the noise floor."""


def _mean_finding(fidelity: Fidelity, limit: float) -> tuple[Finding, str]:
    """Judge the mean KL; a lower bound may fail the limit, and only full-vocabulary KL may pass it."""
    value, full = fidelity.kl_mean, fidelity.whole
    if not fidelity.at_least:
        # These limits have no confidence of their own: an exact mean is compared as it is, and its interval reported.
        outcome: Outcome = "pass" if value <= limit else "fail"
        return Finding(value, fidelity.kl_interval, outcome, None, level=fidelity.interval_level), ""
    if full is None:
        outcome = "fail" if value > limit else "inconclusive"
        finding = Finding(value, fidelity.kl_interval, outcome, None, level=fidelity.interval_level)
        return finding, "" if outcome == "fail" else _no_upper_bound_remark(full)
    # Either of two bounds from below: of all tokens over the top tokens, or of the sample over the whole vocabulary.
    if value > limit or (full.kl_interval is not None and full.kl_interval[0] > limit):
        return Finding(full.kl_mean, full.kl_interval, "fail", None, level=full.interval_level), ""
    if full.kl_interval is None:
        return Finding(full.kl_mean, None, "inconclusive", None), _no_upper_bound_remark(full)
    outcome = "pass" if full.kl_interval[1] <= limit else "inconclusive"
    finding = Finding(full.kl_mean, full.kl_interval, outcome, None, level=full.interval_level)
    return finding, "" if outcome == "pass" else _larger_sample_remark()


def _format_kl(fidelity: Fidelity, value: float) -> str:
    return f"{'at least ' if fidelity.at_least else ''}{_five_decimals(value)}"


def _five_decimals(value: float) -> str:
    return f"{value:.5f}"


def _no_upper_bound_remark(full: WholeKl | None) -> str:
    if full is not None:
        return f": {full.tokens:,} over the whole vocabulary are too few for an upper bound; raise the runtime's whole_tokens"
    return (
        ": over the likeliest tokens alone KL is known from below, which may fail a limit but cannot pass it; set the runtime's "
        "whole_tokens (a server elsewhere must be started with --max-logprobs -1)"
    )


def _larger_sample_remark() -> str:
    return ": the limit lies within what so few tokens over the whole vocabulary leave open; raise the runtime's whole_tokens"
