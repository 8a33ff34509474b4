import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import bdtr, bdtrc

from compress.eval.statistics.bootstrap import Floats, Totals, bootstrap_tails, sum_tails, tilted
from compress.eval.statistics.estimates import PairedCounts, constrained_flips, score_tails

votes = st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])
scores = st.lists(st.tuples(votes, votes), min_size=2, max_size=40).filter(lambda pairs: any(original for original, _ in pairs))


def totals(pairs: Sequence[tuple[float, float]], size: int = 1) -> Totals:
    """Clusters of the given (original, artifact) sums."""
    original, artifact = (np.array(column) for column in zip(*pairs, strict=True))
    return Totals(original, artifact, np.full(len(pairs), float(size)), 1.0)


def right_or_wrong(counts: PairedCounts) -> Totals:
    cells = [(1.0, 1.0)] * counts.both + [(1.0, 0.0)] * counts.lost + [(0.0, 1.0)] * counts.gained + [(0.0, 0.0)] * counts.neither
    return totals(cells)


@pytest.mark.parametrize("cells", [(350, 20, 10, 20), (390, 0, 0, 10), (30, 0, 12, 58), (0, 9, 4, 87), (95, 5, 0, 0)])
@pytest.mark.parametrize("recovery", [0.9, 0.99, 1.0, 1.2])
def test_right_or_wrong_items_get_the_score_tests_probabilities(cells: tuple[int, int, int, int], recovery: float) -> None:
    counts = PairedCounts(*cells)
    values, probabilities = tilted(right_or_wrong(counts), recovery)
    lost, gained = constrained_flips(counts, recovery)
    assert probabilities[np.isclose(values, -recovery)].sum() == pytest.approx(lost, abs=1e-7)
    assert probabilities[np.isclose(values, 1)].sum() == pytest.approx(gained, abs=1e-7)


def test_its_p_values_come_close_to_the_score_tests() -> None:
    for cells in ((350, 20, 10, 20), (200, 30, 28, 90), (700, 40, 20, 240)):
        counts = PairedCounts(*cells)
        for limit in (0.92, 0.95, 0.97, 1.0):
            tails = bootstrap_tails(right_or_wrong(counts), limit)
            assert (tails.larger, tails.smaller) == pytest.approx(score_tails(counts, limit), rel=0.25, abs=0.003)


def test_a_change_that_nothing_makes_possible_has_no_probability_at_all() -> None:
    """A remainder of 1e-16 would count as the largest change, by which the grid's step is chosen."""
    generator = np.random.default_rng(0)
    for number in range(50):
        clusters = totals([(float(a), float(b)) for a, b in generator.random((8 + number, 2)).round(2)])
        unobserved = tilted(clusters, float(generator.uniform(0.8, 1.2)))[1][-2:]
        assert all(value == 0 or value > 1e-12 for value in unobserved)


@settings(max_examples=40, deadline=None)
@given(scores, st.floats(0.8, 1.2))
def test_the_hypothesis_holds_for_the_tilted_probabilities_and_they_are_the_likeliest(
    pairs: list[tuple[float, float]], recovery: float
) -> None:
    clusters = totals(pairs)
    values, probabilities = tilted(clusters, recovery)
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.min() >= 0
    assert float(probabilities @ values) == pytest.approx(0, abs=1e-9)
    shares = clusters.distinct[2]
    seen, unseen = probabilities[:-2], probabilities[-2:]
    ratios = shares / seen  # 1 + λ·D, so a straight line through 1
    multiplier = (ratios - 1) @ values[:-2] / max(float(values[:-2] @ values[:-2]), 1e-300)
    assert ratios == pytest.approx(1 + multiplier * values[:-2], abs=1e-6)
    for value, probability in zip(values[-2:], unseen, strict=True):  # an unseen difference gains only at its pole
        assert 1 + multiplier * value > -1e-6
        assert probability < 1e-9 or 1 + multiplier * value == pytest.approx(0, abs=1e-5)


def enumerated(values: Floats, probabilities: Floats, draws: int, seen: float) -> tuple[float, float]:
    larger = smaller = 0.0
    for drawn in itertools.product(range(len(values)), repeat=draws):
        chance = math.prod(float(probabilities[index]) for index in drawn)
        total = sum(float(values[index]) for index in drawn)
        larger += chance * (total >= seen - 1e-9)
        smaller += chance * (total <= seen + 1e-9)
    return larger, smaller


def test_tails_of_a_sum_are_those_of_all_draws() -> None:
    values, probabilities = np.array([-1.3, -0.2, 0.1, 0.9]), np.array([0.1, 0.3, 0.45, 0.15])
    values -= probabilities @ values
    for seen in (-2.0, float(values[0] + 4 * values[2]), 0.0, 1.7, float(values.sum() + values[3])):
        assert sum_tails([(values, probabilities, 5)], seen) == pytest.approx(enumerated(values, probabilities, 5, seen), abs=1e-4)


