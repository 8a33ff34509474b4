"""The gate: the limits of a recipe, and the verdict on what was measured: pass, fail or inconclusive, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from compress.errors import UsageError
from compress.eval.results import Fidelity, Measured, PerplexityMetrics, ScoreMetrics, check_pairs
from compress.eval.statistics import Finding, Outcome, count_pairs, judge_perplexity, judge_recovery
from compress.schema import Frozen

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]


class AccuracyLimit(Frozen):
    """Of every task with an accuracy, at least this share of the original's accuracy is kept, shown with this confidence."""

    min_recovery: Share
    confidence: Confidence


class PerplexityLimit(Frozen):
    """Of every perplexity task, the perplexity is at most this many times the original's, shown with this confidence."""

    max_ratio: Positive
    confidence: Confidence


class FidelityLimit(Frozen):
    """Of every task, the mean KL per token (or image) in nats is at most, and the share of equal top tokens at least, this."""

    max_kl: Positive | None = None
    min_top1: Share | None = None

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if self.max_kl is None and self.min_top1 is None:
            raise ValueError("sets no limit; write max_kl, min_top1 or both")
        return self


class SizeLimit(Frozen):
    """The artifact's weights take at most this many times the original's bytes."""

    max_ratio: Positive


class Gate(Frozen):
    """The limits that every artifact of a recipe must keep; what is not written is not checked."""

    accuracy: AccuracyLimit | None = None
    perplexity: PerplexityLimit | None = None
    fidelity: FidelityLimit | None = None
    size: SizeLimit | None = None

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not self.model_fields_set or all(getattr(self, name) is None for name in Gate.model_fields):
            raise ValueError(f"checks nothing; write at least one of {', '.join(Gate.model_fields)}")
        return self

    def tasks_needed(self) -> dict[str, tuple[str, ...]]:
        """Return, for each check that is written and needs tasks, the kinds of task of which at least one must be measured."""
        judged = ("vqa", "zero-shot")
        kinds = {"accuracy": judged, "perplexity": ("perplexity",), "fidelity": (*judged, "perplexity")}
        return {check: tasks for check, tasks in kinds.items() if getattr(self, check) is not None}


@dataclass(frozen=True)
class Subject:
    """A model as the gate sees it: its name in reports, the bytes of its weights on disk, and what was measured."""

    artifact: str
    bytes: int
    measured: Measured


class Check(Frozen):
    """One limit held against one artifact, and one task where it is about tasks.

    `check` is the limit's place in the recipe's gate. `interval` holds the bounds of `value`, where it has any.
    `items_needed` is how many items, at the rates observed, would turn an inconclusive check into a pass or a fail.
    """

    artifact: str
    check: str
    task: str | None
    value: float | None
    interval: tuple[float, float] | None
    limit: float
    verdict: Outcome
    reason: str
    items_needed: int | None = None


class Verdict(Frozen):
    """The gate's decision on a run: fail if any artifact fails, otherwise inconclusive if any is, otherwise pass."""

    verdict: Outcome
    artifacts: dict[str, Outcome]
    checks: tuple[Check, ...]


def judge(gate: Gate, original: Subject, artifacts: Sequence[Subject]) -> Verdict:
    """Hold every limit of the gate against every artifact, item by item against the original.

    An artifact passes only if every one of its checks does, so no correction for several checks is needed: each would have to
    err for a bad artifact to pass.

    Raises:
        UsageError: there is no artifact to judge.
        DataError: an artifact was measured on other items than the original; names the first.
    """
    if not artifacts:
        raise UsageError("the gate was given no artifact; export at least one")
    checks: list[Check] = []
    outcomes: dict[str, Outcome] = {}
    for artifact in artifacts:
        own = list(_checks(gate, original, artifact))
        outcomes[artifact.artifact] = _worst([check.verdict for check in own])
        checks += own
    return Verdict(verdict=_worst(list(outcomes.values())), artifacts=outcomes, checks=tuple(checks))


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    if "fail" in outcomes:
        return "fail"
    return "inconclusive" if "inconclusive" in outcomes else "pass"


@dataclass(frozen=True)
class _Held:
    """A limit of the gate held against one artifact and one task."""

    artifact: str
    check: str
    task: str | None
    limit: float

    def decide(self, finding: Finding, reason: str) -> Check:
        return Check(
            artifact=self.artifact,
            check=self.check,
            task=self.task,
            value=finding.value,
            interval=finding.interval,
            limit=self.limit,
            verdict=finding.outcome,
            reason=reason,
            items_needed=finding.items_needed,
        )

    def leave_open(self, reason: str) -> Check:
        return Check(
            artifact=self.artifact,
            check=self.check,
            task=self.task,
            value=None,
            interval=None,
            limit=self.limit,
            verdict="inconclusive",
            reason=reason,
        )


