"""A run of a recipe: its steps, cached or computed, then the gate, the report, and publishing."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from compress.checkpoints.checkpoint import open_checkpoint
from compress.errors import CheckpointError, DataError, MissingError, StoreError
from compress.eval.results import ItemizedMeasurement
from compress.export.format import format_named, format_of
from compress.files import disk_errors, write_json, write_text
from compress.gate.gate import MeasuredModel, Verdict, combine_verdicts
from compress.gate.judge import judge
from compress.hardware import describe
from compress.pipeline.events import EventLog, Watcher
from compress.pipeline.meter import Meter
from compress.pipeline.plan import Plan, make_plan, plan_evaluation
from compress.pipeline.publish import publish
from compress.pipeline.steps.export import versions_of_entries
from compress.pipeline.steps.step import ORIGINAL, Step, StepContext
from compress.pipeline.steps.verify import VerifyArtifact
from compress.pipeline.store import Store, default_store
from compress.pipeline.store_entries import Entry, Origin
from compress.recipe.model import Target
from compress.report.gallery import Gallery, TaskFlips, make_gallery
from compress.report.html import render_html
from compress.report.model import Report, Row, Timing, render
from compress.stages.quantization.widths import Widths, read_widths
from compress.untrusted.redaction import redact_value


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
    if plan.kernel_faults:
        raise MissingError("\n".join(plan.kernel_faults))
    folder = _make_folder(command.folders.runs, plan.name)
    events = EventLog(folder / "events.jsonl", command.watcher)
    events.write("started", recipe=str(command.recipe), settings=dict(command.settings))
    with disk_errors(folder):
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
    # With random digits behind it: two runs may begin within one second.
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = (runs / f"{name}-{stamp}-{secrets.token_hex(2)}").absolute()
    with disk_errors(folder, making=True):
        folder.mkdir(parents=True)
    return folder


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
        self.context = StepContext(folder, events, self.entries, plan.settings.trust_remote_code)

    def report(self, *, force: bool) -> Report:
        """Execute every step, judge, publish, and write the report."""
        if self.plan.family.derived:
            self.events.warn(self.plan.family.derived)
        for note in self.plan.gate_notes:
            self.events.warn(note)
        for warning in self.plan.warnings:
            self.events.warn(warning)
        for position, step in enumerate(self.plan.steps, 1):
            self.events.step_started(step.name, position, len(self.plan.steps))
            self._run_step(step)
        report = self._judge()
        gallery = self._gallery()
        self._write(report, gallery)
        recipe, compression = self.plan.recipe, self.plan.compression
        if recipe is not None and compression is not None and recipe.publish and (report.gate.verdict == "pass" or force):
            artifacts = [(artifact, artifact.at(self.context)) for artifact in compression.artifacts]
            published = publish(report, artifacts, Path(recipe.publish.to), self.events)
            report = report.model_copy(update={"published": published})
            self._write(report, gallery)
        return report

    def _write(self, report: Report, gallery: Gallery) -> None:
        with disk_errors(self.folder):
            write_text(self.folder / "report.json", report.to_json() + "\n")
            write_text(self.folder / "report.md", render(report))
            write_text(self.folder / "report.html", render_html(report, gallery))

    def _run_step(self, step: Step) -> None:
        started = time.perf_counter()
        entry = None if self.fresh else self._find(step)
        meter = Meter()
        if entry is None:
            # Only before something is made of them: cached results need no intact inputs.
            self._check_inputs(step)
            entry, meter = self._compute(step)
        # A meter that measured nothing: the step was found, or another run has made it meanwhile.
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
        entry = self.store.find(step.key, self.events.warn, thorough=step.feeds_verdict)
        if entry is None:
            return None
        try:
            step.read(entry.folder)
        except DataError as error:
            self.store.distrust(step.key)
            self.events.warn(f"{step.name}: {error}; the step is made again")
            return None
        return entry

    def _check_inputs(self, step: Step) -> None:
        """Verify the inputs of a stage or an export byte by byte, and recompute damaged ones."""
        for source in step.steps if step.verifies_inputs else ():
            if self.store.find(source.key, self.events.warn, thorough=True) is None:
                self._check_inputs(source)
                self.entries[source.name], _ = self._compute(source)

    def _compute(self, step: Step) -> tuple[Entry, Meter]:
        # Remembered before the lock is waited for: with --fresh only an entry that appears meanwhile is new enough.
        before = self.store.find(step.key, _ignore_warning)
        with self.store.lock(step.key, lambda: self.events.say(f"{step.name}: another run is making this; waiting for it")):
            entry = self.store.find(step.key, _ignore_warning)
            computed_meanwhile = entry is not None and (before is None or entry.made != before.made)
            if entry is not None and (not self.fresh or computed_meanwhile):
                return entry, Meter()
            resume = step.resumes and not self.fresh
            warnings: list[str] = []
            origin = Origin(self.plan.settings.source, self.plan.name)
            writing = self.store.write(step.key, step.name, origin, resume=resume, warnings=warnings)
            # The step's warnings are stored with its output: a run that finds it cached repeats them.
            with Meter() as meter, writing as target, self.events.collecting(warnings):
                step.make(self.context, target)
            entry = self.store.find(step.key, self.events.warn)
        if entry is None:
            raise CheckpointError(
                f"{step.name}: its output was damaged as soon as it was written; check the disk of {self.store.folder}"
            )
        return entry, meter

    def _judge(self) -> Report:
        plan = self.plan
        rows: list[Row] = []
        verdicts: list[Verdict] = []
        latencies = {target: step.read(step.at(self.context)) for target, step in plan.measurements.latencies.items()}
        targets = plan.evaluation.eval.places
        for target in targets:
            measured = self._measured(target)
            target_rows = self._rows(measured, target)
            models = [
                MeasuredModel(row.artifact, row.bytes, measured[row.artifact], row.bits_per_weight, latencies.get(target.name))
                for row in target_rows
            ]
            verdicts.append(judge(plan.evaluation.gate, models[0], models[1:], target.name))
            rows += target_rows
        serving = plan.serving_notes(self.context)
        runtimes = [target.runtime for target in targets]
        return Report(
            name=plan.name,
            run=str(self.folder),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            source=redact_value(plan.inputs.model.pin.describe()),
            rows=tuple(rows),
            gate=combine_verdicts(verdicts),
            timings=tuple(self.timings),
            warnings=tuple(self.events.warnings),
            published=(),
            notes={
                "KL": " / ".join(dict.fromkeys(runtime.kl_definition for runtime in runtimes)),
                **{task.name: task.note() for task in plan.evaluation.eval.tasks},
                **({"original": "; ".join(plan.source_notes)} if plan.source_notes else {}),
                **({"serving": "; ".join(serving)} if serving else {}),
            },
            recipe=redact_value(plan.described),
            versions=versions_of_entries(plan.stages, plan.exports),
            runtime_versions=redact_value({name: version for runtime in runtimes for name, version in runtime.versions().items()}),
            hardware=describe(),
            widths=self._widths(),
            latency=latencies,
            digests=plan.digests,
            verifications={
                step.artifact.artifact: step.read(step.at(self.context)) for step in plan.steps if isinstance(step, VerifyArtifact)
            },
        )

    def _measured(self, target: Target) -> dict[str, ItemizedMeasurement]:
        """Return the measurements on a target, by artifact, the original first."""
        return {name: step.read(step.at(self.context)) for name, step in self.plan.measurements.models[target.name].items()}

    def _gallery(self) -> Gallery:
        """Return the items whose answers flipped, on the recipe's first target."""
        measured = self._measured(self.plan.evaluation.eval.places[0])
        original = measured.pop(ORIGINAL)
        flips = [
            TaskFlips(task, partial(pin.files, self.events), original, measured)
            for task, pin in self.plan.inputs.tasks
            if pin is not None
        ]
        return make_gallery(flips)

    def _widths(self) -> dict[str, Widths]:
        """Return the widths that stages chose, by the stage's name."""
        stages = () if self.plan.compression is None else self.plan.compression.stages
        by_stage = {step.name: read_widths(step.at(self.context)) for step in stages}
        return {name: widths for name, widths in by_stage.items() if widths is not None}

    def _rows(self, measured: Mapping[str, ItemizedMeasurement], target: Target) -> list[Row]:
        original = self.plan.inputs.weights.at(self.context)
        formats = {ORIGINAL: format_of(original), **{each.artifact: format_named(each.format) for each in self.plan.artifacts}}
        paths = {ORIGINAL: original, **{artifact.artifact: artifact.at(self.context) for artifact in self.plan.artifacts}}
        checkpoint = open_checkpoint(original)
        weights = sum(entry.elements for entry in checkpoint.tensors.values())
        original_bytes = formats[ORIGINAL].total_bytes(original)
        rows: list[Row] = []
        for name, measurement in measured.items():
            path, export_format = paths[name], formats[name]
            total_bytes = export_format.total_bytes(path)
            fidelity = {task: row.fidelity for task, row in measurement.tasks.items() if row.fidelity}
            noise = {task: row.noise for task, row in measurement.tasks.items() if row.noise}
            rows.append(
                Row(
                    artifact=name,
                    runtime=target.runtime.runtime,
                    path=str(path),
                    bytes=total_bytes,
                    size_ratio=total_bytes / original_bytes,
                    bits_per_weight=8 * export_format.weight_bytes(path) / weights,
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
