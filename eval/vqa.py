"""How many questions about images a model answers right, and how faithfully it repeats the original's answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AfterValidator, PositiveInt, ValidationInfo, model_validator

from compress.calibration.sets import Columns, QuestionSource
from compress.checkpoint import read_json_object
from compress.errors import CheckpointError, DataError, RecipeError
from compress.eval.definition import Definition, find_definition, read_definition
from compress.eval.normalize import exact_match, normalize
from compress.eval.results import (
    Fidelity,
    QuestionItem,
    ScoreMetrics,
    TaskMeasurement,
    check_pairs,
    read_items,
    write_items,
)
from compress.eval.task import (
    Task,
    TaskContext,
    cluster_of,
    count,
    draw_questions,
    fidelity_of,
    flips,
    score_passages,
    total,
    warn_of_few,
)
from compress.runtimes.runtime import Answer, Passage, Prompt, Score
from compress.schema import Source

if TYPE_CHECKING:
    from compress.calibration.questions import Question
    from compress.calibration.texts import Document


def _resolve_definition(value: str, info: ValidationInfo) -> str:
    base = Path(cast("dict[str, Any]", info.context or {}).get("base", "."))
    path = find_definition(value, base)
    try:
        read_definition(path)
    except RecipeError as error:
        raise ValueError("; ".join(error.faults)) from error
    return str(path)


class Vqa(Task):
    """Questions about images, asked as `definition` says: the name of a shipped one, or a file relative to the recipe.

    A `source` of its own replaces the definition's, and then so do `subset`, `split`, `revision` and `columns`, given or not: what
    the definition says of them is true of its own source only. `samples` draws at most so many of the questions, with `seed`.
    """

    task_revision: ClassVar[int] = 2

    task: Literal["vqa"]
    definition: Annotated[str, AfterValidator(_resolve_definition)]
    source: Source | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: Columns | None = None
    samples: PositiveInt | None = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        return {"name": Path(str(given.get("definition", ""))).stem, **given}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source is None and self.read().source is None:
            raise ValueError(f"the definition {Path(self.definition).stem} names no data; give source, a JSONL or parquet file")
        if self.columns is not None and self.columns.question is None:
            raise ValueError("columns.question is null: name the column with the questions")
        return self

    def read(self) -> Definition:
        """Return the task's definition.

        Raises:
            RecipeError: its file has changed and is no definition any more.
        """
        return read_definition(Path(self.definition))

    @property
    def data(self) -> QuestionSource:
        """Where the questions come from."""
        definition = self.read()
        own = self.source is None or self.source == definition.source
        usual = definition if own else QuestionSource.model_construct(source=str(self.source), split="test")
        return QuestionSource.model_construct(
            source=str(self.source or definition.source),
            subset=self.subset or usual.subset,
            split=self.split or usual.split,
            revision=self.revision or usual.revision,
            columns=self.columns or usual.columns,
        )

    def settings(self) -> dict[str, Any]:
        """Return the definition's content, the columns, how questions are drawn, and the task's revision."""
        definition = self.read().model_dump(include={"name", "version", "prompt", "max_new_tokens", "metric"})
        drawn = self.model_dump(include={"name", "samples", "seed"})
        return {"task": self.task, "revision": self.task_revision, "definition": definition, **drawn} | {
            "columns": self.data.columns.model_dump()
        }

    def questions(self, files: Sequence[Path]) -> list[Question]:
        """Return the questions that are asked, in the files' order.

        Raises:
            DataError: a file or question cannot be used, there is none, or one has no accepted answer.
        """
        questions = draw_questions(files, self.data.columns, self.samples, self.seed)
        for question in questions:
            if not question.answers:
                raise DataError(f"task {self.name}: {question.origin}: question {question.id} has no accepted answer; add one")
        return questions

    def _check_words(self, questions: Sequence[Question], original: Path) -> None:
        from compress.calibration.collect import load_tokenizer
        from compress.conversation import check_reserved

        definition, reserved = self.read(), load_tokenizer(original).all_special_tokens
        for question in questions:
            name = f"task {self.name}: {question.origin}: question {question.id}"
            check_reserved((definition.ask(question.question),), reserved, name)

    def note(self) -> str:
        """Return how the questions are asked and judged."""
        definition = self.read()
        drawn = f", at most {self.samples:,} drawn with seed {self.seed}" if self.samples else ""
        return (
            f"share of questions{drawn}, whose answer equals an accepted one after VQA v2's normalization; greedy, at most "
            f"{definition.max_new_tokens} tokens, prompt {definition.prompt!r} ({definition.name}, version {definition.version}); "
            "KL and top-1 are of the original's own answers"
        )

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the questions that are asked; see `Task.contents`."""
        return self.questions(files), ()

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Ask the questions and score the original's answers to them; see `Task.measure`."""
        definition = self.read()
        questions = self.questions(context.files)
        warn_of_few(context, self.name, self.samples, len(questions), "questions")
        self._check_words(questions, context.original)
        original = _original_items(self.name, questions, definition, context)
        prompts = [Prompt(id=question.id, text=definition.ask(question.question), images=question.images) for question in questions]
        answers = context.session.answer(prompts, definition.max_new_tokens, context.progress)
        if [answer.id for answer in answers] != [question.id for question in questions]:
            raise CheckpointError(f"task {self.name}: the runtime did not answer the {len(questions)} questions in their order")
        end_tokens = read_end_tokens(context.original)
        spoken = [_with_end(answer, definition.max_new_tokens, end_tokens) for answer in answers]
        forced = spoken if original is None else [item.token_ids for item in original]
        passages = [Passage(id=prompt.id, token_ids=ids, prompt=prompt) for prompt, ids in zip(prompts, forced, strict=True)]
        scores = score_passages(context, self.name, passages)
        items = [_item(definition, *parts) for parts in zip(questions, answers, spoken, scores, strict=True)]
        write_items(context.target, self.name, items)
        metrics = ScoreMetrics(
            task=self.task,
            metric=definition.metric,
            score=math.fsum(item.score for item in items) / len(items),
            items=len(items),
            failed=sum(item.fault is not None for item in items),
            definition_version=definition.version,
        )
        fidelity = fidelity_of(scores)
        if fidelity is not None and original is not None:
            fidelity = _with_flips(fidelity, original, items)
        return TaskMeasurement(name=self.name, metrics=metrics, fidelity=fidelity)


