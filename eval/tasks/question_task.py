"""The base class of tasks that generate answers to questions about images: prompting, scoring, and comparison with the original."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from pydantic import PositiveInt, ValidationInfo, field_validator, model_validator

from compress.checkpoints.special_tokens import required_end_tokens
from compress.data.prompts import Prompt
from compress.data.sources import Columns, QuestionSource, RowFilter, source_fields
from compress.errors import DataError, RecipeError
from compress.eval import TASKS
from compress.eval.definition import Definition, Kind, find_definition, read_definition
from compress.eval.full_vocabulary import compare_full_vocabulary
from compress.eval.journal import answer_all
from compress.eval.metrics import load_metric
from compress.eval.metrics.normalize import normalize
from compress.eval.results import (
    AnyItem,
    Fidelity,
    QuestionItem,
    ScoreMetrics,
    TaskMeasurement,
    repeat_name,
    write_items,
)
from compress.eval.tasks.drawn_task import DrawnTask
from compress.eval.tasks.task import (
    TaskContext,
    cluster_of,
    compare_answers,
    fidelity_of,
    original_items,
    reordered_session,
    score_passages,
    score_twice,
    token_sums,
)
from compress.recipe.schema import Source, load_row
from compress.runtimes.runtime import Answer, Generates, Passage, Score, capable

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.data.texts import Document

_OVERRIDES = ("prompt", "max_new_tokens", "metric")
"""The definition's fields that a recipe may override, where the kind of task has them as keys."""

Scorer = Callable[["Question", str], float]
"""Takes a question and the answer's text, and returns the score."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one interim look, or of the whole task."""

    name: str
    """The name of its journal and record: the task's, with `@<look>` where there are several looks."""

    questions: Sequence[Question]
    original: Sequence[QuestionItem] | None
    """The original's items for the same questions; None where the original itself is measured."""

    scorer: Scorer


ScoredAnswer = tuple[QuestionItem, Score]
"""An item, and the per-token scores of the original's answer to it."""


