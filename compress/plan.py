"""The plan: what a run of a recipe would do, step by step, each with the key its output is stored under; made without torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.calibration.questions import source_digest
from compress.calibration.sets import QuestionSource, TextSource
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.document import Document, dotted
from compress.errors import RecipeError
from compress.export.format import Outlook
from compress.families import Family, family_of
from compress.hardware import default_device
from compress.hub import DatasetPin, ModelPin, open_pinned, resolve_dataset, resolve_model
from compress.layouts import has_kv_scales, quantized_linears
from compress.numerics.scheme import Scheme
from compress.quantization_config import foreign_format
from compress.recipe import Recipe, read_recipe
from compress.schema import is_local
from compress.store import Store

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["convert", "calibration", "overlap", "stage", "export", "measure"]

_REVISIONS: Mapping[Kind, int] = {"convert": 1, "calibration": 1, "overlap": 1, "stage": 1, "export": 1, "measure": 1}
"""Raised whenever this package's own part of such a step gives another output for the same settings."""

ORIGINAL = "original"


@dataclass(frozen=True)
class Step:
    """One step: its output is stored under `key`; `position` is its place in the recipe's list of stages or exports."""

    name: str
    kind: Kind
    key: str
    position: int = 0
    expected_bytes: int | None = None


@dataclass(frozen=True)
class DataPin:
    """A calibration set's or task's data, pinned: the digest of a local file, or a hub dataset's commit and files.

    `label` says which hub dataset it is, empty for a local file.
    """

    digest: str
    path: Path | None
    remote: DatasetPin | None
    label: str = ""


