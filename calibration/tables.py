"""Rows of the files samples come from: JSONL with line numbers, parquet in small pieces, plain text."""

from __future__ import annotations

import io
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from compress.errors import DataError

_UNREADABLE = cast("tuple[type[Exception], ...]", (pa.ArrowException, OSError))


def check_file(path: Path) -> None:
    """Check that there is a file.

    Raises:
        DataError: there is none, or a folder.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the file in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path in the recipe")


def read_text(path: Path) -> str:
    """Return a UTF-8 file's content, without a byte order mark.

    Raises:
        DataError: it is missing, unreadable or not UTF-8.
    """
    check_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path in the recipe") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file with their line numbers, counted from 1; blank lines are passed over.

    Raises:
        DataError: the file is missing or unreadable, or a line is no JSON object; names the line.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: is no JSON ({error.msg} at column {error.colno}); correct or remove the line"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: is no JSON object; write one {{…}} with named fields per line")
        yield number, cast("dict[str, Any]", value)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a parquet file's columns.

    Raises:
        DataError: it is missing or no whole parquet file.
    """
    with _open_parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: Path) -> int:
    """Return a parquet file's number of rows; raises as `parquet_columns` does."""
    with _open_parquet(path) as file:
        return int(file.metadata.num_rows)


def parquet_bytes(path: Path, column: str) -> int:
    """Return the size of a parquet file's column, unpacked, in bytes; raises as `parquet_columns` does."""
    with _open_parquet(path) as file:
        groups = [file.metadata.row_group(place) for place in range(file.metadata.num_row_groups)]
        parts = [group.column(place) for group in groups for place in range(group.num_columns)]
        return sum(int(part.total_uncompressed_size) for part in parts if str(part.path_in_schema).split(".")[0] == column)


def read_parquet(path: Path, columns: Sequence[str], chosen: Container[int] | None = None) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the values of the columns, row by row, with the row number, counted from 1; holds few rows at a time.

    With `chosen`, only the rows whose numbers it holds.

    Raises:
        DataError: the file cannot be read or lacks a column; names those it has.
    """
    with _open_parquet(path) as file:
        known = list[str](file.schema_arrow.names)
        for column in columns:
            if column not in known:
                raise DataError(f"{path}: has no column {column!r}, only {names(known)}; name the right one in the recipe")
        first = 1
        try:
            for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                numbers = range(first, first + int(batch.num_rows))
                first = numbers.stop
                taken = [number for number in numbers if chosen is None or number in chosen]
                if not taken:
                    continue
                rows: list[dict[str, Any]] = batch.take([number - numbers.start for number in taken]).to_pylist()
                for number, row in zip(taken, rows, strict=True):
                    yield number, tuple(row[column] for column in columns)
        except _UNREADABLE as error:
            raise DataError(f"{path}: cannot be read from row {first} on ({error}); fetch the file again") from error


def names(columns: Iterable[str]) -> str:
    """Return column names as a message lists them."""
    return ", ".join(columns) or "none at all"


def _open_parquet(path: Path) -> Any:
    check_file(path)
    try:
        return pq.ParquetFile(path)
    except _UNREADABLE as error:
        raise DataError(f"{path}: is no whole parquet file ({error}); fetch it again") from error


def parquet_of(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return rows, all of the same columns, as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(cast("Any", pa.Table.from_pylist([dict(row) for row in rows])), buffer)
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return all rows of a Parquet file.

    Raises:
        OSError, ValueError: it is missing or damaged.
    """
    try:
        return cast("list[dict[str, object]]", pq.read_table(path).to_pylist())
    except _UNREADABLE as error:  # not all of them are one of the two
        raise ValueError(str(error)) from error
