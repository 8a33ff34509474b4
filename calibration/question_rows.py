"""The rows of a question file by the names of their fields, whatever kind of file it is and however questions are laid out."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from compress.calibration.conversations import FIELDS, IMAGES, USUAL, Row, first_exchange, holds_conversation
from compress.calibration.json_rows import SUFFIXES, read_json_rows
from compress.calibration.sets import Columns, RowFilter
from compress.calibration.tables import check_file, names, parquet_columns, read_parquet
from compress.errors import DataError

_UNNUMBERED = Columns().id
_USUAL = Columns(options="options", category="category")


@dataclass(frozen=True)
class QuestionRows:
    """A question file; `columns` are the names that its fields have, `known` all names there are, of any row."""

    path: Path
    columns: Columns
    known: frozenset[str]

    @classmethod
    def open(cls, path: Path, columns: Columns) -> QuestionRows:
        """Find the names under which a file has the fields: those given, or the usual ones where it has only these.

        So a recipe that renames a hub dataset's columns also takes a local file in this package's own form in its place.

        Raises:
            DataError: the file is missing, malformed, or of another kind.
        """
        check_file(path)
        if path.suffix in SUFFIXES:
            known = read_json_rows(path).fields
        elif path.suffix == ".parquet":
            known = frozenset(parquet_columns(path))
        else:
            raise DataError(f"{path}: questions are read from .jsonl, .json and .parquet files; convert it to one of them")
        shown = _shown(path, known)
        usual = _USUAL.model_dump()
        given = [field for field in usual if columns.named(cast("Any", field))]
        lacking = [field for field in given if shown.isdisjoint(columns.named(cast("Any", field))) and usual[field] in shown]
        return cls(path, columns.model_copy(update={field: usual[field] for field in lacking}), known)

    def read(self, wanted: Collection[str] | None, chosen: Container[int] | None = None) -> Iterator[tuple[int, Row]]:
        """Yield each row's number and the columns it has of those `wanted`, or of all that `columns` names where this is None.

        Raises:
            DataError: a row cannot be read, or is a conversation that asks nothing.
        """
        needed = self._all() if wanted is None else set(wanted)
        with_images = not needed.isdisjoint(self.columns.named("image"))
        if self.path.suffix in SUFFIXES:
            for number, row in read_json_rows(self.path).read(chosen):
                yield number, self._laid_out(row, number, with_images)
            return
        held = self._parquet_columns(needed, with_images)
        for number, values in read_parquet(self.path, held, chosen):
            yield number, self._laid_out(dict(zip(held, values, strict=True)), number, with_images)

    def check_fields(self, rows: RowFilter) -> bool:
        """Check that every row has the fields it must have; return whether the rows are to be numbered, as they have no id.

        Raises:
            DataError: a row lacks one; names it and those it has.
        """
        numbered = self.columns.id == _UNNUMBERED and _UNNUMBERED not in self.known
        needed = self._needed(rows, numbered)
        if self.path.suffix == ".parquet":
            known = _shown(self.path, self.known)
            for column in (column for several in needed for column in several):
                if column not in known:
                    raise DataError(
                        f"{self.path}: has no column {column!r}, only {names(sorted(self.known))}; name the right one under columns"
                    )
            return numbered
        for number, row in self.read(self._all()):
            for several in needed:
                if not any(column in row for column in several):
                    raise DataError(
                        f"{self.path}:{number}: has no field {several[0]!r}, only {names(row)}; add it, or rename it under columns"
                    )
        return numbered

    def _needed(self, rows: RowFilter, numbered: bool) -> list[tuple[str, ...]]:
        """Return what every row must have: each thing's fields, of which one is enough where a row may leave some out."""
        columns = self.columns
        each = [() if rows.text_only else columns.named("image"), columns.named("question")]
        each += [(column,) for column in (() if numbered else columns.named("id"))]
        each += [columns.named("options"), columns.named("category"), *((column,) for column in rows.where)]
        return [several for several in each if several]

    def _all(self) -> set[str]:
        return {name for field in ("question", "image", "answer", "options", "category") for name in self.columns.named(field)}

    def _laid_out(self, row: dict[str, Any], number: int, with_images: bool) -> Row:
        if self.columns.question not in row and holds_conversation(row):
            return first_exchange(row, f"{self.path}:{number}", with_images=with_images)
        return row

    def _parquet_columns(self, needed: Iterable[str], with_images: bool) -> list[str]:
        wanted = set(needed)
        if _may_hold_conversations(self.path, self.known) and not wanted.isdisjoint(USUAL):
            wanted |= {next(field for field in FIELDS if field in self.known), *(IMAGES if with_images else ())}
        return [column for column in parquet_columns(self.path) if column in wanted]


def values_of(row: Row, columns: Sequence[str]) -> list[object]:
    """Return what the fields hold, in a row: lists laid out, empty ones passed over."""
    return [value for column in columns for value in _as_list(row.get(column))]


def _as_list(value: object) -> list[object]:
    if value is None:
        return []
    return cast("list[object]", value) if isinstance(value, list) else [value]


def _shown(path: Path, known: frozenset[str]) -> frozenset[str]:
    """Return the names under which rows of a file with these fields give something: a conversation gives the usual ones."""
    return known | USUAL if _may_hold_conversations(path, known) else known


def _may_hold_conversations(path: Path, known: Collection[str]) -> bool:
    """Return whether rows of a file with these fields are conversations: each of a parquet file, any of a JSONL file."""
    return holds_conversation(known) if path.suffix == ".parquet" else any(field in known for field in FIELDS)
