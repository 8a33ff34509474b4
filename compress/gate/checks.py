"""The checks of the gate for one artifact, limit by limit: value, bounds, verdict and reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from compress.eval.changes import count_flips, judge_flips
from compress.eval.grounding import image_gain_of
from compress.eval.results import TaskMeasurement, check_pairs
from compress.eval.statistics.estimates import Finding, Levels, Recovery, judge_perplexity
from compress.eval.statistics.noise import flips_above_noise
from compress.eval.statistics.paired import Pairs, judge_family, judge_pairs, overall_recovery
from compress.eval.statistics.sequential import Sequential
from compress.gate.artifact import ArtifactChecks, format_interval
from compress.gate.fidelity import fidelity_checks
from compress.gate.gate import (
    AccuracyLimit,
    Check,
    FlipsLimit,
    GateLimits,
    GroundingLimit,
    MeasuredModel,
    PerplexityLimit,
    SizeLimit,
)
from compress.gate.latency import latency_checks, memory_checks
from compress.gate.noise import NoiseFloor

_PERPLEXITY, _FLIPS = "perplexity.max_ratio", "flips.max_share"
"""The names of checks in reports."""


def checks_of(limits: GateLimits, original: MeasuredModel, artifact: MeasuredModel, target: str) -> Iterator[Check]:
    """Yield every check of one artifact, in the order of the gate's fields.

    Raises:
        DataError: the artifact was measured on other items than the original; names the first one.
    """
    checks = ArtifactChecks(original, artifact, target)
    if limits.accuracy is not None:
        yield from _accuracy(checks, limits.accuracy)
    if limits.perplexity is not None:
        yield from checks.of_each_task(_PERPLEXITY, limits.perplexity.max_ratio, partial(_perplexity, checks, limits.perplexity))
    if limits.fidelity is not None:
        yield from fidelity_checks(checks, limits.fidelity)
    if limits.flips is not None:
        yield from checks.of_each_task(_FLIPS, limits.flips.max_share, partial(_flips, checks, limits.flips))
    if limits.grounding is not None:
        yield _grounding(checks, limits.grounding)
    if limits.size is not None:
        yield from _size(checks, limits.size)
    if limits.latency is not None:
        yield from latency_checks(checks, limits.latency)
    if limits.memory is not None:
        yield from memory_checks(checks, limits.memory)


def _accuracy(checks: ArtifactChecks, limit: AccuracyLimit) -> Iterator[Check]:
    check_name = "accuracy.min_recovery"
    tasks = checks.task_names("accuracy")
    if not tasks:
        yield checks.unmeasured(check_name, limit.min_recovery)
    pairs: dict[str, Pairs] = {}
    recoveries: dict[str, Recovery] = {}
    for task in tasks:
        if (reason := checks.skip_reason(task)) is not None:
            yield checks.inconclusive(check_name, limit.of(task), reason, task)
            continue
        pairs[task] = checks.pairs(task)
        recovery = _recovery(checks.artifact.measurement.tasks[task], pairs[task], limit, len(tasks))
        if recovery is None:
            yield checks.inconclusive(
                check_name,
                limit.of(task),
                f"{task}: the original answers none of the {pairs[task].items:,} items right, so there is nothing to keep; "
                "choose a task it can do",
                task,
            )
        else:
            recoveries[task] = recovery
    # Over the tasks that could be judged: Holm's correction is for failures, and passing on all of them needs none.
    corrected = judge_family(recoveries, 1 - limit.confidence)
    for task, finding in corrected.items():
        yield checks.decide(check_name, limit.of(task), finding, _recovery_reason(checks, task, pairs[task], finding, limit), task)
    if limit.overall is not None:
        yield _overall(checks, limit.overall, corrected, tasks)


def _recovery(task: TaskMeasurement, pairs: Pairs, limit: AccuracyLimit, task_count: int) -> Recovery | None:
    if task.look is None or limit.sequential is None:
        # Measured in one go: its whole error is spent at once.
        return judge_pairs(pairs, limit.of(task.name), Levels.at(limit.confidence))
    interim = Sequential.even(limit.sequential, limit.confidence, task_count).judge(pairs, task.look - 1, limit.of(task.name))
    return interim.recovery if interim is not None else None


def _recovery_reason(checks: ArtifactChecks, name: str, pairs: Pairs, finding: Recovery, limit: AccuracyLimit) -> str:
    flips = count_flips(pairs, limit.confidence)
    interval = _percent_interval(finding)
    task = checks.artifact.measurement.tasks[name]
    # Not strict: the artifact may have stopped early; `pairs` has checked that both begin with the same items.
    item_pairs = zip(checks.original.measurement.scored(name), checks.artifact.measurement.scored(name), strict=False)
    failed = sum(before.fault is not None or after.fault is not None for before, after in item_pairs)
    failed_note = f", {failed} of them failed and count 0" if failed else ""
    stopped_note = (
        f", settled after part {task.look} of {task.looks}" if task.look and task.looks and task.look < task.looks else ""
    )
    chance_note = f" (as uneven by chance: p = {flips.p_value:.2g})" if flips.lost + flips.gained else ""
    return (
        f"{name}: recovery {100 * finding.value:.2f} %{interval} of {finding.items:,} items{failed_note}{stopped_note}, "
        f"{flips.lost} lost and {flips.gained} gained{chance_note}; the limit is "
        f"{100 * limit.of(name):g} %{_items_needed_note(finding, 'items')}"
    )


def _overall(checks: ArtifactChecks, limit: float, recoveries: Mapping[str, Recovery], tasks: list[str]) -> Check:
    check_name = "accuracy.overall"
    finding = overall_recovery(list(recoveries.values()), limit)
    # A mean over the tasks that happen to be there is another figure, and could pass where the missing task would fail.
    if finding is None or len(recoveries) < len(tasks):
        return checks.inconclusive(check_name, limit, "not every task could be judged, so their mean cannot be")
    interval = _percent_interval(finding)
    return checks.decide(
        check_name,
        limit,
        finding,
        f"mean recovery {100 * finding.value:.2f} %{interval} over {len(recoveries)} tasks; the limit is "
        f"{100 * limit:g} %{_items_needed_note(finding, 'items')}",
    )


def _perplexity(checks: ArtifactChecks, limit: PerplexityLimit, task: str) -> Check:
    original_windows, artifact_windows = checks.original.measurement.windows(task), checks.artifact.measurement.windows(task)
    check_pairs(task, original_windows, ((item.id, item.digest) for item in artifact_windows))
    scored = [
        (original, artifact)
        for original, artifact in zip(original_windows, artifact_windows, strict=True)
        if not original.fault and not artifact.fault
    ]
    # Inconclusive, not a mean over the rest: the windows that fail may be the hard ones.
    if len(scored) < len(original_windows):
        unscored = f"{task}: {len(original_windows) - len(scored)} of {len(original_windows):,} windows could not be scored"
        return checks.inconclusive(_PERPLEXITY, limit.max_ratio, unscored, task)
    finding = judge_perplexity(
        np.array([original.nll for original, _ in scored]),
        np.array([artifact.nll for _, artifact in scored]),
        np.array([original.tokens for original, _ in scored], dtype=np.float64),
        limit.max_ratio,
        limit.confidence,
    )
    interval = format_interval(finding.interval, finding.level, lambda value: f"{value:.4f}")
    note = _items_needed_note(finding, "windows") if finding.interval else ": a single window has no spread; measure more of them"
    reason = (
        f"{task}: {finding.value:.4f} times the original's perplexity{interval} over {len(original_windows):,} windows; "
        f"the limit is {limit.max_ratio:g}{note}"
    )
    return checks.decide(_PERPLEXITY, limit.max_ratio, finding, reason, task)


def _flips(checks: ArtifactChecks, limit: FlipsLimit, task: str) -> Check:
    flips = count_flips(checks.pairs(task), limit.confidence)
    # Each task for itself: flips are an upper limit on change, of which any task may have too much.
    finding = judge_flips(flips, limit.max_share)
    noise = flips_above_noise(checks.original.measurement, checks.artifact.measurement, task, limit.confidence)
    noise_note, note = "", _items_needed_note(finding, "items")
    if noise is not None:
        floor = NoiseFloor.of(noise.value, noise.floor, f"{100 * noise.floor:.2f} %", noise)
        noise_note = f" (the original asked again: {floor.text})"
        finding, remark = floor.hold(finding, limit.max_share, f"raise it above {floor.text}")
        note = remark or note
    interval = _percent_interval(finding)
    reason = (
        f"{task}: {flips.lost} lost and {flips.gained} gained of {flips.items:,} items, {100 * flips.share:.2f} %{interval}"
        f"{noise_note}; the limit is {100 * limit.max_share:g} %{note}"
    )
    return checks.decide(_FLIPS, limit.max_share, finding, reason, task)


def _grounding(checks: ArtifactChecks, limit: GroundingLimit) -> Check:
    check_name = "grounding"
    original, artifact = checks.original.measurement.grounding, checks.artifact.measurement.grounding
    if original is None or artifact is None:
        return checks.inconclusive(check_name, 0.0, "it was not seen whether answers depend on the image; add eval.grounding")
    original_gain = image_gain_of(checks.original.measurement.grounding_items, limit.confidence)
    artifact_gain = image_gain_of(checks.artifact.measurement.grounding_items, limit.confidence)
    if original_gain is None or artifact_gain is None:
        return checks.inconclusive(check_name, 0.0, "every question that was to show it failed", artifact.task)
    # Where even the original needs no image, an artifact's answers prove nothing either way.
    if original_gain.outcome != "pass":
        return checks.inconclusive(
            check_name,
            0.0,
            f"{artifact.task}: the original itself answers {original_gain.items:,} questions no better with their own image "
            f"({100 * original_gain.right:.1f} %) than with another ({100 * original_gain.wrong:.1f} %); choose questions whose "
            "answers need the image",
            artifact.task,
        )
    figures = (
        f"{100 * artifact_gain.right:.1f} % with the own image, {100 * artifact_gain.wrong:.1f} % with another, "
        f"{100 * artifact.changed_other:.1f} % of answers changed, of {artifact_gain.items:,} questions "
        f"(p = {artifact_gain.p_value:.2g}; the original: {100 * original_gain.right:.1f} % and {100 * original_gain.wrong:.1f} %)"
    )
    conclusion = "answers depend on the image" if artifact_gain.outcome == "pass" else "answers do not depend on the image"
    return checks.decide(check_name, 0.0, artifact_gain, f"{artifact.task}: {conclusion}: {figures}", artifact.task)


def _size(checks: ArtifactChecks, limit: SizeLimit) -> Iterator[Check]:
    original_bytes, artifact_bytes, bits = checks.original.bytes, checks.artifact.bytes, checks.artifact.bits_per_weight
    # Sizes are facts: compared as they are, without bounds.
    ratio = artifact_bytes / original_bytes
    rows = (
        ("max_ratio", ratio, f"{artifact_bytes:,} bytes, {100 * ratio:.2f} % of the original's {original_bytes:,}"),
        ("max_bits_per_weight", bits, f"{bits or 0:.3f} bits per weight of the original"),
        ("max_bytes", artifact_bytes, f"{artifact_bytes:,} bytes"),
    )
    for name, value, text in rows:
        allowed: float | None = getattr(limit, name)
        if allowed is None:
            continue
        if value is None:
            yield checks.inconclusive(f"size.{name}", allowed, "how many weights there are is not known")
            continue
        limit_text = {"max_ratio": f"{100 * allowed:g} %", "max_bytes": f"{allowed:,.0f}"}.get(name, f"{allowed:g}")
        finding = Finding(value, None, "pass" if value <= allowed else "fail", None)
        yield checks.decide(f"size.{name}", allowed, finding, f"{text}; the limit is {limit_text}")


def _percent_interval(finding: Finding) -> str:
    return format_interval(finding.interval, finding.level, lambda value: f"{100 * value:.2f}", " %")


def _items_needed_note(finding: Finding, items: str) -> str:
    if finding.outcome != "inconclusive":
        return ""
    if finding.items_needed is None:
        return f": what was observed stands at the limit, so no number of {items} would settle it"
    return f": {finding.items_needed:,} {items} would settle it"
