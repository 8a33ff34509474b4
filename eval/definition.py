"""Definitions of the tasks that generate answers: a short versioned YAML each, strictly checked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from compress.data.sources import Columns, RowFilter, Values
from compress.errors import RecipeError
from compress.eval.metrics import metrics_of
from compress.recipe.document import dotted, read_document
from compress.recipe.schema import Frozen, Source

_SHIPPED = Path(__file__).parent / "definitions"

Kind = Literal["vqa", "choice", "caption"]
"""The kinds of task that have definitions."""

_QUESTION, _OPTIONS = "{question}", "{options}"


class Definition(Frozen):
    """The prompt, data and metric of a task; `where`, `text_only` and `columns` apply to its own source, not to a recipe's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: PositiveInt
    """Raised by its author with every change of what is measured; reports show it."""

    task: Kind = "vqa"
    source: Source | None = None
    subset: str | None = None
    split: str = "test"
    revision: str = "main"
    columns: Columns = Field(default=Columns(), validate_default=True)
    where: Mapping[str, Values] = Field(default_factory=lambda: dict[str, tuple[str, ...]]())
    text_only: bool = False
    prompt: str
    max_new_tokens: PositiveInt
    metric: str
    labels: Literal["letter", "index", "text"] = "letter"
    """Of a `choice`: how the data name the right option, by its letter, its index from 0, or its text."""

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: Columns, info: ValidationInfo) -> Columns:
        kind = info.data.get("task")
        if kind in {"vqa", "choice"} and columns.question is None:
            raise ValueError("question is null: name the column with the questions")
        if kind == "choice" and columns.options is None:
            # The usual name, as in AI2D's published files: a definition need not repeat it.
            return columns.model_copy(update={"options": "options"})
        if kind in {"vqa", "caption"} and columns.options is not None:
            raise ValueError(f"options are those of a choice, and this is a {kind}; remove them, or write task: choice")
        return columns

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str, info: ValidationInfo) -> str:
        kind, columns = info.data.get("task"), info.data.get("columns")
        if not prompt.strip():
            raise ValueError("is empty; write what the model is asked")
        if kind in {"vqa", "choice"} and _QUESTION not in prompt:
            raise ValueError(f"must have {_QUESTION} where each question belongs")
        if kind == "caption" and _QUESTION in prompt and isinstance(columns, Columns) and columns.question is None:
            raise ValueError(f"has {_QUESTION}, and columns.question is null; remove one of them")
        if kind in {"vqa", "caption"} and _OPTIONS in prompt:
            raise ValueError(f"has {_OPTIONS}, which are those of a choice; remove it, or write task: choice")
        return prompt

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str, info: ValidationInfo) -> str:
        kind: Kind | None = info.data.get("task")
        if kind is not None and metric not in metrics_of(kind):
            raise ValueError(f"of a {kind} must be one of {', '.join(metrics_of(kind))} (got {metric})")
        return metric

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: str, info: ValidationInfo) -> str:
        if info.data.get("task") in {"vqa", "caption"}:
            raise ValueError(f"are those of a choice, and this is a {info.data['task']}; remove them")
        return labels

    def with_overrides(self, overrides: Mapping[str, object]) -> Definition:
        """Return the definition with some fields replaced, validated as a whole.

        Raises:
            ValueError: the result is not valid; names the fields.
        """
        try:
            return Definition.model_validate({**self.model_dump(exclude_unset=True), **overrides})
        except ValidationError as error:
            messages = [f"{dotted(detail['loc'])}: {detail['msg'].removeprefix('Value error, ')}" for detail in error.errors()]
            raise ValueError("; ".join(messages)) from error

    @property
    def rows(self) -> RowFilter:
        """The filter on the rows of its own data."""
        return RowFilter(where=self.where, text_only=self.text_only)

    def format_prompt(self, question: str, options: str = "") -> str:
        """Return the prompt with the question, and the text of its options, filled in."""
        head, mark, tail = self.prompt.partition(_QUESTION)  # a question may hold braces of its own
        return head.replace(_OPTIONS, options) + (question if mark else "") + tail.replace(_OPTIONS, options)


def shipped_definitions(kind: Kind | None = None) -> list[str]:
    """Return the names of the definitions that come with the package, all or those of one kind of task."""
    paths = sorted(_SHIPPED.glob("*.yaml"))
    return [path.stem for path in paths if kind is None or read_definition(path).task == kind]


def find_definition(value: str, base: Path, kind: Kind | None = None) -> Path:
    """Return the path of a shipped definition by its name, or of a file relative to `base`.

    Raises:
        ValueError: there is neither; lists the shipped definitions of that kind of task.
    """
    if value in shipped_definitions():
        return _SHIPPED / f"{value}.yaml"
    path = base / Path(value).expanduser()
    if not path.is_file():
        names = ", ".join(shipped_definitions(kind))
        raise ValueError(f"no definition file at {path}, and no shipped one is called {value}: {names}")
    return path.resolve()


def read_definition(path: Path) -> Definition:
    """Read and check a definition; cached until the file changes.

    Raises:
        RecipeError: every fault found, with file and line.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror})"]) from error
    return _read(path, state.st_mtime_ns, state.st_size)


@cache
def _read(path: Path, changed: int, size: int) -> Definition:
    del changed, size
    document = read_document(path)
    try:
        definition = Definition.model_validate(document.data, context={"base": path.parent})
    except ValidationError as error:
        allowed = ", ".join(Definition.model_fields)
        raise RecipeError(
            [
                f"{document.whereabouts(detail['loc'])}: {dotted(detail['loc'])}: "
                + (
                    f"unknown key; allowed here: {allowed}"
                    if detail["type"] == "extra_forbidden"
                    else detail["msg"].removeprefix("Value error, ")
                )
                for detail in error.errors(include_url=False)
            ]
        ) from error
    if definition.name != path.stem:
        raise RecipeError([f"{document.whereabouts(('name',))}: name: must be {path.stem}, as the file is called"])
    return definition
