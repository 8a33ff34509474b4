"""Running a recipe: each step from the store or made anew, then the gate, the report, and publishing."""

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

from compress.artifact import checkpoint_bytes, weight_bytes
from compress.checkpoint import open_checkpoint
from compress.errors import CheckpointError, DataError, MissingError, StoreError
from compress.eval.latency_results import Latency, read_latency
from compress.eval.results import ItemizedMeasurement, read_measurement
from compress.events import EventLog, Watcher
from compress.files import telling_where, write_json, write_text
from compress.gallery import Gallery, TaskFlips, make_gallery
from compress.gate import MeasuredModel, Verdict, combine_verdicts, judge
from compress.hardware import describe
from compress.meter import Meter
from compress.plan import Plan, make_plan, notes_of, plan_evaluation
from compress.planner import ORIGINAL, Kind, Step
from compress.publish import publish
from compress.recipe import Target
from compress.redaction import redact_value
from compress.report import Report, Row, Timing, render
from compress.report_html import render_html
from compress.stages.widths import Widths, read_widths
from compress.steps import StepExecutor
from compress.store import Store, default_store
from compress.store_entries import Entry, Origin
from compress.verification.results import read_verification


@dataclass(frozen=True)
class Places:
    """Where a run keeps its folder, and its store (None: the user's cache)."""

    runs: Path
    store: Path | None


def run_recipe(
    recipe: Path, settings: Mapping[str, Any], places: Places, watcher: Watcher, *, fresh: bool = False, force: bool = False
) -> Report:
    """Run a recipe to its report; a step whose output is stored is not made again, unless `fresh`.

    `force` publishes even if the gate does not pass.

    Raises:
        CompressError: the recipe, a file, the model or the machine is at fault; the store and earlier runs stay as they were.
    """
    store = _store(places)
    plan = make_plan(recipe, settings, store)
    return _execute(plan, store, _Command(recipe, settings, places, watcher, fresh=fresh, force=force))


def run_evaluation(
    recipe: Path,
    settings: Mapping[str, Any],
    models: tuple[str, Sequence[Path]],
    places: Places,
    watcher: Watcher,
    *,
    fresh: bool = False,
) -> Report:
    """Measure artifacts that are there against an original, and judge them by a recipe's tasks and gate; nothing is published.

    `models` are the original, as a folder or a hub id, and the artifacts' folders.

    Raises:
        CompressError: the recipe, a file, a model or the machine is at fault; the store and earlier runs stay as they were.
    """
    store = _store(places)
    plan = plan_evaluation(recipe, settings, store, original=models[0], artifacts=models[1])
    return _execute(plan, store, _Command(recipe, settings, places, watcher, fresh=fresh, force=False))


@dataclass(frozen=True)
class _Command:
    """What a run was asked for."""

    recipe: Path
    settings: Mapping[str, Any]
    places: Places
    watcher: Watcher
    fresh: bool
    force: bool


def _store(places: Places) -> Store:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS once, when it is first used
    return Store(places.store or default_store())


def _execute(plan: Plan, store: Store, command: _Command) -> Report:
    if plan.unfit:
        raise MissingError("\n".join(plan.unfit))
    folder = _make_folder(command.places.runs, plan.recipe.name)
    events = EventLog(folder / "events.jsonl", command.watcher)
    events.write("started", recipe=str(command.recipe), settings=dict(command.settings))
    with telling_where(folder):
        write_json(folder / "plan.json", redact_value(plan.summary(store)))
    with _noting_a_stop(events), store.using(step.key for step in plan.steps):
        report = _Run(plan, store, folder, events, fresh=command.fresh).report(force=command.force)
    events.write("finished", verdict=report.gate.verdict)
    return report