class QuestionTask(DrawnTask, ABC):
    """Questions about images with the prompt, data and metric of a definition, which the recipe's keys may override.

    A `source` in the recipe replaces the definition's data as a whole: its `subset`, `split`, `revision`, `columns`, `where` and
    `text_only` describe its own source only, and are not taken over.
    """

    item_type: ClassVar[type[AnyItem]] = QuestionItem
    asks: ClassVar[bool] = True
    kind: ClassVar[Kind]
    """What the definitions that it takes are of."""

    row_noun: ClassVar[str] = "question"

    definition: str
    """The name of a shipped definition, or a file relative to the recipe."""

    source: Source | None = None
    split: str | None = None
    revision: str | None = None
    columns: Columns | None = None
    prompt: str | None = None
    max_new_tokens: PositiveInt | None = None

    @classmethod
    def filled_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with the definition's name."""
        default = cls.model_fields["definition"].get_default()
        definition = str(fields.get("definition", default if isinstance(default, str) else ""))
        return {"name": Path(definition).stem, **fields}

    @field_validator("definition")
    @classmethod
    def _resolve_definition(cls, value: str, info: ValidationInfo) -> str:
        base = Path(cast("dict[str, Any]", info.context or {}).get("base", "."))
        path = find_definition(value, base, cls.kind)
        try:
            definition = read_definition(path)
        except RecipeError as error:
            raise ValueError("; ".join(error.faults)) from error
        if definition.task != cls.kind:
            tasks = " or ".join(_tasks_taking(definition.task))
            raise ValueError(f"the definition {definition.name} is of a {definition.task}; write task: {tasks}")
        return str(path)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        definition = read_definition(Path(self.definition)).with_overrides(self._overrides())
        if self.source is None and definition.source is None:
            raise ValueError(f"the definition {definition.name} names no data; give source, a JSONL or parquet file")
        if self.columns is not None and self.columns.question is None and "{question}" in definition.prompt:
            raise ValueError("columns.question is null: name the column with the questions")
        return self

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return the function that scores an answer, given all questions of the task: CIDEr weighs n-grams by their frequency."""
        score = load_metric(self.metric_name).scorer([question.answers for question in questions])
        return lambda question, answer: score(answer, question.answers)

    @abstractmethod
    def note(self) -> str:
        """Return how the figures are measured, one sentence for the report."""

    @property
    def metric_name(self) -> str:
        """The name of the score in reports."""
        return self.resolved_definition().metric

    def prompt_text(self, question: Question) -> str:
        """Return the text of the prompt."""
        return self.resolved_definition().format_prompt(question.question)

    def accepted(self, question: Question) -> tuple[str, ...]:
        """Return the accepted answers, as reports show them.

        Raises:
            DataError: there is none, or the data's value is none; the message goes on after the question's name.
        """
        if not question.answers:
            raise DataError("has no accepted answer; add one")
        return question.answers

    def same(self, answer: str, other: str) -> bool:
        """Return whether two answers are equal after normalization."""
        return normalize(answer) == normalize(other)

    def figures(self, questions: Sequence[Question], items: Sequence[QuestionItem]) -> dict[str, float]:
        """Return further figures for the report: the metric's own, and the mean score of each category, as `column=category`."""
        answers = [(None if item.fault else item.said, item.accepted) for item in items]
        return dict(load_metric(self.metric_name).figures(answers)) | _by_category(self.data.columns.category, questions, items)

    def resolved_definition(self) -> Definition:
        """Return the task's definition with the recipe's overrides.

        Raises:
            RecipeError: its file has changed and is no definition any more.
        """
        return read_definition(Path(self.definition)).model_copy(update=self._overrides())

    @property
    def data(self) -> QuestionSource:
        """The source of the questions: the recipe's, else the definition's."""
        definition = self.resolved_definition()
        defaults: dict[str, Any] = {"split": "test", "columns": self._default_columns()}
        if self._uses_definition_source(definition):
            defaults = source_fields(definition, QuestionSource)
        return QuestionSource.model_construct(**defaults | source_fields(self, QuestionSource))

    @property
    def rows(self) -> RowFilter:
        """The filter on the rows: the definition's, for its own source only."""
        definition = self.resolved_definition()
        return definition.rows if self._uses_definition_source(definition) else RowFilter()

    def settings(self) -> dict[str, Any]:
        """Return the definition's content, the columns, the sampling, and the task's revision; see `Task.settings`."""
        shared = {"name", "version", "task", "prompt", "max_new_tokens", "metric", "labels"}
        fields = {name: value for name, value in super().settings().items() if name not in _OVERRIDES}
        return fields | {
            "definition": self.resolved_definition().model_dump(mode="json", include=shared),
            "rows": self.rows.model_dump(mode="json"),
        }

    def questions(self, files: Sequence[Path]) -> list[Question]:
        """Return the questions of the sample, in the files' order.

        Raises:
            DataError: a file or question cannot be used, there is none, or one has no accepted answer.
        """
        questions = self.draw(files)
        for question in questions:
            try:
                self.accepted(question)
            except DataError as error:
                raise DataError(f"{self.location(question)} {error}") from error
        return questions

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the questions of the sample; see `Task.contents`."""
        return self.questions(files), ()

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Generate the answers, and score the original's answers token by token; see `Task.measure`."""
        questions = self.questions(context.files)
        self.warn_if_fewer(len(questions), "questions", context.progress)
        self._check_reserved_tokens(questions, context.original_checkpoint)
        question_sets = self._question_sets(questions, context)
        answers, look = self._measure_looks(question_sets, context)
        items, scores = [item for item, _ in answers], [score for _, score in answers]
        write_items(context.output_dir, self.name, items)
        questions_measured = [question for question_set in question_sets for question in question_set.questions][: len(items)]
        original = [item for question_set in question_sets for item in question_set.original or ()][: len(items)]
        fidelity = fidelity_of(scores)
        if fidelity is not None and context.original_measurement is not None:
            fidelity = compare_answers(fidelity, original, items, self.same)
        return TaskMeasurement(
            name=self.name,
            metrics=self._metrics(questions_measured, items),
            fidelity=fidelity,
            noise=self._noise(question_sets, items, context),
            look=look,
            looks=None if context.stopping is None else context.stopping.looks,
        )

    def ask(self, question_set: QuestionSet, context: TaskContext) -> list[ScoredAnswer]:
        """Generate answers to the questions, and score the original's answers; where the original is measured, its own.

        Raises:
            CheckpointError: the runtime predicts no finite numbers.
            ServerError: the runtime does not answer any more.
        """
        prompts, limit = self.prompts(question_set), self.resolved_definition().max_new_tokens
        answers = answer_all(
            capable(context.session, Generates), prompts, limit, context.output_dir, question_set.name, context.progress
        )
        ends = required_end_tokens(context.original_checkpoint)
        own_tokens = [_with_end(answer, limit, ends) for answer in answers]
        # Artifacts score the original's answers, not their own: KL needs both models' predictions of the same tokens.
        scored_tokens = own_tokens if question_set.original is None else [item.token_ids for item in question_set.original]
        passages = [Passage(id=prompt.id, token_ids=ids, prompt=prompt) for prompt, ids in zip(prompts, scored_tokens, strict=True)]
        scores = score_passages(context, question_set.name, passages)
        scores = compare_full_vocabulary(context, question_set.name, passages, scores, look_count(context))
        return [
            (self._item(question_set, question, answer, ids, score), score)
            for question, answer, ids, score in zip(question_set.questions, answers, own_tokens, scores, strict=True)
        ]

    def ask_again(self, question_set: QuestionSet, context: TaskContext) -> list[ScoredAnswer]:
        """Generate the original's answers once more, and score its first answers twice, to measure the noise between runs.

        A server gets the requests in another order and in other batches.
        """
        prompts, first_items, session = self.prompts(question_set), question_set.original or (), reordered_session(context.session)
        limit = self.resolved_definition().max_new_tokens
        answers = answer_all(
            capable(session, Generates), prompts, limit, context.output_dir, repeat_name(question_set.name), context.progress
        )
        passages = [
            Passage(id=item.id, token_ids=item.token_ids, prompt=prompt) for item, prompt in zip(first_items, prompts, strict=True)
        ]
        scores = score_twice(context, question_set.name, passages)
        return [
            (self._item(question_set, question, answer, item.token_ids, score), score)
            for question, answer, item, score in zip(question_set.questions, answers, first_items, scores, strict=True)
        ]

    def prompts(self, question_set: QuestionSet) -> list[Prompt]:
        """Return the questions' prompts, in their order."""
        return [
            Prompt(id=question.id, text=self.prompt_text(question), images=question.images) for question in question_set.questions
        ]

    def prompt_note(self) -> str:
        """Return the prompt and its definition, for a report."""
        definition, overrides = self.resolved_definition(), sorted(self._overrides())
        note = f", with the recipe's own {' and '.join(overrides)}" if overrides else ""
        return f"prompt {definition.prompt!r} ({definition.name}, version {definition.version}{note})"

    def _overrides(self) -> dict[str, Any]:
        """Return the fields of the definition that the recipe overrides."""
        values = {name: getattr(self, name, None) for name in _OVERRIDES}
        return {name: value for name, value in values.items() if value is not None}

    def _default_columns(self) -> Columns:
        """Return the default columns of a source that is not the definition's."""
        return Columns()

    def _uses_definition_source(self, definition: Definition) -> bool:
        return self.source is None or self.source == definition.source

    def _check_reserved_tokens(self, questions: Sequence[Question], original: Path) -> None:
        from compress.data.prompts import check_reserved, load_tokenizer

        reserved = load_tokenizer(original).all_special_tokens
        for question in questions:
            check_reserved((self.prompt_text(question),), reserved, self.location(question))

    def _question_sets(self, questions: Sequence[Question], context: TaskContext) -> list[QuestionSet]:
        """Return the questions of each look: one in the files' order without a stopping rule, else several in random order."""
        # Data files are often sorted (by category, by difficulty): a first look must be a random sample of all.
        ordered = list(questions) if context.stopping is None else _shuffle_clusters(questions, self.seed)
        ends = [len(ordered)] if context.stopping is None else list(context.stopping.cumulative_items(len(ordered)))
        original = self._original_items(ordered, context)
        scorer = self.scorer(ordered)
        return [
            QuestionSet(
                name=self.name if context.stopping is None else f"{self.name}@{look}",
                questions=ordered[start:end],
                original=None if original is None else original[start:end],
                scorer=scorer,
            )
            for look, (start, end) in enumerate(pairwise([0, *ends]), 1)
        ]

    def _measure_looks(self, question_sets: Sequence[QuestionSet], context: TaskContext) -> tuple[list[ScoredAnswer], int | None]:
        """Measure look by look until the stopping rule decides; return the items, and the number of the look that decided."""
        answered = list[ScoredAnswer]()
        original = list[QuestionItem]()
        for look, question_set in enumerate(question_sets, 1):
            answered += self.ask(question_set, context) if question_set.questions else []
            # The original is measured on all items: artifacts may stop at different looks.
            if context.stopping is None or question_set.original is None:
                continue
            original += question_set.original
            if look == len(question_sets) or context.stopping.is_decided(original, [item for item, _ in answered], look):
                return answered, look
        return answered, None

    def _original_items(self, questions: Sequence[Question], context: TaskContext) -> list[QuestionItem] | None:
        original = original_items(context, self.name, QuestionItem, ((question.id, question.digest) for question in questions))
        for item, question in zip(original or (), questions, strict=original is not None):
            if item.prompt != self.prompt_text(question):
                raise DataError(
                    f"task {self.name}: item {item.id} was asked in other words when the original was measured; measure the "
                    "original again with --fresh"
                )
        return original

    def _item(
        self, question_set: QuestionSet, question: Question, answer: Answer, token_ids: tuple[int, ...], score: Score
    ) -> QuestionItem:
        return QuestionItem(
            id=question.id,
            digest=question.digest,
            cluster=cluster_of(question),
            prompt=self.prompt_text(question),
            accepted=self.accepted(question),
            said=answer.text,
            score=0.0 if answer.fault else question_set.scorer(question, answer.text),
            fault=answer.fault,
            token_ids=token_ids,
            tokens=len(score.negative_log_likelihood),
            **token_sums(score),
        )

    def _metrics(self, questions: Sequence[Question], items: Sequence[QuestionItem]) -> ScoreMetrics:
        version, details = self.resolved_definition().version, self.figures(questions, items)
        return ScoreMetrics.of(self.task, self.metric_name, items, definition_version=version, details=details)

    def _noise(self, question_sets: Sequence[QuestionSet], items: Sequence[QuestionItem], context: TaskContext) -> Fidelity | None:
        """Return how much the original's answers and predictions change in a second run, None where none is asked for."""
        questions = [question for question_set in question_sets for question in question_set.questions][: context.noise_samples]
        if context.original_measurement is not None or not questions:
            return None
        first_items = items[: len(questions)]
        question_set = replace(question_sets[0], name=self.name, questions=questions, original=first_items)
        answers = self.ask_again(question_set, context)
        fidelity = fidelity_of([score for _, score in answers])
        if fidelity is None:
            return None
        repeated_items = [item for item, _ in answers]
        write_items(context.output_dir, repeat_name(self.name), repeated_items)
        return compare_answers(fidelity, first_items, repeated_items, self.same)


