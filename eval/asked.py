"""What the tasks share whose questions a model answers as a definition says: asking, scoring, and comparing with the original."""

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

from compress.calibration.sets import Columns, ImageFolder, QuestionSource, RowFilter
from compress.checkpoint import read_json_object
from compress.errors import CheckpointError, DataError, RecipeError
from compress.eval.definition import Definition, Kind, find_definition, read_definition
from compress.eval.journal import answer_all
from compress.eval.metrics import figures_of
from compress.eval.normalize import normalize
from compress.eval.results import Fidelity, QuestionItem, ScoreMetrics, TaskMeasurement, again, check_pairs, read_items, write_items
from compress.eval.task import (
    Task,
    TaskContext,
    asked_otherwise,
    cluster_of,
    count,
    draw_questions,
    fidelity_of,
    flips,
    score_again,
    score_passages,
    total,
    warn_of_few,
)
from compress.eval.whole import compare_whole
from compress.runtimes.runtime import Answer, Passage, Prompt, Score
from compress.schema import Source

if TYPE_CHECKING:
    from compress.calibration.questions import Question
    from compress.calibration.texts import Document

_OWN_WORDS = ("prompt", "max_new_tokens", "metric")
"""What a recipe may say in a definition's place, where a kind of task has it as a key."""

Scorer = Callable[["Question", str], float]
"""Takes a question and what was said to it, and returns the score."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are asked together, under a name of their own; `original` are the original's items, None where it is asked."""

    name: str
    questions: Sequence[Question]
    original: Sequence[QuestionItem] | None
    scorer: Scorer


Answered = tuple[QuestionItem, Score]
"""An item, and how its tokens were predicted."""


