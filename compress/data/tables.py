"""Reading of text files by line and of parquet files in small batches; files beyond the limits are refused unread."""

from __future__ import annotations

import io
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from compress.errors import DataError
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable, read_bytes

_UNREADABLE = cast("tuple[type[Exception], ...]", (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError))
"""The errors of pyarrow on damaged files; `ValueError` includes text that is not UTF-8."""

_BATCH_BYTES = 256_000_000
"""Bytes of a batch if each value were as large as its column chunk: dictionary encoding stores a value once for many rows."""

_BATCH_ROWS = 64
"""Rows of a batch where they are small: fewer take longer, more are no faster."""

_LISTED_NAMES = 40
"""Names that a message lists."""

_READ_BYTES = 1_000_000
"""Bytes that are read from the disk at once."""


def check_file(path: Path) -> None:
    """Check that a path is a regular file.

    Raises:
        DataError: it is missing, a folder, a pipe or a device.
    """
    where = printable(str(path))
    try:
        if path.is_dir():
            raise DataError(f"{where}: is a folder; name the file in it")
        if not path.exists():
            raise DataError(f"{where}: no such file; check the path in the recipe")
        if not path.is_file():  # reading a pipe blocks, a device has no end
            raise DataError(f"{where}: is no regular file; name a copy of it")
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be read ({printable(str(error))}); check the path in the recipe") from error