@dataclass(frozen=True)
class Plan:
    """A recipe with everything it reads pinned, its steps in the order they run, and what one should know of what it makes."""

    recipe: Recipe
    model: ModelPin
    source_digest: str
    family: Family
    device: str
    sets: tuple[DataPin, ...]
    tasks: tuple[DataPin, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, Step]:
        """The steps by their names."""
        return {step.name: step for step in self.steps}

    def summary(self, store: Store) -> dict[str, Any]:
        """Return the plan as `plan.json` holds it."""
        steps = [
            {
                "step": step.name,
                "key": step.key,
                "cached": bool(store.find(step.key, _unheard)),
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
        }


def _unheard(message: str) -> None:
    """Take a warning that belongs to a run, not to a plan."""
    del message


def artifact_name(recipe: Recipe, position: int) -> str:
    """Return what reports call the artifact of the export at this place of the recipe."""
    return recipe.export[position].artifact


def digest_of(*parts: object) -> str:
    """Return the SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def versions_of(names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in names}


def make_plan(path: Path, settings: Mapping[str, Any], store: Store) -> Plan:
    """Read a recipe, pin what it reads, and check its stages and exports against the model's own shapes.

    Raises:
        RecipeError: the recipe is at fault, or asks for what this model cannot hold; every fault at once.
        CheckpointError, DataError, MissingError: the model or data cannot be read.
    """
    recipe, document = read_recipe(path, settings)
    source = recipe.model
    pin = resolve_model(source.source, source.hub, source.revision)
    checkpoint = open_pinned(pin, allow_pickle=source.allow_pickle)
    family = family_of(pin.config, pin.source, checkpoint)
    if faults := _task_faults(recipe, document, family):
        raise RecipeError(faults)
    sizes = _check(recipe, document, checkpoint, family) if checkpoint else _Sizes({}, {})
    planner = _Planner(recipe, pin, store, sizes)
    return Plan(
        recipe=recipe,
        model=pin,
        source_digest=planner.source_key,
        family=family,
        device=planner.device,
        sets=planner.sets,
        tasks=planner.tasks,
        steps=planner.steps(),
        notes=sizes.notes,
    )


@dataclass(frozen=True)
class _Sizes:
    stages: Mapping[int, int]
    exports: Mapping[int, int]
    notes: tuple[str, ...] = ()


def _check(recipe: Recipe, document: Document, checkpoint: Checkpoint, family: Family) -> _Sizes:
    """Ask every stage and export whether it can be done, and how large its result will be."""
    faults: list[str] = []
    stages: dict[int, int] = {}
    schemes: dict[str, Scheme] | None = {}
    possible: list[dict[str, Scheme]] = [{}]
    for position, stage in enumerate(recipe.stages):
        found = stage.check(checkpoint, family)
        if stage.reads_images(family) and not _shows_images(recipe):
            found.append(
                f"{stage.stage} observes layers of {family.name} that only images reach, and calibration.sets has none; add a set "
                "of questions about images (dataset: vqa)"
            )
        if any(possible):
            found = [f"the stage before it quantizes already, and {stage.stage} needs weights that are not; remove one of the two"]
        faults += _placed(document, ("stages", position), found)
        if not found:
            size, made = stage.predict_bytes(checkpoint, family), stage.schemes(checkpoint, family)
            stages |= {} if size is None else {position: size}
            schemes = _joined(schemes, made)
            possible = stage.possible_schemes(checkpoint, family) if schemes is None else [schemes]
    if faults:
        raise RecipeError(faults)
    kv_cache = any(getattr(stage, "kv_cache", None) for stage in recipe.stages)
    outlooks = [Outlook(checkpoint, family, each, kv_cache) for each in possible]
    exports: dict[int, int] = {}
    for position, export in enumerate(recipe.export):
        found = list(dict.fromkeys(fault for outlook in outlooks for fault in export.check(outlook)))
        faults += _placed(document, ("export", position), found)
        if not faults and schemes is not None:
            exports[position] = export.predict_bytes(outlooks[0])
    if faults:
        raise RecipeError(faults)
    return _Sizes(stages, exports, _outlook_notes(recipe, outlooks or [Outlook(checkpoint, family, {})]))


def _shows_images(recipe: Recipe) -> bool:
    return recipe.calibration is None or any(isinstance(data, QuestionSource) for data in recipe.calibration.sets)


def _task_faults(recipe: Recipe, document: Document, family: Family) -> list[str]:
    """Return which tasks ask of the model what it does not do, or what the runtime does not offer of it."""
    writes, runtime = family.head is not None, recipe.eval.runtime
    faults: list[str] = []
    for position, task in enumerate(recipe.eval.tasks):
        place = ("eval", "tasks", position)
        where = f"{document.whereabouts(place)}: {dotted(place)}"
        if writes != (task.needs == "text"):
            does, instead = ("writes text", "vqa or perplexity") if writes else ("compares images with texts", "zero-shot")
            faults.append(f"{where}: {family.name} {does}, which {task.task} does not measure; use {instead}")
        elif task.needs not in runtime.offers:
            faults.append(f"{where}: runtime {runtime.runtime} does not offer {task.task}; set eval.runtime to transformers")
    return faults


def _outlook_notes(recipe: Recipe, outlooks: list[Outlook]) -> tuple[str, ...]:
    """Return what one should know of whatever comes out, and what only where the run chooses to hold linears so."""
    noted = [_notes(recipe, outlook) for outlook in outlooks]
    every = dict.fromkeys(note for notes in noted for note in notes)
    return tuple(note if all(note in notes for notes in noted) else f"where the stage chooses so: {note}" for note in every)


def notes_of(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Return what one should know of the exports of the checkpoint that the last stage wrote to `folder`."""
    checkpoint = open_checkpoint(folder)
    if foreign_format(checkpoint.config):
        return plan.notes
    outlook = Outlook(checkpoint, plan.family, quantized_linears(checkpoint), has_kv_scales(checkpoint))
    return _notes(plan.recipe, outlook)


def _notes(recipe: Recipe, outlook: Outlook) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for export in recipe.export for note in export.notes(outlook)))


def _joined(before: dict[str, Scheme] | None, made: dict[str, Scheme] | None) -> dict[str, Scheme] | None:
    """Return how the linears are held after a stage; None where only the run can tell.

    A stage that quantizes needs weights that are not, so that what it makes is known whatever ran before.
    """
    if made is None or (before is None and not made):
        return None
    return {**(before or {}), **made}


def _placed(document: Document, place: tuple[str | int, ...], faults: list[str]) -> list[str]:
    where = f"{document.whereabouts(place)}: {place[0]}.{place[1]}"
    return [f"{where}: {fault}" for fault in faults]