def _original_items(
    name: str, questions: Sequence[Question], definition: Definition, context: TaskContext
) -> list[QuestionItem] | None:
    if context.against is None:
        return None
    original = [item for item in read_items(context.against, name) if isinstance(item, QuestionItem)]
    check_pairs(name, original, ((question.id, question.digest) for question in questions))
    for item, question in zip(original, questions, strict=True):
        if item.prompt != definition.ask(question.question):
            raise DataError(
                f"task {name}: item {item.id} was asked in other words when the original was measured; measure the original "
                "again with --fresh"
            )
    return original


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
        found: object = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if found is not None:
            return tuple(cast("list[int]", found)) if isinstance(found, list) else (cast("int", found),)
    raise CheckpointError(f"{folder}: no eos_token_id in generation_config.json or config.json; add it, so that answers can end")


def _with_end(answer: Answer, limit: int, end_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Return the answer's tokens and, unless it was cut off at the limit, the token that ended it."""
    ids = answer.token_ids
    ended = len(ids) < limit and not (ids and ids[-1] in end_tokens)
    return (*ids, end_tokens[0]) if ended else ids


def _item(definition: Definition, question: Question, answer: Answer, token_ids: tuple[int, ...], score: Score) -> QuestionItem:
    return QuestionItem(
        id=question.id,
        digest=question.digest,
        cluster=cluster_of(question),
        prompt=definition.ask(question.question),
        accepted=question.answers,
        said=answer.text,
        score=float(exact_match(answer.text, question.answers)),
        token_ids=token_ids,
        tokens=len(score.negative_log_likelihood),
        nll=float(score.negative_log_likelihood.sum()),
        kl=total(score.kl),
        same_top=count(score.same_top),
    )


def _with_flips(fidelity: Fidelity, original: Sequence[QuestionItem], items: Sequence[QuestionItem]) -> Fidelity:
    changed = sum(normalize(old.said) != normalize(new.said) for old, new in zip(original, items, strict=True))
    return fidelity.model_copy(update={**flips(original, items), "changed": changed})
