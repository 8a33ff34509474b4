"""Measuring one model in one runtime: every task is run on the opened session and its figures and items are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import DataError
from compress.eval.results import Measurement, TaskMeasurement, write_measurement
from compress.eval.task import Task, TaskContext
from compress.progress import Progress
from compress.runtimes.runtime import Session


@dataclass(frozen=True)
class MeasureContext:
    """What a measurement is given beside session and tasks.

    `original` is the original's checkpoint folder; `data` the local files of each task by its name; `target` an empty folder
    to fill. `against` is the folder that measuring the original in the same runtime filled, None to measure the original.
    """

    original: Path
    data: Mapping[str, Sequence[Path]]
    target: Path
    against: Path | None
    progress: Progress


def measure(session: Session, tasks: Sequence[Task], context: MeasureContext) -> Measurement:
    """Run all tasks and fill `context.target`: `measurement.json`, `items-<task>.jsonl`, and for the original `record/<task>`.

    Raises:
        DataError: a task's data cannot be used, or are not those the original was measured on.
        CheckpointError: the model gives no finite predictions; names the item.
    """
    context.target.mkdir(parents=True, exist_ok=True)
    done: list[TaskMeasurement] = []
    with context.progress.task("tasks", len(tasks), "task") as advance:
        for task in tasks:
            files = tuple(context.data.get(task.name, ()))
            if not files:
                raise DataError(f"task {task.name}: was given no files; name its data as source")
            done.append(
                task.measure(
                    TaskContext(
                        session=session,
                        original=context.original,
                        files=files,
                        target=context.target,
                        against=context.against,
                        progress=context.progress,
                    )
                )
            )
            advance(1)
    measurement = Measurement(tasks=tuple(done))
    write_measurement(context.target, measurement)
    return measurement
