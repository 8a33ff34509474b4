"""Whether a model's answers depend on the image: the same questions with their own image, with another one's, and with none."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from compress.errors import DataError
from compress.eval.changes import ImageGain, image_gain
from compress.eval.journal import answer_all
from compress.eval.normalize import normalize
from compress.eval.results import Grounding, GroundingItem, check_pairs, read_grounding
from compress.eval.task import TaskContext, cluster_of
from compress.runtimes.runtime import Answer, Prompt
from compress.schema import Frozen

if TYPE_CHECKING:
    from compress.calibration.questions import Question
    from compress.eval.asked import Asked


class GroundingCheck(Frozen):
    """At most `samples` of the questions about images that the task `task` asks, drawn with `seed`."""

    task: str
    samples: Annotated[int, Field(ge=8)] = 64
    seed: int = 0


def measure_grounding(check: GroundingCheck, task: Asked, context: TaskContext) -> tuple[Grounding, list[GroundingItem]]:
    """Ask the questions three times over, and score each answer as the task does.

    Raises:
        DataError: fewer than eight questions have an image that another image can stand in for.
        ServerError: the runtime does not answer any more.
    """
    every = task.questions(context.files)
    questions = [question for question in every if question.images]
    drawn = random.Random(check.seed).sample(questions, min(check.samples, len(questions)))  # noqa: S311 - no secret
    pairs = _paired(task.name, drawn, questions)
    scorer = task.scorer(every)
    own = _ask(task, [question for question, _ in pairs], "own", context)
    other = _ask(task, [replace(question, images=standing.images) for question, standing in pairs], "other", context)
    none = _ask(task, [replace(question, images=()) for question, _ in pairs], "none", context)
    without_image = all(answer.fault is None for answer in none)  # some models take no question without an image
    items = [
        _item(task, pair, (mine, theirs, said if without_image else None), scorer)
        for pair, mine, theirs, said in zip(pairs, own, other, none, strict=True)
    ]
    if context.against is not None:
        check_pairs(f"{task.name} (grounding)", read_grounding(context.against), ((item.id, item.digest) for item in items))
    kept = [item for item in items if item.fault is None]
    return _summary(task, items, kept, without_image=without_image), items


def image_gain_of(items: Sequence[GroundingItem], confidence: float) -> ImageGain | None:
    """Judge whether the questions that could be answered are answered better with their own image; None where there are none."""
    kept = [item for item in items if item.fault is None]
    if not kept:
        return None
    own, other = [item.score_own for item in kept], [item.score_other for item in kept]
    return image_gain(own, other, [item.cluster for item in kept], confidence)


def _paired(name: str, drawn: Sequence[Question], every: Sequence[Question]) -> list[tuple[Question, Question]]:
    """Return each question with one whose images differ and are as many; with other accepted answers too where there is one."""
    pairs: list[tuple[Question, Question]] = []
    for question in drawn:
        start = every.index(question)
        others = [*every[start + 1 :], *every[:start]]
        fitting = [
            other
            for other in others
            if len(other.images) == len(question.images) and not set(other.image_digests) & set(question.image_digests)
        ]
        accepted = set(map(normalize, question.answers))
        apart = (other for other in fitting if not accepted & set(map(normalize, other.answers)))
        standing = next(apart, fitting[0] if fitting else None)
        if standing is not None:
            pairs.append((question, standing))
    if len(pairs) < GroundingCheck.model_fields["samples"].metadata[0].ge:
        raise DataError(
            f"eval.grounding: {len(pairs)} questions of task {name} have an image that another one's can stand in for; "
            "name a task with more images, or remove grounding"
        )
    return pairs


def _ask(task: Asked, questions: Sequence[Question], which: str, context: TaskContext) -> list[Answer]:
    prompts = [Prompt(id=question.id, text=task.wording(question), images=question.images) for question in questions]
    return answer_all(context.session, prompts, task.read().max_new_tokens, context.target, f"grounding@{which}", context.progress)


def _item(
    task: Asked,
    pair: tuple[Question, Question],
    answers: tuple[Answer, Answer, Answer | None],
    scorer: Callable[[Question, str], float],
) -> GroundingItem:
    question, standing = pair
    own, other, none = answers
    return GroundingItem(
        id=question.id,
        digest=question.digest,
        cluster=cluster_of(question),
        other=standing.id,
        prompt=task.wording(question),
        accepted=task.accepted(question),
        said_own=own.text,
        said_other=other.text,
        said_none=none.text if none else None,
        score_own=scorer(question, own.text),
        score_other=scorer(question, other.text),
        score_none=scorer(question, none.text) if none else None,
        fault=own.fault or other.fault or (none.fault if none else None),
    )


def _summary(task: Asked, items: Sequence[GroundingItem], kept: Sequence[GroundingItem], *, without_image: bool) -> Grounding:
    count = max(len(kept), 1)
    return Grounding(
        task=task.name,
        metric=task.scored_by,
        binary=task.binary,
        items=len(items),
        failed=len(items) - len(kept),
        score_own=sum(item.score_own for item in kept) / count,
        score_other=sum(item.score_other for item in kept) / count,
        score_none=sum(item.score_none or 0.0 for item in kept) / count if without_image else None,
        changed_other=sum(not task.same(item.said_own, item.said_other) for item in kept) / count,
        changed_none=sum(not task.same(item.said_own, item.said_none or "") for item in kept) / count if without_image else None,
    )
