"""Running text for calibration and perplexity: documents of a text, parquet or JSONL file, each with its origin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.json_rows import SUFFIXES, read_json_rows
from compress.data.tables import names, parquet_bytes, read_lines, read_parquet, read_text
from compress.errors import DataError
from compress.untrusted.limits import limits

SEPARATOR = "\n\n"
"""The separator of joined documents."""

_PIECE = 100_000
"""The most characters that are tokenized at once: only the beginning of a text in a single line may be needed."""

_LINE = re.compile(r"[^\n]*\n+")
_PARTS = re.compile(rf"(?s:.{{1,{_PIECE}}}(?=\s|\Z)|.{{1,{_PIECE}}})")


@dataclass(frozen=True)
class Document:
    """A text without leading and trailing white space."""

    text: str

    origin: str
    """Its file, and the line or row where it starts, counted from 1."""


def read_documents(path: Path, column: str = "text") -> Iterator[Document]:
    """Yield a file's documents in order, without empty ones.

    A document is a row's `column` in a parquet or JSON file, or in any other file a block of text between blank lines.

    Raises:
        DataError: the file is missing, unreadable, malformed, or has no such column; the message names the line or the columns.
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
    """Return the complete text, as perplexity on wikitext-2 is usually measured.

    Rows of a parquet or JSONL file, including empty ones, are joined by `SEPARATOR`; any other file is returned unchanged.

    Raises:
        DataError: as `read_documents`.
    """
    if path.suffix == ".parquet":
        # by the declared size, before anything is unpacked: a small file may unpack to any amount of text
        size = parquet_bytes(path, column)
        if size > limits().text_bytes:
            raise DataError(f"{path}: declares {size:,} bytes of text ({limits().set_by('text_bytes')}); name a part of it")
        # empty rows stay: joined, they are the blank lines of the published text
        return SEPARATOR.join(str(text or "") for _, (text,) in read_parquet(path, [column]))
    if path.suffix in SUFFIXES:
        return SEPARATOR.join(_text_field(row, column, f"{path}:{number}") for number, row in read_json_rows(path).read())
    return read_text(path)


@dataclass(frozen=True)
class Piece:
    """A line of a document with the line ends after it, or a part of a very long line."""

    text: str
    origin: str


def pieces(document: Document) -> Iterator[Piece]:
    """Split a document into lines; joined they are its text and `SEPARATOR`.

    A line longer than `_PIECE` characters is split before white space, where tokenizers split as well.
    """
    for line in (match.group() for match in _LINE.finditer(document.text + SEPARATOR)):
        for part in [line] if len(line) <= _PIECE else _PARTS.findall(line):
            yield Piece(text=part, origin=document.origin)


def _text_field(row: dict[str, Any], column: str, where: str) -> str:
    """Return a JSONL row's text.

    Raises:
        DataError: the row has no such field, or it is no text; the message names the row and its fields.
    """
    if column not in row:
        raise DataError(f"{where}: has no field {column!r}, only {names(row)}; name the right one as column in the recipe")
    value: object = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {column!r} is no text but {type(value).__name__}; name the right one as column in the recipe"
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
