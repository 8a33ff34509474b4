"""The visual grounding check: the same questions with their own image, with another question's image, and without one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from compress.data.prompts import Prompt
from compress.errors import DataError
from compress.eval.changes import ImageGain, image_gain
from compress.eval.journal import answer_all
from compress.eval.metrics import load_metric
from compress.eval.metrics.normalize import normalize
from compress.eval.results import Grounding, GroundingItem, check_pairs, read_grounding
from compress.eval.tasks.task import TaskContext, cluster_of
from compress.recipe.schema import Frozen
from compress.runtimes.runtime import Answer, Generates, capable

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.eval.tasks.question_task import QuestionTask


class GroundingCheck(Frozen):
    """Which questions are used for the check."""

    task: str
    """The name of the task whose questions are taken."""

    samples: Annotated[int, Field(ge=8)] = 64
    """At most so many, drawn at random with `seed`. The p-value of the test cannot fall below 2^−samples, so fewer than 8 would
    prove little."""

    seed: int = 0


def measure_grounding(check: GroundingCheck, task: QuestionTask, context: TaskContext) -> tuple[Grounding, list[GroundingItem]]:
    """Generate answers under the three conditions, and score each as the task does.

    Raises:
        DataError: fewer than eight questions have an image that another question's can replace.
        ServerError: the runtime does not answer any more.
    """
    all_questions = task.questions(context.files)
    questions = [question for question in all_questions if question.images]
    # The seed is the recipe's, so that original and artifacts are asked the same questions with the same wrong images.
    sample = random.Random(check.seed).sample(questions, min(check.samples, len(questions)))  # noqa: S311 - no secret
    pairs = _pair_with_others(task.name, sample, questions)
    # By all questions: CIDEr's word frequencies of a sample would be other scores than the task's.
    scorer = task.scorer(all_questions)
    own_answers = _generate_answers(task, [question for question, _ in pairs], "own", context)
    other_answers = _generate_answers(
        task, [replace(question, images=other_question.images) for question, other_question in pairs], "other", context
    )
    none_answers = _generate_answers(task, [replace(question, images=()) for question, _ in pairs], "none", context)
    without_image = all(answer.fault is None for answer in none_answers)  # some models take no question without an image
    items = [
        _item(task, pair, (own_answer, other_answer, none_answer if without_image else None), scorer)
        for pair, own_answer, other_answer, none_answer in zip(pairs, own_answers, other_answers, none_answers, strict=True)
    ]
    if context.original_measurement is not None:
        check_pairs(
            f"{task.name} (grounding)", read_grounding(context.original_measurement), ((item.id, item.digest) for item in items)
        )
    answered = [item for item in items if item.fault is None]
    return _summary(task, items, answered, without_image=without_image), items


def image_gain_of(items: Sequence[GroundingItem], confidence: float) -> ImageGain | None:
    """Test whether the answered questions have higher scores with their own image; None where none was answered."""
    answered = [item for item in items if item.fault is None]
    if not answered:
        return None
    own_scores, other_scores = [item.score_own for item in answered], [item.score_other for item in answered]
    return image_gain(own_scores, other_scores, [item.cluster for item in answered], confidence)


def _pair_with_others(name: str, sample: Sequence[Question], questions: Sequence[Question]) -> list[tuple[Question, Question]]:
    """Return each question with one whose images replace its own: as many, all different, with another answer if possible."""
    pairs: list[tuple[Question, Question]] = []
    for question in sample:
        start = questions.index(question)
        # From the question on, in the data's order: the same pairs for every model, without another draw.
        candidates = [*questions[start + 1 :], *questions[:start]]
        suitable = [
            other
            for other in candidates
            # By content: another file with the same picture would be the right image.
            if len(other.images) == len(question.images) and not set(other.image_digests) & set(question.image_digests)
        ]
        accepted = set(map(normalize, question.answers))
        # With an equal answer, a model that reads the wrong image correctly would score as if it had seen its own.
        with_other_answers = (other for other in suitable if not accepted & set(map(normalize, other.answers)))
        replacement = next(with_other_answers, suitable[0] if suitable else None)
        if replacement is not None:
            pairs.append((question, replacement))
    if len(pairs) < GroundingCheck.model_fields["samples"].metadata[0].ge:
        raise DataError(
            f"eval.grounding: {len(pairs)} questions of task {name} have an image that another one's can stand in for; "
            "name a task with more images, or remove grounding"
        )
    return pairs


def _generate_answers(task: QuestionTask, questions: Sequence[Question], condition: str, context: TaskContext) -> list[Answer]:
    prompts = [Prompt(id=question.id, text=task.prompt_text(question), images=question.images) for question in questions]
    return answer_all(
        capable(context.session, Generates),
        prompts,
        task.resolved_definition().max_new_tokens,
        context.output_dir,
        f"grounding@{condition}",
        context.progress,
    )


def _item(
    task: QuestionTask,
    pair: tuple[Question, Question],
    answers: tuple[Answer, Answer, Answer | None],
    scorer: Callable[[Question, str], float],
) -> GroundingItem:
    question, replacement = pair
    own, other, none = answers
    return GroundingItem(
        id=question.id,
        digest=question.digest,
        cluster=cluster_of(question),
        other=replacement.id,
        prompt=task.prompt_text(question),
        accepted=task.accepted(question),
        said_own=own.text,
        said_other=other.text,
        said_none=none.text if none else None,
        score_own=scorer(question, own.text),
        score_other=scorer(question, other.text),
        score_none=scorer(question, none.text) if none else None,
        fault=own.fault or other.fault or (none.fault if none else None),
    )


def _summary(
    task: QuestionTask, items: Sequence[GroundingItem], answered: Sequence[GroundingItem], *, without_image: bool
) -> Grounding:
    count = max(len(answered), 1)
    return Grounding(
        task=task.name,
        metric=task.metric_name,
        binary=load_metric(task.metric_name).binary,
        items=len(items),
        failed=len(items) - len(answered),
        score_own=sum(item.score_own for item in answered) / count,
        score_other=sum(item.score_other for item in answered) / count,
        score_none=sum(item.score_none or 0.0 for item in answered) / count if without_image else None,
        changed_other=sum(not task.same(item.said_own, item.said_other) for item in answered) / count,
        changed_none=sum(not task.same(item.said_own, item.said_none or "") for item in answered) / count
        if without_image
        else None,
    )
