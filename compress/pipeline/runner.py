"""A run of a recipe: its steps, cached or computed, then the gate, the report, and publishing."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from compress.checkpoints.artifact import checkpoint_bytes, weight_bytes
from compress.checkpoints.checkpoint import open_checkpoint
from compress.errors import CheckpointError, DataError, MissingError, StoreError
from compress.eval.latency.results import Latency, read_latency
from compress.eval.results import ItemizedMeasurement, read_measurement
from compress.files import telling_where, write_json, write_text
from compress.gate.gate import MeasuredModel, Verdict, combine_verdicts
from compress.gate.judge import judge
from compress.hardware import describe
from compress.pipeline.events import EventLog, Watcher
from compress.pipeline.meter import Meter
from compress.pipeline.plan import Plan, make_plan, notes_of, plan_evaluation
from compress.pipeline.planner import ORIGINAL, Kind, Step
from compress.pipeline.publish import publish
from compress.pipeline.steps import StepExecutor
from compress.pipeline.store import Store, default_store
from compress.pipeline.store_entries import Entry, Origin
from compress.recipe.model import Target
from compress.report.gallery import Gallery, TaskFlips, make_gallery
from compress.report.html import render_html
from compress.report.model import Report, Row, Timing, render
from compress.stages.quantization.widths import Widths, read_widths
from compress.untrusted.redaction import redact_value
from compress.verification.results import read_verification


@dataclass(frozen=True)
class RunFolders:
    """The folders that a run writes to."""

    runs: Path
    """The parent of the run's folder."""

    store: Path | None
    """The store; None: in the user's cache."""


def run_recipe(
    recipe: Path, settings: Mapping[str, Any], folders: RunFolders, watcher: Watcher, *, fresh: bool = False, force: bool = False
) -> Report:
    """Run a recipe and return its report; stored outputs of steps are reused, unless `fresh`.

    `force` publishes even if the gate does not pass.

    Raises:
        CompressError: the recipe, a file, the model or the machine is at fault; the store and earlier runs stay as they were.
    """
    store = _store(folders)
    plan = make_plan(recipe, settings, store)
    return _execute(plan, store, _Command(recipe, settings, folders, watcher, fresh=fresh, force=force))


def run_evaluation(
    recipe: Path,
    settings: Mapping[str, Any],
    models: tuple[str, Sequence[Path]],
    folders: RunFolders,
    watcher: Watcher,
    *,
    fresh: bool = False,
) -> Report:
    """Evaluate existing artifacts against an original by a recipe's tasks and gate; nothing is published.

    `models` are the original, as a folder or a hub id, and the artifacts' folders.

    Raises:
        CompressError: the recipe, a file, a model or the machine is at fault; the store and earlier runs stay as they were.
    """
    store = _store(folders)
    plan = plan_evaluation(recipe, settings, store, original=models[0], artifacts=models[1])
    return _execute(plan, store, _Command(recipe, settings, folders, watcher, fresh=fresh, force=False))


@dataclass(frozen=True)
class _Command:
    """The arguments of a run."""

    recipe: Path
    settings: Mapping[str, Any]
    folders: RunFolders
    watcher: Watcher
    fresh: bool
    force: bool


def _store(folders: RunFolders) -> Store:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS once, when it is first used
    return Store(folders.store or default_store())


def _execute(plan: Plan, store: Store, command: _Command) -> Report:
    if plan.unfit:
        raise MissingError("\n".join(plan.unfit))
    folder = _make_folder(command.folders.runs, plan.recipe.name)
    events = EventLog(folder / "events.jsonl", command.watcher)
    events.write("started", recipe=str(command.recipe), settings=dict(command.settings))
    with telling_where(folder):
        write_json(folder / "plan.json", redact_value(plan.summary(store)))
    with _record_stop(events), store.using(step.key for step in plan.steps):
        report = _Run(plan, store, folder, events, fresh=command.fresh).report(force=command.force)
    events.write("finished", verdict=report.gate.verdict)
    return report


@contextmanager
def _record_stop(events: EventLog) -> Generator[None]:
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            with suppress(StoreError):  # the error that stopped the run must not be replaced by one of its log
                events.write("stopped", error=repr(sys.exception()))


def _make_folder(runs: Path, name: str) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = (runs / f"{name}-{stamp}-{secrets.token_hex(2)}").absolute()
    with telling_where(folder, making=True):
        folder.mkdir(parents=True)
    return folder


_READERS: Mapping[Kind, Callable[[Path], object]] = {
    "measure": read_measurement,
    "latency": read_latency,
    "verify": read_verification,
}
"""Readers of the outputs that a verdict depends on: cached ones are verified byte by byte."""


