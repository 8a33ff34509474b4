"""Visual question answering: generated answers scored by the definition's metric, and the likelihood of the original's answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.eval.definition import Kind
from compress.eval.metrics import load_metric
from compress.eval.tasks.question_task import QuestionTask


class Vqa(QuestionTask):
    """Questions about images with generated answers, scored by the definition's metric or the recipe's."""

    task_revision: ClassVar[int] = 3
    kind: ClassVar[Kind] = "vqa"

    task: Literal["vqa"]
    definition: str = Field(default="questions", validate_default=True)
    """`questions`, the default, asks questions of the recipe's data for a word or phrase that equals an accepted answer."""

    metric: str | None = None

    def note(self) -> str:
        """Return how the questions are prompted and scored."""
        definition = self.resolved_definition()
        score_note = load_metric(definition.metric).note.replace("{drawn}", self.drawn_note())
        return (
            f"{score_note}; greedy, at most {definition.max_new_tokens} tokens, {self.prompt_note()}; KL and top-1 are of the "
            "original's own answers"
        )
