"""KL over the whole vocabulary from a sample of tokens: estimate, bounds, and what becomes of a measurement."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.eval.full_vocabulary import attach_full_kl, estimate_full_kl, kl_divergence, sample_positions
from compress.eval.tasks.task import fidelity_of
from compress.runtimes.runtime import Score

TOKENS = 4000
DRAWN = 320
Floats = NDArray[np.float64]


def population(seed: int) -> tuple[Floats, Floats]:
    """Lower bounds and KL of all tokens: what the whole adds is skewed, as it is where the likeliest tokens leave much."""
    generator = np.random.default_rng(seed)
    lower = generator.exponential(0.0006, TOKENS)
    return lower, lower + generator.lognormal(-9, 1.2, TOKENS)


def scores_of(lower: Floats, *, at_least: bool = True) -> list[Score]:
    return [
        Score(f"q{number}", chunk, kl=chunk, same_top=np.ones(len(chunk), dtype=np.bool_), at_least=at_least)
        for number, chunk in enumerate(np.split(lower, len(lower) // 8))
    ]


def sampled(lower: Floats, full: Floats, count: int, digest: str = "5eed" * 16) -> list[Score]:
    scores = scores_of(lower)
    positions = sample_positions(scores, count, digest)
    return attach_full_kl(scores, positions, np.array([full[8 * passage + token] for passage, token in positions]))


def test_divergence_is_that_of_probabilities_however_they_are_scaled() -> None:
    before, after = np.log([0.5, 0.3, 0.2]), np.log([0.4, 0.4, 0.2])
    expected = 0.5 * np.log(0.5 / 0.4) + 0.3 * np.log(0.3 / 0.4)
    kl = kl_divergence((before + 1e-4).astype(np.float32), (after - 1e-4).astype(np.float32))
    assert kl == pytest.approx(expected, abs=1e-6)


def test_tokens_are_drawn_by_lot_and_alike_for_the_same_passages() -> None:
    scores = scores_of(population(0)[0])
    first = sample_positions(scores, DRAWN, "5eed" * 16)
    assert first == sample_positions(scores, DRAWN, "5eed" * 16) != sample_positions(scores, DRAWN, "beef" * 16)
    assert len(set(first)) == DRAWN and first == sorted(first)
    assert len(sample_positions(scores[:2], DRAWN, "5eed" * 16)) == 16


def test_a_sample_says_what_the_whole_vocabulary_adds() -> None:
    lower, full = population(0)
    fidelity = fidelity_of(sampled(lower, full, DRAWN))
    assert fidelity is not None and fidelity.whole is not None and fidelity.whole.kl_interval is not None
    assert fidelity.at_least
    assert fidelity.kl_mean == pytest.approx(lower.mean())
    assert fidelity.kl_mean < fidelity.whole.kl_interval[0] < full.mean() < fidelity.whole.kl_interval[1] < 1.5 * full.mean()
    assert fidelity.whole.tokens == DRAWN
    assert fidelity.whole.kl_p99_at_most is not None and fidelity.whole.kl_p99_at_most >= np.quantile(full, 0.99)


def test_the_bounds_hold_as_often_as_they_say() -> None:
    """Each in about 95 of 100, also of what is as skewed as this: of an interval of both that is 90."""
    below = above = percentile = 0
    for seed in range(300):
        lower, full = population(seed)
        fidelity = fidelity_of(sampled(lower, full, DRAWN, f"{seed:04x}" * 16))
        assert fidelity is not None and fidelity.whole is not None and fidelity.whole.kl_interval is not None
        below += fidelity.whole.kl_interval[0] <= full.mean()
        above += full.mean() <= fidelity.whole.kl_interval[1]
        percentile += np.quantile(full, 0.99) <= (fidelity.whole.kl_p99_at_most or 0)
    assert below / 300 > 0.93
    assert above / 300 > 0.93
    assert percentile / 300 > 0.93


def test_where_every_token_was_drawn_nothing_is_left_to_be_bounded() -> None:
    lower, full = population(0)
    fidelity = fidelity_of(sampled(lower[:160], full[:160], DRAWN))
    assert fidelity is not None
    assert (fidelity.at_least, fidelity.whole) == (False, None)
    assert fidelity.kl_mean == pytest.approx(full[:160].mean())
    assert fidelity.kl_p99 == pytest.approx(np.quantile(full[:160], 0.99))


def test_few_tokens_give_no_bounds_and_none_leave_the_scores_as_they_are() -> None:
    lower, full = population(0)
    few = estimate_full_kl(lower, np.where(np.arange(TOKENS) < 20, full, np.nan), np.full(TOKENS, TOKENS / 20))
    assert (few.kl_interval, few.kl_p99_at_most) == (None, None)
    scores = scores_of(lower)
    positions = sample_positions(scores, 5, "5eed" * 16)
    assert attach_full_kl(scores, positions, np.full(5, np.nan)) == scores


def test_exact_figures_stay_exact() -> None:
    fidelity = fidelity_of(scores_of(population(0)[0], at_least=False))
    assert fidelity is not None
    assert (fidelity.at_least, fidelity.whole, fidelity.interval_level) == (False, None, 0.9)
