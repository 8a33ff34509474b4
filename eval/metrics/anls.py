"""ANLS, average normalized Levenshtein similarity, DocVQA's metric (arXiv 1907.00490, equation 1; arXiv 2007.00398)."""

from __future__ import annotations

from collections.abc import Sequence

from compress.eval.metrics.metric import Metric
from compress.eval.statistics.power import AssumedChanges

_THRESHOLD = 0.5
"""The papers' τ: from this normalized distance on, the score is 0."""


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Return the largest similarity to an accepted answer: 1 less the edit distance divided by the longer text's length.

    A distance of a half or more counts as another answer: 0. (The competition's own script lets a distance of exactly a half
    through; the papers do not.) Case and runs of spaces do not count.
    """
    normalized = _plain(answer)
    return max((_similarity(normalized, _plain(reference)) for reference in accepted), default=0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(answer: str, accepted: str) -> float:
    longest = max(len(answer), len(accepted))
    distance = edit_distance(answer, accepted) / longest if longest else 0.0
    return 1 - distance if distance < _THRESHOLD else 0.0


def edit_distance(one: str, other: str) -> int:
    """Return the Levenshtein distance: the number of insertions, deletions and substitutions of characters."""
    row = list(range(len(other) + 1))
    for row_index, character in enumerate(one, 1):
        diagonal, row[0] = row[0], row_index
        for column, target in enumerate(other, 1):
            changed = diagonal + (character != target)
            diagonal, row[column] = row[column], min(changed, row[column] + 1, row[column - 1] + 1)
    return row[-1]


ANLS = Metric(
    "anls",
    anls,
    kinds=("vqa",),
    note="mean over questions{drawn} of ANLS: 1 less the share of letters that are wrong, 0 from a half on (DocVQA)",
    assumed=AssumedChanges(step=0.8),  # a changed answer is mostly another one, which scores 0, and seldom misspelt
)
