"""Percentiles, rates and goodput of known times; and how sure ratios are, on made-up loads of a known true ratio."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from compress.eval.latency.figures import estimates, pool, ratios, summarize
from compress.eval.latency.load_generator import Load, RequestTiming
from compress.eval.latency.results import Percentiles
from compress.eval.latency.settings import LatencyGoal


def _load(ttfts: list[float], gap: float = 0.1, tokens: int = 3, seconds: float = 10.0) -> Load:
    return Load(tuple(RequestTiming(ttft, (0.0, *(gap,) * (tokens - 1)), tokens) for ttft in ttfts), seconds, "compress")


def test_figures_are_those_of_the_definitions() -> None:
    """TPOT is the time after the first token over the further ones; ITL leaves out what follows the piece that says who speaks."""
    result = summarize(_load([1.0, 2.0, 3.0, 4.0, 5.0]), None)
    assert result.ttft == Percentiles(mean=3000.0, p50=3000.0, p90=4600.0, p95=4800.0, p99=4960.0)
    assert result.tpot is not None
    assert result.itl is not None
    assert result.e2el is not None
    assert (round(result.tpot.p50, 6), round(result.itl.mean, 6), round(result.e2el.p99, 6)) == (100.0, 100.0, 5160.0)
    assert (result.requests, result.failed, result.request_rate, result.output_token_rate) == (5, 0, 0.5, 1.5)
    assert result.goodput is None
    assert result.within_goal is None


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    load = _load([1.0, 2.0, 3.0, 4.0, 5.0])
    assert summarize(load, LatencyGoal(ttft_ms=3000)).goodput == pytest.approx(0.3)
    both = summarize(load, LatencyGoal(ttft_ms=3000, e2el_ms=2201))
    assert (both.goodput, both.within_goal) == (pytest.approx(0.2), pytest.approx(0.4))
    assert summarize(load, LatencyGoal(tpot_ms=99)).goodput == 0


def test_failed_requests_are_counted_and_are_in_no_time() -> None:
    load = _load([1.0, 2.0, 3.0])
    failed = RequestTiming(0.0, (), 0, "503: busy")
    result = summarize(replace(load, samples=(*load.samples, failed, failed)), LatencyGoal(ttft_ms=1e6))
    assert (result.requests, result.failed, result.faults) == (5, 2, {"503: busy": 2})
    assert result.ttft == summarize(load, None).ttft
    assert (result.request_rate, result.output_token_rate) == (0.3, 0.9)
    assert (result.goodput, result.within_goal) == (pytest.approx(0.3), pytest.approx(0.6))


def test_load_without_an_answer_has_no_times() -> None:
    result = summarize(Load((RequestTiming(0.0, (), 0, "x"),), 1.0, "compress"), LatencyGoal(ttft_ms=1))
    assert (result.ttft, result.tpot, result.itl, result.e2el) == (None, None, None, None)
    assert (result.request_rate, result.goodput) == (0.0, 0.0)
    empty = [Load((RequestTiming(0.0, (), 0, "x"),), 1.0, "compress")] * 2
    assert ratios(empty, empty, None, 0.95) == {}
    assert all(estimate.interval is None for estimate in estimates(empty, None, 0.95).values())


def test_single_token_has_no_time_per_further_token() -> None:
    result = summarize(Load((RequestTiming(1.0, (0.0,), 1), RequestTiming(2.0, (), 1)), 4.0, "compress"), LatencyGoal(tpot_ms=1))
    assert result.tpot is None
    assert result.itl is None
    assert result.within_goal == 1.0


def test_rounds_are_pooled_by_requests_and_seconds() -> None:
    both = pool([_load([1.0] * 4), _load([2.0] * 4, seconds=30.0)])
    assert (len(both.samples), both.seconds, summarize(both, None).request_rate) == (8, 40.0, 0.2)


def _rounds(random: np.random.Generator, scale: float, drift: np.ndarray, noise: float = 0.2) -> list[Load]:
    """Rounds of 40 requests; each server has its own drift, each request its own noise."""
    loads: list[Load] = []
    for shift in drift:
        times = scale * math.exp(shift) * np.exp(random.normal(0, noise, 40))
        samples = tuple(RequestTiming(float(time) / 2, (0.0, float(time) / 2), 2) for time in times)
        loads.append(Load(samples, float(times.sum()) / 4, "compress"))
    return loads


def test_ratio_of_a_load_to_itself_is_one_without_doubt() -> None:
    loads = _rounds(np.random.default_rng(0), 1.0, np.zeros(3))
    found = ratios(loads, loads, LatencyGoal(e2el_ms=1000), 0.95)
    assert found.keys() >= {"ttft_p50", "tpot_p95", "itl_mean", "e2el_p99", "request_rate", "output_token_rate", "goodput"}
    assert {estimate.value for estimate in found.values()} == {1.0}
    assert {estimate.interval for estimate in found.values()} == {(1.0, 1.0)}


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_bounds_hold_the_true_ratio_as_often_as_they_say(drift: float) -> None:
    """Each bound is to be missed in 5 % of measurements; 120 of them leave room up to 12 (99.5th percentile of the count)."""
    random, missed = np.random.default_rng(1), {"low": 0, "high": 0}
    for _ in range(120):
        before = _rounds(random, 1.0, random.normal(0, drift, 4))
        after = _rounds(random, 0.7, random.normal(0, drift, 4))
        interval = ratios(before, after, None, 0.95)["e2el_p50"].interval
        assert interval is not None
        missed["low"] += interval[0] > 0.7
        missed["high"] += interval[1] < 0.7
    assert max(missed.values()) <= 12, missed


def test_more_requests_narrow_the_bounds_and_rounds_that_differ_widen_them() -> None:
    random = np.random.default_rng(2)
    even, uneven = _rounds(random, 1.0, np.zeros(3)), _rounds(random, 1.0, np.array([0.0, 0.5, 1.0]))
    base = _rounds(random, 1.0, np.zeros(3))

    def width(loads: list[Load]) -> float:
        interval = ratios(base, loads, None, 0.95)["e2el_p50"].interval
        assert interval is not None
        return interval[1] / interval[0]

    assert width(uneven) > 2 * width(even)
