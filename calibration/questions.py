"""Questions about images, with their accepted answers, from JSONL or parquet files; each is checked as it is read."""

from __future__ import annotations

import ast
import hashlib
import io
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image, UnidentifiedImageError

from compress.artifact import file_digest
from compress.calibration.sets import Columns, Rows
from compress.calibration.tables import check_file, names, parquet_columns, read_json_lines, read_parquet
from compress.conversation import image_fault
from compress.errors import DataError

_UNNUMBERED = Columns().id
_USUAL = Columns(options="options", category="category")
_ALL_ROWS = Rows()
_JSONL = {".jsonl", ".json"}

Row = Mapping[str, Any]
"""A row's values by the names of its fields, as far as they were read."""


@dataclass(frozen=True)
class Question:
    """A question about one or more images and the answers that count as right, none where the file gives none.

    `images` are encoded (PNG, JPEG, …), none where rows without are allowed; `origin` is the file and the line or row, counted
    from 1. `options` are those of a multiple choice, in their order; `category` is what it counts under, if anything.
    """

    id: str
    images: tuple[bytes, ...]
    question: str
    answers: tuple[str, ...]
    origin: str
    options: tuple[str, ...] = ()
    category: str | None = None

    @cached_property
    def image_digests(self) -> tuple[str, ...]:
        """The SHA-256 of each image's encoded bytes."""
        return tuple(hashlib.sha256(image).hexdigest() for image in self.images)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the normalized question, its images' digests and its options: equal for one question about one thing."""
        normalized = " ".join(self.question.split()).casefold()
        options = [list(self.options)] if self.options else []
        return hashlib.sha256(json.dumps([normalized, *self.image_digests, *options]).encode()).hexdigest()


def count_questions(files: Sequence[Path], columns: Columns, rows: Rows = _ALL_ROWS) -> int:
    """Return how many questions the files hold; every row that counts is checked but for its images.

    Raises:
        DataError: as `read_questions` does.
    """
    return sum(len(_read_ids(path, columns, rows, _prefix(files, path))) for path in _unique(files, columns, rows))


def read_questions(
    files: Sequence[Path], columns: Columns, chosen: Container[int] | None = None, rows: Rows = _ALL_ROWS
) -> Iterator[Question]:
    """Yield the questions of the files in their order, one at a time; with `chosen`, only those at these places from 0 on.

    A JSONL line gives `image` as a path relative to its file or a list of such paths, `answer` as one answer or a list. A parquet
    row gives `image` as on the hub (a struct of `bytes` and `path`) or a list of them, `answer` as text, a list of texts or of
    structs with the field `answer`. Options are a list of texts, such a list written out as text, or a field each. Where a file
    lacks a renamed column but has the usual one, that is read; where it has no `id`, its rows are numbered.

    Raises:
        DataError: a file is missing, malformed or holds no question that counts; a row lacks a field, its question is empty, its
            id was there before, it has no image and `rows` asks for one, or one of its images is missing or unreadable. Names
            the file and the line or row.
    """
    before = 0
    for path in _unique(files, columns, rows):
        ids = _read_ids(path, columns, rows, _prefix(files, path))
        wanted = {number for place, number in enumerate(ids, start=before) if chosen is None or place in chosen}
        before += len(ids)
        here = _names_in(path, columns)
        for number, row in _read_rows(path, _all(here), wanted) if wanted else ():
            place = f"{path}:{number}"
            yield Question(
                id=ids[number],
                images=_read_images(_values(row, here.named("image")), path, place, rows.text_only),
                question=str(row[here.question]).strip() if here.question else "",
                answers=_read_answers(_values(row, here.named("answer")), place),
                origin=f"{path.name}:{number}",
                options=_read_options(row, here, place),
                category=None if here.category is None else str(row[here.category]),
            )


def source_digest(path: Path, columns: Columns | None = None, fingerprint: Callable[[Path], str] = file_digest) -> str:
    """Return the SHA-256 of a local file's content; with `columns`, of a JSONL question file's and of the images it names.

    Raises:
        DataError: the file or an image cannot be read, or a line is malformed.
    """
    check_file(path)
    total = hashlib.sha256(fingerprint(path).encode())
    if columns is not None and path.suffix in _JSONL:
        columns = _names_in(path, columns)
        for number, row in read_json_lines(path):
            for image in _values(row, columns.named("image")):
                place = f"{path}:{number}"
                total.update(_image_digest(path.parent / str(image), f"{place}: image {image}", fingerprint).encode())
    return total.hexdigest()


