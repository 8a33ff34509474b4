"""Questions about images, with their accepted answers, from JSONL or parquet files; each is checked as it is read."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from PIL import Image, UnidentifiedImageError

from compress.artifact import file_digest
from compress.calibration.sets import Columns
from compress.calibration.tables import check_file, names, parquet_columns, read_json_lines, read_parquet
from compress.conversation import image_fault
from compress.errors import DataError

_UNNUMBERED = Columns().id
_JSONL = {".jsonl", ".json"}


@dataclass(frozen=True)
class Question:
    """A question about one or more images and the answers that count as right, none where the file gives none.

    `images` are encoded (PNG, JPEG, …); `origin` is the file and the line or row, counted from 1.
    """

    id: str
    images: tuple[bytes, ...]
    question: str
    answers: tuple[str, ...]
    origin: str

    @cached_property
    def image_digests(self) -> tuple[str, ...]:
        """The SHA-256 of each image's encoded bytes."""
        return tuple(hashlib.sha256(image).hexdigest() for image in self.images)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the normalized question and its images' digests: equal for the same question about the same images."""
        normalized = " ".join(self.question.split()).casefold()
        return hashlib.sha256(json.dumps([normalized, *self.image_digests]).encode()).hexdigest()


def count_questions(files: Sequence[Path], columns: Columns) -> int:
    """Return how many questions the files hold; every row is checked but for its images.

    Raises:
        DataError: as `read_questions` does.
    """
    return sum(len(_read_ids(path, columns, _prefix(files, path))) for path in _unique(files, columns))


