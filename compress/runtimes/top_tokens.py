"""KL divergence from the top tokens of two models, for runtimes that do not return distributions over the full vocabulary."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoints.checkpoint import read_json_object
from compress.errors import ServerError, StoreError, UsageError
from compress.runtimes.runtime import UNSCORED, Passage, Score, passages_digest, unscored

# Not a number: records over the whole vocabulary have numbers, and the two must not be taken for each other.
_SCHEMA = "top-tokens-1"
TOKEN_LIMIT = 1 << 31
"""The bound on token ids: records store them as 32-bit integers."""

MAX_LOG_PROBABILITY = 1e-3
"""How far above 0 rounding may put a log-probability: float32 errs by far less, a server's nonsense by more."""

_MIN_REST = 1e-6
"""The floor of the probability of all other tokens: below it, 1 minus a sum of float32 probabilities is rounding error."""


@dataclass(frozen=True)
class Position:
    """The prediction at one position of a sequence."""

    token: int
    """The token that is there."""

    log_probability: float
    """Of that token, in nats."""

    top: tuple[tuple[int, float], ...]
    """The top tokens and their log-probabilities, best first."""


def position_of(name: str, token: int, row: Mapping[str, Mapping[str, Any]] | None, top: int) -> Position:
    """Parse one row of vLLM's `prompt_logprobs`: by id, the `top` tokens and, where it is none of them, the actual token.

    Raises:
        ServerError: the row lacks the actual token; `name` is the item's in the message.
        ValueError: it has more tokens than requested, or an invalid log-probability.
    """
    if row is None or str(token) not in row:
        raise ServerError(
            f"{name}: vLLM scored other tokens than the {token} it was given; this version cannot be used for scoring"
        )
    if len(row) > top + 1:
        raise ValueError(f"{len(row):,} tokens at a position where {top} were asked for")
    log_probabilities = {int(key): float(value["logprob"]) for key, value in row.items()}
    if not all(
        0 <= token_id < TOKEN_LIMIT and -math.inf < value <= MAX_LOG_PROBABILITY for token_id, value in log_probabilities.items()
    ):
        raise ValueError("a position holds what is no token, or no log-probability")
    # vLLM appends the actual token where it is none of the top ones: removed, so that every position lists as many tokens.
    top_tokens = dict(log_probabilities)
    if len(top_tokens) > top:
        del top_tokens[token]
    # By id among equals: the first is compared as the top token, and JSON objects have no order to rely on.
    ordered = sorted(top_tokens.items(), key=lambda pair: (-pair[1], pair[0]))
    return Position(token=token, log_probability=log_probabilities[token], top=tuple(ordered))


def score_of(name: str, positions: Sequence[Position] | str, original: Sequence[Position] | None) -> Score:
    """Return a passage's score, with KL where the original's predictions at the same positions are given.

    `positions` is the fault's text where the passage could not be scored.
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
    kl = np.array([divergence(p, q) for p, q in pairs], dtype=np.float64)
    same_top = np.array([p.top[0][0] == q.top[0][0] for p, q in pairs], dtype=np.bool_)
    return Score(id=name, negative_log_likelihood=likelihood, kl=kl, same_top=same_top, at_least=True)


def divergence(original: Position, other: Position) -> float:
    """Return KL(original ‖ other) in nats over the tokens that both positions list, and one bucket for all others.

    Each position lists its top tokens and the actual one. Merging the others only lowers KL: the result is a lower bound.
    """
    # The actual token is known for both models even where it is in neither's top.
    p = dict(original.top) | {original.token: original.log_probability}
    q = dict(other.top) | {other.token: other.log_probability}
    # Tokens that only one model lists go into the bucket of both: a partition must be the same on both sides for KL to be defined.
    shared = sorted(p.keys() & q.keys())
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    # `fsum`: 1 minus a sum near 1 loses every digit that the sum's rounding takes.
    p_rest = max(1.0 - math.fsum(math.exp(p[token]) for token in shared), _MIN_REST)
    q_rest = max(1.0 - math.fsum(math.exp(q[token]) for token in shared), _MIN_REST)
    return max(total + p_rest * math.log(p_rest / q_rest), 0.0)


def write_record(folder: Path, passages: Sequence[Passage], positions: Sequence[Sequence[Position]], top: int) -> None:
    """Write the predictions to a new folder for a later comparison; it appears under its name when it is complete.

    Raises:
        StoreError: the disk is full, the folder cannot be written, or is there already.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    flat = [position for passage_positions in positions for position in passage_positions]
    width = max((len(position.top) for position in flat), default=0)
    # -1 is no token: positions of fewer tokens are padded, and unpadded when they are read.
    ids = np.full((len(flat), width), -1, dtype=np.int32)
    logs = np.full((len(flat), width), -np.inf, dtype=np.float32)
    for row, position in enumerate(flat):
        ids[row, : len(position.top)] = [token for token, _ in position.top]
        logs[row, : len(position.top)] = [value for _, value in position.top]
    content = {"schema": _SCHEMA, "passages": passages_digest(passages), "top": top}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.savez(
            partial / "positions.npz",
            counts=np.array([len(row) for row in positions], dtype=np.int64),
            tokens=np.array([position.token for position in flat], dtype=np.int32),
            log_probabilities=np.array([position.log_probability for position in flat], dtype=np.float32),
            top_ids=ids,
            top_log_probabilities=logs,
        )
        (partial / "record.json").write_text(json.dumps(content), encoding="utf-8")
        # Renamed when complete: a killed run leaves no record that looks whole.
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StoreError(f"{folder}: cannot be written ({error}); free space or remove the old record") from error


class TopRecord:
    """A record of the original's predictions, opened for comparison."""

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

    def of(self, index: int) -> list[Position]:
        """Return the positions of the passage of this index."""
        first = int(self._ends[index - 1]) if index else 0
        return [self._position(row) for row in range(first, int(self._ends[index]))]

    def _position(self, row: int) -> Position:
        pairs = zip(self._top_ids[row].tolist(), self._top_logs[row].tolist(), strict=True)
        top = tuple((token, value) for token, value in pairs if token >= 0)
        return Position(token=int(self._tokens[row]), log_probability=float(self._logs[row]), top=top)


def score_top(
    passages: Sequence[Passage],
    record: Path | None,
    reference: Path | None,
    top: int,
    predict: Callable[[TopRecord | None], Sequence[Sequence[Position] | str]],
) -> list[Score]:
    """Return the scores of all passages, in order; see `Scores.score`.

    `predict` returns each passage's predictions, or the fault that left it without, and is given the original's record if any.
    """
    original = TopRecord(reference, passages, top) if reference is not None else None
    predictions = predict(original)
    if record is not None:
        write_record(record, passages, [[] if isinstance(row, str) else row for row in predictions], top)
    return [
        score_of(passage.id, positions, None if original is None else original.of(index))
        for index, (passage, positions) in enumerate(zip(passages, predictions, strict=True))
    ]