def _image_digest(path: Path, name: str, fingerprint: Callable[[Path], str]) -> str:
    if not path.is_file():
        raise DataError(f"{name}: no such file as {path}; correct the path or remove the row")
    return fingerprint(path)


def _prefix(files: Sequence[Path], path: Path) -> str:
    """Return what tells the rows of one file from those of the others where they are numbered; not its name, which may change."""
    return f"{files.index(path)}:" if len(files) > 1 else ""


def _unique(files: Sequence[Path], columns: Columns, rows: Rows) -> Sequence[Path]:
    """Return the files after checking that there is a question and that no id stands twice."""
    seen = dict[str, str]()
    for path in files:
        for number, identity in _read_ids(path, columns, rows, _prefix(files, path)).items():
            if identity in seen:
                raise DataError(
                    f"{path}:{number}: id {identity!r} was given before, in {seen[identity]}; give each question its own"
                )
            seen[identity] = f"{path.name}:{number}"
    if not seen:
        held = ", ".join(map(str, files))
        if rows.where:
            wanted = " and ".join(f"{column!r} is {' or '.join(map(repr, values))}" for column, values in rows.where.items())
            raise DataError(f"{held}: no row is left where {wanted}; correct where, or name a file with such rows")
        raise DataError(f"{held}: holds no questions; name a file with at least one")
    return files


def _names_in(path: Path, columns: Columns) -> Columns:
    """Return the names under which a file has the fields: those given, or the usual ones where it has only these.

    So a recipe that renames a hub dataset's columns also takes a local file in this package's own form in its place.
    """
    if path.suffix in _JSONL:
        known = {name for _, row in read_json_lines(path) for name in row}
    else:
        known = set(parquet_columns(path)) if path.suffix == ".parquet" else set[str]()
    usual = _USUAL.model_dump()
    given = [field for field in usual if columns.named(cast("Any", field))]
    lacking = [field for field in given if known.isdisjoint(columns.named(cast("Any", field))) and usual[field] in known]
    return columns.model_copy(update={field: usual[field] for field in lacking})


def _read_ids(path: Path, columns: Columns, rows: Rows, prefix: str) -> dict[int, str]:
    """Return the id of each row that counts by its number, after checking the row's question."""
    check_file(path)
    columns = _names_in(path, columns)
    numbered = _check_columns(path, columns, rows)
    own = () if numbered else columns.named("id")
    light = {*own, *columns.named("question"), *rows.where} or {*columns.named("image")[:1]}
    ids = dict[int, str]()
    for number, row in _read_rows(path, light):
        if any(str(row.get(column)) not in values for column, values in rows.where.items()):
            continue
        place = f"{path}:{number}"
        question = row[columns.question] if columns.question is not None else None
        if columns.question is not None and (not isinstance(question, str) or not question.strip()):
            raise DataError(f"{place}: the question ({columns.question!r}) is empty or no text; write one or remove the row")
        for column in own:
            if not isinstance(row[column], str | int) or isinstance(row[column], bool) or row[column] == "":
                raise DataError(f"{place}: the id ({column!r}) is missing or neither text nor number; give the question one")
        ids[number] = f"{prefix}{number}" if numbered else "/".join(str(row[column]) for column in own)
    return ids


def _check_columns(path: Path, columns: Columns, rows: Rows) -> bool:
    """Check that every row has the columns it must have; return whether the rows are to be numbered, as they have no id."""
    if path.suffix in _JSONL:
        lines = list(read_json_lines(path))
        numbered = columns.id == _UNNUMBERED and not any(_UNNUMBERED in row for _, row in lines)
        for number, row in lines:
            for several in _needed(columns, rows, numbered):
                if not any(column in row for column in several):
                    raise DataError(
                        f"{path}:{number}: has no field {several[0]!r}, only {names(row)}; add it, or rename it under columns"
                    )
        return numbered
    if path.suffix == ".parquet":
        known = parquet_columns(path)
        numbered = columns.id == _UNNUMBERED and _UNNUMBERED not in known
        for column in (column for several in _needed(columns, rows, numbered) for column in several):
            if column not in known:
                raise DataError(f"{path}: has no column {column!r}, only {names(known)}; name the right one under columns")
        return numbered
    raise DataError(f"{path}: questions are read from .jsonl and .parquet files; convert it to one of them")


