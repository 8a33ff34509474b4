import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.eval.statistics.estimates import Levels
from compress.eval.statistics.paired import Pairs, judge_pairs
from compress.eval.statistics.sequential import ScoreProcess, Sequential, boundaries, error_spent, repeated_p

NORMAL = NormalDist()


def even(looks: int) -> list[float]:
    return [(look + 1) / looks for look in range(looks)]


def crossing_chances(fractions: Sequence[float], bounds: Sequence[float]) -> list[float]:
    """The probability at each look that z first crosses its bound there."""
    process, chances = ScoreProcess(), list[float]()
    for fraction, bound in zip(fractions, bounds, strict=True):
        chances.append(process.chance(fraction, bound))
        process.step(fraction, bound)
    return chances


def right_or_wrong(both: int, lost: int, gained: int, neither: int) -> Pairs:
    original = np.repeat([1.0, 1.0, 0.0, 0.0], (both, lost, gained, neither))
    artifact = np.repeat([1.0, 0.0, 1.0, 0.0], (both, lost, gained, neither))
    order = np.random.default_rng(0).permutation(len(original))
    return Pairs(original[order], artifact[order], np.arange(len(original)))


@pytest.mark.parametrize(("looks", "constant"), [(2, 2.178), (3, 2.289), (4, 2.361), (5, 2.413)])
def test_pococks_constants_spend_five_percent(looks: int, constant: float) -> None:
    # Jennison and Turnbull, Group Sequential Methods (2000), table 2.1, two-sided 0.05; both sides hardly ever meet
    assert 2 * sum(crossing_chances(even(looks), [constant] * looks)) == pytest.approx(0.05, abs=2e-4)


@pytest.mark.parametrize(("looks", "constant"), [(2, 1.977), (3, 2.004), (4, 2.024), (5, 2.040)])
def test_o_brien_and_flemings_constants_spend_five_percent(looks: int, constant: float) -> None:
    bounds = [constant * math.sqrt(looks / (look + 1)) for look in range(looks)]  # the same book, table 2.3
    assert 2 * sum(crossing_chances(even(looks), bounds)) == pytest.approx(0.05, abs=2e-4)


def test_spending_boundaries_are_the_published_ones() -> None:
    # Reboussin, DeMets, Kim and Lan, Controlled Clinical Trials 21 (2000): O'Brien-Fleming-type spending, two-sided 0.05, 5 looks
    assert boundaries(even(5), 0.025) == pytest.approx((4.8769, 3.3569, 2.6803, 2.2898, 2.0310), abs=2e-4)
    # the same for 3 looks, as gsDesign and rpact give them
    assert boundaries(even(3), 0.025) == pytest.approx((3.710, 2.511, 1.993), abs=5e-4)


def test_one_look_is_the_plain_test() -> None:
    assert boundaries([1.0], 0.05) == pytest.approx((NORMAL.inv_cdf(0.95),), abs=1e-6)
    assert crossing_chances([1.0], [1.645]) == pytest.approx([NORMAL.cdf(-1.645)], abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.floats(0.001, 0.2))
def test_each_look_spends_its_share(steps: list[int], alpha: float) -> None:
    fractions = [float(part) for part in np.cumsum(steps) / sum(steps)]
    chances = crossing_chances(fractions, boundaries(fractions, alpha))
    assert np.cumsum(chances) == pytest.approx([error_spent(fraction, alpha) for fraction in fractions], abs=1e-6)
    assert sum(chances) == pytest.approx(alpha, abs=1e-6)


def test_chances_are_those_of_simulated_walks() -> None:
    bounds = boundaries(even(4), 0.05)
    steps = np.random.default_rng(1).normal(0, 0.5, size=(40_000, 4))
    z = steps.cumsum(axis=1) / np.sqrt(even(4))
    reached = (z >= bounds).any(axis=1)
    first = np.bincount((z >= bounds).argmax(axis=1)[reached], minlength=4) / len(z)
    assert crossing_chances(even(4), bounds) == pytest.approx(first, abs=0.01)