def read_questions(files: Sequence[Path], columns: Columns, chosen: Container[int] | None = None) -> Iterator[Question]:
    """Yield the questions of the files in their order, one at a time; with `chosen`, only those at these places from 0 on.

    A JSONL line gives `image` as a path relative to its file or a list of such paths, `answer` as one answer or a list. A parquet
    row gives `image` as on the hub (a struct of `bytes` and `path`) or a list of them, `answer` as text, a list of texts or of
    structs with the field `answer`. Where a file lacks a renamed column but has the usual one, that is read; where it has no `id`,
    its rows are numbered.

    Raises:
        DataError: a file is missing, malformed or holds no question; a row lacks a field, its question is empty, its id was there
            before, or one of its images is missing or unreadable. Names the file and the line or row.
    """
    before = 0
    for path in _unique(files, columns):
        ids = _read_ids(path, columns, _prefix(files, path))
        wanted = {number for place, number in enumerate(ids, start=before) if chosen is None or place in chosen}
        before += len(ids)
        for number, question, images, answers in _read_rows(path, columns, wanted) if wanted else ():
            place = f"{path}:{number}"
            yield Question(
                id=ids[number],
                images=_read_images(images, path.parent if path.suffix in _JSONL else None, place),
                question=question.strip(),
                answers=_read_answers(answers, place),
                origin=f"{path.name}:{number}",
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
            for image in _as_list(row.get(columns.image)):
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


def _unique(files: Sequence[Path], columns: Columns) -> Sequence[Path]:
    """Return the files after checking that there is a question and that no id stands twice."""
    seen = dict[str, str]()
    for path in files:
        for number, identity in _read_ids(path, columns, _prefix(files, path)).items():
            if identity in seen:
                raise DataError(
                    f"{path}:{number}: id {identity!r} was given before, in {seen[identity]}; give each question its own"
                )
            seen[identity] = f"{path.name}:{number}"
    if not seen:
        raise DataError(f"{', '.join(map(str, files))}: holds no questions; name a file with at least one")
    return files


def _names_in(path: Path, columns: Columns) -> Columns:
    """Return the names under which a file has the fields: those given, or the usual ones where it has only these.

    So a recipe that renames a hub dataset's columns also takes a local file in this package's own form in its place.
    """
    if path.suffix in _JSONL:
        known = {name for _, row in read_json_lines(path) for name in row}
    else:
        known = set(parquet_columns(path)) if path.suffix == ".parquet" else set[str]()
    given, usual = columns.model_dump(exclude_none=True), Columns().model_dump()
    present = {field: usual[field] if name not in known and usual[field] in known else name for field, name in given.items()}
    return columns.model_copy(update=present)


def _read_ids(path: Path, columns: Columns, prefix: str) -> dict[int, str]:
    """Return each row's id by its number, after checking the row's question."""
    check_file(path)
    columns = _names_in(path, columns)
    ids = dict[int, str]()
    for number, identity, question in _read_light(path, columns, prefix):
        place = f"{path}:{number}"
        if columns.question is not None and (not isinstance(question, str) or not question.strip()):
            raise DataError(f"{place}: the question ({columns.question!r}) is empty or no text; write one or remove the row")
        if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
            raise DataError(f"{place}: the id ({columns.id!r}) is missing or neither text nor number; give the question one")
        ids[number] = str(identity)
    return ids


def _read_light(path: Path, columns: Columns, prefix: str) -> Iterator[tuple[int, object, object]]:
    """Yield each row's number, id and question; rows are numbered where no row has the usual id."""
    if path.suffix in _JSONL:
        rows = list(read_json_lines(path))
        numbered = columns.id == _UNNUMBERED and not any(columns.id in row for _, row in rows)
        for number, row in rows:
            for column in _needed(columns, numbered):
                if column not in row:
                    raise DataError(
                        f"{path}:{number}: has no field {column!r}, only {names(row)}; add it, or rename it under columns"
                    )
            yield number, f"{prefix}{number}" if numbered else row[columns.id], row[columns.question] if columns.question else ""
    elif path.suffix == ".parquet":
        known = parquet_columns(path)
        numbered = columns.id == _UNNUMBERED and columns.id not in known
        for column in _needed(columns, numbered):
            if column not in known:
                raise DataError(f"{path}: has no column {column!r}, only {names(known)}; name the right one under columns")
        fields = [columns.question or columns.image] if numbered else [columns.question or columns.id, columns.id]
        for number, values in read_parquet(path, fields):
            yield number, f"{prefix}{number}" if numbered else values[1], values[0] if columns.question else ""
    else:
        raise DataError(f"{path}: questions are read from .jsonl and .parquet files; convert it to one of them")


def _needed(columns: Columns, numbered: bool) -> list[str]:
    """Return the columns that every row must have."""
    return [column for column in (columns.image, columns.question, None if numbered else columns.id) if column is not None]


def _read_rows(path: Path, columns: Columns, wanted: Container[int]) -> Iterator[tuple[int, str, object, object]]:
    columns = _names_in(path, columns)
    if path.suffix in _JSONL:
        for number, row in read_json_lines(path):
            if number in wanted:
                yield number, str(row[columns.question]) if columns.question else "", row[columns.image], row.get(columns.answer)
        return
    fields = [columns.question or columns.image, columns.image]
    fields += [columns.answer] if columns.answer in parquet_columns(path) else []
    for number, values in read_parquet(path, fields, wanted):
        yield number, str(values[0]) if columns.question else "", values[1], values[2] if len(values) > 2 else None


def _read_images(value: object, folder: Path | None, place: str) -> tuple[bytes, ...]:
    found = _as_list(value)
    if not found:
        raise DataError(f"{place}: has no image; give it one or remove the row")
    images = list[bytes]()
    for image in found:
        data: object = cast("dict[str, Any]", image).get("bytes") if isinstance(image, dict) else image
        name = f"{place}: image {len(images)}"
        if isinstance(image, str) and folder is not None:
            name = f"{place}: image {image}"
            data = _read_bytes(folder / image, name)
        if not isinstance(data, bytes):
            raise DataError(f"{name}: holds no image's bytes; store the image in the file, or use JSONL with paths")
        _verify(data, name)
        images.append(data)
    return tuple(images)


def _read_answers(value: object, place: str) -> tuple[str, ...]:
    answers = list[str]()
    for answer in _as_list(value):
        text: object = cast("dict[str, Any]", answer).get("answer") if isinstance(answer, dict) else answer
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise DataError(f"{place}: an answer is neither text nor number ({text!r}); write it as text")
        if str(text).strip():
            answers.append(str(text).strip())
    return tuple(answers)


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
