import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.eval.statistics.estimates import (
    Levels,
    PairedCounts,
    above_floor,
    bounded_exp,
    clustered_mean,
    constrained_flips,
    crossing,
    judge_counts,
    judge_perplexity,
    mean_interval,
    recovery_score,
    score_tails,
    two_sided,
)
from compress.eval.statistics.paired import Pairs

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
    counts = Pairs.of([1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 0.0]).counts
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
    interval = judge_counts(counts, 0.9, Levels.at(0.95)).interval
    assert interval is not None
    low, high = interval
    assert 0.98 < low < 1 < high < 1.02


@pytest.mark.parametrize("counts", CASES)
def test_interval_ends_where_the_test_turns(counts: PairedCounts) -> None:
    z = NormalDist().inv_cdf(0.95)
    interval = judge_counts(counts, 0.9, Levels.at(0.95)).interval
    assert interval is not None
    low, high = interval
    assert low < counts.artifact / counts.original < high
    assert recovery_score(counts, low, -0.5) == pytest.approx(z, abs=1e-6)
    assert recovery_score(counts, high, 0.5) == pytest.approx(-z, abs=1e-6)
    assert judge_counts(counts, low - 1e-6, Levels.at(0.95)).outcome == "pass"
    assert judge_counts(counts, low + 1e-6, Levels.at(0.95)).outcome == "inconclusive"
    assert judge_counts(counts, high + 1e-6, Levels.at(0.95)).outcome == "fail"


def test_an_artifact_without_a_right_answer_fails() -> None:
    finding = judge_counts(PairedCounts(both=0, lost=50, gained=0, neither=0), 0.9, Levels.at(0.95))
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
    finding = judge_counts(counts, limit, Levels.at(0.95))
    assert finding.outcome == "inconclusive" or limit == 0.94
    if finding.outcome == "pass":
        assert finding.items_needed is None
        return
    assert finding.items_needed is not None
    settled = judge_counts(scaled(counts, finding.items_needed), limit, Levels.at(0.95))
    assert settled.outcome == ("pass" if finding.value > limit else "fail")
    assert judge_counts(scaled(counts, finding.items_needed - 1), limit, Levels.at(0.95)).outcome == "inconclusive"


def test_an_estimate_at_the_limit_is_never_settled() -> None:
    finding = judge_counts(PairedCounts(both=90, lost=10, gained=0, neither=100), 0.9, Levels.at(0.95))
    assert (finding.outcome, finding.items_needed) == ("inconclusive", None)
    same = judge_counts(PairedCounts(both=90, lost=0, gained=0, neither=10), 1.0, Levels.at(0.95))
    assert (same.outcome, same.items_needed) == ("inconclusive", None)


@pytest.mark.parametrize(
    ("accuracy", "gained", "items", "limit"),
    [(0.97, 0.0, 400, 0.99), (1.0, 0.0, 270, 0.99), (0.7, 0.01, 1000, 0.97), (0.95, 0.05, 400, 0.98), (0.3, 0.02, 3000, 0.9)],
)
def test_a_true_loss_at_the_limit_rarely_passes_or_fails(accuracy: float, gained: float, items: int, limit: float) -> None:
    both = limit * accuracy - gained
    shares = np.array([both, accuracy - both, gained, 1 - accuracy - gained]).clip(min=0)
    draws = np.random.default_rng(7).multinomial(items, shares / shares.sum(), size=4000)
    outcomes = [judge_counts(PairedCounts(*(int(part) for part in draw)), limit, Levels.at(0.95)).outcome for draw in draws]
    error = 3 * math.sqrt(0.05 * 0.95 / len(draws))  # three standard errors of the simulation itself
    assert outcomes.count("pass") / len(draws) <= 0.05 + error
    assert outcomes.count("fail") / len(draws) <= 0.05 + error


def test_a_harmless_change_mostly_passes_and_a_ruinous_one_fails() -> None:
    generator = np.random.default_rng(3)
    for shares, expected in (((0.935, 0.005, 0.005, 0.055), "pass"), ((0.75, 0.19, 0.01, 0.05), "fail")):
        draws = generator.multinomial(1000, shares, size=300)
        outcomes = [judge_counts(PairedCounts(*(int(part) for part in draw)), 0.97, Levels.at(0.95)).outcome for draw in draws]
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


cells = st.integers(0, 60)


