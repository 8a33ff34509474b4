import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import pytest
import scipy.optimize

from compress.eval.statistics import (
    PairedCounts,
    bounded_exp,
    clustered_mean,
    constrained_flips,
    count_pairs,
    judge_perplexity,
    judge_recovery,
    mean_interval,
    recovery_interval,
    recovery_score,
)

CASES = [
    PairedCounts(both=350, lost=20, gained=10, neither=20),
    PairedCounts(both=390, lost=0, gained=0, neither=10),
    PairedCounts(both=30, lost=0, gained=12, neither=58),
    PairedCounts(both=0, lost=9, gained=4, neither=87),
    PairedCounts(both=200, lost=150, gained=3, neither=1),
    PairedCounts(both=95, lost=5, gained=0, neither=0),
]


def lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function is lowest, by numerical search."""
    search = cast("Any", scipy.optimize).minimize_scalar
    return float(search(function, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x)


def test_pairs_are_counted() -> None:
    counts = count_pairs([True, True, True, False, False], [True, True, False, True, False])
    assert counts == PairedCounts(both=2, lost=1, gained=1, neither=1)
    assert (counts.items, counts.original, counts.artifact) == (5, 3, 3)


@pytest.mark.parametrize("counts", CASES)
@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99, 1.0, 1.2])
def test_constrained_flips_maximise_the_likelihood(counts: PairedCounts, ratio: float) -> None:
    def shares(gained: float, neither: float) -> tuple[float, float, float, float]:
        rest = 1 - neither
        lost = ratio * gained + (1 - ratio) * rest
        return rest - lost - gained, lost, gained, neither

    def loss(gained: float, neither: float) -> float:
        total = 0.0
        for seen, share in zip((counts.both, counts.lost, counts.gained, counts.neither), shares(gained, neither), strict=True):
            total -= seen * math.log(max(share, 1e-300)) if seen else 0.0
        return total

    def best_gained(neither: float) -> float:
        rest = 1 - neither
        low, high = max(0.0, (ratio - 1) * rest / ratio), ratio * rest / (1 + ratio)
        found = lowest(lambda gained: loss(gained, neither), low, high)
        return min((low, high, found), key=lambda gained: loss(gained, neither))

    def profile(neither: float) -> float:
        return loss(best_gained(neither), neither)

    neither = lowest(profile, 0.0, 1.0 - 1e-9)
    expected = best_gained(neither)
    lost, gained = constrained_flips(counts, ratio)
    assert gained == pytest.approx(expected, abs=2e-6)
    assert lost == pytest.approx(shares(expected, neither)[1], abs=2e-6)
    both, *_ = shares(gained, counts.neither / counts.items)
    assert both + gained == pytest.approx(ratio * (both + lost), abs=1e-12)  # the constraint itself


def test_no_flips_leave_a_variance() -> None:
    counts = PairedCounts(both=300, lost=0, gained=0, neither=0)
    assert recovery_score(counts, 0.99) == pytest.approx(math.sqrt(300 * 0.01 / 0.99))
    low, high = recovery_interval(counts, 0.95)
    assert 0.98 < low < 1 < high < 1.02


@pytest.mark.parametrize("counts", CASES)
def test_interval_ends_where_the_test_turns(counts: PairedCounts) -> None:
    z = NormalDist().inv_cdf(0.95)
    low, high = recovery_interval(counts, 0.95)
    assert low < counts.artifact / counts.original < high
    assert recovery_score(counts, low, -0.5) == pytest.approx(z, abs=1e-6)
    assert recovery_score(counts, high, 0.5) == pytest.approx(-z, abs=1e-6)
    assert judge_recovery(counts, low - 1e-6, 0.95).outcome == "pass"
    assert judge_recovery(counts, low + 1e-6, 0.95).outcome == "inconclusive"
    assert judge_recovery(counts, high + 1e-6, 0.95).outcome == "fail"


def test_an_artifact_without_a_right_answer_fails() -> None:
    finding = judge_recovery(PairedCounts(both=0, lost=50, gained=0, neither=0), 0.9, 0.95)
    assert finding.outcome == "fail"
    assert finding.value == 0
    assert finding.interval is not None
    assert finding.interval[0] == 0
    assert finding.interval[1] < 0.1


def scaled(counts: PairedCounts, items: int) -> PairedCounts:
    """The same rates over `items` items; the counts need not be whole for the formulas."""
    factor = items / counts.items
    parts = (counts.both * factor, counts.lost * factor, counts.gained * factor, counts.neither * factor)
    return PairedCounts(*parts)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("limit", [0.94, 0.97, 0.985])
def test_items_needed_settle_it_and_one_less_does_not(limit: float) -> None:
    counts = PairedCounts(both=360, lost=16, gained=5, neither=19)
    finding = judge_recovery(counts, limit, 0.95)
    assert finding.outcome == "inconclusive" or limit == 0.94
    if finding.outcome == "pass":
        assert finding.items_needed is None
        return
    assert finding.items_needed is not None
    settled = judge_recovery(scaled(counts, finding.items_needed), limit, 0.95)
    assert settled.outcome == ("pass" if finding.value > limit else "fail")
    assert judge_recovery(scaled(counts, finding.items_needed - 1), limit, 0.95).outcome == "inconclusive"


def test_an_estimate_at_the_limit_is_never_settled() -> None:
    finding = judge_recovery(PairedCounts(both=90, lost=10, gained=0, neither=100), 0.9, 0.95)
    assert (finding.outcome, finding.items_needed) == ("inconclusive", None)
    same = judge_recovery(PairedCounts(both=90, lost=0, gained=0, neither=10), 1.0, 0.95)
    assert (same.outcome, same.items_needed) == ("inconclusive", None)


@pytest.mark.parametrize(
    ("accuracy", "gained", "items", "limit"),
    [(0.97, 0.0, 400, 0.99), (1.0, 0.0, 270, 0.99), (0.7, 0.01, 1000, 0.97), (0.95, 0.05, 400, 0.98), (0.3, 0.02, 3000, 0.9)],
)
def test_a_true_loss_at_the_limit_rarely_passes_or_fails(accuracy: float, gained: float, items: int, limit: float) -> None:
    both = limit * accuracy - gained
    shares = np.array([both, accuracy - both, gained, 1 - accuracy - gained]).clip(min=0)
    draws = np.random.default_rng(7).multinomial(items, shares / shares.sum(), size=4000)
    outcomes = [judge_recovery(PairedCounts(*(int(part) for part in draw)), limit, 0.95).outcome for draw in draws]
    error = 3 * math.sqrt(0.05 * 0.95 / len(draws))  # three standard errors of the simulation itself
    assert outcomes.count("pass") / len(draws) <= 0.05 + error
    assert outcomes.count("fail") / len(draws) <= 0.05 + error


def test_a_harmless_change_mostly_passes_and_a_ruinous_one_fails() -> None:
    generator = np.random.default_rng(3)
    for shares, expected in (((0.935, 0.005, 0.005, 0.055), "pass"), ((0.75, 0.19, 0.01, 0.05), "fail")):
        draws = generator.multinomial(1000, shares, size=300)
        outcomes = [judge_recovery(PairedCounts(*(int(part) for part in draw)), 0.97, 0.95).outcome for draw in draws]
        assert outcomes.count(expected) >= 0.95 * len(draws)


def test_clustered_mean_weighs_tokens_and_reduces_to_the_usual_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 5.0])
    mean, error = clustered_mean(values, np.ones(4))
    assert mean == 3
    assert error == pytest.approx(values.std(ddof=1) / 2)
    sizes = np.array([10.0, 1.0, 4.0])
    assert clustered_mean(np.array([10.0, 3.0, 2.0]), sizes)[0] == pytest.approx(1)
    assert clustered_mean(2 * sizes, sizes) == (2, 0)  # every token is alike, whatever the sizes
    assert mean_interval(np.array([4.0]), np.array([2.0]), 0.95) is None


def test_perplexity_verdicts() -> None:
    sizes = np.full(20, 63.0)
    original = np.random.default_rng(0).normal(200, 20, size=20)
    slightly = original + np.random.default_rng(1).normal(0.63, 0.3, size=20)  # 1 % worse per token
    passed = judge_perplexity(original, slightly, sizes, 1.05, 0.95)
    assert passed.outcome == "pass"
    assert passed.interval is not None
    assert passed.interval[0] < passed.value < passed.interval[1] <= 1.05
    assert passed.value == pytest.approx(1.01, abs=0.003)
    assert judge_perplexity(original, slightly, sizes, 1.001, 0.95).outcome == "fail"
    open_one = judge_perplexity(original, slightly, sizes, passed.interval[1] - 1e-4, 0.95)
    assert open_one.outcome == "inconclusive"
    assert open_one.items_needed is not None
    assert 20 < open_one.items_needed < 30
    assert judge_perplexity(original, original, sizes, 1.0, 0.95).outcome == "pass"


def test_one_window_proves_nothing() -> None:
    finding = judge_perplexity(np.array([10.0]), np.array([10.0]), np.array([5.0]), 2.0, 0.95)
    assert (finding.value, finding.interval, finding.outcome, finding.items_needed) == (1.0, None, "inconclusive", None)


def test_a_true_perplexity_at_the_limit_rarely_passes_or_fails() -> None:
    generator = np.random.default_rng(11)
    sizes = np.full(24, 127.0)
    outcomes: list[str] = []
    for _ in range(3000):
        original = generator.normal(400, 60, size=24)
        changed = original + 127 * math.log(1.02) + generator.normal(0, 2.5, size=24)
        outcomes.append(judge_perplexity(original, changed, sizes, 1.02, 0.95).outcome)
    for outcome in ("pass", "fail"):
        assert outcomes.count(outcome) / len(outcomes) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(outcomes))


def test_a_ruined_model_has_a_perplexity_that_json_can_hold() -> None:
    assert math.isfinite(bounded_exp(1e6))
