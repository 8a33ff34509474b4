"""Questions about images with reference answers, from JSONL, JSON or parquet files, checked as they are read."""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from compress.checkpoints.artifact import file_digest
from compress.data.conversations import Row
from compress.data.json_rows import SUFFIXES, file_state, read_json_rows
from compress.data.question_rows import QuestionRows, values_of
from compress.data.row_images import ImageFolders, image_name, is_encoded, read_images
from compress.data.sources import Columns, RowFilter
from compress.data.tables import check_file
from compress.errors import DataError
from compress.untrusted.limits import limits

_ALL_ROWS = RowFilter()


@dataclass(frozen=True)
class Question:
    """A question about images."""

    id: str

    images: tuple[bytes, ...]
    """Encoded (PNG, JPEG, …); empty for questions of text alone."""

    question: str

    answers: tuple[str, ...]
    """The reference answers; empty where the file has none."""

    origin: str
    """The file and the line or row, counted from 1."""

    options: tuple[str, ...] = ()
    """The options of a multiple choice, in order."""

    category: str | None = None
    """The category for separate scores, if any."""

    @cached_property
    def image_digests(self) -> tuple[str, ...]:
        """The SHA-256 of each image's encoded bytes."""
        return tuple(hashlib.sha256(image).hexdigest() for image in self.images)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the question, its images' digests and its options, whatever the file's format."""
        # white space and case differ between copies of one dataset; the question is the same
        normalized = " ".join(self.question.split()).casefold()
        options = [list(self.options)] if self.options else []
        return hashlib.sha256(json.dumps([normalized, *self.image_digests, *options]).encode()).hexdigest()


@dataclass(frozen=True)
class QuestionFiles:
    """The questions of one or more files, whose rows are checked once; images are read when they are asked for."""

    opened: tuple[tuple[QuestionRows, Mapping[int, str]], ...]
    """Each file with its selected rows' ids, by row number."""

    rows: RowFilter

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self.opened)

    def read(self, chosen: Container[int] | None = None, image_folder: Path | None = None) -> Iterator[Question]:
        """Yield the questions in order, one at a time; with `chosen`, only those with these indices, counted from 0.

        Paths of images are below `image_folder`, or else below the file's own folder.

        Raises:
            DataError: an image is missing or unreadable, a row lacks a required one, or a limit is exceeded; names file and row.
        """
        count = 0
        for opened, ids in self.opened:
            selected = {number for index, number in enumerate(ids, start=count) if chosen is None or index in chosen}
            count += len(ids)
            folders = ImageFolders(opened.path.parent if opened.path.suffix in SUFFIXES else None, image_folder)
            for number, row in opened.read(None, selected) if selected else ():
                yield self._question(opened, ids[number], (number, row), folders)

    def _question(self, opened: QuestionRows, identity: str, numbered: tuple[int, Row], folders: ImageFolders) -> Question:
        (number, row), names = numbered, opened.columns
        where = f"{opened.path}:{number}"
        images = read_images(values_of(row, names.named("image")), folders, where)
        if not images and not self.rows.text_only:
            raise DataError(f"{where}: has no image; give it one, remove the row, or set text_only: true")
        return Question(
            id=identity,
            images=images,
            question=str(row[names.question]).strip() if names.question else "",
            answers=_read_answers(values_of(row, names.named("answer")), where),
            origin=f"{opened.path.name}:{number}",
            options=_read_options(row, names, where),
            category=None if names.category is None else _checked(str(row[names.category]), f"{where}: its category"),
        )


_OPEN: OrderedDict[tuple[object, ...], QuestionFiles] = OrderedDict()
"""The latest opened files, by path, state and settings: plan, calibration, overlap check and measurements read the same ones.

They have at most the number of rows that one file may have, whose ids take 100 MB.
"""


def open_questions(files: Sequence[Path], columns: Columns, rows: RowFilter = _ALL_ROWS) -> QuestionFiles:
    """Open question files and check every selected row except for its answers and images; done once while they do not change.

    In a JSONL or JSON file `image` is a path, a data URI or base64, or a list of these, and `answer` one answer or a list. In a
    parquet file `image` is a struct of `bytes` and `path` (as on the hub), bytes, a data URI or base64, or a list of these, and
    `answer` text, or a list of texts or of structs with the field `answer`. Options are a list of texts, the same list as a Python
    literal, or one field each. Of a conversation (`compress.data.conversations`) the first question is read. Where a file lacks a
    renamed column but has the standard one, that is read; rows without `id` are numbered.

    Raises:
        DataError: a file is missing, malformed or has no selected question; a row lacks a field, its question is empty, its id is a
            duplicate, or a limit is exceeded. The message names the file and the line or row.
    """
    key = (*map(file_state, files), columns, rows.model_dump_json(), limits())
    if key not in _OPEN:
        opened = QuestionFiles(tuple(_opened_files(files, columns, rows)), rows)
        # oldest first, before the new one is added: never more than one file's limit of rows in memory
        while _OPEN and sum(map(len, _OPEN.values())) + len(opened) > limits().rows:
            _OPEN.popitem(last=False)
        _OPEN[key] = opened
    _OPEN.move_to_end(key)
    return _OPEN[key]


