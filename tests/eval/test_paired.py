import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.eval.statistics.estimates import Levels, PairedCounts, Recovery, judge_counts
from compress.eval.statistics.paired import Pairs, decide, holm, judge_family, judge_pairs, overall_recovery

AT_95 = Levels.at(0.95)


def binary(both: int, lost: int, gained: int, neither: int, per_image: int = 1) -> Pairs:
    """Right/wrong items; with several to an image, neighbours in the order kept, lost, gained, neither share it."""
    original = [1.0] * (both + lost) + [0.0] * (gained + neither)
    artifact = [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * neither
    clusters = [str(number // per_image) for number in range(len(original))]
    return Pairs.of(original, artifact, clusters)


def judged(pairs: Pairs, limit: float, levels: Levels = AT_95) -> Recovery:
    recovery = judge_pairs(pairs, limit, levels)
    assert recovery is not None
    return recovery


def test_right_or_wrong_items_of_images_of_their_own_are_judged_by_the_score_test() -> None:
    recovery = judged(binary(385, 6, 2, 7), 0.97)
    finding = judge_counts(PairedCounts(385, 6, 2, 7), 0.97, Levels.at(0.95))
    assert recovery.method == "score test"
    assert (recovery.value, recovery.interval, recovery.outcome, recovery.items_needed) == (
        finding.value,
        finding.interval,
        finding.outcome,
        finding.items_needed,
    )


def test_other_scores_and_shared_images_are_judged_by_the_bootstrap() -> None:
    assert judged(binary(380, 8, 4, 8, per_image=2), 0.97).method == "bootstrap by clusters"
    assert judged(Pairs.of([0.9, 1, 0.3] * 50, [0.9, 1, 0.6] * 50), 0.97).method == "bootstrap by clusters"


def test_flips_that_share_images_prove_less() -> None:
    alone, shared = judged(binary(360, 12, 12, 16, 1), 0.97), judged(binary(360, 12, 12, 16, 4), 0.97)
    assert shared.value == alone.value == 1
    assert alone.outcome == "pass"
    assert shared.outcome == "inconclusive"
    assert shared.items_needed is not None
    assert shared.items_needed > 400
    assert alone.interval is not None
    assert shared.interval is not None
    assert shared.interval[0] < alone.interval[0] < 1 < alone.interval[1] < shared.interval[1]


@pytest.mark.parametrize("limit", [0.9, 0.96, 0.99])
def test_bounds_agree_with_the_verdict(limit: float) -> None:
    generator = np.random.default_rng(4)
    original = generator.choice([0.0, 0.3, 0.6, 0.9, 1.0], 300, p=[0.15, 0.05, 0.1, 0.1, 0.6])
    artifact = np.where(generator.random(300) < 0.08, generator.choice([0.0, 0.6, 1.0], 300), original)
    pairs = Pairs(original, artifact, np.arange(300) // 2)
    recovery = judged(pairs, limit)
    assert recovery.outcome == decide(pairs, limit, AT_95)
    assert recovery.interval is not None
    low, high = recovery.interval
    assert low < recovery.value < high
    assert (low >= limit) == (recovery.outcome == "pass")
    assert (high <= limit) == (recovery.outcome == "fail")
    assert judged(pairs, low - 0.002).outcome == "pass"
    assert judged(pairs, low + 0.002).outcome == "inconclusive"
    assert judged(pairs, high + 0.002).outcome == "fail"


def test_each_bound_has_its_own_level() -> None:
    pairs = binary(300, 20, 10, 30, 3)
    strict, usual = judged(pairs, 0.95, Levels(0.05, 0.005)).interval, judged(pairs, 0.95).interval
    assert strict is not None
    assert usual is not None
    assert strict[0] == pytest.approx(usual[0], abs=1e-5)
    assert strict[1] > usual[1] + 0.01


def test_nothing_changed_leaves_a_bound_that_fits_the_number_of_images() -> None:
    several, single = judged(binary(300, 0, 0, 0, 3), 0.9), judged(Pairs.of([0.9] * 300, [0.9] * 300), 0.9)
    assert several.interval is not None
    assert single.interval is not None
    assert several.value == single.value == 1
    assert several.interval[0] == pytest.approx(0.05 ** (1 / 100), abs=0.002)  # 100 images, none lost
    assert single.interval[0] == pytest.approx(0.05 ** (1 / 300), abs=0.002)
    assert several.interval[1] > single.interval[1] > 1.005
    same = judged(Pairs.of([0.9] * 300, [0.9] * 300), 1.0)
    assert (same.outcome, same.items_needed) == ("inconclusive", None)


def test_one_image_proves_nothing() -> None:
    recovery = judged(Pairs.of([1.0] * 50, [1.0] * 25 + [0.0] * 25, ["only"] * 50), 0.99)
    assert (recovery.value, recovery.interval, recovery.outcome, recovery.items_needed) == (0.5, None, "inconclusive", None)


def test_an_original_that_scores_nothing_leaves_nothing_to_keep() -> None:
    pairs = Pairs.of([0.0] * 5, [0.0, 1.0, 0.0, 0.5, 0.0])
    assert judge_pairs(pairs, 0.9, AT_95) is None
    assert decide(pairs, 0.9, AT_95) == "inconclusive"


def test_an_artifact_that_scores_nothing_fails() -> None:
    recovery = judged(Pairs.of([0.9, 1.0] * 30, [0.0] * 60, [str(number // 2) for number in range(60)]), 0.9)
    assert (recovery.value, recovery.outcome) == (0, "fail")
    assert recovery.interval is not None
    assert recovery.interval[0] == 0
    assert recovery.interval[1] < 0.3


@pytest.mark.parametrize(
    ("original", "artifact", "clusters", "message"),
    [
        ([1.0], [1.0, 0.0], None, "1 and 2 scores of 1 items cannot be paired"),
        ([1.0], [1.0], ["a", "b"], "1 and 1 scores of 2 items cannot be paired"),
        ([], [], None, "there is no item to compare"),
        ([1.0], [-0.5], None, "a score is negative or not finite"),
        ([math.nan], [1.0], None, "a score is negative or not finite"),
    ],
)
def test_scores_that_cannot_be_paired_are_refused(
    original: list[float], artifact: list[float], clusters: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Pairs.of(original, artifact, clusters)


def test_items_needed_settle_it() -> None:
    pairs = binary(360, 14, 8, 18, 2)
    recovery = judged(pairs, 0.97)
    assert (recovery.outcome, recovery.items_needed is None) == ("inconclusive", False)
    assert recovery.items_needed is not None
    for factor, outcome in ((1.25, "pass"), (0.75, "inconclusive")):
        times = recovery.items_needed / pairs.items * factor
        more = [round(cell * times) for cell in (360, 14, 8, 18)]
        assert judged(binary(more[0], more[1], more[2], more[3], 2), 0.97).outcome == outcome


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.sampled_from([1, 3]))
def test_a_lower_limit_is_easier(lost: int, gained: int, neither: int, per_image: int) -> None:
    pairs = binary(150, lost, gained, neither, per_image)
    tails = [judged(pairs, limit) for limit in (0.9, 0.95, 0.99)]
    for easier, harder in itertools.pairwise(tails):
        assert easier.p_pass <= harder.p_pass + 1e-3
        assert easier.p_fail >= harder.p_fail - 1e-3


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 60), st.sampled_from([1, 3]))
def test_more_unchanged_right_items_speak_for_the_artifact(lost: int, gained: int, more: int, per_image: int) -> None:
    few, many = binary(120, lost, gained, 9, per_image), binary(120 + 3 * more, lost, gained, 9, per_image)
    assert judged(many, 0.95).p_pass <= judged(few, 0.95).p_pass + 1e-3


def test_a_true_loss_at_the_limit_rarely_passes_where_images_share_their_fate() -> None:
    generator = np.random.default_rng(6)
    verdicts: list[str] = []
    for _ in range(400):
        original = (generator.random(120) < 0.9).astype(np.float64)
        lost = generator.random(120) < 0.04  # the three questions about an image fall together
        pairs = Pairs(np.repeat(original, 3), np.repeat(original * ~lost, 3), np.repeat(np.arange(120), 3))
        verdicts.append(decide(pairs, 0.96, AT_95))
    error = 3 * math.sqrt(0.05 * 0.95 / 400)
    assert verdicts.count("pass") / 400 <= 0.05 + error
    assert verdicts.count("fail") / 400 <= 0.05 + error


def test_holm_adjusts_as_published() -> None:
    # as R's p.adjust(c(.01, .04, .03, .005), "holm") gives them
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"only": 0.04}) == {"only": 0.04}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_failure_stands_only_where_it_holds_for_all_tasks_together() -> None:
    slight, clear, kept = (
        judged(binary(354, 27, 8, 11), 0.98),
        judged(binary(300, 80, 4, 16), 0.98),
        judged(binary(392, 0, 0, 8), 0.98),
    )
    assert (slight.outcome, clear.outcome, kept.outcome) == ("fail", "fail", "pass")
    assert 0.05 / 3 < slight.p_fail <= 0.05
    family = judge_family({"slight": slight, "clear": clear, "kept": kept}, 0.05)
    assert {name: recovery.outcome for name, recovery in family.items()} == {
        "slight": "inconclusive",
        "clear": "fail",
        "kept": "pass",
    }
    assert family["slight"].p_fail == pytest.approx(2 * slight.p_fail)
    assert family["slight"].items_needed is not None
    assert family["slight"].items_needed > slight.items
    assert judge_family({"slight": slight}, 0.05)["slight"].outcome == "fail"


def test_overall_recovery_is_the_mean_of_the_tasks_with_bounds_from_theirs() -> None:
    one, other = judged(binary(380, 4, 4, 12), 0.9), judged(binary(180, 10, 6, 4, 2), 0.9)
    overall = overall_recovery([one, other], 0.95)
    assert overall is not None
    assert overall.value == pytest.approx((one.value + other.value) / 2)
    assert overall.interval is not None
    assert one.interval is not None
    assert other.interval is not None
    below = math.hypot(one.value - one.interval[0], other.value - other.interval[0]) / 2
    assert overall.interval[0] == pytest.approx(overall.value - below)
    assert overall.outcome == "pass"
    open_one = overall_recovery([one, other], overall.interval[0] + 0.001)
    assert open_one is not None
    assert open_one.outcome == "inconclusive"
    assert open_one.items_needed is not None
    failed = overall_recovery([one, other], overall.interval[1] + 0.001)
    assert failed is not None
    assert failed.outcome == "fail"
    assert overall_recovery([], 0.9) is None


def test_overall_recovery_needs_bounds_of_every_task() -> None:
    single = judged(Pairs.of([1.0, 1.0], [1.0, 1.0], ["a", "a"]), 0.9)
    overall = overall_recovery([single, judged(binary(380, 4, 4, 12), 0.9)], 0.5)
    assert overall is not None
    assert (overall.interval, overall.outcome) == (None, "inconclusive")


def test_overall_bounds_hold_with_their_confidence() -> None:
    generator = np.random.default_rng(8)
    shares = ((0.78, 0.04, 0.02, 0.16), (0.9, 0.03, 0.0, 0.07), (0.5, 0.05, 0.05, 0.4))
    truth = sum((both + gained) / (both + lost) for both, lost, gained, _ in shares) / 3
    above = below = 0
    for _ in range(300):
        draws = [generator.multinomial(250, share) for share in shares]
        overall = overall_recovery([judged(binary(*(int(part) for part in draw)), 0.5) for draw in draws], 0.5)
        assert overall is not None
        assert overall.interval is not None
        above += overall.interval[0] > truth
        below += overall.interval[1] < truth
    error = 3 * math.sqrt(0.05 * 0.95 / 300)
    assert above / 300 <= 0.05 + error
    assert below / 300 <= 0.05 + error
