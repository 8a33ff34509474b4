"""Measuring one model in one runtime: every task is run on the opened session and its figures and items are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import DataError, ServerError
from compress.eval.results import (
    GROUNDING,
    Grounding,
    Measurement,
    TaskMeasurement,
    read_grounding,
    read_measured,
    write_items,
    write_measurement,
)
from compress.eval.task import Stopping, Task, TaskContext
from compress.progress import Progress
from compress.runtimes.runtime import Session

if TYPE_CHECKING:
    from compress.eval.grounding import GroundingCheck


@dataclass(frozen=True)
class MeasureContext:
    """What a measurement is given beside session and tasks.

    `original` is the original's checkpoint folder; `data` the local files of each task by its name; `target` the folder to fill,
    with what an interrupted measurement has left there; `logs` is where harnesses of their own write theirs. `against` is the
    folder that measuring the original in the same runtime filled, None to measure the original; `stopping`, by
    task, and `noise` are as in `TaskContext`; `grounding` says on which task's questions it is seen whether answers depend on
    images. Where that is a condition, with `grounding_confidence`, an artifact that does not meet it is asked nothing else.
    """

    original: Path
    data: Mapping[str, Sequence[Path]]
    target: Path
    against: Path | None
    progress: Progress
    logs: Path
    stopping: Mapping[str, Stopping] = field(default_factory=lambda: dict[str, Stopping]())
    noise: int = 0
    grounding: GroundingCheck | None = None
    grounding_confidence: float | None = None


def measure(session: Session, tasks: Sequence[Task], context: MeasureContext) -> Measurement:
    """Run all tasks and fill `context.target`: `measurement.json`, `items-<task>.parquet`, and for the original `record/<task>`.

    A task that needs what the session does not offer is left out, with the reason.

    Raises:
        DataError: a task's data cannot be used, or are not those the original was measured on.
        CheckpointError: the model gives no finite predictions; names the item.
        ServerError: the runtime does not answer any more, or nothing could be measured.
    """
    context.target.mkdir(parents=True, exist_ok=True)
    done: list[TaskMeasurement] = []
    grounding, ungrounded = _grounding(session, tasks, context)
    before = read_measured(context.against).skipped if context.against else dict[str, str]()
    skipped: dict[str, str] = {}
    with context.progress.task("tasks", len(tasks), "tasks") as advance:
        for task in tasks:
            if ungrounded:
                skipped[task.name] = "answers do not depend on the image, so nothing else was asked"
            elif task.name in before:
                skipped[task.name] = f"of the original neither: {before[task.name]}"
            elif task.needs not in session.offers:
                skipped[task.name] = f"what serves this model does not offer {_NEEDED[task.needs]}"
                context.progress.warn(f"task {task.name}: not measured: {skipped[task.name]}")
            else:
                done.append(task.measure(_task_context(task, session, context)))
            advance(1)
    if not done and not ungrounded:
        raise ServerError("nothing could be measured: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    measurement = Measurement(tasks=tuple(done), grounding=grounding, skipped=skipped)
    from compress.eval.journal import forget

    write_measurement(context.target, measurement)
    forget(context.target)
    return measurement


_NEEDED = {"text": "answers", "scores": "log-probabilities of given tokens", "comparison": "a comparison of images with texts"}


def _task_context(task: Task, session: Session, context: MeasureContext) -> TaskContext:
    files = tuple(context.data.get(task.name, ()))
    if not files and task.data is not None:
        raise DataError(f"task {task.name}: was given no files; name its data as source")
    return TaskContext(
        session=session,
        original=context.original,
        files=files,
        target=context.target,
        against=context.against,
        progress=context.progress,
        logs=context.logs,
        stopping=context.stopping.get(task.name),
        noise=context.noise,
    )


def _grounding(session: Session, tasks: Sequence[Task], context: MeasureContext) -> tuple[Grounding | None, bool]:
    """Return whether answers depend on images, and whether it is settled that they do not, though the original's do."""
    if context.grounding is None:
        return None, False
    from compress.eval.asked import Asked
    from compress.eval.grounding import image_gain_of, measure_grounding

    task = next(task for task in tasks if task.name == context.grounding.task)
    assert isinstance(task, Asked)
    found, items = measure_grounding(context.grounding, task, _task_context(task, session, context))
    write_items(context.target, GROUNDING, items)
    if context.against is None or context.grounding_confidence is None:
        return found, False
    original = image_gain_of(read_grounding(context.against), context.grounding_confidence)
    own = image_gain_of(items, context.grounding_confidence)
    return found, original is not None and own is not None and original.outcome == "pass" and own.outcome == "fail"
