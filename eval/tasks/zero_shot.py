"""Zero-shot image classification by image-text similarity (arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from compress.data.sources import Columns, ImageFolder, QuestionSource
from compress.errors import CheckpointError, DataError
from compress.eval.journal import report_faults
from compress.eval.results import ImageItem, ScoreMetrics, TaskMeasurement, check_pairs, read_items, write_items
from compress.eval.tasks.task import (
    Task,
    TaskContext,
    cluster_of,
    count_or_none,
    draw_questions,
    fidelity_of,
    flips,
    sum_or_none,
    warn_if_fewer,
)
from compress.files import write_bytes
from compress.recipe.schema import Source
from compress.runtimes.runtime import Ability, Faults, ImageInput, Score, unscored

if TYPE_CHECKING:
    from compress.data.questions import Question
    from compress.data.texts import Document

Template = Annotated[str, Field(pattern=r"\{class\}")]


class ZeroShot(Task):
    """Images that are classified by the class whose text embedding is nearest.

    A class's embedding is the mean over its name in each of the `templates`. An image's label, in the answer column, is a class's
    name or its index from 0.
    """

    task_revision: ClassVar[int] = 2

    task: Literal["zero-shot"]
    source: Source
    subset: str | None = None
    split: str = "test"
    revision: str = "main"
    columns: Columns = Columns(question=None)
    image_folder: ImageFolder | None = None
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    templates: Annotated[tuple[Template, ...], Field(min_length=1)]
    samples: PositiveInt | None = None
    """At most so many images, drawn at random with `seed`; None takes all."""

    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return {"name": "zero-shot", **cast("dict[str, Any]", data)} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        duplicate = next((name for index, name in enumerate(self.classes) if name in self.classes[:index]), None)
        if duplicate is not None:
            raise ValueError(f"classes names {duplicate!r} twice; remove one")
        return self

    @property
    def needs(self) -> Ability:
        """Similarities of images with texts."""
        return "comparison"

    @property
    def data(self) -> QuestionSource:
        """The source of the images; they have labels and no questions."""
        return QuestionSource.model_construct(
            source=str(self.source),
            subset=self.subset,
            split=self.split,
            revision=self.revision,
            columns=self.columns.model_copy(update={"question": None}),
            image_folder=self.image_folder,
        )

    def settings(self) -> dict[str, Any]:
        """Return the classes and templates, the columns, the sampling, and the task's revision; see `Task.settings`."""
        fields = self.model_dump(mode="json", include={"name", "classes", "templates", "samples", "seed"})
        return {"task": self.task, "revision": self.task_revision, "columns": self.data.columns.model_dump(), **fields}

    def note(self) -> str:
        """Return how images are classified."""
        drawn = f", at most {self.samples:,} drawn with seed {self.seed}," if self.samples else ""
        return (
            f"share of images{drawn} of whose {len(self.classes):,} classes the right one is likeliest: the softmax of the scaled "
            f"cosines with each class's mean over {len(self.templates):,} texts, such as "
            f"{self.texts(self.classes[0])[0]!r}; KL and top-1 are of these likelihoods, an image each"
        )

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a class's texts, one for each template."""
        return tuple(template.replace("{class}", name) for template in self.templates)

    def images(self, files: Sequence[Path]) -> list[tuple[Question, int]]:
        """Return the images, as questions without text, each with the index of its class.

        Raises:
            DataError: a file or image cannot be used, there is none, or a label is no class.
        """
        questions = draw_questions(files, self.data, self.samples, self.seed)
        return [(question, self._label(question)) for question in questions]

    def contents(self, files: Sequence[Path]) -> tuple[Iterable[Question], Iterable[Document]]:
        """Return the images; see `Task.contents`."""
        return [question for question, _ in self.images(files)], ()

    def measure(self, context: TaskContext) -> TaskMeasurement:
        """Classify the images, and compare the distributions over classes with the original's; see `Task.measure`."""
        images = self.images(context.files)
        warn_if_fewer(context, self.name, self.samples, len(images), "images")
        original = (
            None if context.original_measurement is None else _original_items(self.name, images, context.original_measurement)
        )
        pictures = [ImageInput(question.id, question.images[0]) for question, _ in images]
        faults: Faults = {}
        log_probs = context.session.classify(pictures, [self.texts(name) for name in self.classes], context.progress, faults)
        if log_probs.shape != (len(images), len(self.classes)) or not np.isfinite(np.delete(log_probs, list(faults), axis=0)).all():
            raise CheckpointError(
                f"task {self.name}: the model's likelihoods are not finite, or not one for each image and class; its weights "
                "overflow in this runtime's dtype: set another dtype for the runtime, or a gentler stage"
            )
        failures = [(pictures[index].id, reason) for index, reason in sorted(faults.items())]
        report_faults(self.name, "shown to the model", failures, len(images), context.progress)
        reference = None if context.original_measurement is None else _read_record(context.original_measurement, self.name)
        if context.original_measurement is None:
            _write_record(context.output_dir, self.name, log_probs)
        scores = [
            unscored(question.id, faults[row], compared=reference is not None)
            if row in faults
            else _score(question.id, label, log_probs[row], None if reference is None else reference[row])
            for row, (question, label) in enumerate(images)
        ]
        items = [
            self._item(*image, predicted=None if score.fault else int(image_log_probs.argmax()), score=score)
            for image, image_log_probs, score in zip(images, log_probs, scores, strict=True)
        ]
        write_items(context.output_dir, self.name, items)
        metrics = ScoreMetrics(
            task=self.task, metric="accuracy", score=math.fsum(item.score for item in items) / len(items), items=len(items)
        )
        fidelity = fidelity_of(scores, "image")
        if fidelity is not None and original is not None:
            changed = sum(old.said != new.said for old, new in zip(original, items, strict=True))
            fidelity = fidelity.model_copy(update={**flips(original, items), "changed": changed})
        return TaskMeasurement(name=self.name, metrics=metrics, fidelity=fidelity)

    def _label(self, question: Question) -> int:
        location = f"task {self.name}: {question.origin}: image {question.id}"
        if len(question.images) != 1:
            raise DataError(f"{location}: has {len(question.images)} images; give each label its one")
        label = question.answers[0] if len(question.answers) == 1 else None
        if label in self.classes:
            return self.classes.index(label)
        if label is not None and label.isdecimal() and int(label) < len(self.classes):
            return int(label)
        raise DataError(
            f"{location}: its label ({self.columns.answer!r}) is {label!r}, none of the {len(self.classes)} classes nor the number "
            "of one; correct classes or columns.answer"
        )

    def _item(self, question: Question, label: int, *, predicted: int | None, score: Score) -> ImageItem:
        return ImageItem(
            id=question.id,
            digest=question.digest,
            cluster=cluster_of(question),
            accepted=(self.classes[label],),
            said="" if predicted is None else self.classes[predicted],
            score=float(predicted == label),
            fault=score.fault,
            nll=float(score.negative_log_likelihood.sum()),
            kl=sum_or_none(score.kl),
            same_top=count_or_none(score.same_top),
        )


