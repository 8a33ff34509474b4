"""Image-text retrieval: recall at 1, 5 and 10 in both directions (arXiv 1412.2306, section 4.1)."""

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

from compress.data.sources import Columns, ImageFolder, QuestionSource
from compress.errors import CheckpointError, DataError
from compress.eval.journal import report_faults
from compress.eval.results import ImageItem, ScoreMetrics, TaskMeasurement, check_pairs, read_items, write_items
from compress.eval.tasks.task import (
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
from compress.recipe.schema import Source
from compress.runtimes.runtime import Ability, Embeddings, Faults, ImageInput, Score, unscored

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.data.texts import Document

CUTOFFS = (1, 5, 10)
"""The k of recall@k, those of the paper."""

_BLOCK_ROWS = 256
"""Rows of the similarity matrix that are computed together: bounds the memory, not the result."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Images with their captions."""

    questions: Sequence[Question]
    """The images, as questions without text."""

    texts: tuple[str, ...]
    """The captions, without duplicates."""

    matches: NDArray[np.bool_]
    """Whether a caption belongs to an image, [images, captions]."""


class Retrieval(Task):
    """Images with their captions, in the answer column, retrieved among each other by the cosine of their embeddings.

    An image's score is the mean of image-to-text recall@1 (0 or 1) and of the text-to-image recall@1 of its captions.
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
    """At most so many images, drawn at random with `seed`; retrieval is easier among fewer."""

    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return {"name": "retrieval", **cast("dict[str, Any]", data)} if isinstance(data, dict) else data

    @property
    def needs(self) -> Ability:
        """Embeddings of images and texts in one space."""
        return "comparison"

    @property
    def data(self) -> QuestionSource:
        """The source of the images; they have captions and no questions."""
        return QuestionSource.model_construct(
            source=str(self.source),
            subset=self.subset,
            split=self.split,
            revision=self.revision,
            columns=self.columns.model_copy(update={"question": None}),
            image_folder=self.image_folder,
        )

    def settings(self) -> dict[str, Any]:
        """Return the columns, the sampling, and the task's revision; see `Task.settings`."""
        own = self.model_dump(mode="json", include={"task", "name", "samples", "seed"})
        return {"revision": self.task_revision, "columns": self.data.columns.model_dump(mode="json"), **own}

    def note(self) -> str:
        """Return what the recall is measured over."""
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
        indices = dict[str, int]()
        for question in questions:
            location = f"task {self.name}: {question.origin}: image {question.id}"
            if len(question.images) != 1:
                raise DataError(f"{location}: has {len(question.images)} images; give each row its one")
            if not question.answers:
                raise DataError(f"{location}: has no caption; write one, or name their column as columns.answer")
            for text in question.answers:
                indices.setdefault(text, len(indices))
        if len(questions) < 2:
            raise DataError(f"task {self.name}: there is one image, and nothing to find it among; name a file with more")
        matches = np.zeros((len(questions), len(indices)), dtype=np.bool_)
        for row, question in enumerate(questions):
            matches[row, [indices[text] for text in question.answers]] = True
        return Pool(questions, tuple(indices), matches)

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Embed images and captions, and compare the distributions over captions with the original's; see `Task.measure`."""
        pool = self.pool(context.files)
        warn_if_fewer(context, self.name, self.samples, len(pool.questions), "images")
        original = (
            None
            if context.original_measurement is None
            else _original_items(self.name, pool.questions, context.original_measurement)
        )
        pictures = [ImageInput(question.id, question.images[0]) for question in pool.questions]
        faults: Faults = {}
        embeddings = context.session.embed(pictures, pool.texts, context.progress, faults)
        embedded = np.delete(embeddings.images, list(faults), axis=0)
        if not all(np.isfinite(values).all() for values in (embedded, embeddings.texts, embeddings.scale)):
            raise CheckpointError(
                f"task {self.name}: the model's embeddings are not finite; its weights overflow in this runtime's dtype: set "
                "another dtype for the runtime, or a gentler stage"
            )
        failures = [(pictures[index].id, reason) for index, reason in sorted(faults.items())]
        report_faults(self.name, "shown to the model", failures, len(pictures), context.progress)
        reference = None if context.original_measurement is None else _read_record(context.original_measurement, self.name)
        if context.original_measurement is None:
            _write_record(context.output_dir, self.name, embeddings)
        rank_pair = ranks(pool, embeddings)
        hits = image_scores(pool, *rank_pair)
        nearest, scores = _compare(pool, embeddings, reference, faults)
        items = [self._item(pool, row, *fields) for row, fields in enumerate(zip(hits, nearest, scores, strict=True))]
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
            details=recalls(pool, *rank_pair),
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


def ranks(pool: Pool, embeddings: Embeddings) -> tuple[Counts, Counts]:
    """Return for each image the number of other images' captions at least as near as its own nearest; likewise for each caption."""
    failed = cast("NDArray[np.bool_]", np.isnan(embeddings.images).any(axis=1))  # images that failed: nothing is near them
    directions = np.where(failed[:, None], np.float32(0), embeddings.images)
    captions, images = np.zeros(len(pool.questions), dtype=np.int64), np.zeros(len(pool.texts), dtype=np.int64)
    for start in range(0, len(captions), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        cosines = directions[rows] @ embeddings.texts.T
        cosines[failed[rows]] = -np.inf
        captions[rows] = _nearer(cosines, pool.matches[rows])
    for start in range(0, len(images), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        cosines = embeddings.texts[rows] @ directions.T
        cosines[:, failed] = -np.inf
        images[rows] = _nearer(cosines, pool.matches[:, rows].T)
    return captions, images


def _nearer(cosines: NDArray[np.float32], own: NDArray[np.bool_]) -> Counts:
    best = np.where(own, cosines, -np.inf).max(axis=1, keepdims=True)
    return ((cosines >= best) & ~own).sum(axis=1)


def image_scores(pool: Pool, captions: Counts, images: Counts) -> Floats:
    """Return each image's score: the mean of its recall@1 and the recall@1 of its captions; the arguments are those of `ranks`."""
    caption_recall = (pool.matches & (images < 1)).sum(axis=1) / pool.matches.sum(axis=1)
    return ((captions < 1) + caption_recall) / 2


def recalls(pool: Pool, captions: Counts, images: Counts) -> dict[str, float]:
    """Return recall@1, @5 and @10 from image to text and from text to image.

    `captions` and `images` are those of `ranks`, where ties count against the match.
    """
    pairs = np.broadcast_to(images, pool.matches.shape)[pool.matches]
    return {f"image_to_text_recall@{cutoff}": float((captions < cutoff).mean()) for cutoff in CUTOFFS} | {
        f"text_to_image_recall@{cutoff}": float((pairs < cutoff).mean()) for cutoff in CUTOFFS
    }


def _compare(pool: Pool, embeddings: Embeddings, reference: Embeddings | None, faults: Faults) -> tuple[list[int], list[Score]]:
    """Return the index of each image's nearest caption, and its scores: the softmax over captions compared with the original's."""
    nearest, scores = list[int](), list[Score]()
    original_rows = None if reference is None else _caption_log_probs(reference)
    for row, (question, matches, log_probs) in enumerate(
        zip(pool.questions, pool.matches, _caption_log_probs(embeddings), strict=True)
    ):
        original_log_probs = None if original_rows is None else next(original_rows)
        nearest.append(int(log_probs.argmax()))
        if row in faults:
            scores.append(unscored(question.id, faults[row], compared=original_rows is not None))
            continue
        nll = -np.logaddexp.reduce(log_probs[matches], keepdims=True)
        if original_log_probs is None or not np.isfinite(original_log_probs).all():  # the image failed with the original
            scores.append(Score(question.id, nll))
            continue
        kl = max(0.0, float((np.exp(original_log_probs) * (original_log_probs - log_probs)).sum()))  # below zero only by rounding
        scores.append(Score(question.id, nll, np.array([kl]), np.array([original_log_probs.argmax() == log_probs.argmax()])))
    return nearest, scores


def _caption_log_probs(embeddings: Embeddings) -> Iterator[Floats]:
    """Yield each image's log-probabilities over all captions: the log-softmax of the scaled cosines."""
    for start in range(0, len(embeddings.images), _BLOCK_ROWS):
        logits = (embeddings.scale * (embeddings.images[start : start + _BLOCK_ROWS] @ embeddings.texts.T)).astype(np.float64)
        with np.errstate(invalid="ignore"):  # nan in the rows of images that failed
            log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        yield from log_probs


def _digest(question: Question) -> str:
    return digest_text("\n".join([question.digest, *question.answers]))


def _original_items(name: str, questions: Sequence[Question], folder: Path) -> list[ImageItem]:
    original = [item for item in read_items(folder, name) if isinstance(item, ImageItem)]
    check_pairs(name, original, ((question.id, _digest(question)) for question in questions))
    return original


def _record_path(folder: Path, name: str) -> Path:
    return folder / "record" / f"{name}.npz"


def _write_record(folder: Path, name: str, embeddings: Embeddings) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=embeddings.images, texts=embeddings.texts, scale=np.array(embeddings.scale))
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
