"""Whether an answer to a yes-or-no question is right, with precision, recall and F1, as POPE reads it (arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Sequence

_NEGATIONS = frozenset({"no", "not"})


def yes_no(said: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where the answer says the same of yes and no as an accepted one."""
    return float(any(says_yes(said) == says_yes(answer) for answer in accepted))


def says_yes(text: str) -> bool:
    """Return whether a text is a yes: there is no "no" and no "not" in its first sentence."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return not _NEGATIONS.intersection(words)


def yes_no_figures(answers: Sequence[tuple[str | None, Sequence[str]]]) -> dict[str, float]:
    """Return precision, recall and F1 of yes, and the share of answers that are a yes; an item without an answer is wrong."""
    pairs = list[tuple[bool, bool]]()
    for said, accepted in answers:
        wanted = says_yes(accepted[0])
        pairs.append((not wanted if said is None else says_yes(said), wanted))
    hits = sum(said and wanted for said, wanted in pairs)
    spoken, right = sum(said for said, _ in pairs), sum(wanted for _, wanted in pairs)
    return {
        "precision": hits / spoken if spoken else 0.0,
        "recall": hits / right if right else 0.0,
        "f1": 2 * hits / (spoken + right) if spoken + right else 0.0,
        "yes_share": spoken / len(pairs) if pairs else 0.0,
    }
