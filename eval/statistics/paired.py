"""Tests of recovery, mean(artifact) / mean(original), from paired items: one task, a family of tasks, and their mean.

Independent right/wrong items are judged by the score test in `statistics`, everything else (scores between 0 and 1, several
questions about one image) by the bootstrap of clusters in `bootstrap`. Both return a `Recovery`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.eval.statistics.bootstrap import Totals, bootstrap_tails
from compress.eval.statistics.estimates import (
    Finding,
    Levels,
    Outcome,
    PairedCounts,
    Recovery,
    crossing,
    judge_counts,
    normal_quantile,
    score_tails,
)

Floats = NDArray[np.float64]

_MIN_RATIO, _MAX_RATIO = 1e-9, 1e6
"""The range in which the bounds of a recovery are searched: not 0, by which the hypothesis would say nothing of the original."""

_FIRST_STEP = 0.02
"""The first step of the outward search for a bound, smaller than most intervals; it doubles until the bound is passed."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Two models' scores of the same items in the same order; equal numbers in `clusters` mark dependent items.

    Raises:
        ValueError: the lengths differ, there is no item, or a score is negative or not finite.
    """

    original: Floats
    artifact: Floats
    clusters: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.original) == len(self.artifact) == len(self.clusters):
            raise ValueError(f"{len(self.original)} and {len(self.artifact)} scores of {len(self.clusters)} items cannot be paired")
        if len(self.original) == 0:
            raise ValueError("there is no item to compare")
        scores = np.concatenate([self.original, self.artifact])
        # A negative score would make a ratio of means meaningless.
        if not np.isfinite(scores).all() or scores.min() < 0:
            raise ValueError("a score is negative or not finite")

    @classmethod
    def of(cls, original: Sequence[float], artifact: Sequence[float], clusters: Sequence[str] | None = None) -> Pairs:
        """Pair the scores (or whether each item is right); items with the same name in `clusters` depend on each other."""
        if clusters is None:
            codes = np.arange(len(original), dtype=np.int64)
        else:
            codes = np.unique(np.array(clusters, dtype=str), return_inverse=True)[1].astype(np.int64)
        return cls(np.asarray(original, dtype=np.float64), np.asarray(artifact, dtype=np.float64), codes)

    @property
    def items(self) -> int:
        """The number of items."""
        return len(self.original)

    @cached_property
    def independent(self) -> bool:
        """Whether every item is a cluster of its own."""
        return len(np.unique(self.clusters)) == self.items

    @cached_property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        return all(bool(np.isin(scores, (0.0, 1.0)).all()) for scores in (self.original, self.artifact))

    @cached_property
    def counts(self) -> PairedCounts:
        """The numbers of scores that stayed, fell and rose; of right/wrong items, the four cells of the paired 2×2 table."""
        lost, gained = self.artifact < self.original, self.artifact > self.original
        unchanged = (self.original > 0) & ~lost & ~gained
        cells = (unchanged, lost, gained, ~(unchanged | lost | gained))
        return PairedCounts(*(int(cell.sum()) for cell in cells))

    @cached_property
    def totals(self) -> Totals:
        """The scores summed over each cluster."""
        codes = np.unique(self.clusters, return_inverse=True)[1]
        original, artifact, sizes = (np.bincount(codes, scores) for scores in (self.original, self.artifact, np.ones(self.items)))
        return Totals(
            original.astype(np.float64),
            artifact.astype(np.float64),
            sizes.astype(np.float64),
            largest=float(max(self.original.max(), self.artifact.max())),
        )

    def first(self, items: int) -> Pairs:
        """Return the pairs of the first so many items."""
        return Pairs(self.original[:items], self.artifact[:items], self.clusters[:items])


def decide(pairs: Pairs, limit: float, levels: Levels) -> Outcome:
    """Return the outcome of `judge_pairs` without its bounds, which is faster; inconclusive where the original's mean is 0."""
    if float(pairs.original.sum()) == 0:
        return "inconclusive"
    if pairs.binary and pairs.independent:
        return levels.outcome(*score_tails(pairs.counts, limit))
    tails = bootstrap_tails(pairs.totals, limit)
    return levels.outcome(tails.larger, tails.smaller)


def judge_pairs(pairs: Pairs, limit: float, levels: Levels) -> Recovery | None:
    """Judge whether the recovery is at least `limit`; None where the original's mean score is 0.

    At the limit, an artifact passes with probability of at most levels.passing and fails with at most levels.failing. Where no
    score changed, the interval still has a width: about three clusters may have been lost unseen.
    """
    if float(pairs.original.sum()) == 0:
        return None
    if pairs.binary and pairs.independent:
        return judge_counts(pairs.counts, limit, levels)
    tails = bootstrap_tails(pairs.totals, limit)
    outcome = levels.outcome(tails.larger, tails.smaller)
    value = float(pairs.artifact.sum() / pairs.original.sum())
    needed = _items_to_settle(pairs, limit, tails.spread, levels) if outcome == "inconclusive" else None
    return Recovery(
        value=value,
        interval=_bootstrap_interval(pairs.totals, limit, value, levels, outcome),
        outcome=outcome,
        items_needed=needed,
        items=pairs.items,
        p_pass=tails.larger,
        p_fail=tails.smaller,
        levels=levels,
        method="bootstrap by clusters",
        level=levels.interval,
    )


