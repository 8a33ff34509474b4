"""Questions about images, with their accepted answers, from JSONL, JSON or parquet files; each is checked as it is read."""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from compress.artifact import file_digest
from compress.calibration.conversations import Row
from compress.calibration.json_rows import SUFFIXES, read_json_rows
from compress.calibration.question_rows import QuestionRows, values_of
from compress.calibration.row_images import ImagePlaces, image_name, is_encoded, read_images
from compress.calibration.sets import Columns, RowFilter
from compress.calibration.tables import check_file
from compress.errors import DataError
from compress.limits import limits

_ALL_ROWS = RowFilter()


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
        """The SHA-256 of the question, its images' digests and its options: one item's, however its file is laid out."""
        normalized = " ".join(self.question.split()).casefold()
        options = [list(self.options)] if self.options else []
        return hashlib.sha256(json.dumps([normalized, *self.image_digests, *options]).encode()).hexdigest()


def count_questions(files: Sequence[Path], columns: Columns, rows: RowFilter = _ALL_ROWS) -> int:
    """Return how many questions the files hold; every row that counts is checked but for its images.

    Raises:
        DataError: as `read_questions` does.
    """
    return sum(len(ids) for _, ids in _numbered(files, columns, rows))


def read_questions(
    files: Sequence[Path],
    columns: Columns,
    chosen: Container[int] | None = None,
    rows: RowFilter = _ALL_ROWS,
    image_folder: Path | None = None,
) -> Iterator[Question]:
    """Yield the questions of the files in their order, one at a time; with `chosen`, only those at these places from 0 on.

    A row of a JSONL file or JSON list gives `image` as a path, a data URI or base64, or a list of such; paths stay below
    `image_folder`, or else below the file's own folder. `answer` is one answer or a list. A parquet row gives `image` as on the hub
    (a struct of `bytes` and `path`), as bytes, a data URI or base64, or a list of such, `answer` as text, a list of texts or of
    structs with the field `answer`. Options are a list of texts, such a list written out as text, or a field each. Of a
    conversation (`compress.calibration.conversations`) the first question is read. Where a file lacks a renamed column but has
    the usual one, that is read; where it has no `id`, its rows are numbered.

    Raises:
        DataError: a file is missing, malformed or holds no question that counts; a row lacks a field, its question is empty, its
            id was there before, it has no image and `rows` asks for one, one of its images is missing or unreadable, or
            something exceeds a limit. Names the file and the line or row.
    """
    before = 0
    for opened, ids in _numbered(files, columns, rows):
        wanted = {number for place, number in enumerate(ids, start=before) if chosen is None or place in chosen}
        before += len(ids)
        places = ImagePlaces(opened.path.parent if opened.path.suffix in SUFFIXES else None, image_folder)
        for number, row in opened.read(None, wanted) if wanted else ():
            place, here = f"{opened.path}:{number}", opened.columns
            images = read_images(values_of(row, here.named("image")), places, place)
            if not images and not rows.text_only:
                raise DataError(f"{place}: has no image; give it one, remove the row, or set text_only: true")
            yield Question(
                id=ids[number],
                images=images,
                question=str(row[here.question]).strip() if here.question else "",
                answers=_read_answers(values_of(row, here.named("answer")), place),
                origin=f"{opened.path.name}:{number}",
                options=_read_options(row, here, place),
                category=None if here.category is None else _checked(str(row[here.category]), f"{place}: its category"),
            )


def source_digest(
    path: Path,
    columns: Columns | None = None,
    fingerprint: Callable[[Path], str] = file_digest,
    image_folder: Path | None = None,
) -> str:
    """Return the SHA-256 of a local file's content; with `columns`, of a question file's and of the images whose paths it has.

    Raises:
        DataError: the file or an image cannot be read, or a line is malformed.
    """
    check_file(path)
    if path.suffix not in SUFFIXES:
        return hashlib.sha256(fingerprint(path).encode()).hexdigest()
    total = hashlib.sha256(read_json_rows(path).sha256.encode())
    if columns is not None:
        opened, places = QuestionRows.open(path, columns), ImagePlaces(path.parent, image_folder)
        for number, row in opened.read(None):
            for place, value in enumerate(values_of(row, opened.columns.named("image"))):
                image: object = cast("dict[str, Any]", value).get("path") if isinstance(value, dict) else value
                if isinstance(image, str) and image.strip() and not is_encoded(image):
                    found = places.find(image, image_name(image, place, f"{path}:{number}"))
                    total.update(fingerprint(found).encode())
    return total.hexdigest()