@pytest.mark.parametrize("fractions", [[], [0.5, 0.5, 1.0], [0.5, 0.2], [0.0, 1.0], [0.5, 1.1]])
def test_impossible_looks_are_refused(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match=r"of the items at the level 0\.05 are not possible"):
        boundaries(fractions, 0.05)


def test_a_repeated_p_value_is_the_level_at_which_the_look_rejects() -> None:
    for fractions, alpha in (([1.0], 0.01), ([0.25, 0.5], 0.05), (even(4), 0.01)):
        nominal = NORMAL.cdf(-boundaries(fractions, alpha)[-1])
        assert repeated_p(fractions, nominal) == pytest.approx(alpha, rel=1e-9)
    assert repeated_p(even(2), 0.7) == 1
    assert repeated_p([1.0], 0.03) == pytest.approx(0.03, rel=1e-9)


def test_looks_are_planned_over_the_budget() -> None:
    plan = Sequential.even(4, 0.95, tasks=2)
    assert plan.fractions == (0.25, 0.5, 0.75, 1.0)
    assert plan.items(1001) == (250, 500, 751, 1001)
    assert plan.levels == Levels(1 - 0.95, (1 - 0.95) / 2)
    nominal = [plan.nominal(look) for look in range(4)]
    assert all(early.passing < late.passing for early, late in itertools.pairwise(nominal))
    assert all(level.failing < level.passing for level in nominal)
    assert nominal[3].passing < 0.05


def test_a_look_is_the_test_at_its_own_level() -> None:
    plan, pairs = Sequential.even(4, 0.95), right_or_wrong(180, 9, 3, 8)
    look = plan.judge(pairs, 1, 0.97)
    plain = judge_pairs(pairs, 0.97, plan.nominal(1))
    assert look is not None
    assert plain is not None
    assert (look.decision, plain.outcome) == ("go on", "inconclusive")
    assert look.recovery.interval == plain.interval
    assert look.recovery.p_fail > plain.p_fail
    last = plan.judge(pairs, 3, 0.97)
    assert last is not None
    assert (last.decision, last.recovery.outcome) == ("inconclusive", "inconclusive")
    assert last.recovery.interval is not None
    assert look.recovery.interval is not None
    assert look.recovery.interval[0] < last.recovery.interval[0]  # an early look's bounds are wider


def test_what_is_blatant_stops_early() -> None:
    plan = Sequential.even(4, 0.95)
    ruined = plan.judge(right_or_wrong(50, 40, 0, 10), 0, 0.97)
    assert ruined is not None
    assert ruined.decision == "fail"
    assert ruined.recovery.p_fail < 0.01
    kept = plan.judge(right_or_wrong(1960, 0, 0, 40), 1, 0.97)
    assert kept is not None
    assert kept.decision == "pass"
    assert plan.decide(right_or_wrong(1960, 0, 0, 40), 1, 0.97) == "pass"
    assert plan.judge(right_or_wrong(0, 0, 5, 5), 0, 0.97) is None
    assert plan.decide(right_or_wrong(0, 0, 5, 5), 3, 0.97) == "inconclusive"


def test_many_looks_keep_the_error_at_the_limit() -> None:
    plan = Sequential.even(4, 0.95)
    shares = np.array([0.97 * 0.85 - 0.02, 0.03 * 0.85 + 0.02, 0.02, 0.13])
    generator = np.random.default_rng(2)
    decisions: list[str] = []
    for _ in range(500):
        cells = generator.choice(4, p=shares, size=800)
        pairs = Pairs(np.isin(cells, (0, 1)).astype(np.float64), np.isin(cells, (0, 2)).astype(np.float64), np.arange(800))
        looks = (plan.decide(pairs.first(items), look, 0.97) for look, items in enumerate(plan.items(800)))
        decisions.append(next(decision for decision in looks if decision != "go on"))
    error = 3 * math.sqrt(0.05 * 0.95 / 500)
    assert decisions.count("pass") / 500 <= 0.05 + error
    assert decisions.count("fail") / 500 <= 0.05 + error