def _score(name: str, label: int, log_probs: NDArray[np.float64], reference: NDArray[np.float64] | None) -> Score:
    """Return the negative log-likelihood of an image's class, and KL and top-1 of the distribution against the original's."""
    nll = -log_probs[label : label + 1]
    if reference is None or not np.isfinite(reference).all():  # the image failed with the original
        return Score(name, nll)
    kl = max(0.0, float((np.exp(reference) * (reference - log_probs)).sum()))  # below zero only by rounding
    return Score(name, nll, np.array([kl]), np.array([reference.argmax() == log_probs.argmax()]))


def _original_items(name: str, images: Sequence[tuple[Question, int]], folder: Path) -> list[ImageItem]:
    original = [item for item in read_items(folder, name) if isinstance(item, ImageItem)]
    check_pairs(name, original, ((question.id, question.digest) for question, _ in images))
    return original


def _record_path(folder: Path, name: str) -> Path:
    return folder / "record" / f"{name}.npy"


def _write_record(folder: Path, name: str, log_probs: NDArray[np.float64]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, log_probs)
    path = _record_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def _read_record(folder: Path, name: str) -> NDArray[np.float64]:
    path = _record_path(folder, name)
    try:
        return cast("NDArray[np.float64]", np.load(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); measure the original again with --fresh") from error
