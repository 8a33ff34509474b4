"""The gate: the limits of a recipe, and the verdict on the measurements: pass, fail or inconclusive, with a reason per check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from compress.eval.latency.limits import LatencyLimit, MemoryLimit
from compress.eval.latency.results import Latency
from compress.eval.results import ItemizedMeasurement, ScoredItem
from compress.eval.statistics.estimates import Outcome
from compress.eval.statistics.paired import Pairs
from compress.eval.statistics.sequential import Sequential
from compress.recipe.schema import Frozen, sets_a_limit

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]

_TASK_CHECKS = ("accuracy", "perplexity", "fidelity", "flips")
"""The checks of tasks' figures; which tasks give any is theirs to say (`Task.judged_by`)."""


class AccuracyLimit(Frozen):
    """The recovery of every scored task, mean(artifact) / mean(original), is at least the limit, with this confidence."""

    min_recovery: Share
    confidence: Confidence
    tasks: Mapping[str, Share] = Field(default_factory=lambda: dict[str, float]())
    """Other limits for some of the tasks, by name."""

    overall: Share | None = None
    """The limit of the mean recovery over the tasks."""

    sequential: Annotated[int, Field(ge=2, le=10)] | None = None
    """The number of group-sequential looks: a task is measured on no more items once it is decided. The confidence holds over all
    looks together."""

    def of(self, task: str) -> float:
        """Return a task's limit."""
        return self.tasks.get(task, self.min_recovery)


class PerplexityLimit(Frozen):
    """The perplexity of every perplexity task is at most this many times the original's, with this confidence."""

    max_ratio: Positive
    confidence: Confidence


class FidelityLimit(Frozen):
    """Limits on every task's KL(original ‖ artifact) per token or image, and on top-1 agreement."""

    max_kl: Positive | None = None
    """The mean KL, in nats."""

    max_kl_p99: Positive | None = None
    """The 99th percentile of KL, in nats."""

    min_top1: Share | None = None
    """The share of tokens with the same most likely token."""

    _check_any = sets_a_limit()


class FlipsLimit(Frozen):
    """At most this share of every scored task's items has another score than the original's, with this confidence."""

    max_share: Share
    confidence: Confidence


class GroundingLimit(Frozen):
    """The score with the own image is higher than with another question's image, with this confidence."""

    confidence: Confidence


class SizeLimit(Frozen):
    """Limits on the artifact's weight files: relative to the original's bytes, per weight of the original, or absolute."""

    max_ratio: Positive | None = None
    max_bits_per_weight: Positive | None = None
    max_bytes: Positive | None = None

    _check_any = sets_a_limit()


class GateLimits(Frozen):
    """The limits for an artifact; a check that is None is not made."""

    accuracy: AccuracyLimit | None = None
    perplexity: PerplexityLimit | None = None
    fidelity: FidelityLimit | None = None
    flips: FlipsLimit | None = None
    grounding: GroundingLimit | None = None
    size: SizeLimit | None = None
    latency: LatencyLimit | None = None
    memory: MemoryLimit | None = None

    def task_checks(self) -> tuple[str, ...]:
        """Return the checks for which the recipe must have at least one task that is judged by it."""
        return tuple(check for check in _TASK_CHECKS if getattr(self, check) is not None)

    def required_eval_sections(self) -> dict[str, str]:
        """Return, for each check that needs one, the section of the recipe's `eval` that must be present."""
        sections = {"grounding": "grounding", "latency": "latency", "memory": "latency"}
        return {check: section for check, section in sections.items() if getattr(self, check) is not None}


