"""The plan of a run: its steps, each with the key of its output in the store, predicted sizes and notes; made without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from compress.checkpoints.artifact import artifact_format
from compress.checkpoints.awq_gptq_config import check_packed_config
from compress.checkpoints.checkpoint import open_checkpoint, read_config
from compress.checkpoints.output_head import check_head, head_notes
from compress.checkpoints.quantization_config import Product, foreign_format, products_in
from compress.checkpoints.spec import spec_of
from compress.checkpoints.tokens_check import check_tokens
from compress.errors import RecipeError, UsageError
from compress.export.format import runtimes_of, warnings_of
from compress.families import Family, family_of
from compress.hubs.hub import ModelPin, open_pinned, resolve_model, weights_notes
from compress.pipeline.forecast import Forecast, forecast
from compress.pipeline.plan_data import count_items
from compress.pipeline.plan_notes import (
    export_notes,
    full_vocabulary,
    kernels,
    power,
    tokenizer_notes,
    unmeasured,
)
from compress.pipeline.planner import ORIGINAL, DataPin, Planner, Step, digest_of
from compress.pipeline.publish_folders import check_publish_folders
from compress.pipeline.store import Store
from compress.recipe.document import RecipeDocument, dotted
from compress.recipe.model import Recipe, read_evaluation, read_recipe
from compress.recipe.schema import load_row
from compress.runtimes import RUNTIMES
from compress.runtimes.runtime import Runtime


@dataclass(frozen=True)
class Plan:
    """A recipe with its inputs pinned, its steps in the order they run, and notes on the expected results."""

    recipe: Recipe
    model: ModelPin
    source_digest: str
    family: Family
    device: str

    sets: tuple[DataPin, ...]
    """The data of the calibration sets."""

    tasks: tuple[DataPin | None, ...]
    """The data of the tasks; None for tasks without."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    source_notes: tuple[str, ...] = ()
    """Those of `notes` that concern the original model."""

    existing: Mapping[str, Path] = field(default_factory=lambda: dict[str, Path]())
    """Existing artifacts to measure, by name; empty where the recipe makes them."""

    power: tuple[str, ...] = ()
    """The statistical power of the tasks, and tasks that are not measured."""

    items: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())
    """The number of items of each task whose data could be read."""

    gate_notes: tuple[str, ...] = ()
    """Limits of the gate that cannot be met."""

    warnings: tuple[str, ...] = ()
    """Warnings about existing artifacts and the recipe's keys."""

    unfit: tuple[str, ...] = ()
    """Reasons why this machine cannot run the measurements."""

    @property
    def artifacts(self) -> list[str]:
        """The names of the artifacts that are measured: exports, or existing ones."""
        return list(self.existing) or [export.artifact for export in self.recipe.export]

    def artifacts_at(self, target_index: int) -> list[str]:
        """Return the names of the artifacts that are measured on a target: those that its runtime runs."""
        measured = [step.artifact for step in self.steps if step.kind == "measure" and step.target_index == target_index]
        return [name for name in measured if name != ORIGINAL]

    def measured(self, target_index: int, artifact: str) -> Step:
        """Return the step that measures an artifact, or the original, on a target."""
        steps = (step for step in self.steps if step.kind == "measure")
        return next(step for step in steps if (step.target_index, step.artifact) == (target_index, artifact))

    def sources_of(self, step: Step) -> list[Step]:
        """Return the steps whose outputs a stage or an export reads; none where it reads the published model."""
        stages = [other for other in self.steps if other.kind == "stage"]
        sources = stages[: step.position if step.kind == "stage" else len(stages)][-1:]
        sources = sources or [other for other in self.steps if other.kind == "convert"]
        if step.kind == "stage" and self.recipe.stages[step.position].calibrated:
            sources += [other for other in self.steps if other.kind == "calibration"]
        return sources

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the original and of each task with its data; results with equal digests are comparable between runs."""
        tasks = {
            task.name: digest_of(task.settings(), None if pin is None else pin.digest)
            for task, pin in zip(self.recipe.eval.tasks, self.tasks, strict=True)
        }
        return {ORIGINAL: self.source_digest, **tasks}

    @cached_property
    def by_name(self) -> Mapping[str, Step]:
        """The steps by their names."""
        return {step.name: step for step in self.steps}

    def summary(self, store: Store) -> dict[str, Any]:
        """Return the content of `plan.json`."""
        steps = [
            {
                "step": step.name,
                "key": step.key,
                "cached": bool(store.find(step.key, _ignore_warning)),
                "expected_bytes": step.expected_bytes,
            }
            for step in self.steps
        ]
        return {
            "schema": 1,
            "recipe": self.recipe.name,
            "device": self.device,
            "source": self.model.describe(),
            "steps": steps,
            "notes": list(self.notes),
            "power": list(self.power),
            "items": dict(self.items),
            "gate": list(self.gate_notes),
            "unfit": list(self.unfit),
        }


def _ignore_warning(message: str) -> None:
    """Discard a warning of the store: the run repeats it."""
    del message


def make_plan(path: Path, settings: Mapping[str, Any], store: Store) -> Plan:
    """Read a recipe, pin its inputs, and check its stages and exports against the model's shapes.

    Raises:
        RecipeError: the recipe is at fault, or does not fit the model; every fault at once.
        CheckpointError, DataError, MissingError: the model or data cannot be read.
        StoreError: the folder to publish to cannot be written, or has other files.
    """
    plan = _plan(*read_recipe(path, settings), store, {})
    if plan.recipe.publish:
        check_publish_folders(Path(plan.recipe.publish.to), plan.recipe.name, plan.artifacts, store.fingerprint)
    return plan


def plan_evaluation(path: Path, settings: Mapping[str, Any], store: Store, *, artifacts: Sequence[Path], original: str) -> Plan:
    """Plan the evaluation of existing artifacts against an original, by the tasks and the gate of a recipe.

    Raises:
        RecipeError: the recipe is at fault, or does not fit the model; every fault at once.
        CheckpointError, DataError, MissingError: a model or data cannot be read.
        UsageError: two artifacts have one name.
    """
    existing: dict[str, Path] = {}
    for folder in (artifact.expanduser().resolve() for artifact in artifacts):
        if folder.name in (*existing, ORIGINAL):
            raise UsageError(f"{folder}: a second artifact called {folder.name}; reports name them by their folders: rename one")
        if artifact_format(folder) == "vllm":
            check_packed_config(open_checkpoint(folder))
        existing[folder.name] = folder
    recipe, document = read_evaluation(path, settings, original, {name: runtimes_of(folder) for name, folder in existing.items()})
    plan = _plan(recipe, document, store, existing)
    _check_graphs(plan)
    return replace(
        plan, warnings=(*plan.warnings, *(line for folder in existing.values() for line in warnings_of(folder, plan.family)))
    )


def _check_graphs(plan: Plan) -> None:
    """Check the files of existing ONNX artifacts before anything is measured, where the `onnx` package is installed."""
    graphs = [folder for folder in plan.existing.values() if artifact_format(folder) != "vllm"]
    if not graphs or find_spec("onnx") is None:
        return
    from compress.export.onnx.files import check_artifact

    for folder in graphs:
        check_artifact(folder, plan.family)


def _plan(recipe: Recipe, document: RecipeDocument, store: Store, existing: Mapping[str, Path]) -> Plan:
    source = recipe.model
    pin = resolve_model(source.source, source.hub, source.revision)
    checkpoint = open_pinned(pin, allow_pickle=source.allow_pickle, trust_remote_code=source.trust_remote_code)
    family = family_of(pin.config, pin.source, checkpoint, source.trust_remote_code)
    source_notes: tuple[str, ...] = ()
    if checkpoint is not None:
        check_head(checkpoint, family)
        check_tokens(checkpoint, family)
        source_notes = (*weights_notes(pin), *head_notes(checkpoint, family), *tokenizer_notes(checkpoint.folder))
    if faults := [*_task_faults(recipe, document, family), *_length_faults(recipe, document, pin.config)]:
        raise RecipeError(faults)
    outlook = forecast(recipe, document, checkpoint, family) if checkpoint else Forecast()
    planner = Planner(recipe, pin, store, outlook, existing)
    items = count_items(recipe.eval.tasks, planner.tasks)
    steps = planner.steps()
    unfit, kernel_notes = kernels(recipe, _products(recipe, outlook, existing))
    return Plan(
        recipe=recipe,
        model=pin,
        source_digest=planner.source_key,
        family=family,
        device=planner.device,
        sets=planner.sets,
        tasks=planner.tasks,
        steps=steps,
        notes=(*document.notes, *source_notes, *outlook.notes, *kernel_notes, *full_vocabulary(recipe, pin.config)),
        source_notes=source_notes,
        existing=existing,
        power=(*power(recipe, items), *unmeasured(recipe)),
        items=items,
        gate_notes=outlook.gate_notes,
        unfit=tuple(unfit),
        warnings=document.notes,
    )


def _products(recipe: Recipe, outlook: Forecast, existing: Mapping[str, Path]) -> dict[str, frozenset[Product]]:
    """Return the matrix products that each artifact needs vLLM's kernels for; ONNX graphs have operators of their own."""
    if existing:
        return {name: products_in(read_config(folder)) for name, folder in existing.items() if artifact_format(folder) == "vllm"}
    return {export.artifact: outlook.products for export in recipe.export if export.format == "vllm"}


