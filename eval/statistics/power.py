"""Statistical power, before anything is measured: the loss that a number of items resolves, and the items that a limit needs.

"400 items resolve 2.1 points" means: with a limit 2.1 points below the original's score, an artifact that truly loses
nothing passes with a probability of 80 % (`POWER`), although an assumed share of its items changes, as many for the worse as for
the better. What is assumed depends on the metric: `AssumedFlips` of items that are right or wrong, `AssumedChanges` of others.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from compress.eval.statistics.estimates import PairedCounts, constrained_flips, crossing, normal_quantile

POWER = 0.8
"""The conventional power of a test; `plan` states it with every number."""

_SCALE = 10**9
"""Expected shares are rounded to counts of so many items, for `PairedCounts` are whole numbers."""

_MAX_ITEMS = 10**9
"""Limits that need more items are reported as out of reach."""


@dataclass(frozen=True)
class AssumedFlips:
    """Assumptions on a task with right/wrong items."""

    changed: float = 0.05
    """The share of items that are right with one model and wrong with the other."""

    score: float = 0.75
    """The original's accuracy."""

    design: float = 1.0
    """The design effect of the clusters on the variance: 1 + (items per cluster − 1) · their correlation."""

    def passing_chance(self, items: int, limit: float, passing: float) -> float:
        """Return the probability that an artifact without any true loss passes the limit at the level `passing`.

        A normal approximation of the score test; of several looks, `passing` is the level of the last one.
        """
        # No more than there are right, and wrong, items to flip.
        half_flips = min(self.changed / 2, self.score, 1 - self.score)
        shares = (self.score - half_flips, half_flips, half_flips, 1 - self.score - half_flips)
        counts = PairedCounts(*(round(share * _SCALE) for share in shares))
        distance = (1 - limit) * self.score
        variance_at_limit = limit * sum(constrained_flips(counts, limit))
        variance = (1 - limit) ** 2 * shares[0] + (limit**2 + 1) * half_flips - distance**2
        reach = normal_quantile(passing) * math.sqrt(items * variance_at_limit * self.design)
        # The half item is the test's correction for continuity.
        surplus = items * distance - 0.5 - reach
        spread = math.sqrt(max(items * variance * self.design, 1e-12))
        return NormalDist().cdf(surplus / spread)

    def describe(self) -> str:
        """Return the assumptions in words."""
        return f"{100 * self.changed:g} % of the items flip and {100 * self.score:g} % are right"


@dataclass(frozen=True)
class AssumedChanges:
    """Assumptions on a task whose scores are not just right or wrong, or that has several items per image."""

    score: float = 0.75
    """The original's mean score."""

    changed: float = 0.05
    """The share of items that score more or less with the artifact than with the original."""

    step: float = 1.0
    """The usual change of such an item's score (of a cluster's sum, where items share images)."""

    design: float = 1.0
    """The design effect of the clusters on the variance; see `AssumedFlips.design`."""

    cluster_items: float = 1.0
    """The number of items in a random item's cluster (Σ size² / Σ size): the most that one could lose unseen."""

    def passing_chance(self, items: int, limit: float, passing: float) -> float:
        """Return the probability that an artifact without any true loss passes the limit at the level `passing`.

        Under the hypothesis at the limit, changes of ±`step` with variance v are reweighted, downward ones up and upward ones
        down, until their mean is the loss; their variance is then (v + √(v² + (2 · loss · step)²)) / 2.
        """
        loss, variance = (1 - limit) * self.score, self.changed * self.step**2 * self.design
        fallen = items * variance / 2
        # The mean size of a loss: of those observed, and of the one unobserved cluster that the bootstrap allows for.
        step = (fallen + self.cluster_items**2) / (fallen / self.step + self.cluster_items)
        at_limit = (variance + math.hypot(variance, 2 * loss * step)) / 2
        surplus = items * loss - normal_quantile(passing) * math.sqrt(items * at_limit)
        return NormalDist().cdf(surplus / math.sqrt(max(items * variance, 1e-12)))

    def describe(self) -> str:
        """Return the assumptions in words."""
        return f"{100 * self.changed:g} % of the items change by {self.step:g} and the mean is {self.score:g}"


def resolved_loss(items: int, passing: float, assumed: AssumedFlips | AssumedChanges, power: float = POWER) -> float | None:
    """Return the smallest loss of the mean score at which a limit is still passed with probability `power`.

    None where even a limit of half the original's score is not.
    """

    def shortfall(loss: float) -> float:
        return power - assumed.passing_chance(items, 1 - loss / assumed.score, passing)

    largest_loss = assumed.score / 2
    if shortfall(largest_loss) > 0:
        return None
    return crossing(shortfall, 1e-9, largest_loss, 1e-6)


def items_for(limit: float, passing: float, assumed: AssumedFlips | AssumedChanges, power: float = POWER) -> int | None:
    """Return the number of items with which an artifact without true loss passes with probability `power`, None for limit 1."""
    return _fewest_items(lambda items: assumed.passing_chance(items, limit, passing) >= power)


def _fewest_items(is_enough: Callable[[int], bool]) -> int | None:
    if not is_enough(_MAX_ITEMS):
        return None
    return 1 + bisect_left(range(1, _MAX_ITEMS), True, key=is_enough)
