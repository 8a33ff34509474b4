"""Questions from conversations: LLaVA's `conversations`, and ms-swift's `messages`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from compress.errors import DataError

FIELDS = ("conversations", "messages")
"""The fields with a conversation."""

IMAGES = ("image", "images")
"""The fields with the images of its placeholders, in order."""

STANDARD_FIELDS = frozenset({"image", "question", "answer"})
"""The fields that a conversation is converted to."""

PLACEHOLDER = "<image>"
"""The placeholder of an image in a text."""

_USER_ROLES = frozenset({"user", "human"})
_ASSISTANT_ROLES = frozenset({"assistant", "gpt"})

Row = Mapping[str, Any]
"""The values of a row's fields, as far as they were read, by field name."""


@dataclass(frozen=True)
class _Turn:
    """One turn of a conversation."""

    role: str
    text: str

    images: tuple[object, ...]
    """Its images in order; None for a placeholder of one of the row's images."""


def has_conversation(fields: Collection[str]) -> bool:
    """Return whether a row with these fields is a conversation: it has one, and no `question`."""
    return "question" not in fields and any(field in fields for field in FIELDS)


def first_exchange(row: Row, where: str, *, with_images: bool = True) -> dict[str, Any]:
    """Return a conversation's first question as `question`, the reply as `answer`, and the question's images as `image`.

    System messages are ignored. Placeholders at either end of the question are removed, as images come first in a prompt; those
    within it become `<image 1>`, `<image 2>`, …. Images of later questions are skipped.

    Raises:
        DataError: it is no conversation, or its numbers of placeholders and images differ; names the row.
    """
    field = next(field for field in FIELDS if field in row)
    turns = _turns(row[field], f"{where}: {field!r}")
    first = next((number for number, turn in enumerate(turns) if turn.role in _USER_ROLES), None)
    if first is None:
        raise DataError(f"{where}: nobody asks anything in {field!r}; add a turn of the user, or remove the row")
    answered = first + 1 < len(turns) and turns[first + 1].role in _ASSISTANT_ROLES
    fields = {name: value for name, value in row.items() if name not in {*FIELDS, *IMAGES}}
    fields |= {"question": _without_placeholders(turns[first].text), "answer": turns[first + 1].text.strip() if answered else None}
    images = _images(row, turns, first, where) if with_images else []
    return fields | ({"image": images} if images else {})


def _turns(value: object, where: str) -> list[_Turn]:
    if not isinstance(value, list):
        raise DataError(f"{where} is no list of turns; write one, or remove the row")
    turns = list[_Turn]()
    for turn in cast("list[object]", value):
        fields = cast("dict[str, Any]", turn) if isinstance(turn, dict) else {}
        # `role` and `content` in ms-swift's files, `from` and `value` in LLaVA's
        role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not isinstance(role, str):
            raise DataError(f"{where} has a turn without a speaker; write each as {{role, content}} or {{from, value}}")
        turns.append(_turn(role, content, where))
    return turns


def _turn(role: str, content: object, where: str) -> _Turn:
    """Return a turn whose content is a text, or a list of texts and images."""
    if isinstance(content, str):
        return _Turn(role, content, (None,) * content.count(PLACEHOLDER))
    texts, images = list[str](), list[object]()
    for item in cast("list[object]", content) if isinstance(content, list) else [None]:
        fields = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        text: object = item if isinstance(item, str) else fields.get("text")
        if isinstance(text, str):
            texts.append(text)
            images += [None] * text.count(PLACEHOLDER)
        elif fields.get("type") in ("image", "image_url"):
            texts.append(PLACEHOLDER)
            images.append(_content_image(fields))
        else:
            raise DataError(f"{where} has a turn that holds neither text nor images; correct it, or remove the row")
    return _Turn(role, "".join(texts), tuple(images))


def _content_image(item: Mapping[str, Any]) -> object:
    image: object = next((item[name] for name in ("image", "image_url", "url", "path") if item.get(name) is not None), None)
    return cast("dict[str, object]", image).get("url") if isinstance(image, dict) else image


def _images(row: Row, turns: Sequence[_Turn], first: int, where: str) -> list[object]:
    """Return the images of the first question; all of the row's where the conversation has no placeholders."""
    row_images = [image for name in IMAGES for image in as_list(row.get(name))]
    # of all turns: the row's images belong to the placeholders in order, those of later questions included
    placed = [image for turn in turns if turn.role in _USER_ROLES for image in turn.images]
    if not placed:
        return row_images
    placeholders = sum(image is None for image in placed)
    # which image belongs to which placeholder could only be guessed
    if placeholders != len(row_images):
        raise DataError(
            f"{where}: has {placeholders} marks {PLACEHOLDER} and {len(row_images)} images; "
            "give each image its mark, or leave all out"
        )
    remaining = iter(row_images)
    return [next(remaining) if image is None else image for image in turns[first].images]


def as_list(value: object) -> list[object]:
    """Return a field's values: those of a list, none of a missing value, or the one."""
    if value is None:
        return []
    return cast("list[object]", value) if isinstance(value, list) else [value]


def _without_placeholders(text: str) -> str:
    pieces = text.split(PLACEHOLDER)
    texts = [piece for piece in pieces if piece.strip()]
    if len(texts) <= 1:
        return texts[0].strip() if texts else ""
    return (pieces[0] + "".join(f"<image {number}>{piece}" for number, piece in enumerate(pieces[1:], start=1))).strip()
