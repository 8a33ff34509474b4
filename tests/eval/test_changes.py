import itertools
import math
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.eval.changes import (
    count_flips,
    effective_items,
    image_gain,
    judge_flips,
    mcnemar,
    mcnemar_gain,
    share_interval,
    sign_flip_tail,
)
from compress.eval.statistics.paired import Pairs

binomtest = cast("Any", scipy.stats).binomtest


def test_mcnemar_gives_the_published_p_values() -> None:
    # Fagerland, Lydersen and Laake, BMC Medical Research Methodology 13 (2013) 91: the exact conditional test of both examples
    assert mcnemar(1, 7) == pytest.approx(0.070, abs=5e-4)
    assert mcnemar(6, 16) == pytest.approx(0.052, abs=5e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_of_the_flips(lost: int, gained: int) -> None:
    if lost + gained == 0:
        assert mcnemar(0, 0) == mcnemar_gain(0, 0) == 1
        return
    assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(binomtest(lost, lost + gained).pvalue)
    one_sided = binomtest(gained, lost + gained, alternative="greater").pvalue
    assert mcnemar_gain(gained, lost) == pytest.approx(one_sided)


def test_flipping_signs_is_mcnemars_test_for_right_or_wrong_items() -> None:
    for lost, gained in ((0, 4), (3, 10), (12, 12), (40, 60)):
        differences = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 9)
        assert sign_flip_tail(differences) == pytest.approx(mcnemar_gain(gained, lost), abs=1e-4)
    assert sign_flip_tail(np.zeros(5)) == 1


def test_flipping_signs_counts_every_pattern() -> None:
    differences = np.array([0.3, -0.1, 0.9, 0.6, -0.4, 1.7])
    sums = [sum(sign * abs(value) for sign, value in zip(signs, differences, strict=True)) for signs in patterns(6)]
    expected = np.mean([total >= differences.sum() - 1e-9 for total in sums])
    assert sign_flip_tail(differences) == pytest.approx(expected, abs=1e-4)


def patterns(length: int) -> list[tuple[int, ...]]:
    return list(itertools.product((-1, 1), repeat=length))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 500), st.integers(0, 500), st.sampled_from([0.9, 0.95, 0.975]))
def test_the_share_has_clopper_and_pearsons_bounds(items: int, flipped: int, confidence: float) -> None:
    count = min(flipped, items)
    interval = binomtest(count, items).proportion_ci(confidence_level=2 * confidence - 1, method="exact")
    assert share_interval(count, items, confidence) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_the_rule_of_three() -> None:
    assert share_interval(0, 300, 0.95)[1] == pytest.approx(3 / 300, rel=0.01)


def test_flips_are_counted_both_ways() -> None:
    flips = count_flips(Pairs.of([1, 1, 1, 0, 0] * 40, [1, 0, 1, 1, 0] * 40), 0.95)
    assert (flips.lost, flips.gained, flips.items, flips.share) == (40, 40, 200, 0.4)
    assert flips.interval == share_interval(80, 200, 0.95)
    assert flips.p_value == 1
    votes = count_flips(Pairs.of([1.0] * 30, [0.9] * 12 + [1.0] * 18), 0.95)
    assert (votes.lost, votes.gained) == (12, 0)
    assert votes.p_value == pytest.approx(2 / 2**12, abs=1e-4)


def test_items_that_flip_together_count_less() -> None:
    flipped = np.array([True] * 20 + [False] * 180)
    alone, together = np.arange(200), np.arange(200) // 4
    assert effective_items(flipped, alone) == pytest.approx(200, rel=0.01)
    assert effective_items(flipped, together) == pytest.approx(50, rel=0.05)
    spread = np.array([True, *[False] * 7] * 25)  # never two in one image
    assert effective_items(spread, together) == 200
    assert effective_items(np.zeros(200, dtype=bool), together) == 50
    assert effective_items(flipped, np.zeros(200, dtype=np.int64)) == 1
    one = count_flips(Pairs(np.ones(200), 1.0 - flipped, alone), 0.95)
    four = count_flips(Pairs(np.ones(200), 1.0 - flipped, together), 0.95)
    assert one.share == four.share
    assert four.interval[0] < one.interval[0] < one.interval[1] < four.interval[1]
    assert one.p_value < four.p_value < 0.07


