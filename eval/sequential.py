"""Group-sequential judging: items come in a few looks, and after each the artifact may pass, fail, or more items be drawn.

Over all looks together, an artifact at the limit passes at most α of the time and fails at most α. The error is spent by an
O'Brien-Fleming-like function of the share of items seen (Lan and DeMets, Biometrika 70, 1983), so early looks decide only what
is blatant and the last one is hardly stricter than a single test. The boundaries come from the joint distribution of the looks'
statistics, whose increments are independent, by recursive numerical integration (Armitage, McPherson and Rowe, Journal of the
Royal Statistical Society A 132, 1969; Jennison and Turnbull, Group Sequential Methods, 2000, chapter 19).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.eval.paired import Pairs, decide, judge_pairs
from compress.eval.statistics import Levels, Outcome, Recovery, normal_quantile

Decision = Literal["pass", "fail", "inconclusive", "go on"]

Floats = NDArray[np.float64]

_POINTS = 301
_LOWEST = -9.0


def spent(fraction: float, alpha: float) -> float:
    """Return how much of the one-sided error `alpha` may be spent by the time this fraction of the items was seen."""
    from scipy.special import ndtr

    return float(2 * ndtr(-normal_quantile(alpha / 2) / math.sqrt(fraction)))


def boundaries(fractions: Sequence[float], alpha: float) -> tuple[float, ...]:
    """Return for each look the z from which on the test rejects, at the one-sided error `alpha` over all looks.

    Raises:
        ValueError: the fractions do not rise from above 0 to at most 1, or alpha is not between 0 and 1.
    """
    rising = all(early < late for early, late in zip((0.0, *fractions), fractions, strict=False))
    if not fractions or not rising or fractions[-1] > 1 or not 0 < alpha < 1:
        raise ValueError(f"looks at {tuple(fractions)} of the items at the level {alpha} are not possible")
    return _boundaries(tuple(fractions), alpha)


@lru_cache(maxsize=4096)
def _boundaries(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    if len(fractions) == 1:
        return (normal_quantile(spent(fractions[0], alpha)),)
    earlier = _boundaries(fractions[:-1], alpha)
    walk = _Walk(0.0)
    for fraction, bound in zip(fractions, earlier, strict=False):
        walk.step(fraction, bound)
    return (*earlier, walk.solve(fractions[-1], spent(fractions[-1], alpha) - spent(fractions[-2], alpha)))


def crossing_chances(fractions: Sequence[float], bounds: Sequence[float], drift: float = 0.0) -> tuple[float, ...]:
    """Return with which probability z first reaches its bound at each look, where z's mean at the end would be `drift`."""
    walk = _Walk(drift)
    chances: list[float] = []
    for fraction, bound in zip(fractions, bounds, strict=True):
        chances.append(walk.chance(fraction, bound))
        walk.step(fraction, bound)
    return tuple(chances)


class _Walk:
    """The score process S = z · √fraction of those evaluations that have not reached a bound yet, as a density on a grid."""

    def __init__(self, drift: float) -> None:
        self._drift = drift
        self._fraction = 0.0
        self._places: Floats = np.zeros(1)
        self._masses: Floats = np.ones(1)

    def chance(self, fraction: float, bound: float) -> float:
        """Return the probability to be still under way and to be at `bound` or above at this fraction."""
        from scipy.special import ndtr

        apart = fraction - self._fraction
        distance = bound * math.sqrt(fraction) - self._places - self._drift * apart
        return float((self._masses * ndtr(-distance / math.sqrt(apart))).sum())

    def solve(self, fraction: float, target: float) -> float:
        """Return the bound that is reached with the probability `target`."""
        low, high = _LOWEST, 39.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.chance(fraction, middle) > target else (low, middle)
        return high

    def step(self, fraction: float, bound: float) -> None:
        """Go on to this fraction with those below the bound; Simpson's rule turns the density into masses."""
        apart = fraction - self._fraction
        lowest = _LOWEST * math.sqrt(fraction) + min(self._drift, 0.0)
        highest = min(bound * math.sqrt(fraction), -_LOWEST * math.sqrt(fraction) + max(self._drift, 0.0))
        places = np.linspace(lowest, max(highest, lowest), _POINTS)
        weights = np.full(_POINTS, 2.0)
        weights[1::2] = 4.0
        weights[[0, -1]] = 1.0
        weights *= (places[1] - places[0]) / 3
        distance = places[:, None] - self._places[None, :] - self._drift * apart
        density = np.exp(-(distance**2) / (2 * apart)) @ self._masses / math.sqrt(2 * math.pi * apart)
        self._places, self._masses, self._fraction = places, weights * density, fraction


def repeated_p(fractions: Sequence[float], p_value: float) -> float:
    """Return the p-value, valid whenever one stops, of a look whose own p-value is `p_value`; the last fraction is that look's.

    It is the smallest error over all looks at which this look would have rejected (Jennison and Turnbull, 2000, section 9.3).
    """
    if p_value >= 0.5:
        return 1.0
    low, high = math.log(max(p_value, 1e-300)), 0.0
    z = normal_quantile(max(p_value, 1e-300))
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if boundaries(fractions, math.exp(middle))[-1] <= z else (middle, high)
    return math.exp(high)


@dataclass(frozen=True)
class Look:
    """What one look says: the recovery with its repeated confidence interval, and the decision."""

    recovery: Recovery
    decision: Decision


@dataclass(frozen=True)
class Sequential:
    """A plan of looks, after the given fractions of the items, the last of which is 1; `levels` hold over all looks together.

    With several tasks, `levels.failing` divided by their number makes every failure one that Holm's method upholds.
    """

    fractions: tuple[float, ...]
    levels: Levels

    @classmethod
    def even(cls, looks: int, confidence: float, tasks: int = 1) -> Sequential:
        """Plan so many looks with equally many new items each, for one of `tasks` tasks that are judged together."""
        alpha = 1 - confidence
        return cls(tuple((look + 1) / looks for look in range(looks)), Levels(alpha, alpha / tasks))

    def items(self, budget: int) -> tuple[int, ...]:
        """Return how many items have been drawn by each look, of a budget of so many."""
        return tuple(max(round(fraction * budget), 1) for fraction in self.fractions)

    def nominal(self, look: int) -> Levels:
        """Return the levels at which the look (the first is 0) tests by itself."""
        from scipy.special import ndtr

        passing = boundaries(self.fractions, self.levels.passing)[look]
        failing = boundaries(self.fractions, self.levels.failing)[look]
        return Levels(float(ndtr(-passing)), float(ndtr(-failing)))

    def decide(self, pairs: Pairs, look: int, limit: float) -> Decision:
        """Return the decision of `judge` alone."""
        return self._decision(decide(pairs, limit, self.nominal(look)), look)

    def _decision(self, outcome: Outcome, look: int) -> Decision:
        return "go on" if outcome == "inconclusive" and look + 1 < len(self.fractions) else outcome

    def judge(self, pairs: Pairs, look: int, limit: float) -> Look | None:
        """Judge all the items drawn by this look; None where the original scores nothing.

        Only the last look can be inconclusive. The recovery's levels, and with them its bounds, are the look's own: such
        intervals hold at all looks together, so also at the one where the evaluation stopped. Its p-values are `repeated_p`.
        """
        recovery = judge_pairs(pairs, limit, self.nominal(look))
        if recovery is None:
            return None
        seen = self.fractions[: look + 1]
        recovery = replace(recovery, p_pass=repeated_p(seen, recovery.p_pass), p_fail=repeated_p(seen, recovery.p_fail))
        return Look(recovery, self._decision(recovery.outcome, look))
