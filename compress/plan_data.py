"""What a plan reads of the evaluation's data: how many items each task asks, and whether they can be asked; fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.calibration.questions import count_questions
from compress.calibration.sets import QuestionSource
from compress.hubs.datasets import cached_files
from compress.planner import DataPin

if TYPE_CHECKING:
    from compress.eval.task import Task

_READ_WHOLE = 1000
"""So many questions are read with their images and answers, which takes about a second; of more, numbers and fields are."""


def asked_at_most(task: Task) -> int | None:
    """Return how many items a task's settings let it ask; None where they set no bound."""
    samples: object = getattr(task, "samples", None)
    return samples if isinstance(samples, int) else None


def count_items(tasks: Sequence[Task], pins: Sequence[DataPin | None]) -> dict[str, int]:
    """Return how many items each task asks, where its data are on this machine and are questions; the others are left out.

    Raises:
        DataError: a file, a field, an answer or an image cannot be used.
    """
    found: dict[str, int] = {}
    for task, pin in zip(tasks, pins, strict=True):
        files = None if pin is None else _files_here(pin)
        if files is None:
            continue
        if isinstance(task.data, QuestionSource):
            found[task.name] = _count_questions(task, task.data, files)
        else:
            _, documents = task.contents(files)
            next(iter(documents), None)
    return found


def _count_questions(task: Task, data: QuestionSource, files: Sequence[Path]) -> int:
    held, most = count_questions(files, data.columns, task.rows), asked_at_most(task)
    asked = held if most is None else min(held, most)
    if asked <= _READ_WHOLE:
        questions, _ = task.contents(files)
        asked = sum(1 for _ in questions)
    return asked


def _files_here(pin: DataPin) -> Sequence[Path] | None:
    """Return a task's files where all of them are on this machine."""
    if pin.path is not None:
        return (pin.path,)
    return None if pin.remote is None else cached_files(pin.remote)
