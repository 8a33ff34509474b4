"""The gate: the limits of a recipe, and the verdict on what was measured: pass, fail or inconclusive, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from compress.errors import UsageError
from compress.eval.latency_gate import LatencyLimit, MemoryLimit
from compress.eval.latency_results import Latency
from compress.eval.paired import Pairs
from compress.eval.results import Measured, ScoredItem
from compress.eval.sequential import Sequential
from compress.eval.statistics import Outcome
from compress.schema import Frozen, sets_a_limit

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]

JUDGED = ("vqa", "choice", "caption", "zero-shot", "retrieval", "adapter")
"""The kinds of task whose items have scores."""


class AccuracyLimit(Frozen):
    """Of every task with scores, at least this share of the original's is kept, shown with this confidence.

    `tasks` holds other shares for some of them, by their names. `overall` is the same for the mean over the tasks. With
    `sequential`, items are asked in so many parts, and no more of them once a task is settled; the confidence holds over all
    parts together.
    """

    min_recovery: Share
    confidence: Confidence
    tasks: Mapping[str, Share] = Field(default_factory=lambda: dict[str, float]())
    overall: Share | None = None
    sequential: Annotated[int, Field(ge=2, le=10)] | None = None

    def of(self, task: str) -> float:
        """Return the share of the original's score that a task must keep."""
        return self.tasks.get(task, self.min_recovery)


class PerplexityLimit(Frozen):
    """Of every perplexity task, the perplexity is at most this many times the original's, shown with this confidence."""

    max_ratio: Positive
    confidence: Confidence


class FidelityLimit(Frozen):
    """Of every task, the KL per token (or image) in nats is at most, and the share of equal top tokens at least, this.

    `max_kl` is for the mean, `max_kl_p99` for the 99th percentile.
    """

    max_kl: Positive | None = None
    max_kl_p99: Positive | None = None
    min_top1: Share | None = None

    _check_any = sets_a_limit()


class FlipsLimit(Frozen):
    """Of every task with scores, at most this share of the items scores otherwise than the original's, shown with confidence."""

    max_share: Share
    confidence: Confidence


class GroundingLimit(Frozen):
    """Questions are answered better with their own image than with another one, shown with this confidence."""

    confidence: Confidence


class SizeLimit(Frozen):
    """The artifact's weights take at most so many times the original's bytes, so many bits per weight, or so many bytes."""

    max_ratio: Positive | None = None
    max_bits_per_weight: Positive | None = None
    max_bytes: Positive | None = None

    _check_any = sets_a_limit()


class GateLimits(Frozen):
    """What an artifact must keep; what is not written is not checked."""

    accuracy: AccuracyLimit | None = None
    perplexity: PerplexityLimit | None = None
    fidelity: FidelityLimit | None = None
    flips: FlipsLimit | None = None
    grounding: GroundingLimit | None = None
    size: SizeLimit | None = None
    latency: LatencyLimit | None = None
    memory: MemoryLimit | None = None

    def tasks_needed(self) -> dict[str, tuple[str, ...]]:
        """Return, for each check that is written and needs tasks, the kinds of task of which at least one must be measured."""
        kinds = {"accuracy": JUDGED, "flips": JUDGED, "perplexity": ("perplexity",), "fidelity": (*JUDGED[:-1], "perplexity")}
        return {check: tasks for check, tasks in kinds.items() if getattr(self, check) is not None}

    def parts_needed(self) -> dict[str, str]:
        """Return, for each check that is written and needs it, what else of the recipe's `eval` must be there."""
        parts = {"grounding": "grounding", "latency": "latency", "memory": "latency"}
        return {check: part for check, part in parts.items() if getattr(self, check) is not None}


class Gate(GateLimits):
    """The limits that every artifact of a recipe must keep, everywhere; `targets` holds what is otherwise at a target, by its name.

    A check that is written there stands in the place of the general one.
    """

    targets: Mapping[str, GateLimits] = Field(default_factory=lambda: dict[str, GateLimits]())

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        checks = [name for name in GateLimits.model_fields if getattr(self, name) is not None]
        if not checks and not any(limits.model_fields_set for limits in self.targets.values()):
            raise ValueError(f"checks nothing; write at least one of {', '.join(GateLimits.model_fields)}")
        return self

    def at(self, target: str) -> GateLimits:
        """Return the limits that hold at a target."""
        own = self.targets.get(target)
        found = {name: getattr(self, name) for name in GateLimits.model_fields}
        found |= {
            name: getattr(own, name) for name in GateLimits.model_fields if own is not None and getattr(own, name) is not None
        }
        return GateLimits.model_construct(**found)

    def grounding_confidence(self, target: str) -> float | None:
        """Return the confidence with which answers must be shown to depend on images; None where they need not."""
        limit = self.at(target).grounding
        return None if limit is None else limit.confidence

    def stopping(self, target: str, tasks: Sequence[str]) -> dict[str, AccuracyStopping]:
        """Return when an artifact needs no more items of each of these tasks; empty where all are asked."""
        limit = self.at(target).accuracy
        if limit is None or limit.sequential is None:
            return {}
        plan = Sequential.even(limit.sequential, limit.confidence, max(len(tasks), 1))
        return {task: AccuracyStopping(limit.of(task), plan) for task in tasks}