class _Run:
    """One execution of a plan."""

    def __init__(self, plan: Plan, store: Store, folder: Path, events: EventLog, *, fresh: bool) -> None:
        self.plan = plan
        self.store = store
        self.folder = folder
        self.events = events
        self.fresh = fresh
        self.timings: list[Timing] = []
        self.entries: dict[str, Entry] = {}

    def report(self, *, force: bool) -> Report:
        """Execute every step, judge, publish, and write the report."""
        if self.plan.family.derived:
            self.events.warn(self.plan.family.derived)
        for note in self.plan.gate_notes:
            self.events.warn(note)
        for warning in self.plan.warnings:
            self.events.warn(warning)
        executor = StepExecutor(self.plan, self.folder, self.events, self.entries)
        for position, step in enumerate(self.plan.steps, 1):
            self.events.step_started(step.name, position, len(self.plan.steps))
            self._run_step(step, executor)
        report = self._judge(executor)
        gallery = self._gallery(executor)
        self._write(report, gallery)
        recipe = self.plan.recipe
        if recipe.publish and (report.gate.verdict == "pass" or force):
            artifacts = {name: self.entries[f"export {name}"].folder for name in self.plan.artifacts}
            published = publish(report, artifacts, Path(recipe.publish.to), self.events)
            report = report.model_copy(update={"published": published})
            self._write(report, gallery)
        return report

    def _write(self, report: Report, gallery: Gallery) -> None:
        with telling_where(self.folder):
            write_text(self.folder / "report.json", report.to_json() + "\n")
            write_text(self.folder / "report.md", render(report))
            write_text(self.folder / "report.html", render_html(report, gallery))

    def _run_step(self, step: Step, executor: StepExecutor) -> None:
        started = time.perf_counter()
        entry = None if self.fresh else self._find(step)
        meter = Meter()
        if entry is None:
            self._check_sources(step, executor)
            entry, meter = self._compute(step, executor.maker(step))
        cached = meter.seconds == 0
        for warning in entry.warnings if cached else ():
            self.events.warn(warning)
        self.entries[step.name] = entry
        seconds = time.perf_counter() - started
        self.timings.append(
            Timing(
                step=step.name,
                seconds=round(seconds, 3),
                peak_host_bytes=meter.peak_host_bytes,
                peak_device_bytes=meter.peak_device_bytes,
                cached=cached,
            )
        )
        self.events.step_finished(step.name, seconds, cached=cached)

    def _find(self, step: Step) -> Entry | None:
        """Return a step's store entry; None where it is missing, damaged, or not readable as such a step's output."""
        read = _READERS.get(step.kind)
        entry = self.store.find(step.key, self.events.warn, thorough=read is not None)
        if entry is None or read is None:
            return entry
        try:
            read(entry.folder)
        except DataError as error:
            self.store.distrust(step.key)
            self.events.warn(f"{step.name}: {error}; the step is made again")
            return None
        return entry

    def _check_sources(self, step: Step, executor: StepExecutor) -> None:
        """Verify the inputs of a stage or an export byte by byte, and recompute damaged ones.

        The usual check of modification times and sizes does not notice bits that a disk has lost.
        """
        for source in self.plan.sources_of(step) if step.kind in ("stage", "export") else ():
            if self.store.find(source.key, self.events.warn, thorough=True) is None:
                self._check_sources(source, executor)
                self.entries[source.name], _ = self._compute(source, executor.maker(source))

    def _compute(self, step: Step, make: Callable[[Path], None]) -> tuple[Entry, Meter]:
        before = self.store.find(step.key, _ignore_warning)
        with self.store.lock(step.key, lambda: self.events.say(f"{step.name}: another run is making this; waiting for it")):
            entry = self.store.find(step.key, _ignore_warning)
            computed_meanwhile = entry is not None and (before is None or entry.made != before.made)
            if entry is not None and (not self.fresh or computed_meanwhile):
                return entry, Meter()
            resume = step.kind in ("stage", "measure") and not self.fresh  # these commit finished blocks and answers
            warnings: list[str] = []
            origin = Origin(self.plan.recipe.model.source, self.plan.recipe.name)
            writing = self.store.write(step.key, step.name, origin, resume=resume, warnings=warnings)
            with Meter() as meter, writing as target, self.events.collecting(warnings):
                make(target)
            entry = self.store.find(step.key, self.events.warn)
        if entry is None:
            raise CheckpointError(
                f"{step.name}: its output was damaged as soon as it was written; check the disk of {self.store.folder}"
            )
        return entry, meter

    def _judge(self, executor: StepExecutor) -> Report:
        recipe = self.plan.recipe
        rows: list[Row] = []
        verdicts: list[Verdict] = []
        latencies: dict[str, Latency] = {}
        for index, target in enumerate(recipe.eval.places):
            measured = self._measured(index)
            latency = self._latency(index)
            latencies |= {} if latency is None else {target.name: latency}
            target_rows = self._rows(measured, executor, target)
            models = [
                MeasuredModel(row.artifact, row.bytes, measured[row.artifact], row.bits_per_weight, latency) for row in target_rows
            ]
            verdicts.append(judge(recipe.gate, models[0], models[1:], target.name))
            rows += target_rows
        stages = [step.name for step in self.plan.steps if step.kind == "stage"]
        serving = notes_of(self.plan, self.entries[stages[-1]].folder) if stages else ()
        runtimes = [target.runtime for target in recipe.eval.places]
        return Report(
            name=recipe.name,
            run=str(self.folder),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            source=redact_value(self.plan.model.describe()),
            rows=tuple(rows),
            gate=combine_verdicts(verdicts),
            timings=tuple(self.timings),
            warnings=tuple(self.events.warnings),
            published=(),
            notes={
                "KL": " / ".join(dict.fromkeys(runtime.kl_definition for runtime in runtimes)),
                **{task.name: task.note() for task in recipe.eval.tasks},
                **({"original": "; ".join(self.plan.source_notes)} if self.plan.source_notes else {}),
                **({"serving": "; ".join(serving)} if serving else {}),
            },
            recipe=redact_value(recipe.model_dump(mode="json")),
            versions=executor.versions(recipe.export),
            runtime_versions=redact_value({name: version for runtime in runtimes for name, version in runtime.versions().items()}),
            hardware=describe(),
            widths=self._widths(),
            latency=latencies,
            digests=self.plan.digests,
            verifications={
                step.artifact: read_verification(self.entries[step.name].folder)
                for step in self.plan.steps
                if step.kind == "verify"
            },
        )

    def _measured(self, target_index: int) -> dict[str, ItemizedMeasurement]:
        """Return the measurements on a target, by artifact, the original first."""
        steps = {name: self.plan.measured(target_index, name) for name in (ORIGINAL, *self.plan.artifacts_at(target_index))}
        return {name: read_measurement(self.entries[step.name].folder) for name, step in steps.items()}

    def _gallery(self, executor: StepExecutor) -> Gallery:
        """Return the items whose answers flipped, on the recipe's first target."""
        measured = self._measured(0)
        original = measured.pop(ORIGINAL)
        flips = [
            TaskFlips(task, partial(executor.files, pin), original, measured)
            for task, pin in zip(self.plan.recipe.eval.tasks, self.plan.tasks, strict=True)
            if pin is not None
        ]
        return make_gallery(flips)

    def _latency(self, target_index: int) -> Latency | None:
        step = next((step for step in self.plan.steps if step.kind == "latency" and step.target_index == target_index), None)
        return None if step is None else read_latency(self.entries[step.name].folder)

    def _widths(self) -> dict[str, Widths]:
        """Return the widths that stages chose, by the stage's name."""
        by_stage = {step.name: read_widths(self.entries[step.name].folder) for step in self.plan.steps if step.kind == "stage"}
        return {name: widths for name, widths in by_stage.items() if widths is not None}

    def _rows(self, measured: Mapping[str, ItemizedMeasurement], executor: StepExecutor, target: Target) -> list[Row]:
        original = executor.original()
        checkpoint = open_checkpoint(original)
        weights = sum(_elements(entry.shape) for entry in checkpoint.tensors.values())
        original_bytes = checkpoint_bytes(original)
        rows: list[Row] = []
        for name, measurement in measured.items():
            path = executor.artifact(name)
            fidelity = {task: row.fidelity for task, row in measurement.tasks.items() if row.fidelity}
            noise = {task: row.noise for task, row in measurement.tasks.items() if row.noise}
            rows.append(
                Row(
                    artifact=name,
                    runtime=target.runtime.runtime,
                    path=str(path),
                    bytes=checkpoint_bytes(path),
                    size_ratio=checkpoint_bytes(path) / original_bytes,
                    bits_per_weight=8 * weight_bytes(path) / weights,
                    metrics={task: row.metrics for task, row in measurement.tasks.items()},
                    fidelity=fidelity or None,
                    target=target.name,
                    grounding=measurement.grounding,
                    noise=noise or None,
                    loaded_with=redact_value(target.runtime.loaded_with(name)),
                )
            )
        return rows


def _ignore_warning(message: str) -> None:
    """Discard a warning that was already reported."""
    del message


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
