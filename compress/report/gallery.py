"""The gallery of flips: items whose score an artifact changed, each with its image and the models' answers."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.data.images import decode_image
from compress.errors import CompressError
from compress.eval.results import ItemizedMeasurement, QuestionItem, ScoredItem
from compress.eval.tasks.task import Task

if TYPE_CHECKING:
    from compress.data.questions import Question

LIMIT = 24
"""How many flips a page shows at most."""

_THUMBNAIL_SIDE = 256
_JPEG_QUALITY = 75
"""Pixels and JPEG quality of a thumbnail: they bound the page's size, for images are in it as data URIs."""

_MAX_IMAGES = 4
"""Thumbnails per item; a card states how many more there are."""

Kind = Literal["lost", "gained"]


@dataclass(frozen=True)
class TaskFlips:
    """One task's measurements."""

    task: Task
    files: Callable[[], Sequence[Path]]
    """Returns the task's data files; called only where there is a flip to show."""

    original: ItemizedMeasurement
    artifacts: Mapping[str, ItemizedMeasurement]
    """By the name that the page shows."""


@dataclass(frozen=True)
class GalleryAnswer:
    """One model's answer to an item, its fault, and the item's score."""

    model: str
    text: str
    fault: str | None
    score: float


@dataclass(frozen=True)
class Thumbnail:
    """An image of at most 256 pixels a side, as a data URI."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """One item that flipped, with the answers of the original and of the artifacts whose score changed."""

    task: str
    id: str
    kind: Kind
    binary: bool
    original: GalleryAnswer
    artifacts: tuple[GalleryAnswer, ...]
    accepted: tuple[tuple[str, int], ...]
    """The accepted answers with their frequencies."""

    question: str = ""
    options: tuple[str, ...] = ()
    images: tuple[Thumbnail, ...] = ()
    more_images: int = 0

    @property
    def answers(self) -> tuple[GalleryAnswer, ...]:
        """Each model's answer, the original's first."""
        return (self.original, *self.artifacts)


@dataclass(frozen=True)
class Gallery:
    """The cards of a page."""

    cards: tuple[Card, ...] = ()
    """Lost items first."""

    lost: int = 0
    """The number of all lost items, shown or not; `gained` likewise."""

    gained: int = 0
    missing: tuple[str, ...] = ()
    """Why questions and images are missing, a line for each task."""


def make_gallery(tasks: Iterable[TaskFlips], limit: int = LIMIT) -> Gallery:
    """Choose flips of all tasks in turn, those of most artifacts first, and read their questions and images.

    Up to two thirds of the cards are lost items, or more where few are gained.
    """
    flips = {
        task_flips.task.name: (task_flips, _flips(task_flips))
        for task_flips in tasks
        if "flips" in task_flips.task.judged_by() and task_flips.task.name in task_flips.original.tasks
    }
    lost = [[card for card in cards if card.kind == "lost"] for _, cards in flips.values()]
    gained = [[card for card in cards if card.kind == "gained"] for _, cards in flips.values()]
    count_lost, count_gained = sum(map(len, lost)), sum(map(len, gained))
    # Losses say what an artifact broke; gains beside them show that flips go both ways.
    lost_limit = max(limit - limit // 3, limit - count_gained)
    chosen = _interleave(lost)[:lost_limit]
    chosen += _interleave(gained)[: limit - len(chosen)]
    missing: list[str] = []
    cards_with_data: dict[tuple[str, str], Card] = {}
    for name, (task_flips, _) in flips.items():
        task_cards = [card for card in chosen if card.task == name]
        try:
            cards_with_data |= {(name, card.id): card for card in _with_data(task_flips, task_cards)}
        except CompressError as error:  # the data of a cached measurement may be gone
            missing.append(f"{name}: {error}")
    cards = tuple(_merge(card, cards_with_data.get((card.task, card.id))) for card in chosen)
    return Gallery(cards=cards, lost=count_lost, gained=count_gained, missing=tuple(missing))


def _flips(task_flips: TaskFlips) -> list[Card]:
    """Return a task's flips, those of most artifacts first and otherwise in the order of the items."""
    name = task_flips.task.name
    binary = task_flips.original.tasks[name].metrics.binary
    artifact_items = {
        artifact: {item.id: item for item in measurement.scored(name)}
        for artifact, measurement in task_flips.artifacts.items()
        if name in measurement.tasks
    }
    cards: list[Card] = []
    for original_item in task_flips.original.scored(name):
        items_here = {artifact: items[original_item.id] for artifact, items in artifact_items.items() if original_item.id in items}
        lost = {artifact: item for artifact, item in items_here.items() if item.score < original_item.score}
        gained = {artifact: item for artifact, item in items_here.items() if item.score > original_item.score}
        cards += [_card(name, "lost", original_item, lost, binary=binary)] if lost else []
        cards += [_card(name, "gained", original_item, gained, binary=binary)] if gained else []
    return sorted(cards, key=lambda card: -len(card.artifacts))


def _card(task: str, kind: Kind, original: ScoredItem, artifacts: Mapping[str, ScoredItem], *, binary: bool) -> Card:
    return Card(
        task=task,
        id=original.id,
        kind=kind,
        binary=binary,
        original=_answer("original", original),
        artifacts=tuple(_answer(artifact, item) for artifact, item in artifacts.items()),
        accepted=accepted_answers(original.accepted),
        question=original.prompt if isinstance(original, QuestionItem) else "",
    )


def _answer(model: str, item: ScoredItem) -> GalleryAnswer:
    return GalleryAnswer(model=model, text=item.said, fault=item.fault, score=item.score)


def accepted_answers(answers: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Return the accepted answers with their frequencies, the most frequent first."""
    return tuple(Counter(answers).most_common())


def _interleave(cards: Sequence[Sequence[Card]]) -> list[Card]:
    """Return the cards of all tasks, one of each task after the other."""
    # In turn, so that one task with many flips does not fill the page.
    return [card for card in chain.from_iterable(zip_longest(*cards)) if card is not None]


def _with_data(task_flips: TaskFlips, cards: Sequence[Card]) -> Iterator[Card]:
    """Yield the cards whose questions are in the task's data, with question, options and images."""
    if not cards:
        return
    by_id = {card.id: card for card in cards}
    questions, _ = task_flips.task.contents(task_flips.files())
    for question in questions:
        if question.id in by_id:
            yield _with_question_data(by_id[question.id], question)


def _with_question_data(card: Card, question: Question) -> Card:
    thumbnails = tuple(thumbnail(image, question.origin) for image in question.images[:_MAX_IMAGES])
    more = len(question.images) - len(thumbnails)
    return replace(card, question=question.question, options=question.options, images=thumbnails, more_images=more)


def _merge(card: Card, with_data: Card | None) -> Card:
    if with_data is None:
        return card
    fields = {name: getattr(with_data, name) for name in ("question", "options", "images", "more_images")}
    return replace(card, **fields)


def thumbnail(image: bytes, name: str) -> Thumbnail:
    """Return an image as a small JPEG, decoded as for the models.

    Raises:
        DataError: it cannot be decoded; the message begins with `name`.
    """
    # As for the models, with the same limits: what a reader sees is what was asked about.
    small = decode_image(image, name)
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(uri=uri, width=small.width, height=small.height)