def _tasks_taking(kind: Kind) -> list[str]:
    """Return the names of the tasks that take definitions of a kind."""
    rows = {name: load_row(TASKS, name) for name in TASKS}
    return [name for name, row in rows.items() if issubclass(row, QuestionTask) and row.kind == kind]


def look_count(context: TaskContext) -> int:
    """Return the number of looks at a task's items: 1 without a stopping rule."""
    return 1 if context.stopping is None else context.stopping.looks


def _with_end(answer: Answer, limit: int, end_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Return the answer's tokens with the end token, unless `limit` cut it off; empty where the server gives no token ids."""
    ids = answer.token_ids
    if answer.fault or (answer.text and not ids):
        return ()
    # Shorter than allowed means that it ended by itself: whether a model stops is part of what it predicts.
    ended = len(ids) < limit and not (ids and ids[-1] in end_tokens)
    return (*ids, end_tokens[0]) if ended else ids


def _shuffle_clusters(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions in random order by clusters: those about the same images stay together."""
    # By clusters: a look that splits one would count its items as independent of those in the next.
    clusters: dict[str, list[Question]] = {}
    for question in questions:
        clusters.setdefault(cluster_of(question), []).append(question)
    shuffled = list(clusters.values())
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - no secret
    return [question for cluster in shuffled for question in cluster]


def _by_category(column: str | None, questions: Sequence[Question], items: Sequence[QuestionItem]) -> dict[str, float]:
    """Return the mean score of each category's items."""
    scores = dict[str, list[float]]()
    for question, item in zip(questions, items, strict=True):
        if question.category is not None:
            scores.setdefault(f"{column}={question.category}", []).append(item.score)
    return {category: math.fsum(values) / len(values) for category, values in sorted(scores.items())}
