import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.eval.metrics import load_metric
from compress.eval.statistics.estimates import Levels
from compress.eval.statistics.paired import Pairs, decide
from compress.eval.statistics.power import (
    POWER,
    AssumedChanges,
    AssumedFlips,
    items_for,
    resolved_loss,
)

ERROR = 3 * math.sqrt(0.8 * 0.2 / 1000)


def test_the_plans_figure() -> None:
    assert resolved_loss(400, 0.05, AssumedFlips(changed=0.02)) == pytest.approx(0.0221, abs=5e-4)
    assert resolved_loss(400, 0.05, AssumedFlips()) == pytest.approx(0.0310, abs=5e-4)
    assert resolved_loss(20, 0.05, AssumedFlips(changed=0.5, score=0.5)) is None


@pytest.mark.parametrize(
    ("flips", "accuracy", "limit"), [(0.05, 0.75, 0.97), (0.02, 0.9, 0.98), (0.1, 0.6, 0.96), (0.03, 0.97, 0.98)]
)
def test_the_planned_number_passes_a_sound_artifact_as_often_as_planned(flips: float, accuracy: float, limit: float) -> None:
    items = items_for(limit, 0.05, AssumedFlips(flips, accuracy))
    assert items is not None
    shares = (accuracy - flips / 2, flips / 2, flips / 2, 1 - accuracy - flips / 2)
    draws = np.random.default_rng(3).multinomial(items, shares, size=1000)
    passed = 0
    for draw in draws:
        original, artifact = np.repeat([1.0, 1.0, 0.0, 0.0], draw), np.repeat([1.0, 0.0, 1.0, 0.0], draw)
        passed += decide(Pairs(original, artifact, np.arange(items)), limit, Levels.at(0.95)) == "pass"
    assert POWER - ERROR <= passed / 1000 <= POWER + 0.07


@pytest.mark.parametrize(
    ("assumed", "scores", "shares"),
    [
        (AssumedChanges(score=0.86, changed=0.06, step=0.4), [0.4, 0.6, 1.0], [0.1, 0.2, 0.7]),
        (AssumedChanges(score=1.0, changed=0.5, step=0.4), [0.5, 1.0, 1.5], [0.25, 0.5, 0.25]),  # as CIDEr's
    ],
)
def test_the_planned_number_holds_for_mean_scores(assumed: AssumedChanges, scores: list[float], shares: list[float]) -> None:
    generator = np.random.default_rng(5)
    limit = 0.977
    items = items_for(limit, 0.05, assumed)
    assert items is not None
    passed = 0
    for _ in range(300):
        original = generator.choice(scores, items, p=shares)
        changed = generator.random(items) < assumed.changed
        change = np.where(changed, generator.choice([-assumed.step, assumed.step], items), 0.0)
        passed += decide(Pairs(original, original + change, np.arange(items)), limit, Levels.at(0.95)) == "pass"
    assert POWER - 3 * math.sqrt(0.8 * 0.2 / 300) <= passed / 300 <= POWER + 0.15


@settings(deadline=None, max_examples=40)
@given(st.integers(100, 20_000), st.floats(0.01, 0.1), st.floats(0.4, 0.95))
def test_items_and_loss_are_inverse(items: int, flips: float, accuracy: float) -> None:
    assumed = AssumedFlips(flips, accuracy)
    loss = resolved_loss(items, 0.05, assumed)
    assert loss is not None
    assert items_for(1 - loss / accuracy, 0.05, assumed) == pytest.approx(items, abs=1 + 1e-4 * items)
    changes = AssumedChanges(accuracy, flips, cluster_items=3.0)
    mean_loss = resolved_loss(items, 0.05, changes)
    assert mean_loss is not None
    assert items_for(1 - mean_loss / accuracy, 0.05, changes) == pytest.approx(items, abs=1 + 1e-4 * items)


def test_more_flips_stricter_levels_and_shared_images_need_more_items() -> None:
    usual = items_for(0.97, 0.05, AssumedFlips())
    assert usual is not None
    for harder in (
        items_for(0.97, 0.05, AssumedFlips(changed=0.08)),
        items_for(0.97, 0.04, AssumedFlips()),
        items_for(0.98, 0.05, AssumedFlips()),
        items_for(0.97, 0.05, AssumedFlips(design=2.0)),
        items_for(0.97, 0.05, AssumedFlips(), power=0.9),
    ):
        assert harder is not None
        assert harder > usual
    assert items_for(1.0, 0.05, AssumedFlips()) is None
    for assumed in (AssumedFlips(), AssumedChanges(step=0.5)):
        assert assumed.passing_chance(1000, 0.97, 0.05) > assumed.passing_chance(500, 0.97, 0.05)


def test_mean_scores_follow_the_textbook_where_changes_are_many_and_rule_of_three_where_none_are() -> None:
    z = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(0.8)
    many = AssumedChanges(score=1.0, changed=1.0, step=0.05)
    assert items_for(0.999, 0.05, many) == pytest.approx((z * 0.05 / 0.001) ** 2, rel=0.01)
    none = items_for(0.99, 0.05, AssumedChanges(score=1.0, changed=1e-12))
    assert none == pytest.approx(NormalDist().inv_cdf(0.95) ** 2 / 0.01, rel=0.01)
    wide = items_for(0.99, 0.05, AssumedChanges(score=1.0, changed=1e-12, cluster_items=4.0))
    assert wide == pytest.approx(4 * NormalDist().inv_cdf(0.95) ** 2 / 0.01, rel=0.01)
    assert items_for(1.0, 0.05, many) is None
    assert resolved_loss(2, 0.05, AssumedChanges(changed=0.5)) is None


@pytest.mark.parametrize(
    ("name", "loss", "needed"),
    [
        ("exact_match", 0.0310, 703),
        ("anls", 0.0243, 458),
        ("vqa_vote", 0.0184, 288),
        ("cider", 0.0355, 558),
        ("recall@1", 0.0207, 347),
    ],
)
def test_each_metric_is_planned_with_what_is_assumed_of_it(name: str, loss: float, needed: int) -> None:
    """Known values: 400 items, and the limit 0.97; at the second of them (z₀.₉₅ + z₀.₈)² · variance / loss², a little more for a
    variance that is larger at the limit."""
    assumed = load_metric(name).assumed
    assert assumed is not None
    assert resolved_loss(400, 0.05, assumed) == pytest.approx(loss, abs=5e-4)
    assert items_for(0.97, 0.05, assumed) == needed
    z = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(0.8)
    variance = assumed.changed * (assumed.step if isinstance(assumed, AssumedChanges) else 1.0) ** 2
    textbook = z**2 * variance / ((1 - 0.97) * assumed.score) ** 2
    assert textbook < needed < 1.35 * textbook


def test_what_is_not_judged_by_recovery_has_no_power() -> None:
    assert load_metric("perplexity").assumed is None
    assert load_metric("a harness's own").assumed == AssumedFlips()
