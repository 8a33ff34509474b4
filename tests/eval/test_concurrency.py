"""Finding the best concurrency on made-up curves of throughput and latency."""

from __future__ import annotations

from collections.abc import Callable

from compress.eval.latency.concurrency import MAX_TRIALS, find_best
from compress.eval.latency.results import LoadResult
from compress.eval.latency.settings import LoadPoint

SHAPE = LoadPoint(concurrency=1, images=1, width=64, height=64, prompt_tokens=8, output_tokens=8)


def _curve(
    rate: Callable[[int], float], within: Callable[[int], float | None], failed: int = 0
) -> Callable[[LoadPoint], LoadResult]:
    def measure(point: LoadPoint) -> LoadResult:
        assert point.shape == SHAPE
        return LoadResult(
            requests=100,
            failed=failed,
            seconds=1.0,
            ttft=None,
            tpot=None,
            itl=None,
            e2el=None,
            request_rate=1.0,
            output_token_rate=rate(point.concurrency),
            within_goal=within(point.concurrency),
            client="compress",
        )

    return measure


def test_limit_is_closed_in_on_by_bisection() -> None:
    best = find_best(SHAPE, 256, _curve(lambda c: 100.0 * c, lambda c: 1.0 if c <= 23 else 0.5))
    assert best.concurrency is not None
    assert 21 <= best.concurrency <= 23
    assert best.output_token_rate == 100.0 * best.concurrency
    assert [trial.concurrency for trial in best.trials][:6] == [1, 2, 4, 8, 16, 32]
    assert all(trial.held == (trial.concurrency <= 23) for trial in best.trials)


def test_search_ends_where_throughput_levels_off() -> None:
    best = find_best(SHAPE, 256, _curve(lambda c: 50.0 * min(c, 12), lambda c: None))
    assert best.concurrency in (12, 16, 14, 24, 20, 28)
    assert best.output_token_rate == 600.0
    assert len(best.trials) <= 9


def test_peak_before_the_largest_is_found_though_more_is_slower() -> None:
    best = find_best(SHAPE, 256, _curve(lambda c: 100.0 * c if c <= 12 else 1200.0 - 20 * (c - 12), lambda c: None))
    assert best.concurrency == 12


def test_goal_that_nothing_keeps_leaves_no_concurrency() -> None:
    best = find_best(SHAPE, 64, _curve(lambda c: 100.0, lambda c: 0.0))
    assert best.concurrency is None
    assert best.output_token_rate is None
    assert [trial.concurrency for trial in best.trials] == [1]


def test_failed_requests_are_no_throughput_without_a_goal() -> None:
    assert find_best(SHAPE, 64, _curve(lambda c: 100.0, lambda c: None, failed=1)).concurrency is None


def test_search_is_bounded_and_keeps_to_the_largest() -> None:
    best = find_best(SHAPE, 10, _curve(lambda c: 100.0 * c, lambda c: 1.0))
    assert best.concurrency == 10
    assert max(trial.concurrency for trial in best.trials) == 10
    long = find_best(SHAPE, 10**6, _curve(lambda c: 100.0 * c, lambda c: 1.0 if c < 1900 else 0.0))
    assert len(long.trials) <= MAX_TRIALS


def test_single_concurrency_is_tried_once() -> None:
    best = find_best(SHAPE, 1, _curve(lambda c: 100.0, lambda c: 1.0))
    assert [trial.concurrency for trial in best.trials] == [1]