class _Planner:
    """Works out the steps' keys; a step's key covers everything that shapes its output."""

    def __init__(self, recipe: Recipe, pin: ModelPin, store: Store, sizes: _Sizes) -> None:
        self.recipe = recipe
        self.device = default_device()
        self.source_key = pin.digest(store.fingerprint)
        self.side_key = pin.side_digest(store.fingerprint)
        self.sizes = sizes
        sets = recipe.calibration.sets if recipe.calibration else ()
        self.sets = tuple(_pin_data(data, store) for data in sets)
        self.tasks = tuple(_pin_data(task.data, store) for task in recipe.eval.tasks)
        self.convert = pin.pickled

    def steps(self) -> tuple[Step, ...]:
        steps: list[Step] = []
        weights = self.source_key
        if self.convert:
            weights = self._key("convert", weights)
            steps.append(Step("convert to safetensors", "convert", weights))
        calibration = self._calibration()
        if calibration:
            steps.append(Step("calibration", "calibration", calibration))
            overlap = self._key("overlap", calibration, self._task_settings())
            steps.append(Step("overlap of calibration and evaluation", "overlap", overlap))
        last = weights
        for position, stage in enumerate(self.recipe.stages):
            seed = self.recipe.calibration.seed if self.recipe.calibration else 0
            fields = stage.model_dump(mode="json")
            shaping = [stage.revision, stage.versions(), self.device, seed]
            last = self._key("stage", fields, last, calibration if stage.calibrated else None, *shaping)
            steps.append(Step(self._stage_name(position), "stage", last, position, self.sizes.stages.get(position)))
        original = self._measure(weights, None)
        steps.append(Step(f"measure {ORIGINAL}", "measure", original))
        for position, export in enumerate(self.recipe.export):
            fields = export.model_dump(mode="json")
            key = self._key("export", fields, last, export.revision, versions_of(export.libraries), self._lineage())
            name = artifact_name(self.recipe, position)
            steps.append(Step(f"export {name}", "export", key, position, self.sizes.exports.get(position)))
            steps.append(Step(f"measure {name}", "measure", self._measure(key, original), position))
        return tuple(steps)

    def _stage_name(self, position: int) -> str:
        names = [stage.stage for stage in self.recipe.stages]
        return names[position] if names.count(names[position]) == 1 else f"{names[position]} {position}"

    def _calibration(self) -> str | None:
        calibration = self.recipe.calibration
        if calibration is None:
            return None
        sets = [
            [entry.model_dump(mode="json", exclude={"source", "revision", "subset", "split"}), pin.digest]
            for entry, pin in zip(calibration.sets, self.sets, strict=True)
        ]
        return self._key("calibration", sets, calibration.seed, self.side_key, versions_of(("transformers", "tokenizers")))

    def _task_settings(self) -> list[Any]:
        return [[task.settings(), pin.digest] for task, pin in zip(self.recipe.eval.tasks, self.tasks, strict=True)]

    def _measure(self, artifact: str, original: str | None) -> str:
        runtime = self.recipe.eval.runtime
        shaping = [runtime.settings(), runtime.revision, runtime.versions(), self.device]
        return self._key("measure", artifact, original, self._task_settings(), *shaping)

    def _lineage(self) -> dict[str, Any]:
        """What an artifact's record says of its making beyond what shapes its weights."""
        return self.recipe.model.model_dump(mode="json")

    def _key(self, kind: Kind, *parts: object) -> str:
        return digest_of(kind, _REVISIONS[kind], *parts)


def _pin_data(data: TextSource | QuestionSource, store: Store) -> DataPin:
    if is_local(data.source):
        path = Path(data.source)
        columns = data.columns if isinstance(data, QuestionSource) else None
        digest = digest_of(path.suffix, source_digest(path, columns, store.fingerprint))  # the suffix says how it is read
        return DataPin(digest=digest, path=path, remote=None)
    remote = resolve_dataset(data.source, data.subset, data.split, data.revision)
    return DataPin(digest=remote.digest, path=None, remote=remote, label=remote.label)


def show(plan: Plan, store: Store, console: Console) -> None:
    """Print the plan: what each step would do, and what is there already."""
    from rich.table import Table

    from compress.report import size

    summary = plan.summary(store)
    source = ", ".join(f"{key} {value}" for key, value in summary["source"].items())
    console.print(f"{plan.recipe.name}: {source}; on {plan.device}", highlight=False, markup=False)
    table = Table("step", "key", "cached", "expected size", box=None, pad_edge=False)
    for step in summary["steps"]:
        expected = size(step["expected_bytes"]) if step["expected_bytes"] else ""
        table.add_row(step["step"], step["key"][:12], "yes" if step["cached"] else "no", expected)
    console.print(table)
    if plan.family.derived:
        console.print(f"warning: {plan.family.derived}", highlight=False, markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