def _checks(gate: Gate, original: Subject, artifact: Subject) -> Iterator[Check]:
    tasks = original.measured.tasks.values()
    if gate.accuracy is not None:
        names = [task.name for task in tasks if isinstance(task.metrics, ScoreMetrics)]
        found = [_accuracy(gate.accuracy, original, artifact, name) for name in names]
        yield from found or [_unmeasured(artifact, "accuracy.min_recovery", gate.accuracy.min_recovery)]
    if gate.perplexity is not None:
        names = [task.name for task in tasks if isinstance(task.metrics, PerplexityMetrics)]
        found = [_perplexity(gate.perplexity, original, artifact, name) for name in names]
        yield from found or [_unmeasured(artifact, "perplexity.max_ratio", gate.perplexity.max_ratio)]
    if gate.fidelity is not None:
        if gate.fidelity.max_kl is not None:
            yield from _fidelity(artifact, "fidelity.max_kl", gate.fidelity.max_kl)
        if gate.fidelity.min_top1 is not None:
            yield from _fidelity(artifact, "fidelity.min_top1", gate.fidelity.min_top1)
    if gate.size is not None:
        yield _size(gate.size.max_ratio, original, artifact)


def _unmeasured(artifact: Subject, check: str, limit: float) -> Check:
    held = _Held(artifact.artifact, check, None, limit)
    return held.leave_open("nothing that was measured says anything about it; add a task to eval.tasks")


def _accuracy(limit: AccuracyLimit, original: Subject, artifact: Subject, task: str) -> Check:
    held = _Held(artifact.artifact, "accuracy.min_recovery", task, limit.min_recovery)
    before, after = original.measured.scored(task), artifact.measured.scored(task)
    check_pairs(task, before, ((item.id, item.digest) for item in after))
    counts = count_pairs([item.score >= 1 for item in before], [item.score >= 1 for item in after])
    if counts.original == 0:
        return held.leave_open(
            f"{task}: the original answers none of the {counts.items:,} items right, so there is nothing to keep; "
            "choose a task it can do"
        )
    finding = judge_recovery(counts, limit.min_recovery, limit.confidence)
    bounds = f" ({100 * finding.interval[0]:.2f}–{100 * finding.interval[1]:.2f} %)" if finding.interval else ""
    return held.decide(
        finding,
        f"{task}: recovery {100 * finding.value:.2f} %{bounds} of {counts.items:,} items, {counts.lost} lost and "
        f"{counts.gained} gained; "
        f"the limit is {100 * limit.min_recovery:g} %{_outlook(finding, 'items')}",
    )


def _perplexity(limit: PerplexityLimit, original: Subject, artifact: Subject, task: str) -> Check:
    held = _Held(artifact.artifact, "perplexity.max_ratio", task, limit.max_ratio)
    before, after = original.measured.windows(task), artifact.measured.windows(task)
    check_pairs(task, before, ((item.id, item.digest) for item in after))
    finding = judge_perplexity(
        np.array([item.nll for item in before]),
        np.array([item.nll for item in after]),
        np.array([item.tokens for item in before], dtype=np.float64),
        limit.max_ratio,
        limit.confidence,
    )
    bounds = f" ({finding.interval[0]:.4f}–{finding.interval[1]:.4f})" if finding.interval else ""
    outlook = _outlook(finding, "windows") if finding.interval else ": a single window has no spread; measure more of them"
    return held.decide(
        finding,
        f"{task}: {finding.value:.4f} times the original's perplexity{bounds} over {len(before):,} windows; "
        f"the limit is {limit.max_ratio:g}{outlook}",
    )


def _fidelity(artifact: Subject, check: str, limit: float) -> Iterator[Check]:
    tasks = artifact.measured.tasks.values()
    if not tasks:
        yield _unmeasured(artifact, check, limit)
    for task in tasks:
        held = _Held(artifact.artifact, check, task.name, limit)
        if task.fidelity is None:
            yield held.leave_open(f"{task.name}: was not compared with the original; measure it against the original's record")
        else:
            yield _alike(held, task.fidelity)


def _alike(held: _Held, fidelity: Fidelity) -> Check:
    if held.check == "fidelity.max_kl":
        outcome: Outcome = "pass" if fidelity.kl_mean <= held.limit else "fail"
        interval = fidelity.kl_interval
        bounds = f" ({interval[0]:.5f}–{interval[1]:.5f})" if interval else ""
        shown = f"mean KL {fidelity.kl_mean:.5f}{bounds} nats per {fidelity.unit}"
        finding = Finding(fidelity.kl_mean, interval, outcome, None)
    else:
        outcome = "pass" if fidelity.top1_agreement >= held.limit else "fail"
        top = "token" if fidelity.unit == "token" else "class"
        shown = f"the same top {top} for {100 * fidelity.top1_agreement:.2f} % of {fidelity.unit}s"
        finding = Finding(fidelity.top1_agreement, None, outcome, None)
    limit = f"{held.limit:g}" if held.check == "fidelity.max_kl" else f"{100 * held.limit:g} %"
    return held.decide(finding, f"{held.task}: {shown}, {fidelity.tokens:,} {fidelity.unit}s; the limit is {limit}")


def _size(limit: float, original: Subject, artifact: Subject) -> Check:
    held = _Held(artifact.artifact, "size.max_ratio", None, limit)
    ratio = artifact.bytes / original.bytes
    finding = Finding(ratio, None, "pass" if ratio <= limit else "fail", None)
    return held.decide(
        finding,
        f"{artifact.bytes:,} bytes, {100 * ratio:.2f} % of the original's {original.bytes:,}; the limit is {100 * limit:g} %",
    )


def _outlook(finding: Finding, items: str) -> str:
    if finding.outcome != "inconclusive":
        return ""
    if finding.items_needed is None:
        return f": what was observed stands at the limit, so no number of {items} would settle it"
    return f": {finding.items_needed:,} {items} would settle it"
