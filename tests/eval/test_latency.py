"""The recipe's `eval.latency`: what it takes, and the loads it makes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compress.eval.latency.settings import LatencyGoal, LatencySettings, LoadPoint


def _settings(**fields: object) -> LatencySettings:
    return LatencySettings.model_validate({"concurrency": [1, 4]} | fields)


def test_points_are_every_shape_at_every_concurrency() -> None:
    settings = _settings(images=[0, 2], resolution=[[64, 48], [128, 96]], prompt_tokens=[16, 32], output_tokens=8)
    shapes = {(point.images, point.width, point.height, point.prompt_tokens) for point in settings.points}
    assert len(settings.points) == 2 * len(settings.shapes)
    assert {shape for shape in shapes if shape[0]} == {(2, 64, 48, 16), (2, 64, 48, 32), (2, 128, 96, 16), (2, 128, 96, 32)}
    assert len({shape for shape in shapes if not shape[0]}) == 2, "a resolution of no image is no other load"
    assert {point.concurrency for point in settings.points} == {1, 4}


def test_single_values_stand_for_lists() -> None:
    settings = LatencySettings.model_validate({"concurrency": 2, "resolution": [320, 240], "images": 1, "prompt_tokens": 7})
    assert settings.points == (LoadPoint(concurrency=2, images=1, width=320, height=240, prompt_tokens=7, output_tokens=128),)
    assert settings.points[0].label == "2 at once, 1 × 320×240, 7 → 128 tokens"
    assert settings.points[0].shape.at(2) == settings.points[0]


def test_settings_survive_json() -> None:
    settings = _settings(resolution=[[64, 48], [128, 96]], goal={"ttft_ms": 200})
    assert LatencySettings.model_validate_json(settings.model_dump_json()) == settings


def test_found_concurrencies_have_no_points_and_enough_requests() -> None:
    settings = LatencySettings.model_validate({"concurrency": "auto", "requests": 16})
    assert settings.points == ()
    assert settings.requests_at(settings.shapes[0].at(2)) == 16
    assert settings.requests_at(settings.shapes[0].at(32)) == 128


def test_seeds_differ_by_part_and_point_but_not_by_model() -> None:
    settings = _settings()
    first, second = settings.points[:2]
    seeds = {settings.seed_of(point, part) for point in (first, second) for part in ("round 0", "round 1")}
    assert len(seeds) == 4
    assert settings.seed_of(first, "round 0") == _settings().seed_of(first, "round 0")
    assert settings.seed_of(first, "round 0") != _settings(seed=1).seed_of(first, "round 0")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"concurrency": [4, 4]}, "concurrency names the same value twice"),
        ({"output_tokens": [8, 8]}, "output_tokens names the same value twice"),
        ({"concurrency": [1, 100], "requests": 64}, "requests: 64 are too few to have 100 under way at once"),
        ({"concurrency": []}, "concurrency"),
        ({"concurrency": "best"}, "concurrency"),
        ({"rounds": 1}, "greater than or equal to 2"),
        ({"resolution": [64]}, "resolution"),
        ({"resolution": [[8, 8]]}, "greater than or equal to 16"),
        ({"goal": {}}, "sets no limit; write ttft_ms, tpot_ms, e2el_ms or several"),
        ({"goal": {"ttft_ms": 0}}, "greater than 0"),
        ({"confidence": 0.5}, "greater than 0.5"),
        ({"duration": 3}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _settings(**fields)


def test_goal_names_the_limits_that_are_set() -> None:
    assert LatencyGoal(ttft_ms=100, e2el_ms=900).limits == {"ttft": 100, "e2el": 900}
