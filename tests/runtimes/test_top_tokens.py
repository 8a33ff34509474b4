"""Comparison over the likeliest tokens and one bucket for the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.data.prompts import Prompt
from compress.errors import ServerError, StoreError, UsageError
from compress.runtimes.runtime import Passage
from compress.runtimes.top_tokens import Position, TopRecord, divergence, position_of, score_of, write_record

VOCABULARY = 50
PASSAGES = (Passage("text", (3, 4, 5)), Passage("asked", (7,), Prompt("asked", "What?", (b"image",))), Passage("empty", (1,)))


def logs_of(seed: int, spread: float = 2.0) -> NDArray[np.float64]:
    scores = np.random.default_rng(seed).normal(0, spread, VOCABULARY)
    return scores - np.log(np.exp(scores).sum())


def position(logs: NDArray[np.float64], token: int, top: int) -> Position:
    order = np.argsort(-logs)[:top].tolist()
    row = {str(token_id): {"logprob": float(logs[token_id])} for token_id in [token, *order]}
    return position_of("item", token, row, top)


def exact(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    return float((np.exp(before) * (before - after)).sum())


def test_divergence_over_the_whole_vocabulary_is_exact() -> None:
    before, after = logs_of(0), logs_of(1)
    kl = divergence(position(before, 3, VOCABULARY), position(after, 3, VOCABULARY))
    assert kl == pytest.approx(exact(before, after), abs=2e-5)


@pytest.mark.parametrize("top", [1, 3, 10, 30])
def test_divergence_over_few_tokens_is_a_lower_bound_that_is_not_nothing(top: int) -> None:
    for seed in range(20):
        before, after = logs_of(seed), logs_of(seed + 100)
        kl = divergence(position(before, seed, top), position(after, seed, top))
        assert 0 < kl <= exact(before, after)


def test_divergence_of_small_changes_is_nearly_the_whole() -> None:
    before = logs_of(5, spread=4)
    after = before + np.random.default_rng(6).normal(0, 0.05, VOCABULARY)
    after -= np.log(np.exp(after).sum())
    kl = divergence(position(before, 3, 20), position(after, 3, 20))
    assert 0.8 * exact(before, after) < kl <= exact(before, after)


def test_divergence_from_itself_is_zero() -> None:
    one = position(logs_of(0), 3, 10)
    assert divergence(one, one) == 0


def test_certain_predictions_stay_finite() -> None:
    sure = Position(token=1, log_probability=0.0, top=((1, 0.0), (2, -40.0)))
    other = Position(token=1, log_probability=-60.0, top=((2, 0.0), (3, -50.0)))
    assert 0 < divergence(sure, other) < 100


def test_token_outside_the_top_keeps_its_own_probability_only() -> None:
    logs = logs_of(0)
    last = int(logs.argmin())
    prediction = position(logs, last, 5)
    assert prediction.log_probability == pytest.approx(logs[last])
    assert [token for token, _ in prediction.top] == np.argsort(-logs)[:5].tolist()


def test_ties_are_put_in_the_order_of_the_tokens() -> None:
    row = {str(token): {"logprob": -1.0, "rank": 1} for token in (9, 4, 7)}
    assert [token for token, _ in position_of("item", 9, row, 3).top] == [4, 7, 9]


@pytest.mark.parametrize("row", [None, {"8": {"logprob": -1.0}}])
def test_position_of_another_token_is_refused(row: dict[str, dict[str, float]] | None) -> None:
    with pytest.raises(ServerError, match="item: vLLM scored other tokens than the 7"):
        position_of("item", 7, row, 1)


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan"), 0.5])
def test_what_is_no_log_probability_is_no_position(value: float) -> None:
    with pytest.raises(ValueError, match="what is no token, or no log-probability"):
        position_of("item", 7, {"7": {"logprob": value}}, 1)


def test_score_says_where_both_put_the_same_token_first() -> None:
    before = [position(logs_of(seed), 0, 5) for seed in (0, 1)]
    after = [before[0], position(-logs_of(1) - np.log(np.exp(-logs_of(1)).sum()), 0, 5)]
    score = score_of("item", after, before)
    assert score.same_top is not None
    assert score.same_top.tolist() == [True, False]
    assert score.kl is not None
    assert score.kl[0] == 0 < score.kl[1]
    assert score.negative_log_likelihood.tolist() == [-position.log_probability for position in after]


def rows() -> list[list[Position]]:
    return [[position(logs_of(0), 4, 5), position(logs_of(1), 5, 5)], [position(logs_of(2), 7, 5)], []]


def test_record_comes_back(tmp_path: Path) -> None:
    write_record(tmp_path / "record", PASSAGES, rows(), 5)
    record = TopRecord(tmp_path / "record", PASSAGES, 5)
    for index, expected in enumerate(rows()):
        positions = record.of(index)
        assert [row.token for row in positions] == [row.token for row in expected]
        for one, other in zip(positions, expected, strict=True):
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record"]


def test_record_of_other_passages_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path / "record", PASSAGES, rows(), 5)
    with pytest.raises(UsageError, match="recorded on other passages"):
        TopRecord(tmp_path / "record", PASSAGES[::-1], 5)
    with pytest.raises(UsageError, match="recorded with top_logprobs 5, not 6"):
        TopRecord(tmp_path / "record", PASSAGES, 6)


def test_record_of_another_runtime_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"schema": 1}', encoding="utf-8")
    with pytest.raises(UsageError, match="recorded by another runtime"):
        TopRecord(tmp_path, PASSAGES, 5)


def test_record_that_is_there_already_is_kept(tmp_path: Path) -> None:
    write_record(tmp_path / "record", PASSAGES, rows(), 5)
    with pytest.raises(StoreError, match="free space or remove the old record"):
        write_record(tmp_path / "record", PASSAGES, rows(), 5)
    TopRecord(tmp_path / "record", PASSAGES, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record"]
