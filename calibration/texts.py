"""Running text as calibration and perplexity read it: documents of a text, parquet or JSONL file, each with its origin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.calibration.json_rows import SUFFIXES, read_json_rows
from compress.calibration.tables import names, parquet_bytes, read_lines, read_parquet, read_text
from compress.errors import DataError
from compress.limits import limits

SEPARATOR = "\n\n"
"""What stands between two documents where they are joined."""


_PIECE = 100_000
"""The most characters that are tokenized as one: of a text in a single line only the beginning may be needed."""

_LINE = re.compile(r"[^\n]*\n+")
_PARTS = re.compile(rf"(?s:.{{1,{_PIECE}}}(?=\s|\Z)|.{{1,{_PIECE}}})")


@dataclass(frozen=True)
class Document:
    """A piece of text without blank edges; `origin` is its file and the line or row where it starts, counted from 1."""

    text: str
    origin: str


def read_documents(path: Path, column: str = "text") -> Iterator[Document]:
    """Yield a file's documents in its order, empty ones left out.

    A document is a row of a parquet file, a row's `column` of a JSONL file or JSON list, or in any other file a block of text
    between blank lines.

    Raises:
        DataError: the file is missing, unreadable or malformed (with the line), or has no such column (names those it has).
    """
    if path.suffix == ".parquet":
        rows = ((number, text) for number, (text,) in read_parquet(path, [column]))
    elif path.suffix in SUFFIXES:
        rows = ((number, _text_field(row, column, f"{path}:{number}")) for number, row in read_json_rows(path).read())
    else:
        rows = _blocks(path)
    for number, value in rows:
        if value is not None and not isinstance(value, str):
            raise DataError(f"{path}:{number}: {column} is no text but {type(value).__name__}; name the column that holds the text")
        if value is not None and value.strip():
            yield Document(text=value.strip(), origin=f"{path.name}:{number}")


def read_joined(path: Path, column: str = "text") -> str:
    """Return the whole text as wikitext-2 perplexity is usually measured on it.

    Rows of a parquet or JSONL file, empty ones too, are joined by a blank line; any other file's content stands as it is.

    Raises:
        DataError: as `read_documents` does.
    """
    if path.suffix == ".parquet":
        size = parquet_bytes(path, column)
        if size > limits().text_bytes:
            raise DataError(f"{path}: declares {size:,} bytes of text ({limits().set_by('text_bytes')}); name a part of it")
        return SEPARATOR.join(str(text or "") for _, (text,) in read_parquet(path, [column]))
    if path.suffix in SUFFIXES:
        return SEPARATOR.join(_text_field(row, column, f"{path}:{number}") for number, row in read_json_rows(path).read())
    return read_text(path)


@dataclass(frozen=True)
class Piece:
    """A line of a document with the line ends after it, or a part of a line that is very long."""

    text: str
    origin: str


def pieces(document: Document) -> Iterator[Piece]:
    """Cut a document to its lines; put together they are its text and `SEPARATOR`.

    A line longer than `_PIECE` characters is cut before white space, where tokenizers cut too.
    """
    for line in (found.group() for found in _LINE.finditer(document.text + SEPARATOR)):
        for part in [line] if len(line) <= _PIECE else _PARTS.findall(line):
            yield Piece(text=part, origin=document.origin)


def _text_field(row: dict[str, Any], column: str, place: str) -> str:
    """Return a JSONL row's text.

    Raises:
        DataError: the row has no such field, or it holds something else than text; names the place and the fields there are.
    """
    if column not in row:
        raise DataError(f"{place}: has no field {column!r}, only {names(row)}; name the right one as column in the recipe")
    value: object = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {column!r} is no text but {type(value).__name__}; name the right one as column in the recipe"
        )
    return value


def _blocks(path: Path) -> Iterator[tuple[int, str]]:
    start, lines = 0, list[str]()
    for number, line in read_lines(path):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, "\n".join(lines)
            lines = []
    if lines:
        yield start, "\n".join(lines)