@contextmanager
def _noting_a_stop(events: EventLog) -> Generator[None]:
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            with suppress(StoreError):  # what stopped the run matters more than that it could not be noted
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
"""What reads the outputs that a verdict is made of: a cached one is read whole, for every byte of it counts."""


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
        """Make every step, judge, publish, and write the report."""
        if self.plan.family.derived:
            self.events.warn(self.plan.family.derived)
        for note in self.plan.gate_notes:
            self.events.warn(note)
        for warning in self.plan.warnings:
            self.events.warn(warning)
        executor = StepExecutor(self.plan, self.folder, self.events, self.entries)
        for position, step in enumerate(self.plan.steps, 1):
            self.events.step_started(step.name, position, len(self.plan.steps))
            self._make(step, executor)
        report = self._judge(executor)
        gallery = self._gallery(executor)
        self._write(report, gallery)
        recipe = self.plan.recipe
        if recipe.publish and (report.gate.verdict == "pass" or force):
            artifacts = {name: self.entries[f"export {name}"].folder for name in self.plan.artifacts}
            done = publish(report, artifacts, Path(recipe.publish.to), self.events)
            report = report.model_copy(update={"published": done})
            self._write(report, gallery)
        return report

    def _write(self, report: Report, gallery: Gallery) -> None:
        with telling_where(self.folder):
            write_text(self.folder / "report.json", report.to_json() + "\n")
            write_text(self.folder / "report.md", render(report))
            write_text(self.folder / "report.html", render_html(report, gallery))

    def _make(self, step: Step, executor: StepExecutor) -> None:
        began = time.perf_counter()
        entry = None if self.fresh else self._find(step)
        meter = Meter()
        if entry is None:
            self._check_sources(step, executor)
            entry, meter = self._make_anew(step, executor.maker(step))
        cached = meter.seconds == 0
        for warning in entry.warnings if cached else ():
            self.events.warn(warning)
        self.entries[step.name] = entry
        seconds = time.perf_counter() - began
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
        """Return a step's entry; one that is damaged, or holds something else than such a step writes, is a miss."""
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
        """Read whole what a stage or an export is about to be made of, and make anew what is not what was written.

        Time of change and size of a file stay as they were where a disk loses bits.
        """
        for source in self.plan.sources_of(step) if step.kind in ("stage", "export") else ():
            if self.store.find(source.key, self.events.warn, thorough=True) is None:
                self._check_sources(source, executor)
                self.entries[source.name], _ = self._make_anew(source, executor.maker(source))

    def _make_anew(self, step: Step, make: Callable[[Path], None]) -> tuple[Entry, Meter]:
        before = self.store.find(step.key, _unheard)
        with self.store.lock(step.key, lambda: self.events.say(f"{step.name}: another run is making this; waiting for it")):
            entry = self.store.find(step.key, _unheard)
            made_meanwhile = entry is not None and (before is None or entry.made != before.made)
            if entry is not None and (not self.fresh or made_meanwhile):
                return entry, Meter()
            resume = step.kind in ("stage", "measure") and not self.fresh  # they commit what they finish, piece by piece
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
        for place, target in enumerate(recipe.eval.places):
            measured = self._measured(place)
            found = self._latency(place)
            latencies |= {} if found is None else {target.name: found}
            own = self._rows(measured, executor, target)
            models = [MeasuredModel(row.artifact, row.bytes, measured[row.artifact], row.bits_per_weight, found) for row in own]
            verdicts.append(judge(recipe.gate, models[0], models[1:], target.name))
            rows += own
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

    def _measured(self, place: int) -> dict[str, ItemizedMeasurement]:
        """Return what was measured at one of the recipe's places, by artifact, the original first."""
        steps = {name: self.plan.measured(place, name) for name in (ORIGINAL, *self.plan.artifacts_at(place))}
        return {name: read_measurement(self.entries[step.name].folder) for name, step in steps.items()}

    def _gallery(self, executor: StepExecutor) -> Gallery:
        """Return the items that flipped, at the first of the recipe's places."""
        measured = self._measured(0)
        original = measured.pop(ORIGINAL)
        flips = [
            TaskFlips(task, partial(executor.files, pin), original, measured)
            for task, pin in zip(self.plan.recipe.eval.tasks, self.plan.tasks, strict=True)
            if pin is not None
        ]
        return make_gallery(flips)

    def _latency(self, place: int) -> Latency | None:
        step = next((step for step in self.plan.steps if step.kind == "latency" and step.place == place), None)
        return None if step is None else read_latency(self.entries[step.name].folder)

    def _widths(self) -> dict[str, Widths]:
        """Return the widths that stages chose, by the stage's name."""
        found = {step.name: read_widths(self.entries[step.name].folder) for step in self.plan.steps if step.kind == "stage"}
        return {name: widths for name, widths in found.items() if widths is not None}

    def _rows(self, measured: Mapping[str, ItemizedMeasurement], executor: StepExecutor, target: Target) -> list[Row]:
        original = executor.original()
        checkpoint = open_checkpoint(original)
        weights = sum(_elements(entry.shape) for entry in checkpoint.tensors.values())
        whole = checkpoint_bytes(original)
        rows: list[Row] = []
        for name, found in measured.items():
            path = executor.artifact(name)
            compared = {task: row.fidelity for task, row in found.tasks.items() if row.fidelity}
            noise = {task: row.noise for task, row in found.tasks.items() if row.noise}
            rows.append(
                Row(
                    artifact=name,
                    runtime=target.runtime.runtime,
                    path=str(path),
                    bytes=checkpoint_bytes(path),
                    size_ratio=checkpoint_bytes(path) / whole,
                    bits_per_weight=8 * weight_bytes(path) / weights,
                    metrics={task: row.metrics for task, row in found.tasks.items()},
                    fidelity=compared or None,
                    target=target.name,
                    grounding=found.grounding,
                    noise=noise or None,
                    loaded_with=redact_value(target.runtime.loaded_with(name)),
                )
            )
        return rows


def _unheard(message: str) -> None:
    """Take a warning that was given before."""
    del message


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
