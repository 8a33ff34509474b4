"""Visual question answering: generated answers scored by the definition's metric, and the likelihood of the original's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.eval.definition import Kind
from compress.eval.metrics import load_metric
from compress.eval.tasks.question_task import QuestionTask, Scorer, sampling_note

if TYPE_CHECKING:
    from compress.data.questions import Question

_SCORE_NOTES = {
    "exact_match": "share of questions{drawn} whose answer equals an accepted one after VQA v2's normalization",
    "relaxed": "share of questions{drawn} whose answer is within 5 % of an accepted number or equals an accepted text (ChartQA)",
    "anls": "mean over questions{drawn} of ANLS: 1 less the share of letters that are wrong, 0 from a half on (DocVQA)",
    "vqa_vote": "mean over questions{drawn} of VQA v2's accuracy: people of ten who agree / 3, at most 1, leaving each out in turn",
    "letter": "share of questions{drawn} whose answer names the accepted letter",
    "yes_no": "share of questions{drawn} whose answer says yes or no as it should: no if its first sentence has no or not (POPE)",
}
"""What the score is, by metric, for the report; `{drawn}` becomes the clause on sampling."""


class Vqa(QuestionTask):
    """Questions about images with generated answers, scored by the definition's metric or the recipe's."""

    task_revision: ClassVar[int] = 3
    kind: ClassVar[Kind] = "vqa"

    task: Literal["vqa"]
    definition: str = Field(default="questions", validate_default=True)
    """`questions`, the default, asks questions of the recipe's data for a word or phrase that equals an accepted answer."""

    metric: str | None = None

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        """Return the definition's metric; see `QuestionTask.scorer`."""
        del questions
        metric = load_metric(self.metric_name)
        return lambda question, answer: float(metric(answer, question.answers))

    def note(self) -> str:
        """Return how the questions are prompted and scored."""
        definition = self.resolved_definition()
        score_note = _SCORE_NOTES[definition.metric].replace("{drawn}", sampling_note(self.samples, self.seed))
        return (
            f"{score_note}; greedy, at most {definition.max_new_tokens} tokens, {self.prompt_note()}; KL and top-1 are of the "
            "original's own answers"
        )