def _task_faults(recipe: Recipe, document: RecipeDocument, family: Family) -> list[str]:
    """Return the faults of tasks and latency that the model or a runtime does not support."""
    generates = family.head is not None
    faults: list[str] = []
    if recipe.eval.latency is not None and not generates:
        where = document.whereabouts(("eval", "latency"))
        faults.append(
            f"{where}: eval.latency: is measured of answers, and {family.name} compares images with texts and writes none; leave "
            "it out"
        )
    for position, task in enumerate(recipe.eval.tasks):
        key = ("eval", "tasks", position)
        where = f"{document.whereabouts(key)}: {dotted(key)}"
        if generates != (task.needs != "comparison"):
            does, alternative = ("writes text", "vqa or perplexity") if generates else ("compares images with texts", "zero-shot")
            faults.append(f"{where}: {family.name} {does}, which {task.task} does not measure; use {alternative}")
            continue
        for target in recipe.eval.places:
            runtime = target.runtime
            if task.needs_server and not runtime.asks_server:
                remedy = _remedy(recipe, lambda row: row.asks_server)
                faults.append(
                    f"{where}: {task.task} needs a server, and runtime {runtime.runtime} has none for harnesses to ask; {remedy}"
                )
            elif task.needs not in runtime.offers:
                remedy = _remedy(recipe, lambda row, needed=task.needs: needed in row.offers)
                faults.append(f"{where}: runtime {runtime.runtime} does not offer {task.task}; {remedy}")
    return faults