class Asked(Task, ABC):
    """Questions about images, asked as `definition` says: the name of a shipped one, or a file relative to the recipe.

    A `source` of its own replaces the definition's, and then so do `subset`, `split`, `revision`, `columns`, `where` and
    `text_only`, given or not: what the definition says of them is true of its own source only. `samples` draws at most so many of
    the questions, with `seed`. A `prompt` and `max_new_tokens` take the place of the definition's.
    """

    asks: ClassVar[bool] = True
    kind: ClassVar[Kind]
    """The kind of task that its definitions must be of."""

    definition: str
    source: Source | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: Columns | None = None
    image_folder: ImageFolder | None = None
    prompt: str | None = None
    max_new_tokens: PositiveInt | None = None
    samples: PositiveInt | None = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        usual = cls.model_fields["definition"].get_default()
        definition = str(given.get("definition", usual if isinstance(usual, str) else ""))
        return {"name": Path(definition).stem, **given}

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
            raise ValueError(f"the definition {definition.name} is of a {definition.task}; write task: {definition.task}")
        return str(path)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        definition = read_definition(Path(self.definition)).changed(self._own_words())
        if self.source is None and definition.source is None:
            raise ValueError(f"the definition {definition.name} names no data; give source, a JSONL or parquet file")
        if self.columns is not None and self.columns.question is None and "{question}" in definition.prompt:
            raise ValueError("columns.question is null: name the column with the questions")
        return self

    @abstractmethod
    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return what scores an answer, given all questions of the task, answered or not."""

    @abstractmethod
    def note(self) -> str:
        """Return how its figures come about, one sentence for the report."""

    @property
    def scored_by(self) -> str:
        """What reports call the score."""
        return self.read().metric

    @property
    def binary(self) -> bool:
        """Whether every item's score is 0 or 1."""
        return self.read().binary

    def wording(self, question: Question) -> str:
        """Return the text that a model is asked."""
        return self.read().ask(question.question)

    def accepted(self, question: Question) -> tuple[str, ...]:
        """Return the answers that count as right, as reports show them.

        Raises:
            DataError: there is none, or what the data say cannot be one; without the question's name.
        """
        if not question.answers:
            raise DataError("has no accepted answer; add one")
        return question.answers

    def same(self, said: str, other: str) -> bool:
        """Return whether two answers say the same."""
        return normalize(said) == normalize(other)

    def figures(self, questions: Sequence[Question], items: Sequence[QuestionItem]) -> dict[str, float]:
        """Return further figures: those of the metric, and the mean score of each category, as `column=category`."""
        answers = [(None if item.fault else item.said, item.accepted) for item in items]
        return dict(figures_of(self.scored_by, answers)) | _by_category(self.data.columns.category, questions, items)

    def read(self) -> Definition:
        """Return the task's definition, with what the recipe says otherwise.

        Raises:
            RecipeError: its file has changed and is no definition any more.
        """
        return read_definition(Path(self.definition)).model_copy(update=self._own_words())

    @property
    def data(self) -> QuestionSource:
        """Where the questions come from."""
        definition = self.read()
        foreign = QuestionSource.model_construct(source=str(self.source), split="test", columns=self._usual_columns())
        usual = definition if self._own_data(definition) else foreign
        return QuestionSource.model_construct(
            source=str(self.source or definition.source),
            subset=self.subset or usual.subset,
            split=self.split or usual.split,
            revision=self.revision or usual.revision,
            columns=self.columns or usual.columns,
            image_folder=self.image_folder,
        )

    @property
    def rows(self) -> RowFilter:
        """Which rows of its data count."""
        definition = self.read()
        return definition.rows if self._own_data(definition) else RowFilter()

    def settings(self) -> dict[str, Any]:
        """Return the definition's content, the columns, how questions are drawn, and the task's revision."""
        said = {"name", "version", "task", "prompt", "max_new_tokens", "metric", "labels"}
        elsewhere = {"definition", "source", "subset", "split", "revision", "columns", "image_folder", *_OWN_WORDS}
        own = self.model_dump(mode="json", exclude=elsewhere)
        return own | {
            "revision": self.task_revision,
            "definition": self.read().model_dump(mode="json", include=said),
            "columns": self.data.columns.model_dump(mode="json"),
            "rows": self.rows.model_dump(mode="json"),
        }

    def questions(self, files: Sequence[Path]) -> list[Question]:
        """Return the questions that are asked, in the files' order.

        Raises:
            DataError: a file or question cannot be used, there is none, or one has no accepted answer.
        """
        questions = draw_questions(files, self.data, self.samples, self.seed, self.rows)
        for question in questions:
            try:
                self.accepted(question)
            except DataError as error:
                raise DataError(f"task {self.name}: {question.origin}: question {question.id} {error}") from error
        return questions

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the questions that are asked; see `Task.contents`."""
        return self.questions(files), ()

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Ask the questions and score the original's answers to them; see `Task.measure`."""
        questions = self.questions(context.files)
        warn_of_few(context, self.name, self.samples, len(questions), "questions")
        self._check_words(questions, context.original)
        parts = self._parts(questions, context)
        answered, look = self._go_through(parts, context)
        items, scores = [item for item, _ in answered], [score for _, score in answered]
        write_items(context.target, self.name, items)
        asked = [question for part in parts for question in part.questions][: len(items)]
        original = [item for part in parts for item in part.original or ()][: len(items)]
        fidelity = fidelity_of(scores)
        if fidelity is not None and context.against is not None:
            fidelity = self._with_flips(fidelity, original, items)
        return TaskMeasurement(
            name=self.name,
            metrics=self._metrics(asked, items),
            fidelity=fidelity,
            noise=self._noise(parts, items, context),
            look=look,
            looks=None if context.stopping is None else context.stopping.looks,
        )

    def ask(self, part: QuestionSet, context: TaskContext) -> list[Answered]:
        """Ask a part's questions, and score the original's answers to them, or the model's own where it is the original.

        Raises:
            CheckpointError: the runtime predicts no finite numbers.
            ServerError: the runtime does not answer any more.
        """
        prompts, limit = self.prompts(part), self.read().max_new_tokens
        answers = answer_all(context.session, prompts, limit, context.target, part.name, context.progress)
        end_tokens = read_end_tokens(context.original)
        spoken = [_with_end(answer, limit, end_tokens) for answer in answers]
        forced = spoken if part.original is None else [item.token_ids for item in part.original]
        passages = [Passage(id=prompt.id, token_ids=ids, prompt=prompt) for prompt, ids in zip(prompts, forced, strict=True)]
        scores = score_passages(context, part.name, passages)
        scores = compare_whole(context, part.name, passages, scores, parts_of(context))
        return [
            (self._item(part, question, said, ids, score), score)
            for question, said, ids, score in zip(part.questions, answers, spoken, scores, strict=True)
        ]

    def ask_again(self, part: QuestionSet, context: TaskContext) -> list[Answered]:
        """Ask a part's questions, which the original has answered, once more, and score its answers twice, to compare them.

        They are asked in another order and in other batches, where it is a server that is asked.
        """
        prompts, before, session = self.prompts(part), part.original or (), asked_otherwise(context.session)
        limit = self.read().max_new_tokens
        answers = answer_all(session, prompts, limit, context.target, again(part.name), context.progress)
        passages = [
            Passage(id=item.id, token_ids=item.token_ids, prompt=prompt) for item, prompt in zip(before, prompts, strict=True)
        ]
        scores = score_again(context, part.name, passages)
        return [
            (self._item(part, question, said, item.token_ids, score), score)
            for question, said, item, score in zip(part.questions, answers, before, scores, strict=True)
        ]

    def prompts(self, part: QuestionSet) -> list[Prompt]:
        """Return what a part's questions are as prompts, in their order."""
        return [Prompt(id=question.id, text=self.wording(question), images=question.images) for question in part.questions]

    def asked_as(self) -> str:
        """Return with which prompt questions are asked, and by which definition, for a report."""
        definition, own = self.read(), sorted(self._own_words())
        changed = f", with the recipe's own {' and '.join(own)}" if own else ""
        return f"prompt {definition.prompt!r} ({definition.name}, version {definition.version}{changed})"

    def _own_words(self) -> dict[str, Any]:
        """Return what of the definition the recipe says otherwise."""
        given = {name: getattr(self, name, None) for name in _OWN_WORDS}
        return {name: value for name, value in given.items() if value is not None}

    def _usual_columns(self) -> Columns:
        """Return the columns of data that are not the definition's own, where the recipe names none."""
        return Columns()

    def _own_data(self, definition: Definition) -> bool:
        return self.source is None or self.source == definition.source

    def _check_words(self, questions: Sequence[Question], original: Path) -> None:
        from compress.conversation import check_reserved, load_tokenizer

        reserved = load_tokenizer(original).all_special_tokens
        for question in questions:
            name = f"task {self.name}: {question.origin}: question {question.id}"
            check_reserved((self.wording(question),), reserved, name)

    def _parts(self, questions: Sequence[Question], context: TaskContext) -> list[QuestionSet]:
        """Return the questions as one part in their order, or, where they are drawn until it is settled, as several by lot."""
        ordered = list(questions) if context.stopping is None else _by_lot(questions, self.seed)
        ends = [len(ordered)] if context.stopping is None else list(context.stopping.ends(len(ordered)))
        original = self._original_items(ordered, context)
        scorer = self.scorer(ordered)
        return [
            QuestionSet(
                name=self.name if context.stopping is None else f"{self.name}@{look}",
                questions=ordered[first:last],
                original=None if original is None else original[first:last],
                scorer=scorer,
            )
            for look, (first, last) in enumerate(pairwise([0, *ends]), 1)
        ]

    def _go_through(self, parts: Sequence[QuestionSet], context: TaskContext) -> tuple[list[Answered], int | None]:
        """Ask part after part until an artifact needs no more; return the items, and after which part it was settled."""
        answered = list[Answered]()
        original = list[QuestionItem]()
        for look, part in enumerate(parts, 1):
            answered += self.ask(part, context) if part.questions else []
            if context.stopping is None or part.original is None:
                continue
            original += part.original
            if look == len(parts) or context.stopping.settled(original, [item for item, _ in answered], look):
                return answered, look
        return answered, None

    def _original_items(self, questions: Sequence[Question], context: TaskContext) -> list[QuestionItem] | None:
        if context.against is None:
            return None
        original = [item for item in read_items(context.against, self.name) if isinstance(item, QuestionItem)]
        check_pairs(self.name, original, ((question.id, question.digest) for question in questions))
        for item, question in zip(original, questions, strict=True):
            if item.prompt != self.wording(question):
                raise DataError(
                    f"task {self.name}: item {item.id} was asked in other words when the original was measured; measure the "
                    "original again with --fresh"
                )
        return original

    def _item(
        self, part: QuestionSet, question: Question, answer: Answer, token_ids: tuple[int, ...], score: Score
    ) -> QuestionItem:
        return QuestionItem(
            id=question.id,
            digest=question.digest,
            cluster=cluster_of(question),
            prompt=self.wording(question),
            accepted=self.accepted(question),
            said=answer.text,
            score=0.0 if answer.fault else part.scorer(question, answer.text),
            fault=answer.fault,
            token_ids=token_ids,
            tokens=len(score.negative_log_likelihood),
            nll=float(score.negative_log_likelihood.sum()),
            kl=total(score.kl),
            same_top=count(score.same_top),
        )

    def _metrics(self, questions: Sequence[Question], items: Sequence[QuestionItem]) -> ScoreMetrics:
        return ScoreMetrics(
            task=self.kind,
            metric=self.scored_by,
            score=math.fsum(item.score for item in items) / len(items),
            items=len(items),
            failed=sum(item.fault is not None for item in items),
            binary=self.binary,
            definition_version=self.read().version,
            details=self.figures(questions, items),
        )

    def _noise(self, parts: Sequence[QuestionSet], items: Sequence[QuestionItem], context: TaskContext) -> Fidelity | None:
        """Return how much the original's answers and predictions change when it is asked once more, None where none is."""
        asked = [question for part in parts for question in part.questions][: context.noise]
        if context.against is not None or not asked:
            return None
        first = items[: len(asked)]
        part = replace(parts[0], name=self.name, questions=asked, original=first)
        answered = self.ask_again(part, context)
        fidelity = fidelity_of([score for _, score in answered])
        if fidelity is None:
            return None
        repeated = [item for item, _ in answered]
        write_items(context.target, again(self.name), repeated)
        return self._with_flips(fidelity, first, repeated)

    def _with_flips(self, fidelity: Fidelity, original: Sequence[QuestionItem], items: Sequence[QuestionItem]) -> Fidelity:
        changed = sum(not self.same(old.said, new.said) for old, new in zip(original, items, strict=True))
        return fidelity.model_copy(update={**flips(original, items), "changed": changed})