def test_bounds_of_the_share_hold_where_items_flip_together() -> None:
    generator = np.random.default_rng(0)
    outside = [0, 0]
    for _ in range(300):
        images = generator.random(150) < 0.08
        low, high = count_flips(
            Pairs(np.ones(450), np.repeat(~images, 3).astype(np.float64), np.repeat(np.arange(150), 3)), 0.95
        ).interval
        outside[0] += low > 0.08
        outside[1] += high < 0.08
    assert max(outside) / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_flips_are_held_against_a_limit() -> None:
    few = count_flips(Pairs.of([1.0] * 1000, [0.0] * 5 + [1.0] * 995), 0.95)
    assert judge_flips(few, 0.02).outcome == "pass"
    assert judge_flips(few, 0.001).outcome == "fail"
    open_one = judge_flips(few, 0.008)
    assert (open_one.value, open_one.interval, open_one.outcome) == (0.005, few.interval, "inconclusive")
    assert open_one.items_needed is not None
    assert open_one.items_needed > 1000
    times = math.ceil(open_one.items_needed / 1000)
    more = count_flips(Pairs.of([1.0] * 1000 * times, ([0.0] * 5 + [1.0] * 995) * times), 0.95)
    assert judge_flips(more, 0.008).outcome == "pass"
    assert judge_flips(few, 0.005).items_needed is None


def test_an_image_that_helps_is_seen() -> None:
    gain = image_gain([1.0] * 50 + [0.0] * 14, [1.0] * 20 + [0.0] * 40 + [1.0] * 4, None, 0.95)
    assert (gain.outcome, gain.right, gain.wrong, gain.items) == ("pass", 50 / 64, 24 / 64, 64)
    assert gain.value == pytest.approx(26 / 64)
    assert gain.changed == pytest.approx(34 / 64)
    assert gain.p_value == pytest.approx(mcnemar_gain(30, 4))
    assert gain.interval is not None
    assert 0.25 < gain.interval[0] < gain.value < gain.interval[1] < 0.55


def test_answers_that_do_not_depend_on_the_image_fail() -> None:
    same = image_gain([1.0, 0.0] * 32, [1.0, 0.0] * 32, None, 0.95)
    assert (same.outcome, same.value, same.changed, same.p_value) == ("fail", 0, 0, 1)
    assert image_gain([1.0, 0.0] * 32, [0.0, 1.0] * 32, None, 0.95).outcome == "fail"
    worse = image_gain([0.0] * 30, [0.9] * 30, None, 0.95)
    assert (worse.outcome, worse.value) == ("fail", pytest.approx(-0.9))


def test_questions_about_one_image_are_one_proof() -> None:
    right, wrong = [1.0] * 12 + [0.0] * 12, [0.0] * 24
    assert image_gain(right, wrong, None, 0.999).outcome == "pass"
    clustered = image_gain(right, wrong, [str(number // 6) for number in range(24)], 0.999)
    assert (clustered.outcome, clustered.p_value) == ("fail", pytest.approx(0.25, abs=1e-4))
    assert image_gain(right, wrong, ["one"] * 24, 0.95).interval is None


def test_an_image_that_does_not_matter_rarely_passes() -> None:
    draws = np.random.default_rng(1).choice([0.0, 0.3, 0.6, 1.0], size=(200, 2, 48))
    clusters = [str(number // 2) for number in range(48)]
    passed = sum(image_gain(list(right), list(wrong), clusters, 0.95).outcome == "pass" for right, wrong in draws)
    assert 0 < passed / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
