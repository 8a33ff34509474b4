"""POPE's accuracy of yes-or-no questions, with precision, recall and F1 (arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Sequence

from compress.eval.metrics.metric import Metric

_NEGATIONS = frozenset({"no", "not"})
"""The words by which POPE's script reads an answer as no."""


def yes_no(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where the answer is the same of yes and no as an accepted one."""
    return float(any(says_yes(answer) == says_yes(reference) for reference in accepted))


def says_yes(text: str) -> bool:
    """Return whether an answer is a yes, as POPE reads it: its first sentence has no "no" or "not"."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return not _NEGATIONS.intersection(words)


def yes_no_figures(answers: Sequence[tuple[str | None, Sequence[str]]]) -> dict[str, float]:
    """Return precision, recall and F1 of yes, and the share of answers that are a yes; an item without an answer is wrong."""
    pairs = list[tuple[bool, bool]]()
    for answer, accepted in answers:
        expected = says_yes(accepted[0])
        # A missing answer counts as the wrong one, so that a failing server cannot raise precision.
        pairs.append((not expected if answer is None else says_yes(answer), expected))
    hits = sum(answer and expected for answer, expected in pairs)
    spoken, right = sum(answer for answer, _ in pairs), sum(expected for _, expected in pairs)
    return {
        "precision": hits / spoken if spoken else 0.0,
        "recall": hits / right if right else 0.0,
        "f1": 2 * hits / (spoken + right) if spoken + right else 0.0,
        "yes_share": spoken / len(pairs) if pairs else 0.0,
    }


YES_NO = Metric(
    "yes_no",
    yes_no,
    kinds=("vqa",),
    note="share of questions{drawn} whose answer says yes or no as it should: no if its first sentence has no or not (POPE)",
    figures=yes_no_figures,
)
