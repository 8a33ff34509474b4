"""Running text packed to windows of exactly so many tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from compress.calibration.texts import Document, Piece, pieces
from compress.errors import DataError

REACH = 16
"""The text is read until it fills this many times the windows asked for, and these are drawn from."""

_GROUP_PIECES, _GROUP_CHARACTERS = 1024, 500_000
"""After how many pieces, and characters, a group is tokenized. Pieces of up to 100,000 characters make it one second at most."""

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Turns texts to token ids, without special tokens."""


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of the joined text; `text` are all lines of which a part is in it, from origin `first` to `last`."""

    token_ids: NDArray[np.int32]
    text: str
    first: str
    last: str


@dataclass(frozen=True)
class Wanted:
    """How many windows, of how many tokens, drawn with which seed, for which set (named in messages)."""

    samples: int
    tokens: int
    seed: str
    name: str


def choose(total: int, samples: int, seed: str) -> list[int]:
    """Return `samples` of the numbers from 0 to `total` − 1, in order; the same for the same seed on every machine."""
    ranked = sorted(range(total), key=lambda place: hashlib.sha256(f"{seed}:{place}".encode()).digest())
    return sorted(ranked[:samples])


def pack_windows(documents: Iterable[Document], encode: Encode, wanted: Wanted) -> list[Window]:
    """Draw windows from the documents' text.

    The text is tokenized line by line in the order it was published, cut to spans of exactly `tokens` tokens that do not overlap,
    and `samples` of these are drawn. Contiguous spans keep the context a model meets in use; wikitext's rows are single lines, and
    documents put together in a drawn order would be lines torn out of theirs.

    Raises:
        DataError: the text is too short; says how many windows it gives.
    """
    most = wanted.samples * wanted.tokens * REACH
    parts, ids, total = list[Piece](), list[NDArray[np.int32]](), 0
    for piece, encoded in _encode_all(documents, encode):
        parts.append(piece)
        ids.append(encoded)
        total += len(encoded)
        if total >= most:
            break
    windows = min(total, most) // wanted.tokens
    if windows < wanted.samples:
        raise DataError(
            f"{wanted.name}: the text gives {windows} windows of {wanted.tokens} tokens, {wanted.samples} are asked for; "
            "name a longer text, or ask for fewer samples or tokens"
        )
    stream = np.concatenate(ids)
    ends = np.cumsum([len(part) for part in ids])
    return [
        _cut(stream, parts, ends, place * wanted.tokens, wanted.tokens) for place in choose(windows, wanted.samples, wanted.seed)
    ]


def _encode_all(documents: Iterable[Document], encode: Encode) -> Iterator[tuple[Piece, NDArray[np.int32]]]:
    for group in _grouped(chain.from_iterable(map(pieces, documents))):
        for piece, encoded in zip(group, encode([piece.text for piece in group]), strict=True):
            yield piece, np.asarray(encoded, dtype=np.int32)


def _cut(stream: NDArray[np.int32], parts: list[Piece], ends: NDArray[np.int64], start: int, tokens: int) -> Window:
    first, last = np.searchsorted(ends, [start, start + tokens - 1], side="right")
    inside = parts[int(first) : int(last) + 1]
    return Window(
        token_ids=stream[start : start + tokens],
        text="".join(piece.text for piece in inside),
        first=inside[0].origin,
        last=inside[-1].origin,
    )


def _grouped(items: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield some pieces at once: tokenizers are faster so, and little is tokenized that is not needed."""
    group, characters = list[Piece](), 0
    for item in items:
        group.append(item)
        characters += len(item.text)
        if len(group) == _GROUP_PIECES or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
