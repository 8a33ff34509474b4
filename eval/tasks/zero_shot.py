"""Zero-shot image classification by image-text similarity (arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from compress.errors import CheckpointError, DataError
from compress.eval.tasks.image_task import ImageTask, Pool, Predictions, read_record, write_record
from compress.eval.tasks.task import TaskContext
from compress.runtimes.runtime import Embeds, Faults, ImageInput, capable

if TYPE_CHECKING:
    from compress.data.questions import Question

Template = Annotated[str, Field(pattern=r"\{class\}")]


class ZeroShot(ImageTask):
    """Images that are classified by the class whose text embedding is nearest.

    A class's embedding is the mean over its name in each of the `templates`. An image's label, in the answer column, is a class's
    name or its index from 0.
    """

    task_revision: ClassVar[int] = 3

    task: Literal["zero-shot"]
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    templates: Annotated[tuple[Template, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        duplicate = next((name for index, name in enumerate(self.classes) if name in self.classes[:index]), None)
        if duplicate is not None:
            raise ValueError(f"classes names {duplicate!r} twice; remove one")
        return self

    @property
    def metric_name(self) -> str:
        """The share of images whose likeliest class is the right one."""
        return "accuracy"

    def note(self) -> str:
        """Return how images are classified."""
        return (
            f"share of images{self.drawn_note()} of whose {len(self.classes):,} classes the right one is likeliest: the softmax of "
            f"the scaled cosines with each class's mean over {len(self.templates):,} texts, such as "
            f"{self.class_texts(self.classes[0])[0]!r}; KL and top-1 are of these likelihoods, an image each"
        )

    def class_texts(self, name: str) -> tuple[str, ...]:
        """Return a class's texts, one for each template."""
        return tuple(template.replace("{class}", name) for template in self.templates)

    def pool(self, files: Sequence[Path]) -> Pool:
        """Return the images with the classes; see `ImageTask.pool`."""
        questions = self.images(files, "label")
        matches = np.zeros((len(questions), len(self.classes)), dtype=np.bool_)
        matches[np.arange(len(questions)), [self._label(question) for question in questions]] = True
        return Pool(questions, self.classes, matches)

    def accepted(self, question: Question) -> tuple[str, ...]:
        """Return the name of the image's class."""
        return (self.classes[self._label(question)],)

    def predict(self, pool: Pool, pictures: Sequence[ImageInput], context: TaskContext, faults: Faults) -> Predictions:
        """Return the likelihoods of the classes; see `ImageTask.predict`."""
        texts = [self.class_texts(name) for name in self.classes]
        log_probs = capable(context.session, Embeds).classify(pictures, texts, context.progress, faults)
        if log_probs.shape != pool.matches.shape or not np.isfinite(np.delete(log_probs, list(faults), axis=0)).all():
            raise CheckpointError(
                f"task {self.name}: the model's likelihoods are not finite, or not one for each image and class; its weights "
                "overflow in this runtime's dtype: set another dtype for the runtime, or a gentler stage"
            )
        if context.original_measurement is None:
            write_record(context.output_dir, self.name, log_probs=log_probs)
            return Predictions(log_probs, None)
        return Predictions(log_probs, read_record(context.original_measurement, self.name, ["log_probs"])[0])

    def _label(self, question: Question) -> int:
        label = question.answers[0] if len(question.answers) == 1 else None
        if label in self.classes:
            return self.classes.index(label)
        # After names: a class may be called "7".
        if label is not None and label.isdecimal() and int(label) < len(self.classes):
            return int(label)
        raise DataError(
            f"{self.location(question)}: its label ({self.columns.answer!r}) is {label!r}, none of the {len(self.classes)} classes "
            "nor the number of one; correct classes or columns.answer"
        )
