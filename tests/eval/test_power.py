import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.eval.statistics.estimates import Levels
from compress.eval.statistics.paired import Pairs, decide
from compress.eval.statistics.power import (
    POWER,
    Assumed,
    AssumedChanges,
    items_for,
    items_for_mean_loss,
    mean_passing_chance,
    passing_chance,
    resolved_loss,
    resolved_mean_loss,
)

ERROR = 3 * math.sqrt(0.8 * 0.2 / 1000)


def test_the_plans_figure() -> None:
    assert resolved_loss(400, 0.05, Assumed(flips=0.02)) == pytest.approx(0.0221, abs=5e-4)
    assert resolved_loss(400, 0.05, Assumed()) == pytest.approx(0.0310, abs=5e-4)
    assert resolved_loss(20, 0.05, Assumed(flips=0.5, accuracy=0.5)) is None


@pytest.mark.parametrize(
    ("flips", "accuracy", "limit"), [(0.05, 0.75, 0.97), (0.02, 0.9, 0.98), (0.1, 0.6, 0.96), (0.03, 0.97, 0.98)]
)
def test_the_planned_number_passes_a_sound_artifact_as_often_as_planned(flips: float, accuracy: float, limit: float) -> None:
    items = items_for(limit, 0.05, Assumed(flips, accuracy))
    assert items is not None
    shares = (accuracy - flips / 2, flips / 2, flips / 2, 1 - accuracy - flips / 2)
    draws = np.random.default_rng(3).multinomial(items, shares, size=1000)
    passed = 0
    for draw in draws:
        original, artifact = np.repeat([1.0, 1.0, 0.0, 0.0], draw), np.repeat([1.0, 0.0, 1.0, 0.0], draw)
        passed += decide(Pairs(original, artifact, np.arange(items)), limit, Levels.at(0.95)) == "pass"
    assert POWER - ERROR <= passed / 1000 <= POWER + 0.07


def test_the_planned_number_holds_for_mean_scores() -> None:
    generator = np.random.default_rng(5)
    assumed = AssumedChanges(deviation=math.sqrt(0.06 * 0.4**2), step=0.4)
    items = items_for_mean_loss(0.02, 0.05, assumed)
    assert items is not None
    passed = 0
    for _ in range(300):
        original = generator.choice([0.4, 0.6, 1.0], items, p=[0.1, 0.2, 0.7])
        change = np.where(generator.random(items) < 0.06, generator.choice([-0.4, 0.4], items), 0.0)
        mean = float(original.mean())
        passed += decide(Pairs(original, original + change, np.arange(items)), 1 - 0.02 / mean, Levels.at(0.95)) == "pass"
    assert POWER - 3 * math.sqrt(0.8 * 0.2 / 300) <= passed / 300 <= POWER + 0.15


@settings(deadline=None, max_examples=40)
@given(st.integers(100, 20_000), st.floats(0.01, 0.1), st.floats(0.4, 0.95))
def test_items_and_loss_are_inverse(items: int, flips: float, accuracy: float) -> None:
    assumed = Assumed(flips, accuracy)
    loss = resolved_loss(items, 0.05, assumed)
    assert loss is not None
    assert items_for(1 - loss / accuracy, 0.05, assumed) == pytest.approx(items, abs=1 + 1e-4 * items)
    changes = AssumedChanges(math.sqrt(flips), cluster_items=3.0)
    mean_loss = resolved_mean_loss(items, 0.05, changes)
    assert items_for_mean_loss(mean_loss, 0.05, changes) == pytest.approx(items, abs=1 + 1e-4 * items)


def test_more_flips_stricter_levels_and_shared_images_need_more_items() -> None:
    usual = items_for(0.97, 0.05, Assumed())
    assert usual is not None
    for harder in (
        items_for(0.97, 0.05, Assumed(flips=0.08)),
        items_for(0.97, 0.04, Assumed()),
        items_for(0.98, 0.05, Assumed()),
        items_for(0.97, 0.05, Assumed(design=2.0)),
        items_for(0.97, 0.05, Assumed(), power=0.9),
    ):
        assert harder is not None
        assert harder > usual
    assert items_for(1.0, 0.05, Assumed()) is None
    assert passing_chance(1000, 0.97, 0.05, Assumed()) > passing_chance(500, 0.97, 0.05, Assumed())


def test_mean_scores_follow_the_textbook_where_changes_are_many_and_rule_of_three_where_none_are() -> None:
    z = NormalDist().inv_cdf(0.95) + NormalDist().inv_cdf(0.8)
    many = AssumedChanges(deviation=0.5, step=0.01)
    assert items_for_mean_loss(0.01, 0.05, many) == pytest.approx((z * 0.5 / 0.01) ** 2, rel=0.01)
    none = items_for_mean_loss(0.01, 0.05, AssumedChanges(deviation=1e-6))
    assert none == pytest.approx(NormalDist().inv_cdf(0.95) ** 2 / 0.01, rel=0.01)
    wide = items_for_mean_loss(0.01, 0.05, AssumedChanges(deviation=1e-6, cluster_items=4.0))
    assert wide == pytest.approx(4 * NormalDist().inv_cdf(0.95) ** 2 / 0.01, rel=0.01)
    assert items_for_mean_loss(0.0, 0.05, many) is None
    assert mean_passing_chance(400, 0.02, 0.05, AssumedChanges(0.2)) < mean_passing_chance(800, 0.02, 0.05, AssumedChanges(0.2))