@settings(deadline=None, max_examples=40)
@given(cells.filter(bool), cells, cells, cells, st.floats(0.5, 1.0))
def test_swapping_the_models_turns_the_score_around(both: int, lost: int, gained: int, neither: int, limit: float) -> None:
    forth = recovery_score(PairedCounts(both, lost, gained, neither), limit)
    assert recovery_score(PairedCounts(both, gained, lost, neither), 1 / limit) == pytest.approx(-forth, rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(cells.filter(bool), cells, cells, cells, st.integers(1, 1000))
def test_items_that_neither_gets_right_say_nothing(both: int, lost: int, gained: int, neither: int, more: int) -> None:
    one, other = PairedCounts(both, lost, gained, neither), PairedCounts(both, lost, gained, neither + more)
    assert score_tails(one, 0.95) == pytest.approx(score_tails(other, 0.95), rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(cells.filter(bool), cells, cells, cells, st.floats(0.5, 0.98))
def test_a_lower_limit_is_easier_to_keep(both: int, lost: int, gained: int, neither: int, limit: float) -> None:
    counts = PairedCounts(both, lost, gained, neither)
    easier, harder = score_tails(counts, limit), score_tails(counts, limit + 0.02)
    assert easier[0] <= harder[0] + 1e-9
    assert easier[1] >= harder[1] - 1e-9


def test_the_p_values_decide_at_the_levels() -> None:
    counts = PairedCounts(both=360, lost=16, gained=5, neither=19)
    recovery = judge_counts(counts, 0.94, Levels.at(0.95))
    assert (recovery.outcome, recovery.items, recovery.method) == ("pass", 400, "score test")
    assert recovery.p_pass <= 0.05 < recovery.p_fail
    assert judge_counts(counts, 0.94, Levels(recovery.p_pass / 2, 0.05)).outcome == "inconclusive"
    failed = judge_counts(counts, 0.995, Levels.at(0.95))
    assert failed.outcome == "fail"
    assert judge_counts(counts, 0.995, Levels(0.05, failed.p_fail / 2)).outcome == "inconclusive"


def test_each_level_moves_its_own_bound() -> None:
    usual, strict = (judge_counts(CASES[0], 0.95, levels).interval for levels in (Levels.at(0.95), Levels(0.05, 1e-30)))
    assert usual is not None
    assert strict is not None
    assert strict[0] == pytest.approx(usual[0], rel=1e-12)
    assert strict[1] > usual[1] + 0.1


def test_a_mean_above_its_floor_is_told_from_one_at_it() -> None:
    generator = np.random.default_rng(2)
    tokens = generator.integers(3, 30, 200).astype(np.float64)
    clusters = np.arange(200) // 2
    noise, again = (tokens * generator.gamma(2.0, 0.002, 200) for _ in range(2))
    at_floor = above_floor((again, tokens), (noise, tokens), clusters, 0.95)
    assert not at_floor.above
    assert at_floor.interval is not None
    assert at_floor.interval[0] < 0 < at_floor.interval[1]
    assert at_floor.value == pytest.approx(again.sum() / tokens.sum())
    raised = above_floor((again + 0.002 * tokens, tokens), (noise, tokens), clusters, 0.95)
    assert raised.above
    assert raised.p_value < 0.01
    assert raised.value - raised.floor == pytest.approx(at_floor.value - at_floor.floor + 0.002)


def test_the_difference_from_the_floor_is_a_paired_t_test_for_items_of_one_token() -> None:
    generator = np.random.default_rng(9)
    artifact, noise = generator.gamma(2.0, 1.0, 40), generator.gamma(2.0, 0.9, 40)
    excess = above_floor((artifact, np.ones(40)), (noise, np.ones(40)), np.arange(40), 0.95)
    test = cast("Any", scipy.stats).ttest_rel(artifact, noise, alternative="greater")
    assert excess.p_value == pytest.approx(test.pvalue)
    assert excess.interval is not None
    assert excess.interval[0] == pytest.approx(test.confidence_interval(0.95).low)


def test_two_runs_that_are_alike_are_at_the_floor() -> None:
    same = (np.array([0.1, 0.2, 0.3]), np.ones(3))
    excess = above_floor(same, same, np.arange(3), 0.95)
    assert (excess.above, excess.p_value, excess.interval) == (False, 1.0, (0.0, 0.0))
    single = above_floor((np.array([5.0]), np.ones(1)), (np.array([0.0]), np.ones(1)), np.zeros(1, dtype=np.int64), 0.95)
    assert (single.above, single.interval) == (False, None)


def test_an_interval_is_named_by_the_confidence_of_both_its_bounds() -> None:
    """Two bounds with 95 % each hold together in 90 of 100."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(2000):
        bounds = mean_interval(generator.normal(1, 1, 20), np.ones(20), 0.95)
        assert bounds is not None
        held += bounds[0] <= 1 <= bounds[1]
    assert held / 2000 == pytest.approx(two_sided(0.95), abs=0.02)
    assert Levels.at(0.95).interval == pytest.approx(0.9)
    assert judge_counts(PairedCounts(90, 5, 4, 1), 0.9, Levels.at(0.95)).level == pytest.approx(0.9)


@pytest.mark.parametrize("steps", [False, True])
def test_a_crossing_is_found_on_slopes_and_steps_and_beside_infinity(*, steps: bool) -> None:
    for root in (3e-9, 0.02, 1.0, 700.0):
        assert crossing(lambda x, root=root: 1 - x / root, 1e-9, 1e3, steps=steps) == pytest.approx(root, rel=3e-12)
        assert crossing(lambda x, root=root: 1.0 if x < root else -1.0, 1e-9, 1e3, steps=steps) == pytest.approx(root, rel=3e-12)
    assert crossing(lambda x: math.inf if x < 2 else 3 - x, 1.0, 5.0, steps=steps) == pytest.approx(3, rel=3e-12)
    assert (crossing(lambda x: -x, 1.0, 2.0, steps=steps), crossing(lambda x: 9 - x, 1.0, 2.0, steps=steps)) == (1.0, 2.0)
