"""The concurrency with the best throughput under a latency goal: doubling until it is missed or nothing is gained, then halving."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compress.eval.latency import LoadPoint
from compress.eval.latency_results import Best, LoadResult, Trial

WITHIN_GOAL = 0.95
"""The share of a load's requests that must keep the goal."""
MOST_TRIALS = 12
_GAIN = 1.03
"""How much more throughput a doubling must give to be followed by another."""
_NARROW = 0.125
"""How close, of the concurrency, the search comes to where the goal is missed."""


def find_best(shape: LoadPoint, largest: int, measure: Callable[[LoadPoint], LoadResult]) -> Best:
    """Return the concurrency that gives the most output tokens per second while at least 95 % of requests keep the goal.

    `measure` puts on one load; without a goal, whatever has no failed request is within it. At most 12 loads are put on.
    """
    search = _Search(shape, measure)
    good, bad = 0, None
    while search.open and (following := min(max(good * 2, 1), largest)) > good:
        before = search.rate(good)
        if not search.try_at(following):
            bad = following
            break
        good = following
        if before and search.rate(following) < _GAIN * before:
            break
    if bad is not None:
        _bisect(search, good, bad)
    elif good:
        _around_the_top(search, largest)
    return search.best()


def _bisect(search: _Search, good: int, bad: int) -> None:
    while search.open and good and bad - good > max(1, _NARROW * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if search.try_at(middle) else (good, middle)


def _around_the_top(search: _Search, largest: int) -> None:
    """Look halfway between the best so far and its neighbours, where throughput has levelled off."""
    for _ in range(2):
        top = search.best().concurrency or 1
        tried = sorted(search.trials)
        place = tried.index(top)
        above = tried[place + 1] if place + 1 < len(tried) else min(2 * top, largest)
        below = tried[place - 1] if place else 1
        middles = [(top + above) // 2, (below + top) // 2]
        fresh = [middle for middle in middles if middle not in search.trials and abs(middle - top) > _NARROW * top]
        for middle in fresh:
            if search.open:
                search.try_at(middle)


class _Search:
    def __init__(self, shape: LoadPoint, measure: Callable[[LoadPoint], LoadResult]) -> None:
        self._shape = shape
        self._measure = measure
        self.trials: dict[int, Trial] = {}

    @property
    def open(self) -> bool:
        """Whether another load may be put on."""
        return len(self.trials) < MOST_TRIALS

    def try_at(self, concurrency: int) -> bool:
        """Put on a load and return whether the goal was kept."""
        result = self._measure(self._shape.at(concurrency))
        held = result.failed == 0 if result.within_goal is None else result.within_goal >= WITHIN_GOAL
        self.trials[concurrency] = Trial(concurrency=concurrency, held=held, result=result)
        return held

    def rate(self, concurrency: int) -> float:
        """Return the output tokens per second of a concurrency that was tried, 0 of another."""
        return self.trials[concurrency].result.output_token_rate if concurrency in self.trials else 0.0

    def best(self) -> Best:
        """Return the best of what was tried."""
        held: Mapping[int, float] = {number: self.rate(number) for number, trial in self.trials.items() if trial.held}
        top = max(held, key=lambda number: held[number], default=None)
        rate = held[top] if top is not None else None
        return Best(shape=self._shape, concurrency=top, output_token_rate=rate, trials=tuple(self.trials.values()))
