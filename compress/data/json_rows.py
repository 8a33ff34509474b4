"""Rows of a JSONL file, or of a JSON file with one list: read from the disk once, and parsed row by row."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Container, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

from compress.data.tables import check_file
from compress.errors import DataError
from compress.untrusted.limits import limits
from compress.untrusted.reading import parse_json, printable, read_bytes

SUFFIXES = frozenset({".jsonl", ".json"})

_OPEN = ord("{")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Written by some editors at the start of a file."""

_STRING = rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?'
_TOKEN = re.compile(rb"\{[^{}\[\]\"]*+(?:" + _STRING + rb"[^{}\[\]\"]*+)*+\}|" + _STRING + rb"|[\[\]{},]", re.DOTALL)
"""An object without nested lists and objects, a string (possibly truncated by the end of the file), or a delimiter.

Possessive, so that matching takes linear time.
"""

_REMEDIES = ("correct or remove the line", "write one list of all rows, or one object {…} a line")
"""The remedies for unreadable rows of a JSONL file, and of a JSON file."""

_Spans = tuple["array[int]", "array[int]", "array[int]"]
"""The number, first byte and end of each row."""


class JsonRows:
    """The rows of one file with their numbers from 1 on: the line in a JSONL file, the index in a list."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path
        self._content = content

    @property
    def size(self) -> int:
        """The file's bytes."""
        return len(self._content)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file's content."""
        return hashlib.sha256(self._content).hexdigest()

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names of all fields that any row has."""
        return frozenset(name for _, row in self.read() for name in row)

    def __len__(self) -> int:
        return len(self._spans[0])

    def read(self, chosen: Container[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows with their numbers; with `chosen`, only those with these numbers.

        Raises:
            DataError: a row is no JSON object or exceeds a limit; the message names it.
        """
        for number, first, end in zip(*self._spans, strict=True):
            if chosen is None or number in chosen:
                yield number, self._row(number, self._content[first:end])

    def _row(self, number: int, text: bytes) -> dict[str, Any]:
        where, limit = f"{self._path}:{number}", limits()
        if len(text) > limit.line_bytes:
            raise DataError(f"{printable(where)}: has {len(text):,} bytes ({limit.set_by('line_bytes')}); remove it")
        # counted before parsing, whose objects take many times the bytes of the text
        if text.count(b",") + text.count(b"[") + text.count(b"{") > limit.row_values:
            self._refuse_values(number)
        value: object = parse_json(text, where, DataError, _REMEDIES[self._path.suffix == ".json"])
        if not isinstance(value, dict):
            self._refuse_kind(number)
        return cast("dict[str, Any]", value)

    @cached_property
    def _spans(self) -> _Spans:
        start = len(_BYTE_ORDER_MARK) if self._content.startswith(_BYTE_ORDER_MARK) else 0
        # by content, not by suffix: files named .jsonl hold one list now and then
        listed = re.compile(rb"\s*+\[").match(self._content, start)
        return self._entries(listed.end()) if listed else self._lines(start)

    def _lines(self, start: int) -> _Spans:
        if self._content.count(b"\n") > limits().rows:
            self._refuse_number("lines")
        spans, number = _no_spans(), 1
        while start < len(self._content):
            end = self._content.find(b"\n", start)
            end = len(self._content) if end < 0 else end
            if self._content[start:end].strip():
                _add(spans, number, start, end)
            start, number = end + 1, number + 1
        return spans

    def _entries(self, start: int) -> _Spans:
        """Return the spans of the entries of the list that begins at byte `start`."""
        spans, depth, limit = _no_spans(), 1, limits()
        tokens = 0
        for token in _TOKEN.finditer(self._content, start):
            delimiter = self._content[token.start()]
            tokens += 1
            if delimiter == _OPEN and token.end() - token.start() > 1:
                continue
            if tokens > limit.row_values * 2:  # a value has at most two tokens: a bracket and a comma, or a name and a string
                self._refuse_values(len(spans[0]) + 1)
            depth += (delimiter in b"[{") - (delimiter in b"]}")
            if depth and not (depth == 1 and delimiter in b","):
                continue
            if len(spans[0]) == limit.rows:
                self._refuse_number("entries")
            entry = self._content[start : token.start()].lstrip()
            if depth or len(spans[0]) or entry:
                if not entry.startswith(b"{"):  # refused at once: splitting a list of millions of numbers would take long
                    self._refuse_kind(len(spans[0]) + 1)
                _add(spans, len(spans[0]) + 1, start, token.start())
            start, tokens = token.end(), 0
            if not depth:
                self._check_rest(start)
                return spans
        raise DataError(f"{printable(str(self._path))}: is cut off: its list has no end; fetch or write it again")

    def _check_rest(self, start: int) -> None:
        if self._content[start:].strip():
            raise DataError(
                f"{printable(str(self._path))}: goes on after its list; write one list of all rows, or one object {{…}} a line"
            )

    def _refuse_kind(self, number: int) -> NoReturn:
        where = printable(f"{self._path}:{number}")
        raise DataError(f"{where}: is no JSON object; write one {{…}} with named fields for each row")

    def _refuse_values(self, number: int) -> NoReturn:
        where = printable(f"{self._path}:{number}")
        raise DataError(f"{where}: holds too many values ({limits().set_by('row_values')}); remove it")

    def _refuse_number(self, unit: str) -> NoReturn:
        limit = limits()
        raise DataError(
            f"{printable(str(self._path))}: has more than {limit.rows:,} {unit} ({limit.set_by('rows')}); name a part of it"
        )


FileState = tuple[str, int, int, int, int, int]
"""A file's path, device, inode, size and times: it has not changed while they are the same."""


def file_state(path: Path) -> FileState:
    """Return the state of a regular file.

    Raises:
        DataError: it is missing, no regular file, or unreadable.
    """
    check_file(path)
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(
            f"{printable(str(path))}: cannot be read ({printable(str(error))}); check the path in the recipe"
        ) from error
    # ctime as well: tools that restore a file's mtime cannot set it
    return str(path.absolute()), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def read_json_rows(path: Path) -> JsonRows:
    """Return a file's rows, cached while the file does not change, because every step of a run reads them.

    The cache has at most the size limit of one file (`rows_file_bytes`).

    Raises:
        DataError: the file is missing, no regular file, too large or unreadable.
    """
    key, limit = file_state(path), limits().rows_file_bytes
    if key not in _CACHE:
        # evicted before reading: the cache and the new file stay within the limit together
        while _CACHE and sum(rows.size for rows in _CACHE.values()) + key[3] > limit:
            _CACHE.popitem(last=False)
        try:
            _CACHE[key] = JsonRows(path, read_bytes(path, limit, DataError, name="rows_file_bytes"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{printable(str(path))}: cannot be read ({printable(str(error))}); check the path in the recipe"
            ) from error
    _CACHE.move_to_end(key)
    return _CACHE[key]


_CACHE: OrderedDict[FileState, JsonRows] = OrderedDict()
"""The most recently read files, by path and state."""


def _no_spans() -> _Spans:
    # 24 bytes per row; lists of Python integers would take several times that
    return array("q"), array("q"), array("q")


def _add(spans: _Spans, number: int, first: int, end: int) -> None:
    for values, value in zip(spans, (number, first, end), strict=True):
        values.append(value)