class Gate(GateLimits):
    """The limits for every artifact of a recipe."""

    targets: Mapping[str, GateLimits] = Field(default_factory=lambda: dict[str, GateLimits]())
    """Checks that replace the general ones at a target, by its name."""

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        checks = [name for name in GateLimits.model_fields if getattr(self, name) is not None]
        if not checks and not any(limits.model_fields_set for limits in self.targets.values()):
            raise ValueError(f"checks nothing; write at least one of {', '.join(GateLimits.model_fields)}")
        return self

    def at(self, target: str) -> GateLimits:
        """Return the limits at a target."""
        overrides = self.targets.get(target)
        limits = {name: getattr(self, name) for name in GateLimits.model_fields}
        limits |= {
            name: getattr(overrides, name)
            for name in GateLimits.model_fields
            if overrides is not None and getattr(overrides, name) is not None
        }
        # Both parts have been validated; their union needs no second check.
        return GateLimits.model_construct(**limits)

    def grounding_confidence(self, target: str) -> float | None:
        """Return the confidence of the limit on visual grounding, None without one."""
        limit = self.at(target).grounding
        return None if limit is None else limit.confidence

    def stopping(self, target: str, tasks: Sequence[str]) -> dict[str, AccuracyStoppingRule]:
        """Return the stopping rule of each of these tasks; empty where all items are measured."""
        limit = self.at(target).accuracy
        if limit is None or limit.sequential is None:
            return {}
        # By the number of tasks: a failure at an interim look must stand after Holm's correction over all of them.
        plan = Sequential.even(limit.sequential, limit.confidence, max(len(tasks), 1))
        return {task: AccuracyStoppingRule(limit.of(task), plan) for task in tasks}


@dataclass(frozen=True)
class AccuracyStoppingRule:
    """Stops measuring a task once the recovery is decided to be above or below its limit; a `StoppingRule` of tasks."""

    limit: float
    """The least recovery."""

    plan: Sequential

    @property
    def looks(self) -> int:
        """The number of looks, the last of which is at all items."""
        return len(self.plan.fractions)

    def cumulative_items(self, items: int) -> Sequence[int]:
        """Return, for a sample of `items`, how many of them have been measured by each look."""
        return self.plan.items(items)

    def is_decided(self, original: Sequence[ScoredItem], artifact: Sequence[ScoredItem], look: int) -> bool:
        """Return whether the paired items so far decide the verdict at look number `look`, counted from 1."""
        return self.plan.decide(pairs_of(original, artifact), look - 1, self.limit) != "go on"

    def describe(self) -> dict[str, object]:
        """Return the parameters that determine which items are measured, as JSON values: part of a step's cache key."""
        return {
            "limit": self.limit,
            "fractions": self.plan.fractions,
            "levels": [self.plan.levels.passing, self.plan.levels.failing],
        }


@dataclass(frozen=True)
class MeasuredModel:
    """The original or an artifact, with everything that the gate judges."""

    artifact: str
    """The name in reports."""

    bytes: int
    """The size of the weight files on disk."""

    measurement: ItemizedMeasurement
    bits_per_weight: float | None = None
    """The bits of the weight files per weight of the original."""

    latency: Latency | None = None


class Check(Frozen):
    """The result of one limit for one artifact, and for one task where the limit is per task; a row of `report.json`."""

    artifact: str
    check: str
    """The limit's key in the recipe's gate, such as `accuracy.min_recovery`."""

    task: str | None
    value: float | None
    interval: tuple[float, float] | None
    """The confidence bounds of `value`, None where it has none."""

    limit: float
    verdict: Outcome
    reason: str
    items_needed: int | None = None
    """How many items, at the observed rates, would decide an inconclusive check."""

    target: str = "local"
    interval_level: float | None = None
    """The confidence of the interval as a whole: 0.9 where each bound holds with 95 %."""

    at_least: bool = False
    """Whether `value` is only a lower bound of the limited quantity."""


class Verdict(Frozen):
    """The decision on a run: fail if any artifact fails, otherwise inconclusive if any is, otherwise pass."""

    verdict: Outcome
    artifacts: dict[str, Outcome]
    checks: tuple[Check, ...]


def combine_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict over several targets: an artifact's outcome is its worst one."""
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
    """Pair the scores of the same items in the same order, clustered by image."""
    # Clusters are images: answers to several questions about one image err together; as independent items they would make intervals
    # too narrow.
    return Pairs.of([item.score for item in original], [item.score for item in items], [item.cluster for item in original])
