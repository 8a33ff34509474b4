"""Measuring one model in one runtime: runs every task on the loaded session, and writes metrics and items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from compress.errors import DataError, ServerError
from compress.eval.results import (
    GROUNDING_ITEMS,
    Grounding,
    Measurement,
    TaskMeasurement,
    read_grounding,
    read_measurement,
    write_items,
    write_measurement,
)
from compress.eval.tasks.task import StoppingRule, Task, TaskContext
from compress.progress import Progress
from compress.runtimes.runtime import CAPABILITIES, Session

if TYPE_CHECKING:
    from compress.eval.grounding import GroundingCheck
    from compress.eval.tasks.question_task import QuestionTask


@dataclass(frozen=True)
class MeasureContext:
    """The data and folders of one measurement, beside session and tasks; see `TaskContext`, which is one task's part of it."""

    original_checkpoint: Path
    data: Mapping[str, Sequence[Path]]
    """The local data files of each task, by its name."""

    output_dir: Path
    """The folder to fill; the journal of an interrupted measurement in it is continued."""

    original_measurement: Path | None
    """The folder that measuring the original in the same runtime filled; None to measure the original."""

    progress: Progress
    logs: Path
    stopping: Mapping[str, StoppingRule] = field(default_factory=lambda: dict[str, StoppingRule]())
    """The stopping rules, by task."""

    noise_samples: int = 0
    grounding: GroundingCheck | None = None
    """The check of visual grounding, None for none."""

    grounding_confidence: float | None = None
    """Where the gate has a limit on grounding: its confidence. An artifact that fails it is measured on nothing else."""


def measure(session: Session, tasks: Sequence[Task], context: MeasureContext) -> Measurement:
    """Run all tasks; write `measurement.json`, `items-<task>.parquet` and the original's `record/<task>` to `context.output_dir`.

    A task that needs what the session cannot do is skipped, with the reason.

    Raises:
        DataError: a task's data cannot be used, or are not those the original was measured on.
        CheckpointError: the model gives no finite predictions; names the item.
        ServerError: the runtime does not answer any more, or nothing could be measured.
    """
    context.output_dir.mkdir(parents=True, exist_ok=True)
    measurements: list[TaskMeasurement] = []
    # First: an artifact that ignores the image has failed, and hours of further questions would not change that.
    grounding, ungrounded = _measure_grounding(session, tasks, context)
    skipped_before = read_measurement(context.original_measurement).skipped if context.original_measurement else dict[str, str]()
    skipped: dict[str, str] = {}
    with context.progress.task("tasks", len(tasks), "tasks") as advance:
        for task in tasks:
            if ungrounded:
                skipped[task.name] = "answers do not depend on the image, so nothing else was asked"
            # Nothing to compare with: an artifact's figure alone decides nothing here.
            elif task.name in skipped_before:
                skipped[task.name] = f"of the original neither: {skipped_before[task.name]}"
            elif lacking := [CAPABILITIES[need] for need in task.needs if not isinstance(session, need)]:
                skipped[task.name] = f"what serves this model does not offer {lacking[0]}"
                context.progress.warn(f"task {task.name}: not measured: {skipped[task.name]}")
            else:
                measurements.append(task.measure(_task_context(task, session, context)))
            advance(1)
    if not measurements and not ungrounded:
        raise ServerError("nothing could be measured: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    measurement = Measurement(tasks=tuple(measurements), grounding=grounding, skipped=skipped)
    from compress.eval.journal import remove_journal

    # Before the journal is removed: killed between the two, the measurement is complete.
    write_measurement(context.output_dir, measurement)
    remove_journal(context.output_dir)
    return measurement


def _task_context(task: Task, session: Session, context: MeasureContext) -> TaskContext:
    files = tuple(context.data.get(task.name, ()))
    if not files and task.data is not None:
        raise DataError(f"task {task.name}: was given no files; name its data as source")
    return TaskContext(
        session=session,
        original_checkpoint=context.original_checkpoint,
        files=files,
        output_dir=context.output_dir,
        original_measurement=context.original_measurement,
        progress=context.progress,
        logs=context.logs,
        stopping=context.stopping.get(task.name),
        noise_samples=context.noise_samples,
    )


def _measure_grounding(session: Session, tasks: Sequence[Task], context: MeasureContext) -> tuple[Grounding | None, bool]:
    """Return the grounding figures, and whether the artifact is shown to be ungrounded although the original is grounded."""
    if context.grounding is None:
        return None, False
    from compress.eval.grounding import image_gain_of, measure_grounding

    task = cast("QuestionTask", next(task for task in tasks if task.asks and task.name == context.grounding.task))
    grounding, items = measure_grounding(context.grounding, task, _task_context(task, session, context))
    write_items(context.output_dir, GROUNDING_ITEMS, items)
    if context.original_measurement is None or context.grounding_confidence is None:
        return grounding, False
    original = image_gain_of(read_grounding(context.original_measurement), context.grounding_confidence)
    artifact = image_gain_of(items, context.grounding_confidence)
    # Only beside an original that is grounded itself: otherwise the questions do not need their images.
    return grounding, original is not None and artifact is not None and original.outcome == "pass" and artifact.outcome == "fail"