def source_digest(
    path: Path,
    columns: Columns | None = None,
    fingerprint: Callable[[Path], str] = file_digest,
    image_folder: Path | None = None,
) -> str:
    """Return the SHA-256 of a local file's content; with `columns`, of a question file and the images that it names.

    Raises:
        DataError: the file or an image cannot be read, or a line is malformed.
    """
    check_file(path)
    if path.suffix not in SUFFIXES:
        return hashlib.sha256(fingerprint(path).encode()).hexdigest()
    digest = hashlib.sha256(read_json_rows(path).sha256.encode())
    if columns is not None:
        opened, folders = QuestionRows.open(path, columns), ImageFolders(path.parent, image_folder)
        for number, row in opened.read(None):
            for index, value in enumerate(values_of(row, opened.columns.named("image"))):
                image: object = cast("dict[str, Any]", value).get("path") if isinstance(value, dict) else value
                if isinstance(image, str) and image.strip() and not is_encoded(image):
                    image_path = folders.resolve(image, image_name(image, index, f"{path}:{number}"))
                    # the images' content as well: a question file may stay the same while an image behind it changes
                    digest.update(fingerprint(image_path).encode())
    return digest.hexdigest()


def _opened_files(files: Sequence[Path], columns: Columns, rows: RowFilter) -> list[tuple[QuestionRows, dict[int, str]]]:
    """Return the opened files, each with its selected rows' ids by number, after checking that ids are unique and not empty."""
    seen = dict[str, str]()
    opened_files = list[tuple[QuestionRows, dict[int, str]]]()
    for index, path in enumerate(files):
        opened = QuestionRows.open(path, columns)
        # numbered rows of several files are told apart by the file's index: its name may change
        ids = _read_ids(opened, rows, f"{index}:" if len(files) > 1 else "")
        opened_files.append((opened, ids))
        for number, identity in ids.items():
            if identity in seen:
                raise DataError(
                    f"{path}:{number}: id {_excerpt(identity)} was given before, in {seen[identity]}; give each question its own"
                )
            seen[identity] = f"{path.name}:{number}"
    if not seen:
        names = ", ".join(map(str, files))
        if rows.where:
            conditions = " and ".join(f"{column!r} is {' or '.join(map(repr, values))}" for column, values in rows.where.items())
            raise DataError(f"{names}: no row is left where {conditions}; correct where, or name a file with such rows")
        raise DataError(f"{names}: holds no questions; name a file with at least one")
    return opened_files


def _read_ids(opened: QuestionRows, rows: RowFilter, prefix: str) -> dict[int, str]:
    """Return the ids of selected rows, by number, after checking their questions."""
    columns, numbered, required = opened.columns, opened.numbered, opened.check_columns(rows)
    id_fields = () if numbered else columns.named("id")
    fields = {*id_fields, *columns.named("question"), *rows.where} or {*columns.named("image")[:1]}
    ids = dict[int, str]()
    for number, row in opened.read(None if required else fields):  # a JSON row is read whole in any case, and so checked whole
        opened.check_row(number, row, required)
        if any(str(row.get(column)) not in values for column, values in rows.where.items()):
            continue
        where = f"{opened.path}:{number}"
        question = row[columns.question] if columns.question is not None else None
        if columns.question is not None:
            if not isinstance(question, str) or not question.strip():
                raise DataError(f"{where}: the question ({columns.question!r}) is empty or no text; write one or remove the row")
            _checked(question, f"{where}: the question")
        for column in id_fields:
            if not isinstance(row[column], str | int) or isinstance(row[column], bool) or row[column] == "":
                raise DataError(f"{where}: the id ({column!r}) is missing or neither text nor number; give the question one")
            _checked(str(row[column]), f"{where}: the id", "id_characters")
        ids[number] = f"{prefix}{number}" if numbered else "/".join(str(row[column]) for column in id_fields)
    return ids


def _checked(text: str, name: str, limit: Literal["question_characters", "id_characters"] = "question_characters") -> str:
    """Return a text after checking it.

    Raises:
        DataError: it is too long, or has NUL characters, which tokenizers do not support; `name` identifies it in the message.
    """
    if len(text) > getattr(limits(), limit):
        raise DataError(f"{name} has {len(text):,} characters ({limits().set_by(limit)}); shorten it or remove the row")
    if "\0" in text:
        raise DataError(f"{name} holds NUL characters; remove them or the row")
    return text


def _check_count(count: int, name: str) -> None:
    if count > limits().question_answers:
        raise DataError(f"{name}: there are {count:,} ({limits().set_by('question_answers')}); leave some out or remove the row")


def _read_answers(values: Sequence[object], where: str) -> tuple[str, ...]:
    _check_count(len(values), f"{where}: its answers")
    answers = list[str]()
    for answer in values:
        text: object = cast("dict[str, Any]", answer).get("answer") if isinstance(answer, dict) else answer
        # JSON's true is an int to Python: an answer "True" would be made up
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise DataError(f"{where}: an answer is neither text nor number ({_excerpt(text)}); write it as text")
        if str(text).strip():
            answers.append(_checked(str(text).strip(), f"{where}: an answer"))
    return tuple(answers)


def _read_options(row: Row, columns: Columns, where: str) -> tuple[str, ...]:
    """Return a row's options; empty ones are skipped among several fields, and kept in a list, whose order counts."""
    fields = columns.named("options")
    value: object = row.get(fields[0]) if fields else []
    if len(fields) > 1:
        value = [option for option in values_of(row, fields) if str(option).strip()]
    elif isinstance(value, str):
        value = _parse_list(_checked(value, f"{where}: its options"))
    if not isinstance(value, list):
        raise DataError(f"{where}: its options ({columns.options!r}) are no list; write one, or name a field for each option")
    _check_count(len(cast("list[object]", value)), f"{where}: its options")
    return tuple(_checked(str(option).strip(), f"{where}: an option") for option in cast("list[object]", value))


def _parse_list(text: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes: backslashes of formulas are literal
            # literals only, no code; nesting that is too deep for the parser is caught below
            return cast("object", ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
