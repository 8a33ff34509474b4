"""ANLS, the score of DocVQA: how few letters must change (arXiv 1907.00490, equation 1; arXiv 2007.00398)."""

from __future__ import annotations

from collections.abc import Sequence

_THRESHOLD = 0.5


def anls(said: str, accepted: Sequence[str]) -> float:
    """Return the best of the accepted answers' similarities: one less the edit distance by the longer text's length.

    A distance of a half or more counts as another answer: 0. (The competition's own script lets a distance of exactly a half
    through; the papers do not.) Case and runs of spaces do not count.
    """
    spoken = _plain(said)
    return max((_similarity(spoken, _plain(answer)) for answer in accepted), default=0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(said: str, accepted: str) -> float:
    longest = max(len(said), len(accepted))
    distance = edit_distance(said, accepted) / longest if longest else 0.0
    return 1 - distance if distance < _THRESHOLD else 0.0


def edit_distance(one: str, other: str) -> int:
    """Return how many letters must be put in, taken out or changed to turn one text into the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], place
        for column, wanted in enumerate(other, 1):
            changed = diagonal + (letter != wanted)
            diagonal, row[column] = row[column], min(changed, row[column] + 1, row[column - 1] + 1)
    return row[-1]
