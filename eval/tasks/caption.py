"""Image captioning: generated captions scored against reference captions by CIDEr-D (arXiv 1411.5726)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.data.sources import Columns
from compress.errors import DataError
from compress.eval.definition import Kind
from compress.eval.metrics.cider import tokens
from compress.eval.tasks.question_task import QuestionTask, Scorer

if TYPE_CHECKING:
    from compress.data.questions import Question

_MIN_IMAGES = 2
"""CIDEr weighs n-grams by log(images / images with it), which is 0 for a single image."""


class Caption(QuestionTask):
    """Images with generated captions.

    An item's score is its caption's CIDEr-D, from 0 to 10: a hundredth of the usual figure. N-grams are weighed by their frequency
    over the sampled images, answered or not: scores of models on the same sample are comparable, those of other samples are not.
    """

    task_revision: ClassVar[int] = 1
    kind: ClassVar[Kind] = "caption"

    task: Literal["caption"]

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return the CIDEr-D with the n-gram frequencies of these images' references; see `QuestionTask.scorer`."""
        if len({question.image_digests for question in questions}) < _MIN_IMAGES:
            raise DataError(f"task {self.name}: CIDEr weighs words by the images that have them, and there is one; name more")
        return super().scorer(questions)

    def same(self, answer: str, other: str) -> bool:
        """Return whether two captions have the same tokens."""
        return tokens(answer) == tokens(other)

    def note(self) -> str:
        """Return how captions are generated and scored."""
        limit = self.resolved_definition().max_new_tokens
        return (
            f"mean CIDEr-D over images{self.drawn_note()} beside their reference captions, 1.0 being the "
            f"usual 100; greedy, at most {limit} tokens, {self.prompt_note()}; KL and top-1 are of the original's own captions"
        )

    def _default_columns(self) -> Columns:
        return Columns() if "{question}" in self.resolved_definition().prompt else Columns(question=None)