def read_text(path: Path) -> str:
    """Return a UTF-8 file's content, without a byte order mark.

    Raises:
        DataError: it is missing, unreadable, too large or not UTF-8.
    """
    check_file(path)
    try:
        # utf-8-sig, because some editors begin a file with a byte order mark, which would be part of the first word
        text = read_bytes(path, limits().text_bytes, DataError, name="text_bytes").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_no_utf8(path, error.start)) from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, without their ends, with their numbers from 1 on, one at a time.

    Raises:
        DataError: it is missing, unreadable or not UTF-8, or a line is too long; the message names the line.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            yield from _lines(path, file)
    except OSError as error:
        raise DataError(f"{printable(str(path))}: cannot be read ({error.strerror}); check the path in the recipe") from error


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    where, limit = printable(str(path)), limits()
    number, offset = 0, 0
    # one byte more than allowed tells a long line apart without reading it whole
    while line := file.readline(limit.line_bytes + 1):
        number += 1
        if number > limit.rows:
            raise DataError(f"{where}: has more than {limit.rows:,} lines ({limit.set_by('rows')}); name a part of it")
        if len(line) > limit.line_bytes:
            raise DataError(
                f"{where}:{number}: is longer than {limit.line_bytes:,} bytes ({limit.set_by('line_bytes')}); break it up"
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(_no_utf8(path, offset + error.start)) from error
        offset += len(line)
        yield number, text.rstrip("\r\n")


def _no_utf8(path: Path, offset: int) -> str:
    return f"{printable(str(path))}: byte {offset} is not UTF-8; save the file as UTF-8 text"


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
        return sum(_group_bytes(path, file.metadata, index, {column}) for index in range(file.metadata.num_row_groups))


def read_parquet(path: Path, columns: Sequence[str], chosen: Container[int] | None = None) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the values of the columns, row by row, with the row number, counted from 1, in small batches.

    With `chosen`, only the rows with these numbers.

    Raises:
        DataError: the file cannot be read, lacks a column (the message lists those it has), or exceeds a limit.
    """
    with _open_parquet(path) as file:
        existing = list[str](file.schema_arrow.names)
        for column in columns:
            if column not in existing:
                raise DataError(
                    f"{printable(str(path))}: has no column {column!r}, only {names(existing)}; name the right one in the recipe"
                )
        sizes = [_group_bytes(path, file.metadata, index, set(columns)) for index in range(file.metadata.num_row_groups)]
        first = 1
        try:
            for index, size in enumerate(sizes):
                numbers = range(first, first + int(file.metadata.row_group(index).num_rows))
                first = numbers.stop
                if chosen is None or any(number in chosen for number in numbers):
                    yield from _group_rows(file, index, _batch_rows(size), columns, (numbers, chosen))
        except _UNREADABLE as error:
            raise DataError(
                f"{printable(str(path))}: cannot be read from row {first} on ({_reason(error)}); fetch the file again"
            ) from error


def _batch_rows(size: int) -> int:
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, size)))


def _group_rows(
    file: Any, group: int, batch_rows: int, columns: Sequence[str], selection: tuple[range, Container[int] | None]
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    numbers, chosen = selection
    first = numbers.start
    for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=list(columns)):
        in_batch = range(first, min(numbers.stop, first + int(batch.num_rows)))
        first = in_batch.stop
        selected = [number for number in in_batch if chosen is None or number in chosen]
        if not selected:
            continue
        # selected before the conversion: Python objects take many times the memory of arrow's
        rows: list[dict[str, Any]] = batch.take([number - in_batch.start for number in selected]).to_pylist()
        for number, row in zip(selected, rows, strict=True):
            yield number, tuple(row[column] for column in columns)


def names(columns: Iterable[str]) -> str:
    """Return a list of column names for a message."""
    listed = [printable(column) for column in islice(columns, _LISTED_NAMES + 1)]
    return ", ".join(listed[:_LISTED_NAMES]) + (" and more" if len(listed) > _LISTED_NAMES else "") or "none at all"


def _group_bytes(path: Path, metadata: Any, index: int, columns: Container[str]) -> int:
    """Return the declared uncompressed size of a row group's columns, in bytes.

    Raises:
        DataError: it, or the number of a column's values, exceeds the limit or is negative.
    """
    group, limit = metadata.row_group(index), limits()
    chunks = [group.column(number) for number in range(group.num_columns)]
    # a nested column (a struct of bytes and path) has a chunk per leaf, all read with it
    chunks = [chunk for chunk in chunks if str(chunk.path_in_schema).split(".")[0] in columns]
    # as declared in the footer, before anything is unpacked: compressed zeros expand a thousandfold
    total = sum(int(chunk.total_uncompressed_size) for chunk in chunks)
    where = f"{printable(str(path))}: row group {index + 1}"
    if total > limit.parquet_group_bytes:
        raise DataError(
            f"{where}: declares {total:,} bytes ({limit.set_by('parquet_group_bytes')}); write the file with smaller row groups"
        )
    for chunk in chunks:
        if int(chunk.num_values) > limit.parquet_group_values:
            raise DataError(
                f"{where}: declares {chunk.num_values:,} values of {printable(str(chunk.path_in_schema))} "
                f"({limit.set_by('parquet_group_values')}); write the file with smaller row groups"
            )
    # negative sizes would pass every limit above
    if min([0, int(group.num_rows), *(int(chunk.total_uncompressed_size) for chunk in chunks)]) < 0:
        raise DataError(f"{where}: declares a size below 0; fetch the file again")
    return total


def _reason(error: Exception) -> str:
    """Return pyarrow's message, which may have several lines, as one line."""
    return printable(" ".join(str(error).split()))


def _open_parquet(path: Path) -> Any:
    """Open a parquet file and check its declared sizes; columns are read in small batches.

    `pre_buffer`, pyarrow's default, would read all row groups into memory at once.
    """
    check_file(path)
    where, limit = printable(str(path)), limits()
    try:
        file = cast("Any", pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES))
        metadata = file.metadata
        rows, chunks = int(metadata.num_rows), int(metadata.num_row_groups) * int(metadata.num_columns)
        schema_names = list[str](file.schema_arrow.names)
    except _UNREADABLE as error:
        raise DataError(f"{where}: is no whole parquet file ({_reason(error)}); fetch it again") from error
    if rows > limit.rows:
        raise DataError(f"{where}: declares {rows:,} rows ({limit.set_by('rows')}); name a part of it")
    if chunks > limit.parquet_chunks:
        raise DataError(
            f"{where}: declares {chunks:,} chunks of columns ({limit.set_by('parquet_chunks')}); write fewer row groups"
        )
    # rows are tables by column name: one of the two would silently win
    if len(set(schema_names)) < len(schema_names):
        raise DataError(f"{where}: has two columns of one name; rename one of {names(schema_names)}")
    return file


def parquet_of(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return rows with the same columns as the content of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(cast("Any", pa.Table.from_pylist([dict(row) for row in rows])), buffer)
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return all rows of a parquet file.

    Raises:
        OSError, ValueError: it is missing or damaged.
    """
    try:
        return cast("list[dict[str, object]]", pq.read_table(path).to_pylist())
    except _UNREADABLE as error:  # some of them are neither OSError nor ValueError
        raise ValueError(str(error)) from error
