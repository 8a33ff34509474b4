"""How well a model finds an image's captions, and a caption's image: recall at 1, 5 and 10 (arXiv 1412.2306, section 4.1)."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt, model_validator

from compress.calibration.sets import Columns, ImageFolder, QuestionSource
from compress.errors import CheckpointError, DataError
from compress.eval.journal import report_faults
from compress.eval.results import ImageItem, ScoreMetrics, TaskMeasurement, check_pairs, read_items, write_items
from compress.eval.task import (
    Task,
    TaskContext,
    cluster_of,
    count_or_none,
    digest_text,
    draw_questions,
    fidelity_of,
    flips,
    sum_or_none,
    warn_if_fewer,
)
from compress.files import write_bytes
from compress.runtimes.runtime import Ability, Embeddings, Faults, Picture, Score, unscored
from compress.schema import Source

if TYPE_CHECKING:
    from compress.calibration.questions import Question
    from compress.calibration.texts import Document

CUTOFFS = (1, 5, 10)
_ROWS_AT_ONCE = 256

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Images with their captions: each different caption once, and which images have which of them [images, captions]."""

    questions: Sequence[Question]
    texts: tuple[str, ...]
    belongs: NDArray[np.bool_]


class Retrieval(Task):
    """Images with their captions, in the column of answers: each looks for the other among all.

    An image's score is the mean of whether one of its captions is the nearest of all, and of its captions' share whose
    nearest image it is. `samples` draws at most so many of the images, with `seed`; the fewer there are, the easier it is.
    """

    task_revision: ClassVar[int] = 1

    task: Literal["retrieval"]
    source: Source
    subset: str | None = None
    split: str = "test"
    revision: str = "main"
    columns: Columns = Columns(question=None)
    image_folder: ImageFolder | None = None
    samples: PositiveInt | None = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return {"name": "retrieval", **cast("dict[str, Any]", data)} if isinstance(data, dict) else data

    @property
    def needs(self) -> Ability:
        """A model that compares images with texts."""
        return "comparison"

    @property
    def data(self) -> QuestionSource:
        """Where the images come from; they have captions and no questions."""
        return QuestionSource.model_construct(
            source=str(self.source),
            subset=self.subset,
            split=self.split,
            revision=self.revision,
            columns=self.columns.model_copy(update={"question": None}),
            image_folder=self.image_folder,
        )

    def settings(self) -> dict[str, Any]:
        """Return the columns, how images are drawn, and the task's revision."""
        own = self.model_dump(mode="json", include={"task", "name", "samples", "seed"})
        return {"revision": self.task_revision, "columns": self.data.columns.model_dump(mode="json"), **own}

    def note(self) -> str:
        """Return what is looked for among what."""
        drawn = f", at most {self.samples:,} drawn with seed {self.seed}," if self.samples else ""
        return (
            f"mean over images{drawn} of having one of its captions nearest among all captions, and of the share of its captions "
            "that have it nearest among all images, by the cosine of embeddings; KL and top-1 are of the softmax over all "
            "captions, an image each"
        )

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the images; see `Task.contents`."""
        return self.pool(files).questions, ()

    def pool(self, files: Sequence[Path]) -> Pool:
        """Return the images and their captions.

        Raises:
            DataError: a file or image cannot be used, there is only one, or one has no caption or several images.
        """
        questions = draw_questions(files, self.data, self.samples, self.seed)
        places = dict[str, int]()
        for question in questions:
            where = f"task {self.name}: {question.origin}: image {question.id}"
            if len(question.images) != 1:
                raise DataError(f"{where}: has {len(question.images)} images; give each row its one")
            if not question.answers:
                raise DataError(f"{where}: has no caption; write one, or name their column as columns.answer")
            for text in question.answers:
                places.setdefault(text, len(places))
        if len(questions) < 2:
            raise DataError(f"task {self.name}: there is one image, and nothing to find it among; name a file with more")
        belongs = np.zeros((len(questions), len(places)), dtype=np.bool_)
        for row, question in enumerate(questions):
            belongs[row, [places[text] for text in question.answers]] = True
        return Pool(questions, tuple(places), belongs)

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Find captions and images, and compare the likelihoods of captions with the original's; see `Task.measure`."""
        pool = self.pool(context.files)
        warn_if_fewer(context, self.name, self.samples, len(pool.questions), "images")
        original = (
            None
            if context.original_measurement is None
            else _original_items(self.name, pool.questions, context.original_measurement)
        )
        pictures = [Picture(question.id, question.images[0]) for question in pool.questions]
        faults: Faults = {}
        found = context.session.embed(pictures, pool.texts, context.progress, faults)
        known = np.delete(found.images, list(faults), axis=0)
        if not all(np.isfinite(part).all() for part in (known, found.texts, found.scale)):
            raise CheckpointError(
                f"task {self.name}: the model's embeddings are not finite; its weights overflow in this runtime's dtype: set "
                "another dtype for the runtime, or a gentler stage"
            )
        told = [(pictures[place].id, words) for place, words in sorted(faults.items())]
        report_faults(self.name, "shown to the model", told, len(pictures), context.progress)
        reference = None if context.original_measurement is None else _read_record(context.original_measurement, self.name)
        if context.original_measurement is None:
            _write_record(context.output_dir, self.name, found)
        found_at = ranks(pool, found)
        hits = image_scores(pool, *found_at)
        nearest, scores = _compare(pool, found, reference, faults)
        items = [self._item(pool, row, *parts) for row, parts in enumerate(zip(hits, nearest, scores, strict=True))]
        write_items(context.output_dir, self.name, items)
        fidelity = fidelity_of(scores, "image")
        if fidelity is not None and original is not None:
            changed = sum(old.said != new.said for old, new in zip(original, items, strict=True))
            fidelity = fidelity.model_copy(update={**flips(original, items), "changed": changed})
        metrics = ScoreMetrics(
            task=self.task,
            metric="recall@1",
            score=math.fsum(item.score for item in items) / len(items),
            items=len(items),
            binary=False,
            details=recalls(pool, *found_at),
        )
        return TaskMeasurement(name=self.name, metrics=metrics, fidelity=fidelity)

    def _item(self, pool: Pool, row: int, hit: float, nearest: int, score: Score) -> ImageItem:
        question = pool.questions[row]
        return ImageItem(
            id=question.id,
            digest=_digest(question),
            cluster=cluster_of(question),
            accepted=question.answers,
            said="" if score.fault else pool.texts[nearest],
            score=0.0 if score.fault else float(hit),
            fault=score.fault,
            nll=float(score.negative_log_likelihood.sum()),
            kl=sum_or_none(score.kl),
            same_top=count_or_none(score.same_top),
        )


