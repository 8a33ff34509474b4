"""Tables as people read them in a terminal: whole at any width, and without colours where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.report.tabular import Column, Table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

VERDICT_STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
"""The colour of each verdict."""

_GAP = 2
"""Columns between two of a table's own."""


def as_renderables(table: Table, width: int) -> Iterator[RenderableType]:
    """Yield what a terminal of so many columns shows of a table: the table, or a list of its rows where that is too wide."""
    yield from [_in_columns(table)] if _width(table) <= width else _row_by_row(table)


def _widths(table: Table) -> list[int]:
    columns = zip(*[tuple(column.head for column in table.columns), *table.rows], strict=True)
    return [max(map(len, cells)) for cells in columns]


def _width(table: Table) -> int:
    return sum(_GAP + width for width in _widths(table))


def aligned_lines(table: Table) -> Iterator[str]:
    """Yield a table's lines in full: what reads them may be a file, a pipe, or a log that wraps as it likes."""
    widths = _widths(table)
    for row in (tuple(column.head for column in table.columns), *table.rows):
        cells = [
            cell.rjust(width) if column.kind == "number" else cell.ljust(width)
            for column, cell, width in zip(table.columns, row, widths, strict=True)
        ]
        yield (" " * _GAP).join(cells).rstrip()


def _in_columns(table: Table) -> RenderableType:
    from rich.table import Table as RichTable

    shown = RichTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for column in table.columns:
        shown.add_column(column.head, justify="right" if column.kind == "number" else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*(_cell(column, cell) for column, cell in zip(table.columns, row, strict=True)))
    return shown


def _row_by_row(table: Table) -> Iterator[RenderableType]:
    """Yield each row as a line of its words, and below it its figures with their heads."""
    from rich.padding import Padding
    from rich.text import Text

    for row in table.rows:
        cells = [(column, cell) for column, cell in zip(table.columns, row, strict=True) if cell]
        yield Text("  ").join(_cell(*pair) for pair in cells if pair[0].kind not in ("number", "mark"))
        # No-break spaces keep a head and its figure on one line.
        figures = [f"{column.head}\u00a0{cell.replace(' ', chr(160))}" for column, cell in cells if column.kind == "number"]
        marks = [column.head for column, _ in cells if column.kind == "mark"]
        if figures or marks:
            yield Padding(Text("  ".join([*figures, *marks])), (0, 0, 0, 4))


def _cell(column: Column, cell: str) -> Text:
    from rich.text import Text

    return Text(cell, style=VERDICT_STYLES.get(cell, "") if column.kind == "verdict" else "")
