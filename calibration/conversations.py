"""Rows in which a question stands as a conversation: LLaVA's `conversations`, and `messages` as ms-swift has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from compress.errors import DataError

FIELDS = ("conversations", "messages")
"""The fields that hold a conversation."""

IMAGES = ("image", "images")
"""The fields of the images that its marks stand for, in their order."""

USUAL = frozenset({"image", "question", "answer"})
"""The fields that a conversation is read as."""

MARK = "<image>"
"""What stands in a text where an image belongs."""

_ASKING = frozenset({"user", "human"})
_ANSWERING = frozenset({"assistant", "gpt"})

Row = Mapping[str, Any]
"""A row's values by the names of its fields, as far as they were read."""


@dataclass(frozen=True)
class _Turn:
    """What was said by whom; `images` are those that stand in the turn itself, None where a mark is for one of the row's."""

    speaker: str
    text: str
    images: tuple[object, ...]


def holds_conversation(fields: Collection[str]) -> bool:
    """Return whether a row with these fields is read as a conversation: it has one, and no question of its own."""
    return "question" not in fields and any(field in fields for field in FIELDS)


def first_exchange(row: Row, place: str, *, with_images: bool = True) -> dict[str, Any]:
    """Return a conversation's first question as `question`, what follows it as `answer`, and its images as `image`.

    What a system message says is not part of it. Marks at either end of the question are left out, as images come first in a
    prompt; where they stand within it, each becomes `<image 1>`, `<image 2>`, …. Later questions only take their images with them.

    Raises:
        DataError: it is no conversation, or has another number of marks than images; names the place.
    """
    field = next(field for field in FIELDS if field in row)
    turns = _turns(row[field], f"{place}: {field!r}")
    first = next((number for number, turn in enumerate(turns) if turn.speaker in _ASKING), None)
    if first is None:
        raise DataError(f"{place}: nobody asks anything in {field!r}; add a turn of the user, or remove the row")
    answered = first + 1 < len(turns) and turns[first + 1].speaker in _ANSWERING
    found = {name: value for name, value in row.items() if name not in {*FIELDS, *IMAGES}}
    found |= {"question": _without_marks(turns[first].text), "answer": turns[first + 1].text.strip() if answered else None}
    images = _images(row, turns, first, place) if with_images else []
    return found | ({"image": images} if images else {})


def _turns(value: object, where: str) -> list[_Turn]:
    if not isinstance(value, list):
        raise DataError(f"{where} is no list of turns; write one, or remove the row")
    turns = list[_Turn]()
    for turn in cast("list[object]", value):
        fields = cast("dict[str, Any]", turn) if isinstance(turn, dict) else {}
        speaker, said = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not isinstance(speaker, str):
            raise DataError(f"{where} has a turn without a speaker; write each as {{role, content}} or {{from, value}}")
        turns.append(_turn(speaker, said, where))
    return turns


def _turn(speaker: str, said: object, where: str) -> _Turn:
    """Return a turn whose content is a text, or a list of parts, each a text or an image."""
    if isinstance(said, str):
        return _Turn(speaker, said, (None,) * said.count(MARK))
    texts, images = list[str](), list[object]()
    for part in cast("list[object]", said) if isinstance(said, list) else [None]:
        fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
        text: object = part if isinstance(part, str) else fields.get("text")
        if isinstance(text, str):
            texts.append(text)
            images += [None] * text.count(MARK)
        elif fields.get("type") in ("image", "image_url"):
            texts.append(MARK)
            images.append(_own_image(fields))
        else:
            raise DataError(f"{where} has a turn that holds neither text nor images; correct it, or remove the row")
    return _Turn(speaker, "".join(texts), tuple(images))


def _own_image(part: Mapping[str, Any]) -> object:
    given: object = next((part[name] for name in ("image", "image_url", "url", "path") if part.get(name) is not None), None)
    return cast("dict[str, object]", given).get("url") if isinstance(given, dict) else given


def _images(row: Row, turns: Sequence[_Turn], first: int, place: str) -> list[object]:
    """Return the images of the first question; all of the row's where no mark says to which question they belong."""
    given = [image for name in IMAGES for image in _listed(row.get(name))]
    marks = [image for turn in turns if turn.speaker in _ASKING for image in turn.images]
    if not marks:
        return given
    open_marks = sum(image is None for image in marks)
    if open_marks != len(given):
        raise DataError(
            f"{place}: has {open_marks} marks {MARK} and {len(given)} images; give each image its mark, or leave all out"
        )
    rest = iter(given)
    return [next(rest) if image is None else image for image in turns[first].images]


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return cast("list[object]", value) if isinstance(value, list) else [value]


def _without_marks(text: str) -> str:
    parts = text.split(MARK)
    said = [part for part in parts if part.strip()]
    if len(said) <= 1:
        return said[0].strip() if said else ""
    return (parts[0] + "".join(f"<image {number}>{part}" for number, part in enumerate(parts[1:], start=1))).strip()