def _needed(columns: Columns, rows: Rows, numbered: bool) -> list[tuple[str, ...]]:
    """Return what every row must have: the names of each thing's fields, of which one is enough where a row may leave some out."""
    each = [() if rows.text_only else columns.named("image"), columns.named("question")]
    each += [(column,) for column in (() if numbered else columns.named("id"))]
    each += [columns.named("options"), columns.named("category"), *((column,) for column in rows.where)]
    return [several for several in each if several]


def _all(columns: Columns) -> set[str]:
    return {name for field in ("question", "image", "answer", "options", "category") for name in columns.named(field)}


def _read_rows(path: Path, columns: Container[str], wanted: Container[int] | None = None) -> Iterator[tuple[int, Row]]:
    """Yield each row's number and those of the columns that it has."""
    if path.suffix in _JSONL:
        for number, row in read_json_lines(path):
            if wanted is None or number in wanted:
                yield number, row
        return
    held = [column for column in parquet_columns(path) if column in columns]
    for number, values in read_parquet(path, held, wanted):
        yield number, dict(zip(held, values, strict=True))


def _values(row: Row, columns: Sequence[str]) -> list[object]:
    """Return what the fields hold, in a row: lists laid out, empty ones passed over."""
    return [value for column in columns for value in _as_list(row.get(column))]


def _read_images(found: Sequence[object], path: Path, place: str, text_only: bool) -> tuple[bytes, ...]:
    images = list[bytes]()
    for image in found:
        fields: dict[str, Any] = cast("dict[str, Any]", image) if isinstance(image, dict) else {}
        if fields and fields.get("bytes") is None and fields.get("path") is None:
            continue
        data: object = fields.get("bytes") if isinstance(image, dict) else image
        name = f"{place}: image {len(images)}"
        if isinstance(image, str) and path.suffix in _JSONL:
            name = f"{place}: image {image}"
            data = _read_bytes(path.parent / image, name)
        if not isinstance(data, bytes):
            raise DataError(f"{name}: holds no image's bytes; store the image in the file, or use JSONL with paths")
        _verify(data, name)
        images.append(data)
    if not images and not text_only:
        raise DataError(f"{place}: has no image; give it one or remove the row")
    return tuple(images)


def _read_answers(found: Sequence[object], place: str) -> tuple[str, ...]:
    answers = list[str]()
    for answer in found:
        text: object = cast("dict[str, Any]", answer).get("answer") if isinstance(answer, dict) else answer
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise DataError(f"{place}: an answer is neither text nor number ({text!r}); write it as text")
        if str(text).strip():
            answers.append(str(text).strip())
    return tuple(answers)


def _read_options(row: Row, columns: Columns, place: str) -> tuple[str, ...]:
    """Return a row's options; in a list their number and order count, so none is passed over there."""
    found = columns.named("options")
    value: object = row.get(found[0]) if found else []
    if len(found) > 1:
        value = [option for option in _values(row, found) if str(option).strip()]
    elif isinstance(value, str):
        value = _written_list(value)
    if not isinstance(value, list):
        raise DataError(f"{place}: its options ({columns.options!r}) are no list; write one, or name a field for each option")
    return tuple(str(option).strip() for option in cast("list[object]", value))


def _written_list(text: str) -> object:
    try:
        return cast("object", ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _as_list(value: object) -> list[object]:
    if value is None:
        return []
    return cast("list[object]", value) if isinstance(value, list) else [value]


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file as {path}; correct the path or remove the row") from error
    except OSError as error:
        raise DataError(f"{name}: {path} cannot be read ({error.strerror}); correct the path or remove the row") from error


def _verify(data: bytes, name: str) -> None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: cannot be read as an image ({image_fault(error)}); replace it or remove the row") from error
