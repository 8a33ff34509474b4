"""What each limit of the gate says of one artifact: value, bounds, verdict and reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from compress.eval.changes import count_flips, judge_flips
from compress.eval.grounding import image_gain_of
from compress.eval.latency_gate import LatencyFinding, judge_latency, judge_memory
from compress.eval.noise import flips_above_noise
from compress.eval.paired import Pairs, judge_family, judge_pairs, overall_recovery
from compress.eval.results import PerplexityMetrics, ScoreMetrics, TaskMeasurement, check_pairs
from compress.eval.sequential import Sequential
from compress.eval.statistics import Finding, Levels, Recovery, judge_perplexity
from compress.gate import (
    AccuracyLimit,
    Check,
    FlipsLimit,
    GateLimits,
    GroundingLimit,
    PerplexityLimit,
    SizeLimit,
    Subject,
)
from compress.gate_fidelity import fidelity_checks
from compress.gate_held import ArtifactChecks, bounds_told


def checks_of(limits: GateLimits, original: Subject, artifact: Subject, target: str) -> Iterator[Check]:
    """Yield every check of one artifact, in the order of the gate's fields.

    Raises:
        DataError: the artifact was measured on other items than the original; names the first.
    """
    held = ArtifactChecks(original, artifact, target)
    if limits.accuracy is not None:
        yield from _accuracy(held, limits.accuracy)
    if limits.perplexity is not None:
        yield from _perplexity(held, limits.perplexity)
    if limits.fidelity is not None:
        yield from fidelity_checks(held, limits.fidelity)
    if limits.flips is not None:
        yield from _flips(held, limits.flips)
    if limits.grounding is not None:
        yield _grounding(held, limits.grounding)
    if limits.size is not None:
        yield from _size(held, limits.size)
    if limits.latency is not None:
        found = judge_latency(limits.latency, artifact.latency, artifact.artifact) if artifact.latency else []
        yield from _measured_load(held, "latency", found)
    if limits.memory is not None:
        found = judge_memory(limits.memory, artifact.latency, artifact.artifact) if artifact.latency else []
        yield from _measured_load(held, "memory", found)


def _measured_load(held: ArtifactChecks, check: str, found: list[LatencyFinding]) -> Iterator[Check]:
    if not found:
        yield held.leave_open(check, 0.0, f"no load was put on a server at target {held.target}, so its {check} is not known")
    for row in found:
        yield Check(
            artifact=held.artifact.artifact,
            check=row.check,
            task=row.point or None,
            value=row.value,
            interval=row.interval,
            limit=row.limit,
            verdict=row.outcome,
            reason=row.reason,
            target=held.target,
            interval_level=row.level,
        )


def _accuracy(held: ArtifactChecks, limit: AccuracyLimit) -> Iterator[Check]:
    check = "accuracy.min_recovery"
    names = held.names(ScoreMetrics)
    if not names:
        yield held.unmeasured(check, limit.min_recovery)
    pairs: dict[str, Pairs] = {}
    recoveries: dict[str, Recovery] = {}
    for name in names:
        if (reason := held.skipped(name)) is not None:
            yield held.leave_open(check, limit.of(name), reason, name)
            continue
        pairs[name] = held.pairs(name)
        found = _recovery(held.artifact.measured.tasks[name], pairs[name], limit, len(names))
        if found is None:
            yield held.leave_open(
                check,
                limit.of(name),
                f"{name}: the original answers none of the {pairs[name].items:,} items right, so there is nothing to keep; "
                "choose a task it can do",
                name,
            )
        else:
            recoveries[name] = found
    judged = judge_family(recoveries, 1 - limit.confidence)
    for name, finding in judged.items():
        yield held.decide(check, limit.of(name), finding, _recovery_reason(held, name, pairs[name], finding, limit), name)
    if limit.overall is not None:
        yield _overall(held, limit.overall, judged, names)


def _recovery(task: TaskMeasurement, pairs: Pairs, limit: AccuracyLimit, tasks: int) -> Recovery | None:
    if task.look is None or limit.sequential is None:
        return judge_pairs(pairs, limit.of(task.name), Levels.at(limit.confidence))
    look = Sequential.even(limit.sequential, limit.confidence, tasks).judge(pairs, task.look - 1, limit.of(task.name))
    return look.recovery if look is not None else None


def _recovery_reason(held: ArtifactChecks, name: str, pairs: Pairs, finding: Recovery, limit: AccuracyLimit) -> str:
    flips = count_flips(pairs, limit.confidence)
    bounds = _share_bounds(finding)
    task = held.artifact.measured.tasks[name]
    both = zip(held.original.measured.scored(name), held.artifact.measured.scored(name), strict=False)
    failed = sum(before.fault is not None or after.fault is not None for before, after in both)
    told = f", {failed} of them failed and count 0" if failed else ""
    stopped = f", settled after part {task.look} of {task.looks}" if task.look and task.looks and task.look < task.looks else ""
    chance = f" (as uneven by chance: p = {flips.p_value:.2g})" if flips.lost + flips.gained else ""
    return (
        f"{name}: recovery {100 * finding.value:.2f} %{bounds} of {finding.items:,} items{told}{stopped}, {flips.lost} lost and "
        f"{flips.gained} gained{chance}; the limit is "
        f"{100 * limit.of(name):g} %{_outlook(finding, 'items')}"
    )


def _overall(held: ArtifactChecks, limit: float, recoveries: Mapping[str, Recovery], names: list[str]) -> Check:
    check = "accuracy.overall"
    finding = overall_recovery(list(recoveries.values()), limit)
    if finding is None or len(recoveries) < len(names):
        return held.leave_open(check, limit, "not every task could be judged, so their mean cannot be")
    bounds = _share_bounds(finding)
    return held.decide(
        check,
        limit,
        finding,
        f"mean recovery {100 * finding.value:.2f} %{bounds} over {len(recoveries)} tasks; the limit is "
        f"{100 * limit:g} %{_outlook(finding, 'items')}",
    )


def _perplexity(held: ArtifactChecks, limit: PerplexityLimit) -> Iterator[Check]:
    check = "perplexity.max_ratio"
    names = held.names(PerplexityMetrics)
    if not names:
        yield held.unmeasured(check, limit.max_ratio)
    for name in names:
        if (reason := held.skipped(name)) is not None:
            yield held.leave_open(check, limit.max_ratio, reason, name)
            continue
        before, after = held.original.measured.windows(name), held.artifact.measured.windows(name)
        check_pairs(name, before, ((item.id, item.digest) for item in after))
        both = [(old, new) for old, new in zip(before, after, strict=True) if not old.fault and not new.fault]
        if len(both) < len(before):
            yield held.leave_open(
                check, limit.max_ratio, f"{name}: {len(before) - len(both)} of {len(before):,} windows could not be scored", name
            )
            continue
        finding = judge_perplexity(
            np.array([old.nll for old, _ in both]),
            np.array([new.nll for _, new in both]),
            np.array([old.tokens for old, _ in both], dtype=np.float64),
            limit.max_ratio,
            limit.confidence,
        )
        bounds = bounds_told(finding.interval, finding.level, lambda value: f"{value:.4f}")
        outlook = _outlook(finding, "windows") if finding.interval else ": a single window has no spread; measure more of them"
        yield held.decide(
            check,
            limit.max_ratio,
            finding,
            f"{name}: {finding.value:.4f} times the original's perplexity{bounds} over {len(before):,} windows; "
            f"the limit is {limit.max_ratio:g}{outlook}",
            name,
        )


def _flips(held: ArtifactChecks, limit: FlipsLimit) -> Iterator[Check]:
    check = "flips.max_share"
    names = held.names(ScoreMetrics)
    if not names:
        yield held.unmeasured(check, limit.max_share)
    for name in names:
        if (reason := held.skipped(name)) is not None:
            yield held.leave_open(check, limit.max_share, reason, name)
            continue
        flips = count_flips(held.pairs(name), limit.confidence)
        finding = judge_flips(flips, limit.max_share)
        noise = flips_above_noise(held.original.measured, held.artifact.measured, name, limit.confidence)
        own = "" if noise is None else f" (the original asked again: {100 * noise.floor:.2f} %)"
        outlook = _outlook(finding, "items")
        if finding.outcome == "fail" and noise is not None and not noise.above:
            finding = replace(finding, outcome="inconclusive", items_needed=None)
            outlook = f": but it is not shown to be more than of the original itself (p = {noise.p_value:.2g})"
        bounds = _share_bounds(finding)
        reason = (
            f"{name}: {flips.lost} lost and {flips.gained} gained of {flips.items:,} items, {100 * flips.share:.2f} %{bounds}{own}"
            f"; the limit is {100 * limit.max_share:g} %{outlook}"
        )
        yield held.decide(check, limit.max_share, finding, reason, name)


def _grounding(held: ArtifactChecks, limit: GroundingLimit) -> Check:
    check = "grounding"
    before, after = held.original.measured.grounding, held.artifact.measured.grounding
    if before is None or after is None:
        return held.leave_open(check, 0.0, "it was not seen whether answers depend on the image; add eval.grounding")
    own = image_gain_of(held.original.measured.grounding_items, limit.confidence)
    found = image_gain_of(held.artifact.measured.grounding_items, limit.confidence)
    if own is None or found is None:
        return held.leave_open(check, 0.0, "every question that was to show it failed", after.task)
    if own.outcome != "pass":
        return held.leave_open(
            check,
            0.0,
            f"{after.task}: the original itself answers {own.items:,} questions no better with their own image "
            f"({100 * own.right:.1f} %) than with another ({100 * own.wrong:.1f} %); choose questions whose answers need the image",
            after.task,
        )
    shown = (
        f"{100 * found.right:.1f} % with the own image, {100 * found.wrong:.1f} % with another, "
        f"{100 * after.changed_other:.1f} % of answers changed, of {found.items:,} questions (p = {found.p_value:.2g}; the "
        f"original: {100 * own.right:.1f} % and {100 * own.wrong:.1f} %)"
    )
    verdict = "answers depend on the image" if found.outcome == "pass" else "answers do not depend on the image"
    return held.decide(check, 0.0, found, f"{after.task}: {verdict}: {shown}", after.task)


def _size(held: ArtifactChecks, limit: SizeLimit) -> Iterator[Check]:
    before, after = held.original.bytes, held.artifact.bytes
    if limit.max_ratio is not None:
        ratio = after / before
        reason = f"{after:,} bytes, {100 * ratio:.2f} % of the original's {before:,}; the limit is {100 * limit.max_ratio:g} %"
        yield held.decide("size.max_ratio", limit.max_ratio, _within(ratio, limit.max_ratio), reason)
    if limit.max_bits_per_weight is not None:
        bits = held.artifact.bits_per_weight
        if bits is None:
            yield held.leave_open("size.max_bits_per_weight", limit.max_bits_per_weight, "how many weights there are is not known")
        else:
            reason = f"{bits:.3f} bits per weight of the original; the limit is {limit.max_bits_per_weight:g}"
            yield held.decide(
                "size.max_bits_per_weight", limit.max_bits_per_weight, _within(bits, limit.max_bits_per_weight), reason
            )
    if limit.max_bytes is not None:
        reason = f"{after:,} bytes; the limit is {limit.max_bytes:,.0f}"
        yield held.decide("size.max_bytes", limit.max_bytes, _within(after, limit.max_bytes), reason)


def _share_bounds(finding: Finding) -> str:
    return bounds_told(finding.interval, finding.level, lambda value: f"{100 * value:.2f}", " %")


def _within(value: float, limit: float) -> Finding:
    return Finding(value, None, "pass" if value <= limit else "fail", None)


def _outlook(finding: Finding, items: str) -> str:
    if finding.outcome != "inconclusive":
        return ""
    if finding.items_needed is None:
        return f": what was observed stands at the limit, so no number of {items} would settle it"
    return f": {finding.items_needed:,} {items} would settle it"