def _length_faults(recipe: Recipe, document: RecipeDocument, config: Mapping[str, Any]) -> list[str]:
    """Return the faults of runtimes whose context is shorter than the recipe's settings or its tasks' windows."""
    windows = (getattr(task, "window", None) for task in recipe.eval.tasks)
    longest = max((window for window in windows if isinstance(window, int)), default=0)
    faults: list[str] = []
    for position, target in enumerate(recipe.eval.places):
        key = ("eval", "runtime") if recipe.eval.targets is None else ("eval", "targets", position)
        where = f"{document.whereabouts(key)}: {dotted(key)}"
        faults += [f"{where}: {fault}" for fault in target.runtime.length_faults(config, longest)]
    return faults


def _remedy(recipe: Recipe, supports: Callable[[type[Runtime]], bool]) -> str:
    """Return the sentence that names the runtimes which support a need and run the exported formats."""
    runtimes = {name: cast("type[Runtime]", load_row(RUNTIMES, name)) for name in RUNTIMES}
    supporting = [name for name in sorted(runtimes, reverse=True) if supports(runtimes[name])]
    formats = sorted({export.format for export in recipe.export})
    usable = [name for name in supporting if not formats or any(name in export.runtimes for export in recipe.export)]
    if usable:
        return f"set eval.runtime to {' or '.join(usable)}"
    return f"what does ({', '.join(supporting)}) runs no {' or '.join(formats)}; use another format, or leave the task out"


def notes_of(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Return the notes on the exports of the checkpoint that the last stage wrote to `folder`."""
    checkpoint = open_checkpoint(folder)
    if foreign_format(checkpoint.config):
        return plan.notes
    return export_notes(plan.recipe, spec_of(checkpoint, plan.family))
