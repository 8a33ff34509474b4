"""The base class of tasks that compare images with texts: the images, the model's likelihoods of their outcomes, the comparison."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from compress.data.sources import Columns, QuestionSource, source_fields
from compress.errors import DataError
from compress.eval.journal import report_faults
from compress.eval.results import AnyItem, ImageItem, ScoreMetrics, TaskMeasurement, write_items
from compress.eval.tasks.drawn_task import DrawnTask
from compress.eval.tasks.task import (
    TaskContext,
    cluster_of,
    compare_answers,
    fidelity_of,
    original_items,
    token_sums,
)
from compress.files import write_bytes
from compress.recipe.schema import Source
from compress.runtimes.runtime import Capability, Embeds, Faults, ImageInput, Score, unscored

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.data.texts import Document

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Images with the texts that they are compared with."""

    questions: Sequence[Question]
    """The images, as questions without text."""

    texts: tuple[str, ...]
    """The outcomes: classes, or captions without duplicates."""

    matches: NDArray[np.bool_]
    """Whether an outcome is right for an image, [images, outcomes]."""


@dataclass(frozen=True)
class Predictions:
    """What a model finds of a pool's images."""

    log_probs: Iterable[Floats]
    """For each image, the log-probabilities of all outcomes; nan where it failed."""

    reference: Iterable[Floats] | None
    """The original's; None where the original itself is measured."""

    scores: Sequence[float] | None = None
    """Each image's score; None where it is whether the likeliest outcome is right."""

    details: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())


class ImageTask(DrawnTask, ABC):
    """Images, each with one or more right texts in the answer column, that a model compares with all texts of the task."""

    item_type: ClassVar[type[AnyItem]] = ImageItem
    row_noun: ClassVar[str] = "image"

    source: Source
    split: str = "test"
    revision: str = "main"
    columns: Columns = Columns(question=None)

    @classmethod
    def filled_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with the kind of task as its name."""
        return {"name": fields.get("task", ""), **fields}

    @property
    def needs(self) -> tuple[Capability, ...]:
        """Similarities of images with texts."""
        return (Embeds,)

    @property
    def data(self) -> QuestionSource:
        """The source of the images; they have answers and no questions."""
        fields = source_fields(self, QuestionSource)
        fields["columns"] = self.columns.model_copy(update={"question": None})
        return QuestionSource.model_construct(**fields)

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the images; see `Task.contents`."""
        return self.pool(files).questions, ()

    @abstractmethod
    def pool(self, files: Sequence[Path]) -> Pool:
        """Return the images and their texts.

        Raises:
            DataError: a file or image cannot be used, there is none, or one has no right text.
        """

    @abstractmethod
    def predict(self, pool: Pool, pictures: Sequence[ImageInput], context: TaskContext, faults: Faults) -> Predictions:
        """Return the model's predictions; those of the original are recorded. `faults` takes the images that fail, by index.

        Raises:
            CheckpointError: they are not finite.
            DataError: the original's record cannot be read.
        """

    def accepted(self, question: Question) -> tuple[str, ...]:
        """Return the right texts, as reports show them."""
        return question.answers

    def digest(self, question: Question) -> str:
        """Return the digest of an image's content, by which it is paired with the original's."""
        return question.digest

    def images(self, files: Sequence[Path], noun: str) -> list[Question]:
        """Return the sampled images, as questions without text; `noun` is what each must have one image for.

        Raises:
            DataError: a file or image cannot be used, there is none, or a row has several.
        """
        questions = self.draw(files)
        for question in questions:
            if len(question.images) != 1:
                raise DataError(f"{self.location(question)}: has {len(question.images)} images; give each {noun} its one")
        return questions

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Compare the images with the texts, and the distributions over the texts with the original's; see `Task.measure`."""
        pool = self.pool(context.files)
        self.warn_if_fewer(len(pool.questions), "images", context.progress)
        digests = [(question.id, self.digest(question)) for question in pool.questions]
        original = original_items(context, self.name, ImageItem, digests)
        pictures = [ImageInput(question.id, question.images[0]) for question in pool.questions]
        faults: Faults = {}
        predictions = self.predict(pool, pictures, context, faults)
        failures = [(pictures[index].id, reason) for index, reason in sorted(faults.items())]
        report_faults(self.name, "shown to the model", failures, len(pictures), context.progress)
        likeliest, scores = _compare(pool, predictions, faults)
        hits = [pool.matches[row, best] for row, best in enumerate(likeliest)] if predictions.scores is None else predictions.scores
        items = [
            ImageItem(
                id=question.id,
                digest=digest,
                cluster=cluster_of(question),
                accepted=self.accepted(question),
                said="" if score.fault else pool.texts[best],
                score=0.0 if score.fault else float(hit),
                fault=score.fault,
                **token_sums(score),
            )
            for question, (_, digest), best, hit, score in zip(pool.questions, digests, likeliest, hits, scores, strict=True)
        ]
        write_items(context.output_dir, self.name, items)
        fidelity = fidelity_of(scores, "image")
        if fidelity is not None and original is not None:
            fidelity = compare_answers(fidelity, original, items)
        metrics = ScoreMetrics.of(self.task, self.metric_name, items, details=predictions.details)
        return TaskMeasurement(name=self.name, metrics=metrics, fidelity=fidelity)


def _compare(pool: Pool, predictions: Predictions, faults: Faults) -> tuple[list[int], list[Score]]:
    """Return the index of each image's likeliest outcome, and its scores: the distribution compared with the original's."""
    likeliest, scores = list[int](), list[Score]()
    reference = None if predictions.reference is None else iter(predictions.reference)
    for row, (question, matches, log_probs) in enumerate(zip(pool.questions, pool.matches, predictions.log_probs, strict=True)):
        original = None if reference is None else next(reference)
        likeliest.append(int(log_probs.argmax()))
        if row in faults:
            scores.append(unscored(question.id, faults[row], compared=original is not None))
            continue
        # Several captions may be right: their probabilities add up.
        nll = -np.logaddexp.reduce(log_probs[matches], keepdims=True)
        if original is None or not np.isfinite(original).all():  # the image failed with the original
            scores.append(Score(question.id, nll))
            continue
        kl = max(0.0, float((np.exp(original) * (original - log_probs)).sum()))  # below zero only by rounding
        scores.append(Score(question.id, nll, np.array([kl]), np.array([original.argmax() == log_probs.argmax()])))
    return likeliest, scores


def write_record(folder: Path, name: str, **arrays: NDArray[Any]) -> None:
    """Write the original's arrays, with which artifacts' predictions are compared."""
    buffer = io.BytesIO()
    np.savez(buffer, **cast("dict[str, Any]", arrays))
    path = _record_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def read_record(folder: Path, name: str, arrays: Sequence[str]) -> list[NDArray[Any]]:
    """Read arrays of the original's record, in the order of their names.

    Raises:
        DataError: it is missing or damaged.
    """
    path = _record_path(folder, name)
    try:
        with np.load(path) as record:
            return [record[array] for array in arrays]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure the original again with --fresh") from error


def _record_path(folder: Path, name: str) -> Path:
    return folder / "record" / f"{name}.npz"
