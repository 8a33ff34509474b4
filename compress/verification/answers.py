"""Compare an artifact's answers in its runtime with the checkpoint's: with the right image, a wrong one, and none.

The log-likelihood of a given answer shows whether a model is grounded in the image even where its greedy answer is the same for
every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from compress.data.prompts import Prompt
from compress.families import Family
from compress.progress import Progress
from compress.runtimes.runtime import Answer, Embeds, Generates, Passage, Scores, Session, capable
from compress.verification.limits import DifferenceLimits
from compress.verification.results import Agreement, Answers, Shown
from compress.verification.samples import captions, questions, sample_images, without_images

NEW_TOKENS = 16
"""The length limit of an answer, in tokens."""

_MIN_IMAGE_EFFECT = 1e-3
"""From how many nats per token on the image changes the likelihood of an answer; see docs/verification.md."""

_UNGROUNDED_SHARE = 0.1
"""An artifact is not grounded in a prompt's image if its change is at most this share of the checkpoint's."""

_WRONG_IMAGE_SEED = 300
"""The seed of the wrong images; those of the right ones are 100 to 107, of CLIP's 200 to 207."""
_SCORED: tuple[Shown, ...] = ("right image", "wrong image")


@dataclass(frozen=True)
class AnswerSet:
    """A model's answers to the same questions with several images. For CLIP, answers are the nearest captions."""

    answers: dict[Shown, list[Answer]]
    likelihoods: dict[Shown, list[float]]
    """Mean log-likelihoods per token of the scored answers, in nats; NaN where a prompt could not be scored."""


def ask(session: Session, family: Family, reference: AnswerSet | None, progress: Progress) -> AnswerSet:
    """Ask every question with its image, with a wrong one and with none, and score the answers to the first under both images.

    The scored answers are the model's own or, with `reference`, those of the reference model.
    """
    if not isinstance(session, Generates):
        return _match(capable(session, Embeds), reference, progress)
    prompts = questions(family)
    variants: dict[Shown, list[Prompt]] = {
        "right image": prompts,
        "wrong image": questions(family, seed=_WRONG_IMAGE_SEED),
        "no image": without_images(prompts),
    }
    answers: dict[Shown, list[Answer]] = {}
    likelihoods: dict[Shown, list[float]] = {}
    for shown, variant in variants.items():
        answers[shown] = session.answer(variant, NEW_TOKENS, progress)
    scored = (reference.answers if reference else answers)["right image"]
    for shown in _SCORED:
        likelihoods[shown] = _likelihoods(capable(session, Scores), variants[shown], scored, progress)
    return AnswerSet(answers, likelihoods)


def _likelihoods(session: Scores, prompts: Sequence[Prompt], answers: Sequence[Answer], progress: Progress) -> list[float]:
    """Return the mean log-likelihood per token of each answer to its prompt, in nats; NaN where it could not be scored."""
    passages = [Passage(prompt.id, answer.token_ids, prompt) for prompt, answer in zip(prompts, answers, strict=True)]
    scores = session.score(passages, None, None, progress)
    return [
        float(-np.mean(score.negative_log_likelihood)) if len(score.negative_log_likelihood) else float("nan") for score in scores
    ]


def _match(session: Embeds, reference: AnswerSet | None, progress: Progress) -> AnswerSet:
    """Return the nearest caption of each image, and its log-probability for that image and, as the wrong one, for the next."""
    images, texts = sample_images(), captions()
    log_probabilities = session.classify(images, [[text] for text in texts], progress)
    nearest = cast("list[int]", log_probabilities.argmax(axis=1).tolist())
    answers = [Answer(image.id, texts[index], (index,)) for image, index in zip(images, nearest, strict=True)]
    scored = [answer.token_ids[0] for answer in (reference.answers["right image"] if reference else answers)]
    rows = np.arange(len(images))
    likelihoods: dict[Shown, list[float]] = {
        "right image": log_probabilities[rows, scored].tolist(),
        "wrong image": log_probabilities[rows - len(rows) + 1, scored].tolist(),  # negative indices wrap: the next image
    }
    return AnswerSet({"right image": answers, "wrong image": answers[1:] + answers[:1]}, likelihoods)


def judge_answers(reference: AnswerSet, artifact: AnswerSet, limits: DifferenceLimits) -> Answers:
    """Compare an artifact's answers with the checkpoint's (`reference`)."""
    agreement = [
        Agreement(shown=shown, prompts=len(answers), same=sum(map(_is_same, answers, artifact.answers[shown])))
        for shown, answers in reference.answers.items()
        if any(answer.fault is None for answer in answers)
    ]
    # With the wrong image the answer is unlikely, and its likelihood varies more: there only a missing number counts.
    differences = [
        abs(actual - expected) if shown == "right image" or not np.isfinite(actual) else 0.0
        for shown, likelihoods in reference.likelihoods.items()
        for expected, actual in zip(likelihoods, artifact.likelihoods[shown], strict=True)
        if not np.isnan(expected)
    ]
    reference_changes, artifact_changes = _image_effects(reference), _image_effects(artifact)
    grounded = [index for index, change in enumerate(reference_changes) if change > _MIN_IMAGE_EFFECT]
    return Answers(
        agreement=tuple(agreement),
        # a number that the artifact could not give is beyond every limit; `max` would drop a NaN
        likelihood=max((value if np.isfinite(value) else float("inf") for value in differences), default=0.0),
        likelihood_limit=limits.likelihood,
        least_agreement=limits.agreement,
        seeing=len(grounded),
        ungrounded=sum(artifact_changes[index] <= _UNGROUNDED_SHARE * reference_changes[index] for index in grounded),
        changed_checkpoint=_changed_answers(reference),
        changed_artifact=_changed_answers(artifact),
    )


def _is_same(expected: Answer, actual: Answer) -> bool:
    # ids and text: tokenizers may write one text in several ways, and other ids may decode to the same text
    return actual.fault == expected.fault and actual.token_ids == expected.token_ids and actual.text == expected.text


def _image_effects(answers: AnswerSet) -> list[float]:
    """Return by how much the wrong image changes the likelihood of each prompt's answer, in nats."""
    right, wrong = answers.likelihoods["right image"], answers.likelihoods["wrong image"]
    return [abs(with_right - with_wrong) for with_right, with_wrong in zip(right, wrong, strict=True)]


def _changed_answers(answers: AnswerSet) -> int:
    pairs = zip(answers.answers["right image"], answers.answers["wrong image"], strict=True)
    return sum(right.text != wrong.text for right, wrong in pairs)
