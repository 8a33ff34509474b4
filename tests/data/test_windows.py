from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from compress.data.texts import Document, pieces
from compress.data.windows import REACH, WindowRequest, draw_indices, pack_windows
from compress.errors import DataError

LONG = [Document(f"{number:04d} " * 20, f"a:{number}") for number in range(400)]


def encode(texts: Sequence[str]) -> list[list[int]]:
    """Give every character its own token."""
    return [list(text.encode()) for text in texts]


def wanted(samples: int = 4, tokens: int = 64, seed: str = "0") -> WindowRequest:
    return WindowRequest(samples=samples, tokens=tokens, seed=seed, name="calibration.sets.0")


def test_windows_are_exact_spans_of_the_joined_text() -> None:
    windows = pack_windows(LONG, encode, wanted())
    assert [len(window.token_ids) for window in windows] == [64] * 4
    text = "".join(piece.text for document in LONG for piece in pieces(document))
    starts = [text.index(bytes(window.token_ids.tolist()).decode()) for window in windows]
    assert all(start % 64 == 0 for start in starts)
    assert starts == sorted(set(starts))
    assert max(starts) < 64 * 4 * REACH


def test_a_window_knows_the_lines_in_it() -> None:
    documents = [Document(f"{number}{'x' * 99}", f"a:{number}") for number in range(40)]
    text = "".join(blocks(documents))
    ends = [sum(map(len, blocks(documents[: index + 1]))) for index in range(40)]
    windows = pack_windows(documents, encode, wanted(samples=3, tokens=150))
    assert len(windows) == 3
    for window in windows:
        start = text.index(bytes(window.token_ids.tolist()).decode())
        inside = [index for index in range(40) if ends[index] > start and (ends[index - 1] if index else 0) < start + 150]
        assert window.text == "".join(blocks([documents[index] for index in inside]))
        assert (window.first, window.last) == (f"a:{inside[0]}", f"a:{inside[-1]}")


def blocks(documents: list[Document]) -> list[str]:
    return [piece.text for document in documents for piece in pieces(document)]


def test_the_seed_decides() -> None:
    def drawn(seed: str) -> list[list[int]]:
        return [window.token_ids.tolist() for window in pack_windows(LONG, encode, wanted(seed=seed))]

    assert drawn("0") == drawn("0")
    assert drawn("0") != drawn("1")


def test_all_windows_of_a_text_that_just_suffices() -> None:
    windows = pack_windows([Document("x" * 126, "a:1")], encode, wanted(samples=2))
    assert np.concatenate([window.token_ids for window in windows]).tolist() == [120] * 126 + [10, 10]


@pytest.mark.parametrize("documents", [[], [Document("x" * 125, "a:1")]])
def test_short_text(documents: list[Document]) -> None:
    number = len(documents)
    with pytest.raises(
        DataError, match=rf"calibration.sets.0: the text gives {number} windows of 64 tokens, 2 are asked for; name a longer"
    ):
        pack_windows(documents, encode, wanted(samples=2))


def test_choose_is_fixed_for_all_time() -> None:
    assert draw_indices(20, 5, "0:0") == [4, 7, 10, 11, 12]
    assert draw_indices(20, 20, "0:0") == list(range(20))
    assert len({tuple(draw_indices(20, 5, f"{seed}:0")) for seed in range(20)}) > 15
    counts = np.bincount([index for seed in range(2000) for index in draw_indices(10, 3, str(seed))], minlength=10)
    assert counts.min() > 500
    assert counts.max() < 700