def _numbered(files: Sequence[Path], columns: Columns, rows: RowFilter) -> list[tuple[QuestionRows, dict[int, str]]]:
    """Return the opened files, each with its rows' ids, after checking that there is a question and that no id stands twice."""
    seen = dict[str, str]()
    found = list[tuple[QuestionRows, dict[int, str]]]()
    for place, path in enumerate(files):
        opened = QuestionRows.open(path, columns)
        # what tells the rows of one file from those of the others where they are numbered is not its name, which may change
        ids = _read_ids(opened, rows, f"{place}:" if len(files) > 1 else "")
        found.append((opened, ids))
        for number, identity in ids.items():
            if identity in seen:
                raise DataError(
                    f"{path}:{number}: id {_excerpt(identity)} was given before, in {seen[identity]}; give each question its own"
                )
            seen[identity] = f"{path.name}:{number}"
    if not seen:
        held = ", ".join(map(str, files))
        if rows.where:
            wanted = " and ".join(f"{column!r} is {' or '.join(map(repr, values))}" for column, values in rows.where.items())
            raise DataError(f"{held}: no row is left where {wanted}; correct where, or name a file with such rows")
        raise DataError(f"{held}: holds no questions; name a file with at least one")
    return found


def _read_ids(opened: QuestionRows, rows: RowFilter, prefix: str) -> dict[int, str]:
    """Return the id of each row that counts by its number, after checking the row's question."""
    columns, numbered = opened.columns, opened.check_fields(rows)
    own = () if numbered else columns.named("id")
    light = {*own, *columns.named("question"), *rows.where} or {*columns.named("image")[:1]}
    ids = dict[int, str]()
    for number, row in opened.read(light):
        if any(str(row.get(column)) not in values for column, values in rows.where.items()):
            continue
        place = f"{opened.path}:{number}"
        question = row[columns.question] if columns.question is not None else None
        if columns.question is not None:
            if not isinstance(question, str) or not question.strip():
                raise DataError(f"{place}: the question ({columns.question!r}) is empty or no text; write one or remove the row")
            _checked(question, f"{place}: the question")
        for column in own:
            if not isinstance(row[column], str | int) or isinstance(row[column], bool) or row[column] == "":
                raise DataError(f"{place}: the id ({column!r}) is missing or neither text nor number; give the question one")
            _checked(str(row[column]), f"{place}: the id", "id_characters")
        ids[number] = f"{prefix}{number}" if numbered else "/".join(str(row[column]) for column in own)
    return ids


def _checked(text: str, what: str, limit: Literal["question_characters", "id_characters"] = "question_characters") -> str:
    """Return a text that a model or a report could take.

    Raises:
        DataError: it is too long, or holds NUL characters, which no tokenizer is made for; `what` says which it is.
    """
    if len(text) > getattr(limits(), limit):
        raise DataError(f"{what} has {len(text):,} characters ({limits().set_by(limit)}); shorten it or remove the row")
    if "\0" in text:
        raise DataError(f"{what} holds NUL characters; remove them or the row")
    return text


def _check_count(count: int, what: str) -> None:
    if count > limits().question_answers:
        raise DataError(f"{what}: there are {count:,} ({limits().set_by('question_answers')}); leave some out or remove the row")


def _read_answers(found: Sequence[object], place: str) -> tuple[str, ...]:
    _check_count(len(found), f"{place}: its answers")
    answers = list[str]()
    for answer in found:
        text: object = cast("dict[str, Any]", answer).get("answer") if isinstance(answer, dict) else answer
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise DataError(f"{place}: an answer is neither text nor number ({_excerpt(text)}); write it as text")
        if str(text).strip():
            answers.append(_checked(str(text).strip(), f"{place}: an answer"))
    return tuple(answers)


def _read_options(row: Row, columns: Columns, place: str) -> tuple[str, ...]:
    """Return a row's options; in a list their number and order count, so none is passed over there."""
    found = columns.named("options")
    value: object = row.get(found[0]) if found else []
    if len(found) > 1:
        value = [option for option in values_of(row, found) if str(option).strip()]
    elif isinstance(value, str):
        value = _written_list(_checked(value, f"{place}: its options"))
    if not isinstance(value, list):
        raise DataError(f"{place}: its options ({columns.options!r}) are no list; write one, or name a field for each option")
    _check_count(len(cast("list[object]", value)), f"{place}: its options")
    return tuple(_checked(str(option).strip(), f"{place}: an option") for option in cast("list[object]", value))


def _written_list(text: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # formulas have backslashes that stand for themselves
            return cast("object", ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _excerpt(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"
