"""Whether an artifact keeps enough of the original's score, item by item: one task, several tasks, and all of them together.

Right/wrong items of which no two belong together are judged by the score test in `statistics`, everything else (scores between 0
and 1, several questions about one image) by the bootstrap of whole clusters in `bootstrap`. Both answer alike: a `Recovery`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.eval.bootstrap import Totals, bootstrap_tails
from compress.eval.statistics import (
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

_LEAST, _MOST = 1e-9, 1e6
"""Between these a recovery's bounds are looked for."""

_STEP = 0.02
"""How far from the value that begins: less than bounds usually are."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Two models' scores of the same items in the same order; equal numbers in `clusters` mark items that belong together.

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
        """Whether no two items belong together."""
        return len(np.unique(self.clusters)) == self.items

    @cached_property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        return all(bool(np.isin(scores, (0.0, 1.0)).all()) for scores in (self.original, self.artifact))

    @cached_property
    def counts(self) -> PairedCounts:
        """How many scores were kept, fell and rose; of right/wrong items these are the four cells of the paired table."""
        lost, gained = self.artifact < self.original, self.artifact > self.original
        kept = (self.original > 0) & ~lost & ~gained
        parts = (kept, lost, gained, ~(kept | lost | gained))
        return PairedCounts(*(int(part.sum()) for part in parts))

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
    """Return the outcome of `judge_pairs` alone, which is found faster than bounds are; inconclusive where the original's is 0."""
    if float(pairs.original.sum()) == 0:
        return "inconclusive"
    if pairs.binary and pairs.independent:
        return levels.outcome(*score_tails(pairs.counts, limit))
    tails = bootstrap_tails(pairs.totals, limit)
    return levels.outcome(tails.larger, tails.smaller)


def judge_pairs(pairs: Pairs, limit: float, levels: Levels) -> Recovery | None:
    """Judge whether the artifact keeps at least `limit` of the original's mean score; None where the original's is 0.

    At the limit, an artifact passes at most levels.passing of the time and fails at most levels.failing. Where nothing changed the
    bounds still say what so few items can say: about three clusters may have been lost unseen.
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
        interval=_bounds(pairs.totals, limit, value, levels, outcome),
        outcome=outcome,
        items_needed=needed,
        items=pairs.items,
        p_pass=tails.larger,
        p_fail=tails.smaller,
        levels=levels,
        method="bootstrap by clusters",
        level=levels.interval,
    )


def _bounds(totals: Totals, limit: float, value: float, levels: Levels, outcome: Outcome) -> tuple[float, float] | None:
    """Invert the bootstrap's test; the verdict at the limit says on which side of it the bounds lie. None for one cluster.

    A bound is the crossing nearest to the value: of a recovery that is far from it so little is known that the test may not be
    sure of anything any more.
    """
    if totals.clusters < 2:
        return None

    def below(ratio: float) -> float:
        return levels.passing - bootstrap_tails(totals, ratio).larger

    def above(ratio: float) -> float:
        return bootstrap_tails(totals, ratio).smaller - levels.failing

    low = high = max(value, _LEAST)
    if outcome == "pass":
        start = limit
    else:
        start, low = _outwards(lambda ratio: below(ratio) < 0, min(low, limit), -1)
    if outcome == "fail":
        end = limit
    else:
        high, end = _outwards(lambda ratio: above(ratio) > 0, max(high, limit), 1)
    return 0.0 if value == 0 else crossing(below, start, low, 1e-6), crossing(above, high, end, 1e-6)


def _outwards(inside: Callable[[float], bool], ratio: float, sign: Literal[-1, 1]) -> tuple[float, float]:
    """Step away from a recovery that is within the bounds until one is not; return the last two, the smaller first."""
    step = _STEP
    while True:
        last, ratio = ratio, min(max(ratio + sign * step, _LEAST), _MOST)
        if not inside(ratio) or ratio in (_LEAST, _MOST):
            return min(last, ratio), max(last, ratio)
        step *= 2


def _items_to_settle(pairs: Pairs, limit: float, spread: float, levels: Levels) -> int | None:
    """Return for how many items the distance to the limit would be as many standard errors as the verdict asks for."""
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
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        worst = max(worst, min((len(p_values) - rank) * p_values[name], 1.0))
        adjusted[name] = worst
    return adjusted


def judge_family(recoveries: Mapping[str, Recovery], failing: float) -> dict[str, Recovery]:
    """Judge several tasks together, so that a sound artifact fails on any of them by chance at most `failing` of the time.

    A failure stands only where its p-value, adjusted by Holm for the number of tasks (`p_fail` of what is returned), is at most
    `failing`; otherwise it becomes inconclusive. Passing needs no correction: the artifact passes only if it does so on
    every task (an intersection-union test: Berger, Technometrics 24, 1982), so each task would have to err.
    """
    adjusted = holm({name: recovery.p_fail for name, recovery in recoveries.items()})
    level = failing / max(len(recoveries), 1)
    judged: dict[str, Recovery] = {}
    for name, recovery in recoveries.items():
        changes = replace(recovery, p_fail=adjusted[name])
        if recovery.outcome == "fail" and adjusted[name] > failing:
            ratio = normal_quantile(level) / normal_quantile(recovery.p_fail)
            needed = max(math.ceil(recovery.items * ratio**2), recovery.items + 1)
            changes = replace(changes, outcome="inconclusive", items_needed=needed)
        judged[name] = changes
    return judged


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
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return Finding(value, None, "inconclusive", None)
    below = math.hypot(*(recovery.value - bounds[0] for recovery, bounds in zip(recoveries, known, strict=True)))
    above = math.hypot(*(bounds[1] - recovery.value for recovery, bounds in zip(recoveries, known, strict=True)))
    interval = (value - below / len(known), value + above / len(known))
    level = min((recovery.level for recovery in recoveries if recovery.level is not None), default=None)
    if interval[0] >= limit:
        return Finding(value, interval, "pass", None, level=level)
    if interval[1] < limit:
        return Finding(value, interval, "fail", None, level=level)
    reach, distance = (below if value > limit else above) / len(known), abs(value - limit)
    items = sum(recovery.items for recovery in recoveries)
    needed = max(math.ceil(items * (reach / distance) ** 2), items + 1) if distance > 1e-12 else None
    return Finding(value, interval, "inconclusive", needed, level=level)
