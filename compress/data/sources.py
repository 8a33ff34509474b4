"""Sources of questions and texts, as recipes name them: a file or a hub's dataset, its fields, its rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from compress.recipe.schema import Frozen, Source, resolve_source

Names = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""A field, or several that are read together."""


class Columns(Frozen):
    """The names of a question file's fields; `image`, `answer` and `options` may be several, of which any may be empty."""

    id: Names = "id"
    """One field, or several that are unique together."""

    image: Names = "image"

    question: str | None = "question"
    """None for images without questions."""

    answer: Names = "answer"

    options: Names | None = None
    """The options of a multiple choice."""

    category: str | None = None
    """The category for separate scores."""

    def named(self, field: Literal["id", "image", "question", "answer", "options", "category"]) -> tuple[str, ...]:
        """Return a field's names in the file; empty where it has none."""
        names = cast("str | tuple[str, ...] | None", getattr(self, field))
        return () if names is None else (names,) if isinstance(names, str) else names


def _as_texts(value: Any) -> Any:
    values = list(cast("list[object]", value)) if isinstance(value, list | tuple) else [value]
    # YAML reads 2 and 2.0 as numbers, and values are compared as texts; true and false stay an error
    return [str(entry) if isinstance(entry, int | float) and not isinstance(entry, bool) else entry for entry in values]


Values = Annotated[tuple[str, ...], BeforeValidator(_as_texts), Field(min_length=1)]
"""Allowed values of a field, one or several."""


class RowFilter(Frozen):
    """The selection of a question file's rows."""

    where: Mapping[str, Values] = Field(default_factory=lambda: dict[str, tuple[str, ...]]())
    """Allowed values, by field."""

    text_only: bool = False
    """Whether rows without an image are included."""


def _resolve_folder(value: str, info: ValidationInfo) -> str:
    folder = Path(resolve_source(value, info)).resolve() if value.strip() else Path()
    if not value.strip() or not folder.is_dir():
        raise ValueError(f"no folder at {value}; name one that holds the images")
    return str(folder)


ImageFolder = Annotated[str, AfterValidator(_resolve_folder)]
"""The folder of the images that a question file names by path, relative to the recipe.

Without it images must be inside the question file's own folder: an untrusted file must not read other files of this machine.
"""


def source_fields(record: Frozen, source: type[TextSource] | type[QuestionSource]) -> dict[str, Any]:
    """Return the fields of a record that a source has too, without those that are None."""
    return {name: value for name, value in record if name in source.model_fields and value is not None}


class TextSource(Frozen):
    """The source of running text: a local text, parquet or JSONL file, or a hub dataset."""

    source: Source
    subset: str | None = None
    split: str = "train"
    revision: str = "main"
    column: str = "text"


class QuestionSource(Frozen):
    """The source of questions about images: a local JSONL, JSON or parquet file, or a hub dataset."""

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
