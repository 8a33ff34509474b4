"""The gallery of flips: items that an artifact answers otherwise than the original did, each with its image and both answers."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.errors import CompressError
from compress.eval.results import ItemizedMeasurement, QuestionItem, ScoredItem, ScoreMetrics
from compress.eval.task import Task
from compress.pictures import decode_image

if TYPE_CHECKING:
    from compress.calibration.questions import Question

LIMIT = 24
"""How many flips a page shows at most."""

_SIDE = 256
_QUALITY = 75
_IMAGES = 4
Kind = Literal["lost", "gained"]


@dataclass(frozen=True)
class TaskFlips:
    """One task as it was measured; `files` gives its data, and is called only where there is a flip to show.

    `artifacts` are told apart by the names that the page shows.
    """

    task: Task
    files: Callable[[], Sequence[Path]]
    original: ItemizedMeasurement
    artifacts: Mapping[str, ItemizedMeasurement]


@dataclass(frozen=True)
class GalleryAnswer:
    """What one model said to an item, why it said nothing, and the item's score."""

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
    """One item that flipped: what was asked, what is accepted, and what the original and the artifacts that flipped said."""

    task: str
    id: str
    kind: Kind
    binary: bool
    original: GalleryAnswer
    artifacts: tuple[GalleryAnswer, ...]
    accepted: tuple[tuple[str, int], ...]
    question: str = ""
    options: tuple[str, ...] = ()
    images: tuple[Thumbnail, ...] = ()
    more_images: int = 0

    @property
    def said(self) -> tuple[GalleryAnswer, ...]:
        """What was said by each model, the original first."""
        return (self.original, *self.artifacts)


@dataclass(frozen=True)
class Gallery:
    """The cards that are shown, lost ones first, of `lost` and `gained` items in all; `missing` tells why images are missing."""

    cards: tuple[Card, ...] = ()
    lost: int = 0
    gained: int = 0
    missing: tuple[str, ...] = ()


def make_gallery(tasks: Iterable[TaskFlips], limit: int = LIMIT) -> Gallery:
    """Choose flips of all tasks in turn, those of most artifacts first, and fetch their questions and images.

    Up to two thirds of the room are for lost items, or more where few are gained.
    """
    flips = {each.task.name: (each, _flips(each)) for each in tasks if isinstance(_metrics(each), ScoreMetrics)}
    lost = [[card for card in cards if card.kind == "lost"] for _, cards in flips.values()]
    gained = [[card for card in cards if card.kind == "gained"] for _, cards in flips.values()]
    count_lost, count_gained = sum(map(len, lost)), sum(map(len, gained))
    room = max(limit - limit // 3, limit - count_gained)
    chosen = _in_turn(lost)[:room]
    chosen += _in_turn(gained)[: limit - len(chosen)]
    missing: list[str] = []
    filled: dict[tuple[str, str], Card] = {}
    for name, (each, _) in flips.items():
        own = [card for card in chosen if card.task == name]
        try:
            filled |= {(name, card.id): card for card in _filled(each, own)}
        except CompressError as error:  # the data of a measurement that was stored may have gone since
            missing.append(f"{name}: {error}")
    cards = tuple(_with_question(card, filled.get((card.task, card.id))) for card in chosen)
    return Gallery(cards=cards, lost=count_lost, gained=count_gained, missing=tuple(missing))


def _metrics(each: TaskFlips) -> object:
    return each.original.tasks[each.task.name].metrics if each.task.name in each.original.tasks else None


def _flips(each: TaskFlips) -> list[Card]:
    """Return a task's flips, those of most artifacts first and otherwise in the order they were asked."""
    name = each.task.name
    metrics = _metrics(each)
    assert isinstance(metrics, ScoreMetrics)
    after = {
        artifact: {item.id: item for item in measured.scored(name)}
        for artifact, measured in each.artifacts.items()
        if name in measured.tasks
    }
    cards: list[Card] = []
    for before in each.original.scored(name):
        now = {artifact: items[before.id] for artifact, items in after.items() if before.id in items}
        lost = {artifact: item for artifact, item in now.items() if item.score < before.score}
        gained = {artifact: item for artifact, item in now.items() if item.score > before.score}
        cards += [_card(name, "lost", before, lost, metrics)] if lost else []
        cards += [_card(name, "gained", before, gained, metrics)] if gained else []
    return sorted(cards, key=lambda card: -len(card.artifacts))


def _card(task: str, kind: Kind, before: ScoredItem, now: Mapping[str, ScoredItem], metrics: ScoreMetrics) -> Card:
    return Card(
        task=task,
        id=before.id,
        kind=kind,
        binary=metrics.binary,
        original=_said("original", before),
        artifacts=tuple(_said(artifact, item) for artifact, item in now.items()),
        accepted=accepted_answers(before.accepted),
        question=before.prompt if isinstance(before, QuestionItem) else "",
    )


def _said(model: str, item: ScoredItem) -> GalleryAnswer:
    return GalleryAnswer(model=model, text=item.said, fault=item.fault, score=item.score)


def accepted_answers(answers: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Return the accepted answers, each with how often it was given, the most frequent first."""
    return tuple(Counter(answers).most_common())


def _in_turn(cards: Sequence[Sequence[Card]]) -> list[Card]:
    """Return the cards of all tasks, one of each task after the other."""
    return [card for card in chain.from_iterable(zip_longest(*cards)) if card is not None]


def _filled(each: TaskFlips, cards: Sequence[Card]) -> Iterator[Card]:
    """Yield the cards whose questions are found in the task's data, with what was asked and its images."""
    if not cards:
        return
    wanted = {card.id: card for card in cards}
    questions, _ = each.task.contents(each.files())
    for question in questions:
        if question.id in wanted:
            yield _fill(wanted[question.id], question)


def _fill(card: Card, question: Question) -> Card:
    shown = tuple(thumbnail(image, question.origin) for image in question.images[:_IMAGES])
    more = len(question.images) - len(shown)
    return replace(card, question=question.question, options=question.options, images=shown, more_images=more)


def _with_question(card: Card, filled: Card | None) -> Card:
    if filled is None:
        return card
    told = {name: getattr(filled, name) for name in ("question", "options", "images", "more_images")}
    return replace(card, **told)


def thumbnail(image: bytes, name: str) -> Thumbnail:
    """Return an encoded image, as models see it, as a small JPEG.

    Raises:
        DataError: it cannot be decoded; `name` says which it is.
    """
    small = decode_image(image, name)
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(uri=uri, width=small.width, height=small.height)