def test_tails_are_exact_far_out() -> None:
    values, probabilities = np.array([-0.02, 0.98]), np.array([0.98, 0.02])
    for reached in (3, 8, 14, 20, 25):
        larger, smaller = sum_tails([(values, probabilities, 400)], reached - 8.0)
        assert larger == pytest.approx(float(bdtrc(reached - 1, 400, 0.02)), rel=1e-3, abs=1e-13)
        assert smaller == pytest.approx(float(bdtr(reached, 400, 0.02)), rel=1e-3)


def test_parts_with_different_values_add_up() -> None:
    distributions = [(np.array([-1.0, 1.0]), np.array([0.5, 0.5]), 2), (np.array([-0.25, 0.25]), np.array([0.5, 0.5]), 1)]
    assert sum_tails(distributions, 2.25) == pytest.approx((1 / 8, 1.0), abs=1e-4)
    assert sum_tails(distributions, 1.75) == pytest.approx((2 / 8, 7 / 8), abs=1e-4)


def test_no_change_at_all_is_as_if_three_clusters_were_lost_unseen() -> None:
    for size in (1, 4):  # of 300 clusters whose items are wholly alike, 1 % lost leaves none with a probability of 0.99^300
        tails = bootstrap_tails(totals([(float(size), float(size))] * 300, size), 0.99)
        assert tails.larger == pytest.approx(0.99**300, rel=0.05)
        assert tails.smaller > 0.99
    assert bootstrap_tails(totals([(1.0, 1.0)] * 300), 1.0).larger == 1


def test_one_cluster_says_nothing_and_few_say_little() -> None:
    assert bootstrap_tails(totals([(50.0, 0.0)], 50), 0.9).smaller == 1
    assert bootstrap_tails(totals([(50.0, 0.0)] * 3, 50), 0.9).smaller > 0.05
    assert bootstrap_tails(totals([(50.0, 0.0)] * 12, 50), 0.9).smaller < 0.01


def test_few_clusters_with_a_normal_difference_hold_the_level() -> None:
    generator = np.random.default_rng(0)
    original = np.full(10, 20.0)
    draws = [Totals(original, original - 0.6 + generator.normal(0, 2, 10), original, 2.0) for _ in range(600)]
    tails = [bootstrap_tails(drawn, 0.97) for drawn in draws]
    for rate in (np.mean([tail.larger <= 0.05 for tail in tails]), np.mean([tail.smaller <= 0.05 for tail in tails])):
        assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


@settings(max_examples=30, deadline=None)
@given(scores, st.floats(0.85, 1.0), st.integers(0, 99))
def test_the_order_of_the_items_does_not_matter(pairs: list[tuple[float, float]], limit: float, seed: int) -> None:
    shuffled = [pairs[int(index)] for index in np.random.default_rng(seed).permutation(len(pairs))]
    one, other = bootstrap_tails(totals(pairs), limit), bootstrap_tails(totals(shuffled), limit)
    assert (one.larger, one.smaller) == pytest.approx((other.larger, other.smaller), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), st.floats(0.8, 1.0))
def test_swapping_the_models_swaps_the_tails(pairs: list[tuple[bool, bool]], limit: float) -> None:
    pairs += [(True, True)]
    forth = bootstrap_tails(totals([(float(a), float(b)) for a, b in pairs]), limit)
    back = bootstrap_tails(totals([(float(b), float(a)) for a, b in pairs]), 1 / limit)
    assert (forth.larger, forth.smaller) == pytest.approx((back.smaller, back.larger), abs=1e-3)


def test_where_few_clusters_changed_the_spread_is_known_from_those_few() -> None:
    """Otherwise an artifact whose changes come by whole images passes at the limit in 5.9 % of evaluations, not 5 %."""
    from scipy.special import ndtri, stdtr

    sums = totals([(3.0, 3.0)] * 80 + [(3.0, 0.0)] * 5 + [(3.0, 1.0)] * 3 + [(0.0, 3.0)] * 2 + [(0.0, 0.0)] * 50, size=3)
    values, chances = tilted(sums, 0.9)
    larger, _ = sum_tails([(values, chances, 140)], float(sums.artifact.sum() - 0.9 * sums.original.sum()))
    third, fourth = ((chances * values**power).sum() / (chances * values**2).sum() ** (power / 2) for power in (3, 4))
    freedom = 2 * 140 / (fourth - 1 - third**2)
    assert 5 < freedom < 100
    assert bootstrap_tails(sums, 0.9).larger == pytest.approx(stdtr(freedom, ndtri(larger) * math.sqrt(139 / 140)), rel=1e-6)


def test_of_two_values_the_spread_is_known_and_nothing_is_widened_for_it() -> None:
    """As of items alone that are right or wrong, which agree with the score test in `statistics`."""
    from scipy.special import ndtri, stdtr

    sums = totals([(3.0, 3.0)] * 80 + [(3.0, 0.0)] * 5, size=3)
    values, chances = tilted(sums, 0.9)
    larger, _ = sum_tails([(values, chances, 85)], float(sums.artifact.sum() - 0.9 * sums.original.sum()))
    assert bootstrap_tails(sums, 0.9).larger == pytest.approx(stdtr(84, ndtri(larger) * math.sqrt(84 / 85)), rel=1e-6)
