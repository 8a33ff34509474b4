"""A plan's reading of local evaluation data: the number of each task's items, and their validity; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.questions import open_questions
from compress.data.sources import QuestionSource
from compress.hubs.datasets import cached_files
from compress.pipeline.steps.calibration import PinnedTask
from compress.pipeline.steps.data import DataPin

if TYPE_CHECKING:
    from compress.eval.tasks.task import Task

_FULL_CHECK = 1000
"""Up to so many questions are read with images and answers, which takes about a second; of more, only the rows are counted."""


def count_items(tasks: Sequence[PinnedTask]) -> dict[str, int]:
    """Return the number of items of each task whose data are questions on this machine.

    Raises:
        DataError: a file, a field, an answer or an image cannot be used.
    """
    counts: dict[str, int] = {}
    for task, pin in tasks:
        files = None if pin is None else _local_files(pin)
        if files is None:
            continue
        if isinstance(task.data, QuestionSource):
            counts[task.name] = _count_questions(task, task.data, files)
        else:
            _, documents = task.contents(files)
            # The first document alone, which shows whether the column and the file's form are right.
            next(iter(documents), None)
    return counts


def _count_questions(task: Task, data: QuestionSource, files: Sequence[Path]) -> int:
    available = len(open_questions(files, data.columns, task.rows))
    count = available if task.samples is None else min(available, task.samples)
    if count <= _FULL_CHECK:
        questions, _ = task.contents(files)
        count = sum(1 for _ in questions)
    return count


def _local_files(pin: DataPin) -> Sequence[Path] | None:
    """Return a task's files, None where any is not on this machine."""
    if pin.path is not None:
        return (pin.path,)
    return None if pin.remote is None else cached_files(pin.remote)
