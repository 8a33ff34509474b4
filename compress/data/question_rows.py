"""Rows of question files of any supported format, with conversations converted to questions."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from compress.data.conversations import FIELDS, IMAGES, STANDARD_FIELDS, Row, as_list, first_exchange, has_conversation
from compress.data.json_rows import SUFFIXES, read_json_rows
from compress.data.sources import Columns, RowFilter
from compress.data.tables import check_file, names, parquet_columns, read_parquet
from compress.errors import DataError

_DEFAULT_ID = Columns().id
_STANDARD_COLUMNS = Columns(options="options", category="category")


@dataclass(frozen=True)
class QuestionRows:
    """The rows of a question file."""

    path: Path

    columns: Columns
    """The names of the file's fields."""

    fields: frozenset[str]
    """The names of all fields that any row has."""

    @classmethod
    def open(cls, path: Path, columns: Columns) -> QuestionRows:
        """Open a file with the field names of `columns`, or the standard ones where it only has those.

        So a recipe that renames a hub dataset's columns also accepts a local file with the standard names instead.

        Raises:
            DataError: the file is missing, malformed, or of another format.
        """
        check_file(path)
        if path.suffix in SUFFIXES:
            fields = read_json_rows(path).fields
        elif path.suffix == ".parquet":
            fields = frozenset(parquet_columns(path))
        else:
            raise DataError(f"{path}: questions are read from .jsonl, .json and .parquet files; convert it to one of them")
        available = _available_fields(path, fields)
        standard = _STANDARD_COLUMNS.model_dump()
        configured = [field for field in standard if columns.named(cast("Any", field))]
        replaced = [
            field
            for field in configured
            if available.isdisjoint(columns.named(cast("Any", field))) and standard[field] in available
        ]
        return cls(path, columns.model_copy(update={field: standard[field] for field in replaced}), fields)

    def read(self, fields: Collection[str] | None, chosen: Container[int] | None = None) -> Iterator[tuple[int, Row]]:
        """Yield each row's number and values of `fields`, or of all fields in `columns` for None.

        Raises:
            DataError: a row cannot be read, or is a conversation without a question.
        """
        needed = self._all_fields() if fields is None else set(fields)
        # images make up most of a file: not read where only ids or questions are asked for
        with_images = not needed.isdisjoint(self.columns.named("image"))
        if self.path.suffix in SUFFIXES:
            for number, row in read_json_rows(self.path).read(chosen):
                yield number, self._as_question(row, number, with_images)
            return
        columns = self._parquet_columns(needed, with_images)
        for number, values in read_parquet(self.path, columns, chosen):
            yield number, self._as_question(dict(zip(columns, values, strict=True)), number, with_images)

    @property
    def numbered(self) -> bool:
        """Whether rows are numbered because they have no id."""
        return self.columns.id == _DEFAULT_ID and _DEFAULT_ID not in self.fields

    def check_columns(self, rows: RowFilter) -> list[tuple[str, ...]]:
        """Return the fields that `check_row` requires of each row; of a parquet file none, as its columns are checked here.

        Raises:
            DataError: a column is missing; the message names it and those that the file has.
        """
        columns = self.columns
        required = [() if rows.text_only else columns.named("image"), columns.named("question")]
        required += [(column,) for column in (() if self.numbered else columns.named("id"))]
        required += [columns.named("options"), columns.named("category"), *((column,) for column in rows.where)]
        # rows of JSON may each have other fields, so that only reading them can tell
        if self.path.suffix != ".parquet":
            return [alternatives for alternatives in required if alternatives]
        available = _available_fields(self.path, self.fields)
        for column in (column for alternatives in required for column in alternatives):
            if column not in available:
                raise DataError(
                    f"{self.path}: has no column {column!r}, only {names(sorted(self.fields))}; name the right one under columns"
                )
        return []

    def check_row(self, number: int, row: Row, required: Iterable[tuple[str, ...]]) -> None:
        """Check that a row has the required fields, of each tuple one.

        Raises:
            DataError: it lacks one; the message names it and those it has.
        """
        for alternatives in required:
            if not any(column in row for column in alternatives):
                raise DataError(
                    f"{self.path}:{number}: has no field {alternatives[0]!r}, only {names(row)}; add it, or rename it under columns"
                )

    def _all_fields(self) -> set[str]:
        return {name for field in ("question", "image", "answer", "options", "category") for name in self.columns.named(field)}

    def _as_question(self, row: dict[str, Any], number: int, with_images: bool) -> Row:
        if self.columns.question not in row and has_conversation(row):
            return first_exchange(row, f"{self.path}:{number}", with_images=with_images)
        return row

    def _parquet_columns(self, needed: Iterable[str], with_images: bool) -> list[str]:
        columns = set(needed)
        if _may_have_conversations(self.path, self.fields) and not columns.isdisjoint(STANDARD_FIELDS):
            # a standard field may have to be made from a conversation, which is then read in its place
            columns |= {next(field for field in FIELDS if field in self.fields), *(IMAGES if with_images else ())}
        return [column for column in parquet_columns(self.path) if column in columns]


def values_of(row: Row, columns: Sequence[str]) -> list[object]:
    """Return the values of a row's fields, with lists flattened and missing values skipped."""
    return [value for column in columns for value in as_list(row.get(column))]


def _available_fields(path: Path, fields: frozenset[str]) -> frozenset[str]:
    """Return the fields that rows can be read by: a file's own, and the standard ones of conversations."""
    return fields | STANDARD_FIELDS if _may_have_conversations(path, fields) else fields


def _may_have_conversations(path: Path, fields: Collection[str]) -> bool:
    """Return whether a file with these fields has conversations: in all rows of a parquet file, in any row of a JSONL file."""
    return has_conversation(fields) if path.suffix == ".parquet" else any(field in fields for field in FIELDS)
