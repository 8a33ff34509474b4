"""The accuracy of VQA v2 (https://visualqa.org/evaluation.html): three agreeing annotators give the full score."""

from __future__ import annotations

from collections.abc import Sequence

from compress.eval.metrics.metric import Metric
from compress.eval.metrics.normalize import normalize
from compress.eval.statistics.power import AssumedChanges

_ANNOTATORS = 10
_FULL_SCORE_VOTES = 3
"""Both are VQA v2's: ten annotators per question, three of whom give the full score."""


def vqa_vote(answer: str, accepted: Sequence[str]) -> float:
    """Return min(agreeing annotators / 3, 1), averaged over leaving out each of the ten annotators in turn.

    So one, two and three agreeing annotators give 0.3, 0.6 and 0.9, four and more give 1. Answers are compared after VQA v2's
    normalization; annotators whose answer is blank, and so is not among the accepted ones, disagree. A single accepted answer
    counts as that of all ten.
    """
    # Data sets with one reference use this metric, too: a right answer must reach the full score.
    accepted = list(accepted) * (_ANNOTATORS if len(accepted) == 1 else 1)
    normalized = normalize(answer)
    agreeing = sum(normalize(reference) == normalized for reference in accepted)
    others = max(_ANNOTATORS, len(accepted)) - agreeing
    without_agreeing, without_other = min((agreeing - 1) / _FULL_SCORE_VOTES, 1.0), min(agreeing / _FULL_SCORE_VOTES, 1.0)
    # In closed form: leaving out one who agrees, or one who does not, gives one of two scores.
    return (agreeing * without_agreeing + others * without_other) / (agreeing + others)


VQA_VOTE = Metric(
    "vqa_vote",
    vqa_vote,
    kinds=("vqa",),
    note="mean over questions{drawn} of VQA v2's accuracy: people of ten who agree / 3, at most 1, leaving each out in turn",
    assumed=AssumedChanges(step=0.6),  # the steps are 0.3, 0.6, 0.9 and 1: another answer is mostly one that fewer people gave
)
