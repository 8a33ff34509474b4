"""The base class of tasks on the rows of a question file: where these lie, and the sample that is drawn of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.sources import ImageFolder, QuestionSource
from compress.eval.tasks.task import Task, draw_questions

if TYPE_CHECKING:
    from compress.data.questions import Question


class DrawnTask(Task, ABC):
    """Rows of a question file, with questions or with images alone; `samples` of them are drawn at random with `seed`."""

    row_noun: ClassVar[str]
    """What a row is, for messages."""

    subset: str | None = None
    image_folder: ImageFolder | None = None
    seed: int = 0

    @property
    @abstractmethod
    def data(self) -> QuestionSource:
        """The source of the rows."""

    def settings(self) -> dict[str, Any]:
        """Return the fields but those that say where the data lie, the columns, and the task's revision; see `Task.settings`."""
        # Paths and places are left out: the digest of the data's content is in the key beside these settings.
        fields = self.model_dump(mode="json", exclude=set(QuestionSource.model_fields))
        return fields | {"revision": self.task_revision, "columns": self.data.columns.model_dump(mode="json")}

    def draw(self, files: Sequence[Path]) -> list[Question]:
        """Return the rows of the sample, in the files' order; see `draw_questions`."""
        return draw_questions(files, self.data, self.samples, self.seed, self.rows)

    def location(self, question: Question) -> str:
        """Return where a row stands, for a message."""
        return f"task {self.name}: {question.origin}: {self.row_noun} {question.id}"

    def drawn_note(self) -> str:
        """Return the clause of a report that says that the items are a sample."""
        return f", at most {self.samples:,} drawn with seed {self.seed}," if self.samples else ""
