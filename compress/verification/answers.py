"""Whole answers of an artifact in its runtime beside the checkpoint's: with the right image, with a wrong one, with none.

How likely a model finds given words shows whether it looks at the image even where its greedy answer is the same for every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from compress.families import Family
from compress.progress import Progress
from compress.runtimes.runtime import Answer, Passage, Prompt, Session
from compress.verification.limits import DifferenceLimits
from compress.verification.results import Agreement, Answers, Shown
from compress.verification.samples import captions, pictures, questions, without_images

NEW_TOKENS = 16
"""How many tokens an answer has at most."""

_SEEING = 1e-3
_BLIND = 0.1
_OTHERS = 300
_SCORED: tuple[Shown, ...] = ("right image", "wrong image")


@dataclass(frozen=True)
class AnswerSet:
    """What a model makes of the same questions asked in several ways: its answers, and how likely it finds given ones.

    `likelihoods` are mean log-likelihoods per token in nats, not a number where a prompt could not be scored. Of a model that
    compares images with texts, answers are the nearest texts, and likelihoods theirs.
    """

    answers: dict[Shown, list[Answer]]
    likelihoods: dict[Shown, list[float]]


def ask(session: Session, family: Family, given: AnswerSet | None, progress: Progress) -> AnswerSet:
    """Ask a model every question with its images, with wrong ones, and with none, and score the answers of the first.

    What is scored, with each image, are the model's own answers to the right one or, with `given`, those of the model that made it.
    """
    if "text" not in session.offers:
        return _match(session, given, progress)
    own = questions(family)
    asked: dict[Shown, list[Prompt]] = {
        "right image": own,
        "wrong image": questions(family, seed=_OTHERS),
        "no image": without_images(own),
    }
    answers: dict[Shown, list[Answer]] = {}
    likelihoods: dict[Shown, list[float]] = {}
    for shown, prompts in asked.items():
        answers[shown] = session.answer(prompts, NEW_TOKENS, progress)
    scored = (given.answers if given else answers)["right image"]
    for shown in _SCORED:
        likelihoods[shown] = _likelihoods(session, asked[shown], scored, progress)
    return AnswerSet(answers, likelihoods)


def _likelihoods(session: Session, prompts: Sequence[Prompt], answers: Sequence[Answer], progress: Progress) -> list[float]:
    passages = [Passage(prompt.id, answer.token_ids, prompt) for prompt, answer in zip(prompts, answers, strict=True)]
    scores = session.score(passages, None, None, progress)
    return [
        float(-np.mean(score.negative_log_likelihood)) if len(score.negative_log_likelihood) else float("nan") for score in scores
    ]


def _match(session: Session, given: AnswerSet | None, progress: Progress) -> AnswerSet:
    """Return which text is nearest to each picture and how likely it is, and how likely that is for the next picture."""
    shown, texts = pictures(), captions()
    likely = session.classify(shown, [[text] for text in texts], progress)
    nearest = cast("list[int]", likely.argmax(axis=1).tolist())
    answers = [Answer(picture.id, texts[place], (place,)) for picture, place in zip(shown, nearest, strict=True)]
    chosen = [answer.token_ids[0] for answer in (given.answers["right image"] if given else answers)]
    rows = np.arange(len(shown))
    likelihoods: dict[Shown, list[float]] = {
        "right image": likely[rows, chosen].tolist(),
        "wrong image": likely[rows - len(rows) + 1, chosen].tolist(),
    }
    return AnswerSet({"right image": answers, "wrong image": answers[1:] + answers[:1]}, likelihoods)


def judge_answers(theirs: AnswerSet, ours: AnswerSet, limits: DifferenceLimits) -> Answers:
    """Compare what an artifact says (`ours`) with what the checkpoint does."""
    agreement = [
        Agreement(shown=shown, prompts=len(answers), same=sum(map(_alike, answers, ours.answers[shown])))
        for shown, answers in theirs.answers.items()
        if any(answer.fault is None for answer in answers)
    ]
    apart = [
        abs(mine - other) if shown == "right image" or not np.isfinite(mine) else 0.0  # what is unlikely varies more
        for shown, likelihoods in theirs.likelihoods.items()
        for other, mine in zip(likelihoods, ours.likelihoods[shown], strict=True)
        if not np.isnan(other)
    ]
    moved, moves = _moved(theirs), _moved(ours)
    seeing = [place for place, change in enumerate(moved) if change > _SEEING]
    return Answers(
        agreement=tuple(agreement),
        likelihood=max((each if np.isfinite(each) else float("inf") for each in apart), default=0.0),
        likelihood_limit=limits.likelihood,
        least_agreement=limits.agreement,
        seeing=len(seeing),
        ungrounded=sum(moves[place] <= _BLIND * moved[place] for place in seeing),
        changed_checkpoint=_changed(theirs),
        changed_artifact=_changed(ours),
    )


def _alike(theirs: Answer, ours: Answer) -> bool:
    return ours.fault == theirs.fault and ours.token_ids == theirs.token_ids and ours.text == theirs.text


def _moved(said: AnswerSet) -> list[float]:
    """Return by how much another image changes each prompt's likelihood."""
    right, wrong = said.likelihoods["right image"], said.likelihoods["wrong image"]
    return [abs(one - other) for one, other in zip(right, wrong, strict=True)]


def _changed(said: AnswerSet) -> int:
    pairs = zip(said.answers["right image"], said.answers["wrong image"], strict=True)
    return sum(one.text != other.text for one, other in pairs)
