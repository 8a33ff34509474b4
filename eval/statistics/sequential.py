"""Group-sequential tests: items are measured in a few looks, and at each the artifact may pass, fail, or need more items.

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

from compress.eval.statistics.estimates import Levels, Outcome, Recovery, crossing, normal_quantile
from compress.eval.statistics.paired import Pairs, decide, judge_pairs

Decision = Literal["pass", "fail", "inconclusive", "go on"]

Floats = NDArray[np.float64]

_POINTS = 301
"""Grid points of the numerical integration; an odd number, for Simpson's rule. More are slower and more accurate: each look costs
their square."""

_MIN_Z = -9.0
"""The grid's lower end in standard deviations: the normal density below has a mass under 1e-18."""

_MAX_Z = 39.0
"""The largest bound: the normal density above has a mass under the smallest float64."""


def error_spent(fraction: float, alpha: float) -> float:
    """Return the part of the one-sided error `alpha` that the spending function allows up to this fraction of the items."""
    from scipy.special import ndtr

    # At fraction 1 it is `alpha`: the error is spent in full by the last look.
    return float(2 * ndtr(-normal_quantile(alpha / 2) / math.sqrt(fraction)))


def boundaries(fractions: Sequence[float], alpha: float) -> tuple[float, ...]:
    """Return each look's boundary, the z from which on the test rejects, at the one-sided error `alpha` over all looks.

    Raises:
        ValueError: the fractions do not rise from above 0 to at most 1, or alpha is not between 0 and 1.
    """
    rising = all(early < late for early, late in zip((0.0, *fractions), fractions, strict=False))
    if not fractions or not rising or fractions[-1] > 1 or not 0 < alpha < 1:
        raise ValueError(f"looks at {tuple(fractions)} of the items at the level {alpha} are not possible")
    return _boundaries(tuple(fractions), alpha)


# Every judgement asks for the same boundaries, and a later look's are built on the earlier ones'.
@lru_cache(maxsize=4096)
def _boundaries(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    if len(fractions) == 1:
        return (normal_quantile(error_spent(fractions[0], alpha)),)
    earlier = _boundaries(fractions[:-1], alpha)
    process = ScoreProcess()
    for fraction, bound in zip(fractions, earlier, strict=False):
        process.step(fraction, bound)
    return (*earlier, process.solve(fractions[-1], error_spent(fractions[-1], alpha) - error_spent(fractions[-2], alpha)))


class ScoreProcess:
    """The density on a grid of the score process S = z · √fraction, for evaluations that have not crossed a bound yet."""

    def __init__(self) -> None:
        self._fraction = 0.0
        self._grid: Floats = np.zeros(1)
        self._masses: Floats = np.ones(1)

    def chance(self, fraction: float, bound: float) -> float:
        """Return the probability of having crossed no earlier bound and of being at `bound` or above at this fraction."""
        from scipy.special import ndtr

        increment = fraction - self._fraction
        distance = bound * math.sqrt(fraction) - self._grid
        return float((self._masses * ndtr(-distance / math.sqrt(increment))).sum())

    def solve(self, fraction: float, target: float) -> float:
        """Return the bound that is crossed with the probability `target`."""
        return crossing(lambda bound: self.chance(fraction, bound) - target, _MIN_Z, _MAX_Z)

    def step(self, fraction: float, bound: float) -> None:
        """Advance to this fraction with the mass below the bound; integrates by Simpson's rule."""
        increment = fraction - self._fraction
        low = _MIN_Z * math.sqrt(fraction)
        # Cut at the bound: evaluations above it have stopped and contribute to no later look.
        high = min(bound, -_MIN_Z) * math.sqrt(fraction)
        grid = np.linspace(low, max(high, low), _POINTS)
        weights = np.full(_POINTS, 2.0)
        weights[1::2] = 4.0
        weights[[0, -1]] = 1.0
        weights *= (grid[1] - grid[0]) / 3
        distance = grid[:, None] - self._grid[None, :]
        density = np.exp(-(distance**2) / (2 * increment)) @ self._masses / math.sqrt(2 * math.pi * increment)
        self._grid, self._masses, self._fraction = grid, weights * density, fraction


def repeated_p(fractions: Sequence[float], p_value: float) -> float:
    """Return the repeated p-value, valid under any stopping rule, of the look at the last fraction, given its nominal p-value.

    It is the smallest error over all looks at which this look would have rejected (Jennison and Turnbull, 2000, section 9.3).
    """
    # On the wrong side of the hypothesis no boundary is met at any error.
    if p_value >= 0.5:
        return 1.0
    nominal = max(p_value, 1e-300)
    z = normal_quantile(nominal)
    largest = math.log(1 - 1e-9)  # at an error of 1 there are no boundaries
    return math.exp(crossing(lambda error: boundaries(fractions, math.exp(error))[-1] - z, math.log(nominal), largest))


@dataclass(frozen=True)
class Look:
    """The result of one look: the recovery with its repeated confidence interval, and the decision."""

    recovery: Recovery
    decision: Decision


@dataclass(frozen=True)
class Sequential:
    """A plan of looks at fractions of the items, the last of which is 1; `levels` are the errors over all looks together.

    With several tasks, `levels.failing` is divided by their number, so that Holm's method upholds every failure.
    """

    fractions: tuple[float, ...]
    levels: Levels

    @classmethod
    def even(cls, looks: int, confidence: float, tasks: int = 1) -> Sequential:
        """Plan looks with an equal number of new items each, for one of `tasks` tasks that are judged together."""
        alpha = 1 - confidence
        # Bonferroni's level for failing, which Holm's step-down then upholds; passing on all tasks needs no correction.
        return cls(tuple((look + 1) / looks for look in range(looks)), Levels(alpha, alpha / tasks))

    def items(self, budget: int) -> tuple[int, ...]:
        """Return the cumulative number of items at each look, for a sample of `budget` items."""
        return tuple(max(round(fraction * budget), 1) for fraction in self.fractions)

    def nominal(self, look: int) -> Levels:
        """Return the nominal levels of a look, counted from 0."""
        from scipy.special import ndtr

        passing = boundaries(self.fractions, self.levels.passing)[look]
        failing = boundaries(self.fractions, self.levels.failing)[look]
        return Levels(float(ndtr(-passing)), float(ndtr(-failing)))

    def decide(self, pairs: Pairs, look: int, limit: float) -> Decision:
        """Return the decision of `judge` without its interval, which is faster."""
        return self._decision(decide(pairs, limit, self.nominal(look)), look)

    def _decision(self, outcome: Outcome, look: int) -> Decision:
        return "go on" if outcome == "inconclusive" and look + 1 < len(self.fractions) else outcome

    def judge(self, pairs: Pairs, look: int, limit: float) -> Look | None:
        """Judge all items up to this look; None where the original's mean score is 0.

        Only the last look can be inconclusive. The recovery's levels, and with them its bounds, are the look's own: such
        intervals hold at all looks together, so also at the one where the evaluation stopped. Its p-values are `repeated_p`.
        """
        recovery = judge_pairs(pairs, limit, self.nominal(look))
        if recovery is None:
            return None
        seen = self.fractions[: look + 1]
        recovery = replace(recovery, p_pass=repeated_p(seen, recovery.p_pass), p_fail=repeated_p(seen, recovery.p_fail))
        return Look(recovery, self._decision(recovery.outcome, look))
