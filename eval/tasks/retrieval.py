"""Image-text retrieval: recall at 1, 5 and 10 in both directions (arXiv 1412.2306, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from compress.errors import CheckpointError, DataError
from compress.eval.tasks.image_task import Floats, ImageTask, Pool, Predictions, read_record, write_record
from compress.eval.tasks.task import TaskContext, digest_text
from compress.runtimes.runtime import Embeddings, Embeds, Faults, ImageInput, capable

if TYPE_CHECKING:
    from compress.data.questions import Question

CUTOFFS = (1, 5, 10)
"""The k of recall@k, those of the paper."""

_BLOCK_ROWS = 256
"""Rows of the similarity matrix that are computed together: bounds the memory, not the result."""

Counts = NDArray[np.int64]


class Retrieval(ImageTask):
    """Images with their captions, in the answer column, retrieved among each other by the cosine of their embeddings.

    An image's score is the mean of image-to-text recall@1 (0 or 1) and of the text-to-image recall@1 of its captions. It is easier
    among fewer images.
    """

    task_revision: ClassVar[int] = 1

    task: Literal["retrieval"]

    @property
    def metric_name(self) -> str:
        """Recall@1; that of other ranks is among the details."""
        return "recall@1"

    def note(self) -> str:
        """Return what the recall is measured over."""
        return (
            f"mean over images{self.drawn_note()} of having one of its captions nearest among all captions, and of the share of "
            "its captions that have it nearest among all images, by the cosine of embeddings; KL and top-1 are of the softmax over "
            "all captions, an image each"
        )

    def pool(self, files: Sequence[Path]) -> Pool:
        """Return the images and their captions; there must be two images at least. See `ImageTask.pool`."""
        questions = self.images(files, "row")
        indices = dict[str, int]()
        for question in questions:
            if not question.answers:
                raise DataError(f"{self.location(question)}: has no caption; write one, or name their column as columns.answer")
            for text in question.answers:
                indices.setdefault(text, len(indices))
        if len(questions) < 2:
            raise DataError(f"task {self.name}: there is one image, and nothing to find it among; name a file with more")
        matches = np.zeros((len(questions), len(indices)), dtype=np.bool_)
        for row, question in enumerate(questions):
            matches[row, [indices[text] for text in question.answers]] = True
        return Pool(questions, tuple(indices), matches)

    def digest(self, question: Question) -> str:
        """Return the digest of the image and its captions: these are what it is searched among."""
        return digest_text("\n".join([question.digest, *question.answers]))

    def predict(self, pool: Pool, pictures: Sequence[ImageInput], context: TaskContext, faults: Faults) -> Predictions:
        """Embed images and captions, and rank them among each other; see `ImageTask.predict`."""
        embeddings = capable(context.session, Embeds).embed(pictures, pool.texts, context.progress, faults)
        # Failed images have NaN rows on purpose, which must not be taken for an overflow.
        embedded = np.delete(embeddings.images, list(faults), axis=0)
        if not all(np.isfinite(values).all() for values in (embedded, embeddings.texts, embeddings.scale)):
            raise CheckpointError(
                f"task {self.name}: the model's embeddings are not finite; its weights overflow in this runtime's dtype: set "
                "another dtype for the runtime, or a gentler stage"
            )
        reference = None
        if context.original_measurement is None:
            scale = np.array(embeddings.scale)
            write_record(context.output_dir, self.name, images=embeddings.images, texts=embeddings.texts, scale=scale)
        else:
            images, texts, scale = read_record(context.original_measurement, self.name, ["images", "texts", "scale"])
            reference = _caption_log_probs(Embeddings(images=images, texts=texts, scale=float(scale)))
        rank_pair = ranks(pool, embeddings)
        scores = image_scores(pool, *rank_pair).tolist()
        return Predictions(_caption_log_probs(embeddings), reference, scores, recalls(pool, *rank_pair))


def ranks(pool: Pool, embeddings: Embeddings) -> tuple[Counts, Counts]:
    """Return for each image the number of other images' captions at least as near as its own nearest; likewise for each caption."""
    failed = cast("NDArray[np.bool_]", np.isnan(embeddings.images).any(axis=1))  # images that failed: nothing is near them
    # Zeros, as a NaN in a matrix product spreads to its whole column; their cosines become -inf below.
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
    # Ties count against the match: a model whose embeddings are all equal must not have a recall of 1.
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


def _caption_log_probs(embeddings: Embeddings) -> Iterator[Floats]:
    """Yield each image's log-probabilities over all captions: the log-softmax of the scaled cosines."""
    for start in range(0, len(embeddings.images), _BLOCK_ROWS):
        logits = (embeddings.scale * (embeddings.images[start : start + _BLOCK_ROWS] @ embeddings.texts.T)).astype(np.float64)
        with np.errstate(invalid="ignore"):  # nan in the rows of images that failed
            log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        yield from log_probs
