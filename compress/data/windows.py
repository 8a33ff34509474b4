"""Running text packed into windows of a fixed number of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.data.texts import Document, Piece, pieces
from compress.errors import DataError

REACH = 16
"""Windows are drawn from a text of this many times the requested number of tokens; more text is not read."""

_GROUP_PIECES, _GROUP_CHARACTERS = 1024, 500_000
"""The pieces, and characters, that are tokenized at once: one second at most, with pieces of up to 100,000 characters."""

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Tokenizes texts, without special tokens."""


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of the joined text."""

    token_ids: NDArray[np.int32]

    text: str
    """All lines that are at least partly in the window."""

    first: str
    """The origin of the first of them."""

    last: str
    """The origin of the last of them."""


@dataclass(frozen=True)
class WindowRequest:
    """A request for windows of text."""

    samples: int
    """The number of windows."""

    tokens: int
    """The tokens of a window."""

    seed: str

    name: str
    """The calibration set's name in messages."""


def draw_indices(total: int, samples: int, seed: str) -> list[int]:
    """Return `samples` distinct indices below `total`, sorted; the same for the same seed on every machine."""
    # by hashes rather than a random generator, whose sequence may change with the library's version
    ranked = sorted(range(total), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    return sorted(ranked[:samples])


def encoder(tokenizer: Any) -> Encode:
    """Return a function that tokenizes texts without adding or recognizing special tokens."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,  # an image token's spelling in a text is plain text
            truncation=False,
            return_attention_mask=False,
            # else it warns of texts longer than the model takes, which are cut into windows anyway
            verbose=False,
        )
        return cast("list[list[int]]", encoded["input_ids"])

    return encode


def pack_windows(documents: Iterable[Document], encode: Encode, request: WindowRequest) -> list[Window]:
    """Draw windows from the documents' text.

    The text is tokenized line by line in its published order and split into non-overlapping windows of exactly `tokens` tokens, of
    which `samples` are drawn. Contiguous windows keep the context that a model sees in use; wikitext's rows are single lines, and
    shuffling them would tear lines out of their context.

    Raises:
        DataError: the text is too short; the message gives the number of windows.
    """
    limit = request.samples * request.tokens * REACH
    lines, ids, total = list[Piece](), list[NDArray[np.int32]](), 0
    for piece, encoded in _encode_all(documents, encode):
        lines.append(piece)
        ids.append(encoded)
        total += len(encoded)
        if total >= limit:
            break
    windows = min(total, limit) // request.tokens
    if windows < request.samples:
        raise DataError(
            f"{request.name}: the text gives {windows} windows of {request.tokens} tokens, {request.samples} are asked for; "
            "name a longer text, or ask for fewer samples or tokens"
        )
    stream = np.concatenate(ids)
    ends = np.cumsum([len(tokens) for tokens in ids])
    return [
        _window(stream, lines, ends, index * request.tokens, request.tokens)
        for index in draw_indices(windows, request.samples, request.seed)
    ]


def _encode_all(documents: Iterable[Document], encode: Encode) -> Iterator[tuple[Piece, NDArray[np.int32]]]:
    for group in _grouped(chain.from_iterable(map(pieces, documents))):
        for piece, encoded in zip(group, encode([piece.text for piece in group]), strict=True):
            yield piece, np.asarray(encoded, dtype=np.int32)


def _window(stream: NDArray[np.int32], lines: list[Piece], ends: NDArray[np.int64], start: int, tokens: int) -> Window:
    # side=right, because the token at index `ends[i]` is the first one of the next line
    first, last = np.searchsorted(ends, [start, start + tokens - 1], side="right")
    inside = lines[int(first) : int(last) + 1]
    return Window(
        token_ids=stream[start : start + tokens],
        text="".join(piece.text for piece in inside),
        first=inside[0].origin,
        last=inside[-1].origin,
    )


def _grouped(items: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield groups of pieces: tokenizers are faster on groups, and little unneeded text is tokenized."""
    group, characters = list[Piece](), 0
    for item in items:
        group.append(item)
        characters += len(item.text)
        if len(group) == _GROUP_PIECES or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
