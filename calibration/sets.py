"""The calibration sets of a recipe, as data: their fields are the recipe's keys."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from compress.schema import Frozen, Source


class Columns(Frozen):
    """The names of a question file's fields, where they are not the usual ones; `question` is None where images have none."""

    id: str = "id"
    image: str = "image"
    question: str | None = "question"
    answer: str = "answer"


class TextSource(Frozen):
    """Where running text comes from: a local text, parquet or JSONL file, or a hub dataset."""

    source: Source
    subset: str | None = None
    split: str = "train"
    revision: str = "main"
    column: str = "text"


class QuestionSource(Frozen):
    """Where questions about images come from: a local JSONL or parquet file, or a hub dataset."""

    source: Source
    subset: str | None = None
    split: str = "train"
    revision: str = "main"
    columns: Columns = Columns()

    @model_validator(mode="after")
    def _check_question(self) -> Self:
        if self.columns.question is None:
            raise ValueError("columns.question is null: name the column with the questions")
        return self


class Text(TextSource):
    """Running text, packed to windows of exactly `tokens` tokens."""

    dataset: Literal["text"]
    samples: PositiveInt
    tokens: PositiveInt


class Wikitext(TextSource):
    """Wikitext as published on the hub, or any local copy of it, packed to windows of exactly `tokens` tokens."""

    dataset: Literal["wikitext"]
    source: Source = "Salesforce/wikitext"
    subset: str | None = "wikitext-2-raw-v1"
    samples: PositiveInt
    tokens: PositiveInt


class Vqa(QuestionSource):
    """Images with a question and its answer, through the model's own chat template and processor."""

    dataset: Literal["vqa"]
    samples: PositiveInt
    prompt: str = Field(default="{question}", pattern=r"\{question\}")