@dataclass(frozen=True)
class AccuracyStopping:
    """Stops asking an artifact once it is settled whether it keeps enough of the original's score."""

    limit: float
    plan: Sequential

    @property
    def looks(self) -> int:
        """After how many parts of the items it is seen whether it is settled."""
        return len(self.plan.fractions)

    def ends(self, items: int) -> Sequence[int]:
        """Return how many of so many items have been asked by the end of each part."""
        return self.plan.items(items)

    def settled(self, original: Sequence[ScoredItem], items: Sequence[ScoredItem], look: int) -> bool:
        """Return whether the items so far, the same of both, settle it after part `look`, from 1."""
        return self.plan.decide(pairs_of(original, items), look - 1, self.limit) != "go on"

    def describe(self) -> dict[str, object]:
        """Return what shapes which items are asked, for a step's key."""
        return {
            "limit": self.limit,
            "fractions": self.plan.fractions,
            "levels": [self.plan.levels.passing, self.plan.levels.failing],
        }


@dataclass(frozen=True)
class Subject:
    """A model as the gate sees it: its name in reports, its weights' bytes on disk and bits each, and what was measured of it."""

    artifact: str
    bytes: int
    measured: Measured
    bits_per_weight: float | None = None
    latency: Latency | None = None


class Check(Frozen):
    """One limit held against one artifact, and one task where it is about tasks.

    `check` is the limit's place in the recipe's gate. `interval` holds the bounds of `value`, where it has any, and
    `interval_level` the confidence of both together: 0.9 where each holds with 95 %. `at_least` says that `value` is a lower bound
    of what the limit is about. `items_needed` is how many items, at the rates observed, would turn an inconclusive check into a
    pass or a fail.
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
    target: str = "local"
    interval_level: float | None = None
    at_least: bool = False


class Verdict(Frozen):
    """The gate's decision on a run: fail if any artifact fails, otherwise inconclusive if any is, otherwise pass."""

    verdict: Outcome
    artifacts: dict[str, Outcome]
    checks: tuple[Check, ...]


def judge(gate: Gate, original: Subject, artifacts: Sequence[Subject], target: str = "local") -> Verdict:
    """Hold every limit that the gate has at a target against every artifact, item by item against the original.

    An artifact passes only if every one of its checks does, so no correction for several checks is needed: each would have to
    err for a bad artifact to pass. That a good one fails on one of several tasks by chance is corrected for.

    Raises:
        UsageError: there is no artifact to judge.
        DataError: an artifact was measured on other items than the original; names the first.
    """
    from compress.gate_checks import checks_of

    if not artifacts:
        raise UsageError("the gate was given no artifact; export at least one")
    checks: list[Check] = []
    outcomes: dict[str, Outcome] = {}
    for artifact in artifacts:
        own = list(checks_of(gate.at(target), original, artifact, target))
        outcomes[artifact.artifact] = worst([check.verdict for check in own])
        checks += own
    return Verdict(verdict=worst(list(outcomes.values())), artifacts=outcomes, checks=tuple(checks))


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict over several targets: an artifact is what it is at the worst of them."""
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict.artifacts))
    artifacts: dict[str, Outcome] = {
        name: worst([verdict.artifacts[name] for verdict in verdicts if name in verdict.artifacts]) for name in names
    }
    checks = tuple(check for verdict in verdicts for check in verdict.checks)
    return Verdict(verdict=worst(list(artifacts.values())), artifacts=artifacts, checks=checks)


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """Return fail if any is, otherwise inconclusive if any is, otherwise pass."""
    if "fail" in outcomes:
        return "fail"
    return "inconclusive" if "inconclusive" in outcomes else "pass"


def pairs_of(original: Sequence[ScoredItem], items: Sequence[ScoredItem]) -> Pairs:
    """Return the scores of the same items in the same order, those about the same images together in a cluster."""
    return Pairs.of([item.score for item in original], [item.score for item in items], [item.cluster for item in original])
