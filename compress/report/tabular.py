"""Tables that are rendered as Markdown, and by the page's templates as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

Kind = Literal["text", "number", "verdict", "brief", "prose", "code", "mark"]


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    head: str
    kind: Kind = "text"
    """Numbers are right-aligned, verdicts get a sign beside the word, `brief` and `prose` may wrap. A `mark` column's cells are
    either empty or not, and its head tells the meaning."""


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column is the row header."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What the figures mean."""

    grouped: bool = False
    """Whether the first column is the header of groups of consecutive rows, and the second the row header."""

    @property
    def groups(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """The rows grouped by their first column, which they leave out."""
        return [(name, [row[1:] for row in rows]) for name, rows in groupby(self.rows, key=lambda row: row[0])]

    def without_empty(self) -> Table:
        """Return the table without columns whose cells are all empty."""
        indices = [index for index in range(len(self.columns)) if any(row[index] for row in self.rows)]
        columns = tuple(self.columns[index] for index in indices)
        return replace(self, columns=columns, rows=tuple(tuple(row[index] for index in indices) for row in self.rows))


def markdown(table: Table) -> str:
    """Return a table in Markdown, without its caption."""
    alignments = ["---:" if column.kind == "number" else "---" for column in table.columns]
    lines = [_line([column.head for column in table.columns]), _line(alignments)]
    return "\n".join([*lines, *(_line(row) for row in table.rows)])


def _line(cells: Sequence[str]) -> str:
    # A line break or a bar in a cell (a model's answer, a fault) would break the table.
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
