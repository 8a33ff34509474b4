"""Search for the concurrency with the best throughput under a latency goal: doubling, then bisection."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compress.eval.latency.results import Best, LoadResult, Trial
from compress.eval.latency.settings import LoadPoint

WITHIN_GOAL = 0.95
"""The share of a load's requests that must meet the goal: its 95th percentile then keeps to it."""

MAX_TRIALS = 12
"""The most loads of one search: bounds its time. Doubling to 256 takes nine."""

_MIN_GAIN = 1.03
"""The search doubles the concurrency while that raises the throughput by at least this factor: loads differ by a few per cent."""

_PRECISION = 0.125
"""The bisection ends where the bounds are this close, relative to the concurrency."""


def find_best(shape: LoadPoint, largest: int, measure: Callable[[LoadPoint], LoadResult]) -> Best:
    """Return the concurrency with the most output tokens per second while at least 95 % of requests meet the goal.

    `measure` runs one load. Without a goal, a load without failed requests meets it. At most 12 loads are run.
    """
    search = _Search(shape, measure)
    good, bad = 0, None
    while search.open and (candidate := min(max(good * 2, 1), largest)) > good:
        previous_rate = search.rate(good)
        if not search.try_at(candidate):
            bad = candidate
            break
        good = candidate
        # The server is saturated: more concurrency only queues requests.
        if previous_rate and search.rate(candidate) < _MIN_GAIN * previous_rate:
            break
    if bad is not None:
        _bisect(search, good, bad)
    elif good:
        _refine_maximum(search, largest)
    return search.best()


def _bisect(search: _Search, good: int, bad: int) -> None:
    # Relative to the concurrency: the difference between 200 and 210 is noise, that between 2 and 3 is not.
    while search.open and good and bad - good > max(1, _PRECISION * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if search.try_at(middle) else (good, middle)


def _refine_maximum(search: _Search, largest: int) -> None:
    """Try the midpoints between the best concurrency so far and its neighbours, where throughput has levelled off."""
    for _ in range(2):
        best = search.best().concurrency or 1
        tried = sorted(search.trials)
        position = tried.index(best)
        above = tried[position + 1] if position + 1 < len(tried) else min(2 * best, largest)
        below = tried[position - 1] if position else 1
        middles = [(best + above) // 2, (below + best) // 2]
        untried = [middle for middle in middles if middle not in search.trials and abs(middle - best) > _PRECISION * best]
        for middle in untried:
            if search.open:
                search.try_at(middle)


class _Search:
    def __init__(self, shape: LoadPoint, measure: Callable[[LoadPoint], LoadResult]) -> None:
        self._shape = shape
        self._measure = measure
        self.trials: dict[int, Trial] = {}

    @property
    def open(self) -> bool:
        """Whether another load may be run."""
        return len(self.trials) < MAX_TRIALS

    def try_at(self, concurrency: int) -> bool:
        """Run a load and return whether it met the goal."""
        result = self._measure(self._shape.at(concurrency))
        met_goal = result.failed == 0 if result.within_goal is None else result.within_goal >= WITHIN_GOAL
        self.trials[concurrency] = Trial(concurrency=concurrency, held=met_goal, result=result)
        return met_goal

    def rate(self, concurrency: int) -> float:
        """Return the output tokens per second at a concurrency that was tried, 0 at others."""
        return self.trials[concurrency].result.output_token_rate if concurrency in self.trials else 0.0

    def best(self) -> Best:
        """Return the best of the concurrencies that were tried."""
        rates: Mapping[int, float] = {number: self.rate(number) for number, trial in self.trials.items() if trial.held}
        best = max(rates, key=lambda number: rates[number], default=None)
        rate = rates[best] if best is not None else None
        return Best(shape=self._shape, concurrency=best, output_token_rate=rate, trials=tuple(self.trials.values()))