def _bootstrap_interval(totals: Totals, limit: float, value: float, levels: Levels, outcome: Outcome) -> tuple[float, float] | None:
    """Return the interval of the recovery by inverting the bootstrap test; None for one cluster.

    The outcome at the limit tells on which side of it the bounds are. A bound is the crossing nearest to the value: far from
    it the test may stop rejecting.
    """
    if totals.clusters < 2:
        return None

    def below(ratio: float) -> float:
        return levels.passing - bootstrap_tails(totals, ratio).larger

    def above(ratio: float) -> float:
        return bootstrap_tails(totals, ratio).smaller - levels.failing

    low = high = max(value, _MIN_RATIO)
    if outcome == "pass":
        start = limit
    else:
        start, low = _step_outwards(lambda ratio: below(ratio) < 0, min(low, limit), -1)
    if outcome == "fail":
        end = limit
    else:
        high, end = _step_outwards(lambda ratio: above(ratio) > 0, max(high, limit), 1)
    lower = 0.0 if value == 0 else crossing(below, start, low, 1e-6, steps=True)
    return lower, crossing(above, high, end, 1e-6, steps=True)


def _step_outwards(inside: Callable[[float], bool], ratio: float, sign: Literal[-1, 1]) -> tuple[float, float]:
    """Step outwards from a ratio inside the interval until one is outside; return the last two, the smaller first."""
    step = _FIRST_STEP
    while True:
        last, ratio = ratio, min(max(ratio + sign * step, _MIN_RATIO), _MAX_RATIO)
        if not inside(ratio) or ratio in (_MIN_RATIO, _MAX_RATIO):
            return min(last, ratio), max(last, ratio)
        step *= 2


def _items_to_settle(pairs: Pairs, limit: float, spread: float, levels: Levels) -> int | None:
    """Return the number of items at which the distance to the limit is as many standard errors as the level requires."""
    totals = pairs.totals
    distance = float(totals.artifact.sum() - limit * totals.original.sum()) / totals.clusters
    if abs(distance) < 1e-12 or totals.clusters < 2:
        return None
    z = normal_quantile(levels.passing if distance > 0 else levels.failing)
    return max(math.ceil((z * spread / distance) ** 2 * pairs.items / totals.clusters), pairs.items + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values adjusted by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979).

    Calling every adjusted value of at most α significant errs on one or more true hypotheses with a probability of at most α,
    however the tests depend on each other.
    """
    adjusted: dict[str, float] = {}
    worst = 0.0
    # By name among equal p-values: the result must not depend on the order of the recipe's tasks.
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        # Monotone: a larger p-value must not be adjusted to less than a smaller one.
        worst = max(worst, min((len(p_values) - rank) * p_values[name], 1.0))
        adjusted[name] = worst
    return adjusted


def judge_family(recoveries: Mapping[str, Recovery], failing: float) -> dict[str, Recovery]:
    """Correct several tasks' outcomes for multiple tests: a sound artifact fails on any of them with at most `failing` probability.

    A failure stands only where its p-value, adjusted by Holm for the number of tasks (`p_fail` of what is returned), is at most
    `failing`; otherwise it becomes inconclusive. Passing needs no correction: the artifact passes only if it does so on
    every task (an intersection-union test: Berger, Technometrics 24, 1982), so each task would have to err.
    """
    adjusted = holm({name: recovery.p_fail for name, recovery in recoveries.items()})
    level = failing / max(len(recoveries), 1)
    corrected: dict[str, Recovery] = {}
    for name, recovery in recoveries.items():
        recovery_corrected = replace(recovery, p_fail=adjusted[name])
        if recovery.outcome == "fail" and adjusted[name] > failing:
            # At the strictest of Holm's levels: what suffices there suffices at any.
            ratio = normal_quantile(level) / normal_quantile(recovery.p_fail)
            items_needed = max(math.ceil(recovery.items * ratio**2), recovery.items + 1)
            recovery_corrected = replace(recovery_corrected, outcome="inconclusive", items_needed=items_needed)
        corrected[name] = recovery_corrected
    return corrected


def overall_recovery(recoveries: Sequence[Recovery], limit: float) -> Finding | None:
    """Judge the mean of several tasks' recoveries, each task weighing the same; None where there is none.

    The tasks' items are independent of each other, so the distances of the bounds from the estimates add in quadrature (Zou and
    Donner, Statistics in Medicine 27, 2008): the bounds hold with the confidence of the tasks' own, are as uneven as those,
    and do not shrink to a point where nothing changed.
    """
    if not recoveries:
        return None
    value = sum(recovery.value for recovery in recoveries) / len(recoveries)
    intervals = [recovery.interval for recovery in recoveries]
    bounded = [interval for interval in intervals if interval is not None]
    if len(bounded) < len(intervals):
        return Finding(value, None, "inconclusive", None)
    # Lower and upper distances apart: intervals of ratios are uneven.
    reach_below = math.hypot(*(recovery.value - bounds[0] for recovery, bounds in zip(recoveries, bounded, strict=True)))
    reach_above = math.hypot(*(bounds[1] - recovery.value for recovery, bounds in zip(recoveries, bounded, strict=True)))
    interval = (value - reach_below / len(bounded), value + reach_above / len(bounded))
    # The lowest: tasks that stopped early have intervals of other confidence.
    level = min((recovery.level for recovery in recoveries if recovery.level is not None), default=None)
    if interval[0] >= limit:
        return Finding(value, interval, "pass", None, level=level)
    if interval[1] < limit:
        return Finding(value, interval, "fail", None, level=level)
    reach, distance = (reach_below if value > limit else reach_above) / len(bounded), abs(value - limit)
    total_items = sum(recovery.items for recovery in recoveries)
    items_needed = max(math.ceil(total_items * (reach / distance) ** 2), total_items + 1) if distance > 1e-12 else None
    return Finding(value, interval, "inconclusive", items_needed, level=level)
