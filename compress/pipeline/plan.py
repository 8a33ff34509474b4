"""The plan of a run: its steps, each with the key of its output in the store, predicted sizes and notes; made without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.output_head import check_head, head_notes
from compress.checkpoints.quantization_config import KernelKind, foreign_format
from compress.checkpoints.spec import spec_of
from compress.checkpoints.tokens_check import check_tokens
from compress.errors import RecipeError, UsageError
from compress.export.format import Export, format_name, format_named
from compress.families import Family
from compress.families.resolve import family_of
from compress.hardware import default_device, gpus
from compress.hubs.hub import open_pinned, resolve_model, weights_notes
from compress.pipeline.evaluation_faults import length_faults, task_faults
from compress.pipeline.forecast import Forecast, forecast
from compress.pipeline.graph import Compression, Inputs, Measurements, compression, measurements
from compress.pipeline.plan_data import count_items
from compress.pipeline.plan_notes import export_notes, full_vocabulary, kernels, power, tokenizer_notes, unmeasured
from compress.pipeline.publish_folders import check_publish_folders
from compress.pipeline.steps.data import pin_data
from compress.pipeline.steps.measure import AnyArtifact
from compress.pipeline.steps.model import Convert, ExistingArtifact, PublishedModel
from compress.pipeline.steps.step import ORIGINAL, Step, StepContext, digest_of
from compress.pipeline.store import Store
from compress.recipe.document import RecipeDocument
from compress.recipe.model import AnyEvaluation, Model, Recipe, read_evaluation, read_recipe
from compress.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The measurement of an original and its artifacts: its inputs pinned, its steps in the order they run, and notes."""

    evaluation: AnyEvaluation
    """The tasks and the gate; a recipe, where artifacts are made."""

    settings: Model
    inputs: Inputs
    artifacts: tuple[AnyArtifact, ...]
    measurements: Measurements
    steps: tuple[Step, ...]
    """All steps, each after those that it reads."""

    compression: Compression | None = None
    """The steps that make the artifacts; None where they are there already."""

    notes: tuple[str, ...] = ()

    source_notes: tuple[str, ...] = ()
    """Those of `notes` that concern the original model."""

    power: tuple[str, ...] = ()
    """The statistical power of the tasks, and tasks that are not measured."""

    items: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())
    """The number of items of each task whose data could be read."""

    gate_notes: tuple[str, ...] = ()
    """Limits of the gate that cannot be met."""

    warnings: tuple[str, ...] = ()
    """Warnings about existing artifacts and the recipe's keys."""

    kernel_faults: tuple[str, ...] = ()
    """Reasons why this machine cannot run the measurements."""

    @property
    def name(self) -> str:
        """The name of the recipe."""
        return self.evaluation.name

    @property
    def recipe(self) -> Recipe | None:
        """The recipe; None for the evaluation of existing artifacts."""
        return self.evaluation if isinstance(self.evaluation, Recipe) else None

    @property
    def family(self) -> Family:
        """The original's family."""
        return self.inputs.family

    @property
    def exports(self) -> Sequence[Export]:
        """The exports of the recipe; none where the artifacts are there already."""
        return () if self.recipe is None else self.recipe.export

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of the recipe; none where the artifacts are there already."""
        return () if self.recipe is None else self.recipe.stages

    @property
    def described(self) -> dict[str, Any]:
        """The recipe as the report has it; of what an evaluation has no keys for, nothing."""
        keys = self.evaluation.model_dump(mode="json")
        absent: dict[str, Any] = {"calibration": None, "stages": [], "export": [], "publish": None}
        return {"name": self.name, "model": self.settings.model_dump(mode="json"), **absent, **keys}

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the original and of each task with its data; results with equal digests are comparable between runs."""
        tasks = {task.name: digest_of(task.settings(), None if pin is None else pin.digest) for task, pin in self.inputs.tasks}
        return {ORIGINAL: self.inputs.model.key, **tasks}

    def serving_notes(self, run: StepContext) -> tuple[str, ...]:
        """Return the notes on the exports of the checkpoint that the last stage wrote."""
        if self.compression is None or not self.compression.stages:
            return ()
        checkpoint = open_checkpoint(self.compression.stages[-1].at(run))
        # Such a checkpoint has no spec of ours: the plan's own notes stand.
        if foreign_format(checkpoint.config):
            return self.notes
        return export_notes(self.exports, spec_of(checkpoint, self.family))

    def summary(self, store: Store) -> dict[str, Any]:
        """Return the content of `plan.json`."""
        steps = [
            {
                "step": step.name,
                "key": step.key,
                "reads": [source.name for source in step.steps],
                "cached": bool(store.find(step.key, _ignore_warning)),
                "expected_bytes": step.expected_bytes,
            }
            for step in self.steps
        ]
        return {
            "schema": 1,
            "recipe": self.name,
            "device": self.inputs.device,
            "source": self.inputs.model.pin.describe(),
            "steps": steps,
            "notes": list(self.notes),
            "power": list(self.power),
            "items": dict(self.items),
            "gate": list(self.gate_notes),
            "unfit": list(self.kernel_faults),
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
    recipe, document = read_recipe(path, settings)
    original = _open_original(recipe.model, store)
    _check_evaluation(recipe, document, original, recipe.export)
    outlook = Forecast()
    if original.checkpoint is not None:
        outlook = forecast(recipe, document, original.checkpoint, original.family)
    inputs = _inputs(recipe, original, store)
    sets = tuple(pin_data(data, store) for data in recipe.calibration.sets) if recipe.calibration else ()
    made = compression(recipe, inputs, sets, outlook)
    artifacts = _Artifacts(made.artifacts, outlook.kernel_kinds, document.notes, made, outlook.notes, outlook.gate_notes)
    if recipe.publish:
        names = [export.artifact for export in recipe.export]
        check_publish_folders(Path(recipe.publish.to), recipe.name, names, store.fingerprint)
    return _plan(recipe, recipe.model, original, inputs, artifacts)


def plan_evaluation(path: Path, settings: Mapping[str, Any], store: Store, *, artifacts: Sequence[Path], original: str) -> Plan:
    """Plan the evaluation of existing artifacts against an original, by the tasks and the gate of a recipe.

    Raises:
        RecipeError: the recipe is at fault, or does not fit the model; every fault at once.
        CheckpointError, DataError, MissingError: a model or data cannot be read.
        UsageError: two artifacts have one name.
    """
    existing: list[ExistingArtifact] = []
    for folder in (artifact.expanduser().resolve() for artifact in artifacts):
        # Reports, records and the gate name artifacts by their folders.
        if folder.name in (ORIGINAL, *(other.artifact for other in existing)):
            raise UsageError(f"{folder}: a second artifact called {folder.name}; reports name them by their folders: rename one")
        export_format = format_name(folder)
        existing.append(ExistingArtifact(folder.name, folder, _artifact_key(folder, export_format, store), export_format))
    formats = {artifact.artifact: artifact.format for artifact in existing}
    evaluation, model, document = read_evaluation(path, settings, original, formats)
    opened = _open_original(model, store)
    _check_evaluation(evaluation, document, opened, ())
    kernel_kinds: dict[str, frozenset[KernelKind]] = {}
    warnings: list[str] = []
    for artifact in existing:
        row = format_named(artifact.format)
        row.check_artifact(artifact.folder, opened.family)
        kernel_kinds[artifact.artifact] = row.kernel_kinds_in(artifact.folder)
        warnings += row.warnings(artifact.folder, opened.family)
    inputs = _inputs(evaluation, opened, store)
    return _plan(
        evaluation, model, opened, inputs, _Artifacts(tuple(existing), kernel_kinds, document.notes, warnings=tuple(warnings))
    )


@dataclass(frozen=True)
class _Original:
    """The model as it was published."""

    model: PublishedModel

    checkpoint: Checkpoint | None
    """Its headers; None where they can only be read once it is fetched."""

    family: Family
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Artifacts:
    """The artifacts of a plan, and what is known of them."""

    artifacts: tuple[AnyArtifact, ...]

    kernel_kinds: Mapping[str, frozenset[KernelKind]]
    """The matrix products that each needs a runtime's kernels for; graphs have operators of their own."""

    recipe_notes: tuple[str, ...]
    """Notes on the recipe's keys."""

    compression: Compression | None = None
    notes: tuple[str, ...] = ()
    gate_notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _open_original(settings: Model, store: Store) -> _Original:
    pin = resolve_model(settings.source, settings.hub, settings.revision)
    checkpoint = open_pinned(pin, allow_pickle=settings.allow_pickle, trust_remote_code=settings.trust_remote_code)
    family = family_of(pin.config, pin.source, checkpoint, settings.trust_remote_code)
    notes: tuple[str, ...] = ()
    if checkpoint is not None:
        check_head(checkpoint, family)
        check_tokens(checkpoint, family)
        notes = (*weights_notes(pin), *head_notes(checkpoint, family), *tokenizer_notes(checkpoint.folder))
    keys = (pin.digest(store.fingerprint), pin.side_digest(store.fingerprint))
    return _Original(PublishedModel(pin, *keys, settings.allow_pickle), checkpoint, family, notes)


def _check_evaluation(evaluation: AnyEvaluation, document: RecipeDocument, original: _Original, exports: Sequence[Export]) -> None:
    faults = task_faults(evaluation, document, original.family, exports)
    if faults := [*faults, *length_faults(evaluation, document, original.model.pin.config)]:
        raise RecipeError(faults)


def _inputs(evaluation: AnyEvaluation, original: _Original, store: Store) -> Inputs:
    device = default_device()
    return Inputs(
        model=original.model,
        family=original.family,
        tasks=tuple((task, None if task.data is None else pin_data(task.data, store)) for task in evaluation.eval.tasks),
        device=device,
        # The GPU's model is in the keys: another one has other kernels, which round differently.
        devices=(device, *gpus()[:1]),
        weights=Convert(original.model) if original.model.pin.pickled else original.model,
    )


def _plan(evaluation: AnyEvaluation, settings: Model, original: _Original, inputs: Inputs, made: _Artifacts) -> Plan:
    measured = measurements(evaluation, inputs, made.artifacts)
    items = count_items(inputs.tasks)
    formats = {artifact.artifact: artifact.format for artifact in made.artifacts}
    kernel_faults, kernel_notes = kernels(evaluation, formats, made.kernel_kinds)
    before = made.compression.before if made.compression is not None else ()
    steps = (*inputs.conversion, *before, *measured.steps)
    for step in steps:
        _ = step.key  # covers every environment's versions: a missing one is reported now, not in the run
    return Plan(
        evaluation=evaluation,
        settings=settings,
        inputs=inputs,
        artifacts=made.artifacts,
        measurements=measured,
        steps=steps,
        compression=made.compression,
        notes=(
            *made.recipe_notes,
            *original.notes,
            *made.notes,
            *kernel_notes,
            *full_vocabulary(evaluation, original.model.pin.config),
        ),
        source_notes=original.notes,
        power=(*power(evaluation, items), *unmeasured(evaluation)),
        items=items,
        gate_notes=made.gate_notes,
        kernel_faults=tuple(kernel_faults),
        warnings=(*made.recipe_notes, *made.warnings),
    )


def _artifact_key(artifact: Path, export_format: str, store: Store) -> str:
    """Return a digest of everything in an existing artifact that shapes its measurements."""
    # The format's files only: a README or log beside them must not make a measurement stale.
    files = format_named(export_format).files(artifact)
    return digest_of({path.relative_to(artifact).as_posix(): store.fingerprint(path) for path in files})
