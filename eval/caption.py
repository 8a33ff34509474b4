"""How well a model describes images, beside people's own captions of them: CIDEr-D (arXiv 1411.5726)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.calibration.sets import Columns
from compress.errors import DataError
from compress.eval.asked import Asked, Scorer, drawn
from compress.eval.definition import Kind
from compress.eval.metrics.cider import Cider, tokens

if TYPE_CHECKING:
    from compress.calibration.questions import Question

_FEWEST = 2


class Caption(Asked):
    """Images that a model describes; what it says is compared with the reference captions of all of them.

    An item's score is its caption's CIDEr-D, from 0 to 10: the usual figure by 100. The words are weighed by the images that are
    drawn, answered or not, so that models that saw the same ones can be compared, and figures of other draws cannot.
    """

    task_revision: ClassVar[int] = 1
    kind: ClassVar[Kind] = "caption"

    task: Literal["caption"]

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return the CIDEr-D by the references of these questions; see `Asked.scorer`."""
        if len({question.image_digests for question in questions}) < _FEWEST:
            raise DataError(f"task {self.name}: CIDEr weighs words by the images that have them, and there is one; name more")
        cider = Cider([question.answers for question in questions])
        return lambda question, said: cider.score(said, question.answers)

    def same(self, said: str, other: str) -> bool:
        """Return whether two captions have the same words."""
        return tokens(said) == tokens(other)

    def note(self) -> str:
        """Return how images are described and captions scored."""
        limit = self.read().max_new_tokens
        return (
            f"mean CIDEr-D over images{drawn(self.samples, self.seed)} beside their reference captions, 1.0 being the usual 100; "
            f"greedy, at most {limit} tokens, {self.asked_as()}; KL and top-1 are of the original's own captions"
        )

    def _usual_columns(self) -> Columns:
        return Columns() if "{question}" in self.read().prompt else Columns(question=None)
