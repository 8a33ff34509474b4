"""What an evaluation can show, told beforehand: the loss that so many items resolve, and how many items a limit needs.

"400 items resolve 2.1 points" means: with a limit 2.1 points below the original's score, an artifact that truly loses
nothing passes with a probability of 80 % (`POWER`), although a certain share of its items flips, as many lost as gained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from compress.eval.statistics import PairedCounts, constrained_flips, crossing, normal_quantile

POWER = 0.8

_WHOLE = 10**9
_MOST_ITEMS = 10**9


@dataclass(frozen=True)
class Assumed:
    """What is assumed before anything is measured: the share of items that flip, the original's accuracy, and the clusters' effect.

    `design` is by how much the variance is larger than of independent items: 1 + (items per cluster − 1) · their correlation.
    """

    flips: float = 0.05
    accuracy: float = 0.75
    design: float = 1.0


def passing_chance(items: int, limit: float, passing: float, assumed: Assumed) -> float:
    """Return the probability that an artifact without any true loss passes the limit at the level `passing`.

    It is the normal approximation of the score test's: `passing` is the level of the last look where there are several.
    """
    half = min(assumed.flips / 2, assumed.accuracy, 1 - assumed.accuracy)
    shares = (assumed.accuracy - half, half, half, 1 - assumed.accuracy - half)
    counts = PairedCounts(*(round(share * _WHOLE) for share in shares))
    distance = (1 - limit) * assumed.accuracy
    at_limit = limit * sum(constrained_flips(counts, limit))
    truly = (1 - limit) ** 2 * shares[0] + (limit**2 + 1) * half - distance**2
    reach = normal_quantile(passing) * math.sqrt(items * at_limit * assumed.design)
    surplus = items * distance - 0.5 - reach
    spread = math.sqrt(max(items * truly * assumed.design, 1e-12))
    return NormalDist().cdf(surplus / spread)


def resolved_loss(items: int, passing: float, assumed: Assumed, power: float = POWER) -> float | None:
    """Return the smallest loss of score, between 0 and 1, that a limit may allow and so many items still resolve.

    None where they resolve nothing: not even a limit of half the original's accuracy.
    """

    def missing(loss: float) -> float:
        return power - passing_chance(items, 1 - loss / assumed.accuracy, passing, assumed)

    most = assumed.accuracy / 2
    if missing(most) > 0:
        return None
    return crossing(missing, 1e-9, most, 1e-6)


def items_for(limit: float, passing: float, assumed: Assumed, power: float = POWER) -> int | None:
    """Return how many items an artifact without any true loss needs to pass with this probability; None for a limit of 1."""
    return _fewest(lambda items: passing_chance(items, limit, passing, assumed) >= power)


@dataclass(frozen=True)
class AssumedChanges:
    """What is assumed of mean scores: how the paired difference of an item deviates, and how much changes at once.

    `step` is the usual change of a cluster whose score changes at all, and `whole` the number of items in a random item's cluster
    (Σ size² / Σ size): all that one could lose unseen. `deviation` includes the clusters' effect, √design times that of an item.
    """

    deviation: float
    step: float = 1.0
    whole: float = 1.0


def mean_passing_chance(items: int, loss: float, passing: float, assumed: AssumedChanges) -> float:
    """Return the probability that an artifact without any true loss passes a limit so far below the original's mean score.

    At the limit, changes of `step` both ways with the variance v become likelier downwards and rarer upwards until the mean is
    the loss; their variance is then (v + √(v² + (2 · loss · step)²)) / 2.
    """
    variance = assumed.deviation**2
    fallen = items * variance / 2
    step = (fallen + assumed.whole**2) / (fallen / assumed.step + assumed.whole)
    at_limit = (variance + math.hypot(variance, 2 * loss * step)) / 2
    surplus = items * loss - normal_quantile(passing) * math.sqrt(items * at_limit)
    return NormalDist().cdf(surplus / math.sqrt(max(items * variance, 1e-12)))


def resolved_mean_loss(items: int, passing: float, assumed: AssumedChanges, power: float = POWER) -> float:
    """Return the smallest loss of the mean score that a limit may allow and so many items still resolve."""
    return crossing(lambda loss: power - mean_passing_chance(items, loss, passing, assumed), 1e-9, 1e3, 1e-6)


def items_for_mean_loss(loss: float, passing: float, assumed: AssumedChanges, power: float = POWER) -> int | None:
    """Return how many items an artifact without any true loss needs to pass with this probability; None for no loss at all."""
    return _fewest(lambda items: mean_passing_chance(items, loss, passing, assumed) >= power)


def _fewest(enough: Callable[[int], bool]) -> int | None:
    if not enough(_MOST_ITEMS):
        return None
    low, high = 0, _MOST_ITEMS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
