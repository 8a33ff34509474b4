"""Comparison of two models' predictions from the likeliest tokens of each, where a runtime does not give the whole vocabulary."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import read_json_object
from compress.errors import ServerError, StoreError, UsageError
from compress.runtimes.runtime import UNSCORED, Passage, Score, passages_digest, unscored

_SCHEMA = "top-tokens-1"
_TOKENS = 1 << 31
_LARGEST = 1e-3
"""What rounding may put a log-probability above 0."""
_FLOOR = 1e-6
"""What float32 log-probabilities leave uncertain of a probability that remains."""


@dataclass(frozen=True)
class Position:
    """How one token was predicted: its log-probability, and the likeliest tokens, best first, with theirs, all in nats."""

    token: int
    log_probability: float
    top: tuple[tuple[int, float], ...]


def position_of(name: str, token: int, row: Mapping[str, Mapping[str, Any]] | None, top: int) -> Position:
    """Read one position's answer: the `top` likeliest tokens by id and, where it is none of them, the token that stands there.

    Raises:
        ServerError: the position holds another token than the one that was asked for; `name` says in which item.
        ValueError: it holds more tokens than asked for, or what is no log-probability.
    """
    if row is None or str(token) not in row:
        raise ServerError(
            f"{name}: vLLM scored other tokens than the {token} it was given; this version cannot be used for scoring"
        )
    if len(row) > top + 1:
        raise ValueError(f"{len(row):,} tokens at a position where {top} were asked for")
    found = {int(key): float(value["logprob"]) for key, value in row.items()}
    if not all(0 <= number < _TOKENS and -math.inf < value <= _LARGEST for number, value in found.items()):
        raise ValueError("a position holds what is no token, or no log-probability")
    likeliest = dict(found)
    if len(likeliest) > top:
        del likeliest[token]
    ordered = sorted(likeliest.items(), key=lambda pair: (-pair[1], pair[0]))
    return Position(token=token, log_probability=found[token], top=tuple(ordered))


def score_of(name: str, positions: Sequence[Position] | str, original: Sequence[Position] | None) -> Score:
    """Return a passage's score, compared with the original's predictions at the same positions where they are given.

    In the place of its positions stands why there are none where it could not be scored.
    """
    fault = positions if isinstance(positions, str) else None
    if fault is None and original is not None and len(original) != len(positions):
        fault = UNSCORED
    if fault is not None or isinstance(positions, str):
        return unscored(name, fault, compared=original is not None)
    likelihood = np.array([-position.log_probability for position in positions], dtype=np.float64)
    if original is None:
        return Score(id=name, negative_log_likelihood=likelihood)
    pairs = list(zip(original, positions, strict=True))
    kl = np.array([divergence(before, after) for before, after in pairs], dtype=np.float64)
    same_top = np.array([before.top[0][0] == after.top[0][0] for before, after in pairs], dtype=np.bool_)
    return Score(id=name, negative_log_likelihood=likelihood, kl=kl, same_top=same_top, at_least=True)


def divergence(original: Position, other: Position) -> float:
    """Return KL(original ‖ other) in nats over the tokens that are known of both, and one bucket for all others.

    Known are the likeliest tokens of each and the one that stands there. Merging the others only lowers KL.
    """
    before = dict(original.top) | {original.token: original.log_probability}
    after = dict(other.top) | {other.token: other.log_probability}
    both = sorted(before.keys() & after.keys())
    total = sum(math.exp(before[token]) * (before[token] - after[token]) for token in both)
    rest_before = max(1.0 - math.fsum(math.exp(before[token]) for token in both), _FLOOR)
    rest_after = max(1.0 - math.fsum(math.exp(after[token]) for token in both), _FLOOR)
    return max(total + rest_before * math.log(rest_before / rest_after), 0.0)


def write_record(folder: Path, passages: Sequence[Passage], positions: Sequence[Sequence[Position]], top: int) -> None:
    """Write a new folder with what a later comparison needs; it appears under its name when it is complete.

    Raises:
        StoreError: the disk is full, the folder cannot be written, or is there already.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    flat = [position for row in positions for position in row]
    width = max((len(position.top) for position in flat), default=0)
    ids = np.full((len(flat), width), -1, dtype=np.int32)
    logs = np.full((len(flat), width), -np.inf, dtype=np.float32)
    for place, position in enumerate(flat):
        ids[place, : len(position.top)] = [token for token, _ in position.top]
        logs[place, : len(position.top)] = [value for _, value in position.top]
    content = {"schema": _SCHEMA, "passages": passages_digest(passages), "top": top}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        np.savez(
            aside / "positions.npz",
            counts=np.array([len(row) for row in positions], dtype=np.int64),
            tokens=np.array([position.token for position in flat], dtype=np.int32),
            log_probabilities=np.array([position.log_probability for position in flat], dtype=np.float32),
            top_ids=ids,
            top_log_probabilities=logs,
        )
        (aside / "record.json").write_text(json.dumps(content), encoding="utf-8")
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StoreError(f"{folder}: cannot be written ({error}); free space or remove the old record") from error


class TopRecord:
    """A record of the original's predictions, read back."""

    def __init__(self, folder: Path, passages: Sequence[Passage], top: int) -> None:
        content = read_json_object(folder / "record.json")
        if content.get("schema") != _SCHEMA:
            raise UsageError(f"{folder}: was recorded by another runtime; record the original again with this one")
        if content.get("passages") != passages_digest(passages):
            raise UsageError(f"{folder}: was recorded on other passages than these; record the original again on the same ones")
        if content.get("top") != top:
            raise UsageError(f"{folder}: was recorded with top_logprobs {content.get('top')}, not {top}; use the same for both")
        with np.load(folder / "positions.npz") as arrays:
            self._tokens: NDArray[np.int32] = arrays["tokens"]
            self._logs: NDArray[np.float32] = arrays["log_probabilities"]
            self._top_ids: NDArray[np.int32] = arrays["top_ids"]
            self._top_logs: NDArray[np.float32] = arrays["top_log_probabilities"]
            self._ends: NDArray[np.int64] = np.cumsum(arrays["counts"])

    def of(self, place: int) -> list[Position]:
        """Return the positions of the passage at this place."""
        first = int(self._ends[place - 1]) if place else 0
        return [self._position(row) for row in range(first, int(self._ends[place]))]

    def _position(self, row: int) -> Position:
        pairs = zip(self._top_ids[row].tolist(), self._top_logs[row].tolist(), strict=True)
        top = tuple((token, value) for token, value in pairs if token >= 0)
        return Position(token=int(self._tokens[row]), log_probability=float(self._logs[row]), top=top)


def scores_of(passages: Sequence[Passage], found: Sequence[Sequence[Position] | str], original: TopRecord | None) -> list[Score]:
    """Return the scores of all passages, in their order, compared with the original's record where there is one."""
    return [
        score_of(passage.id, row, None if original is None else original.of(place))
        for place, (passage, row) in enumerate(zip(passages, found, strict=True))
    ]