def ranks(pool: Pool, found: Embeddings) -> tuple[Counts, Counts]:
    """Return, for each image, how many foreign captions are as near as its nearest own one or nearer; then so for each caption."""
    hidden = cast("NDArray[np.bool_]", np.isnan(found.images).any(axis=1))  # images that could not be shown: nothing is near them
    directions = np.where(hidden[:, None], np.float32(0), found.images)
    captions, images = np.zeros(len(pool.questions), dtype=np.int64), np.zeros(len(pool.texts), dtype=np.int64)
    for first in range(0, len(captions), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        cosines = directions[rows] @ found.texts.T
        cosines[hidden[rows]] = -np.inf
        captions[rows] = _nearer(cosines, pool.belongs[rows])
    for first in range(0, len(images), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        cosines = found.texts[rows] @ directions.T
        cosines[:, hidden] = -np.inf
        images[rows] = _nearer(cosines, pool.belongs[:, rows].T)
    return captions, images


def _nearer(cosines: NDArray[np.float32], own: NDArray[np.bool_]) -> Counts:
    best = np.where(own, cosines, -np.inf).max(axis=1, keepdims=True)
    return ((cosines >= best) & ~own).sum(axis=1)


def image_scores(pool: Pool, captions: Counts, images: Counts) -> Floats:
    """Return for each image the mean of whether a caption of its own is nearest, and of the share of them whose nearest it is."""
    found = (pool.belongs & (images < 1)).sum(axis=1) / pool.belongs.sum(axis=1)
    return ((captions < 1) + found) / 2


def recalls(pool: Pool, captions: Counts, images: Counts) -> dict[str, float]:
    """Return the shares of images with one of their captions among the nearest 1, 5 and 10, and of captions with their image there.

    `captions` and `images` are those of `ranks`; so what is as near as one's own counts as nearer.
    """
    pairs = np.broadcast_to(images, pool.belongs.shape)[pool.belongs]
    return {f"image_to_text_recall@{cutoff}": float((captions < cutoff).mean()) for cutoff in CUTOFFS} | {
        f"text_to_image_recall@{cutoff}": float((pairs < cutoff).mean()) for cutoff in CUTOFFS
    }


def _compare(pool: Pool, found: Embeddings, reference: Embeddings | None, faults: Faults) -> tuple[list[int], list[Score]]:
    """Return the place of each image's nearest caption, and how alike the captions' likelihoods are to the original's."""
    nearest, scores = list[int](), list[Score]()
    theirs = None if reference is None else _likelihoods(reference)
    for row, (question, own, ours) in enumerate(zip(pool.questions, pool.belongs, _likelihoods(found), strict=True)):
        before = None if theirs is None else next(theirs)
        nearest.append(int(ours.argmax()))
        if row in faults:
            scores.append(unscored(question.id, faults[row], compared=theirs is not None))
            continue
        lost = -np.logaddexp.reduce(ours[own], keepdims=True)
        if before is None or not np.isfinite(before).all():  # the original could not be shown it
            scores.append(Score(question.id, lost))
            continue
        kl = max(0.0, float((np.exp(before) * (before - ours)).sum()))  # below zero only by rounding
        scores.append(Score(question.id, lost, np.array([kl]), np.array([before.argmax() == ours.argmax()])))
    return nearest, scores


def _likelihoods(found: Embeddings) -> Iterator[Floats]:
    """Give each image's log-probabilities of all captions, by the softmax of the scaled cosines."""
    for first in range(0, len(found.images), _ROWS_AT_ONCE):
        logits = (found.scale * (found.images[first : first + _ROWS_AT_ONCE] @ found.texts.T)).astype(np.float64)
        with np.errstate(invalid="ignore"):  # of images that could not be shown
            likelihoods = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        yield from likelihoods


def _digest(question: Question) -> str:
    return digest_text("\n".join([question.digest, *question.answers]))


def _original_items(name: str, questions: Sequence[Question], folder: Path) -> list[ImageItem]:
    original = [item for item in read_items(folder, name) if isinstance(item, ImageItem)]
    check_pairs(name, original, ((question.id, _digest(question)) for question in questions))
    return original


def _record_path(folder: Path, name: str) -> Path:
    return folder / "record" / f"{name}.npz"


def _write_record(folder: Path, name: str, found: Embeddings) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=found.images, texts=found.texts, scale=np.array(found.scale))
    path = _record_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def _read_record(folder: Path, name: str) -> Embeddings:
    path = _record_path(folder, name)
    try:
        with np.load(path) as record:
            return Embeddings(images=record["images"], texts=record["texts"], scale=float(record["scale"]))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure the original again with --fresh") from error
