"""How many questions about images a model answers right, and how faithfully it repeats the original's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.eval.asked import Asked, Scorer, drawn
from compress.eval.definition import Kind
from compress.eval.metrics import load_metric

if TYPE_CHECKING:
    from compress.calibration.questions import Question

_MEASURES = {
    "exact_match": "share of questions{drawn} whose answer equals an accepted one after VQA v2's normalization",
    "relaxed": "share of questions{drawn} whose answer is within 5 % of an accepted number or equals an accepted text (ChartQA)",
    "anls": "mean over questions{drawn} of ANLS: 1 less the share of letters that are wrong, 0 from a half on (DocVQA)",
    "vqa_vote": "mean over questions{drawn} of VQA v2's accuracy: people of ten who agree / 3, at most 1, leaving each out in turn",
    "letter": "share of questions{drawn} whose answer names the accepted letter",
    "yes_no": "share of questions{drawn} whose answer says yes or no as it should: no if its first sentence has no or not (POPE)",
}
"""What a task's score is, by its metric."""


class Vqa(Asked):
    """Questions about images, each answered in the model's own words and scored by the definition's metric, or the recipe's.

    Without a `definition`, questions of one's own are asked for a word or phrase, which must equal an accepted answer.
    """

    task_revision: ClassVar[int] = 3
    kind: ClassVar[Kind] = "vqa"

    task: Literal["vqa"]
    definition: str = Field(default="questions", validate_default=True)
    metric: str | None = None

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return the definition's metric; see `Asked.scorer`."""
        del questions
        metric = load_metric(self.scored_by)
        return lambda question, said: float(metric(said, question.answers))

    def note(self) -> str:
        """Return how the questions are asked and scored."""
        definition = self.read()
        measures = _MEASURES[definition.metric].replace("{drawn}", drawn(self.samples, self.seed))
        return (
            f"{measures}; greedy, at most {definition.max_new_tokens} tokens, {self.asked_as()}; KL and top-1 are of the "
            "original's own answers"
        )
