"""Tables that are told in several forms: Markdown, CSV, and HTML by the page's templates."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

Kind = Literal["text", "number", "verdict", "brief", "prose", "code", "mark"]


@dataclass(frozen=True)
class Column:
    """One column: numbers stand to the right, verdicts get a sign beside their word, `brief` and `prose` may fill several lines.

    What a `mark` says is in its head: its cells are empty or not.
    """

    head: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """A table with its caption; the first column names what a row is of. `note` says what the figures mean.

    In a `grouped` one it names what several rows in a row are of, and the second names the row.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    grouped: bool = False

    @property
    def groups(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """The rows by their first column, without it."""
        return [(name, [row[1:] for row in rows]) for name, rows in groupby(self.rows, key=lambda row: row[0])]

    def without_empty(self) -> Table:
        """Return the table without the columns that hold nothing in any row."""
        kept = [place for place in range(len(self.columns)) if any(row[place] for row in self.rows)]
        columns = tuple(self.columns[place] for place in kept)
        return replace(self, columns=columns, rows=tuple(tuple(row[place] for place in kept) for row in self.rows))


def markdown(table: Table) -> str:
    """Return a table in Markdown, without its caption."""
    rules = ["---:" if column.kind == "number" else "---" for column in table.columns]
    lines = [_line([column.head for column in table.columns]), _line(rules)]
    return "\n".join([*lines, *(_line(row) for row in table.rows)])


def comma_separated(table: Table) -> str:
    """Return a table as CSV (RFC 4180, with plain line ends), its heads in the first line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.head for column in table.columns])
    writer.writerows(table.rows)
    return buffer.getvalue()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