def parts_of(context: TaskContext) -> int:
    """Return in how many parts a task's questions are asked."""
    return 1 if context.stopping is None else context.stopping.looks


def drawn(samples: int | None, seed: int) -> str:
    """Return how a report says that not all questions were taken."""
    return f", at most {samples:,} drawn with seed {seed}," if samples else ""


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer, the usual one first, from a checkpoint's generation config or config.

    Raises:
        CheckpointError: neither names one.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        config = read_json_object(path)
        text = cast("dict[str, Any]", config.get("text_config") or {})
        found: object = config.get("eos_token_id", text.get("eos_token_id"))
        if found is not None:
            return tuple(cast("list[int]", found)) if isinstance(found, list) else (cast("int", found),)
    raise CheckpointError(f"{folder}: no eos_token_id in generation_config.json or config.json; add it, so that answers can end")


def _with_end(answer: Answer, limit: int, end_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Return the answer's tokens and, unless it was cut off at the limit, what ended it; none where they are not known."""
    ids = answer.token_ids
    if answer.fault or (answer.text and not ids):
        return ()
    ended = len(ids) < limit and not (ids and ids[-1] in end_tokens)
    return (*ids, end_tokens[0]) if ended else ids


def _by_lot(questions: Sequence[Question], seed: int) -> list[Question]:
    """Return the questions in an order drawn with a seed, in which those about the same images stay together."""
    clusters: dict[str, list[Question]] = {}
    for question in questions:
        clusters.setdefault(cluster_of(question), []).append(question)
    drawn_by_lot = list(clusters.values())
    random.Random(seed).shuffle(drawn_by_lot)  # noqa: S311 - no secret
    return [question for together in drawn_by_lot for question in together]


def _by_category(column: str | None, questions: Sequence[Question], items: Sequence[QuestionItem]) -> dict[str, float]:
    """Return the mean score of each category's items."""
    scores = dict[str, list[float]]()
    for question, item in zip(questions, items, strict=True):
        if question.category is not None:
            scores.setdefault(f"{column}={question.category}", []).append(item.score)
    return {category: math.fsum(found) / len(found) for category, found in sorted(scores.items())}
