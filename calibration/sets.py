"""The calibration sets of a recipe, as data: their fields are the recipe's keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, ValidationInfo, model_validator

from compress.schema import Frozen, Source, resolve_source

Names = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""A field, or several that together hold one thing."""


class Columns(Frozen):
    """The names of a question file's fields, where they are not the usual ones; `question` is None where images have none.

    `image`, `answer` and `options` (of a multiple choice) may be several fields, of which any may be empty; `id` may be
    several that only together tell rows apart. `category` is what a row counts under in figures of its own.
    """

    id: Names = "id"
    image: Names = "image"
    question: str | None = "question"
    answer: Names = "answer"
    options: Names | None = None
    category: str | None = None

    def named(self, what: Literal["id", "image", "question", "answer", "options", "category"]) -> tuple[str, ...]:
        """Return the fields that hold something, none where nothing does."""
        names = cast("str | tuple[str, ...] | None", getattr(self, what))
        return () if names is None else (names,) if isinstance(names, str) else names


def _spelled(value: Any) -> Any:
    values = list(cast("list[object]", value)) if isinstance(value, list | tuple) else [value]
    return [str(entry) if isinstance(entry, int | float) and not isinstance(entry, bool) else entry for entry in values]


Values = Annotated[tuple[str, ...], BeforeValidator(_spelled), Field(min_length=1)]
"""What a field may hold: one value or several."""


class RowFilter(Frozen):
    """Which rows of a question file count: `where` fields hold one of their values; with `text_only`, those with no image too."""

    where: Mapping[str, Values] = Field(default_factory=lambda: dict[str, tuple[str, ...]]())
    text_only: bool = False


def _resolve_folder(value: str, info: ValidationInfo) -> str:
    found = Path(resolve_source(value, info)).resolve() if value.strip() else Path()
    if not value.strip() or not found.is_dir():
        raise ValueError(f"no folder at {value}; name one that holds the images")
    return str(found)


ImageFolder = Annotated[str, AfterValidator(_resolve_folder)]
"""A folder, relative to the recipe, below which the images lie that a question file names by their paths.

Without it they must lie below the file's own folder: a file of a stranger's must not name what else is on this machine.
"""


class TextSource(Frozen):
    """Where running text comes from: a local text, parquet or JSONL file, or a hub dataset."""

    source: Source
    subset: str | None = None
    split: str = "train"
    revision: str = "main"
    column: str = "text"


class QuestionSource(Frozen):
    """Where questions about images come from: a local JSONL, JSON or parquet file, or a hub dataset."""

    source: Source
    subset: str | None = None
    split: str = "train"
    revision: str = "main"
    columns: Columns = Columns()
    image_folder: ImageFolder | None = None

    @model_validator(mode="after")
    def _check_question(self) -> Self:
        if self.columns.question is None:
            raise ValueError("columns.question is null: name the column with the questions")
        if self.columns.options is not None or self.columns.category is not None:
            raise ValueError("columns.options and columns.category are for tasks of the evaluation; remove them here")
        return self


class TextSet(TextSource):
    """Running text, packed to windows of exactly `tokens` tokens."""

    dataset: Literal["text"]
    samples: PositiveInt
    tokens: PositiveInt


class WikitextSet(TextSource):
    """Wikitext as published on the hub, or any local copy of it, packed to windows of exactly `tokens` tokens."""

    dataset: Literal["wikitext"]
    source: Source = "Salesforce/wikitext"
    subset: str | None = "wikitext-2-raw-v1"
    samples: PositiveInt
    tokens: PositiveInt


class VqaSet(QuestionSource):
    """Images with a question and its answer, through the model's own chat template and processor.

    With `text_only`, rows without an image are questions of text alone.
    """

    dataset: Literal["vqa"]
    samples: PositiveInt
    text_only: bool = False
    prompt: str = Field(default="{question}", pattern=r"\{question\}")

    @property
    def rows(self) -> RowFilter:
        """Which rows count."""
        return RowFilter(text_only=self.text_only)
