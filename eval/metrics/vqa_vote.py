"""The accuracy of VQA v2 (https://visualqa.org/evaluation.html): an answer counts fully when three people agree with it."""

from __future__ import annotations

from collections.abc import Sequence

from compress.eval.normalize import normalize

_ANNOTATORS = 10
_ENOUGH = 3


def vqa_vote(said: str, accepted: Sequence[str]) -> float:
    """Return min(people who said so / 3, 1), averaged over leaving out each of the ten people in turn.

    So one, two and three of ten who agree give 0.3, 0.6 and 0.9, four and more give 1. Answers are compared after VQA v2's
    normalization; people whose answer is blank, and so is not among the accepted ones, said something else. A single answer, as
    data of one's own have it, is taken for that of all ten.
    """
    accepted = list(accepted) * (_ANNOTATORS if len(accepted) == 1 else 1)
    spoken = normalize(said)
    agreeing = sum(normalize(answer) == spoken for answer in accepted)
    others = max(_ANNOTATORS, len(accepted)) - agreeing
    without_one, without_another = min((agreeing - 1) / _ENOUGH, 1.0), min(agreeing / _ENOUGH, 1.0)
    return (agreeing * without_one + others * without_another) / (agreeing + others)
