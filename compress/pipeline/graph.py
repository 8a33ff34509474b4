"""The steps of a plan as a graph: which step reads what another makes, in an order in which they can be made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.export.format import VerifiedExport
from compress.families import Family
from compress.pipeline.forecast import Forecast
from compress.pipeline.steps.calibration import Calibrate, CheckOverlap, PinnedTask
from compress.pipeline.steps.data import DataPin
from compress.pipeline.steps.export import ExportArtifact, Lineage
from compress.pipeline.steps.latency import MeasureLatency
from compress.pipeline.steps.measure import AnyArtifact, Measure
from compress.pipeline.steps.model import Convert, PublishedModel
from compress.pipeline.steps.stage import ApplyStage
from compress.pipeline.steps.step import ORIGINAL, Step
from compress.pipeline.steps.verify import VerifyArtifact
from compress.recipe.model import AnyEvaluation, Recipe
from compress.runtimes.runtime import ServingRuntime


@dataclass(frozen=True)
class Inputs:
    """What every plan starts from: the original, the tasks with their data, and this machine's device."""

    model: PublishedModel
    family: Family
    tasks: tuple[PinnedTask, ...]
    device: str

    devices: tuple[str, ...]
    """The device and the GPU's name."""

    weights: PublishedModel | Convert
    """The original in safetensors."""

    @property
    def conversion(self) -> list[Step]:
        """The step that converts pickled weights, where there are such."""
        return [self.weights] if isinstance(self.weights, Convert) else []


@dataclass(frozen=True)
class Compression:
    """The steps from the original to the artifacts of a recipe."""

    before: tuple[Step, ...]
    """The calibration and the stages."""

    stages: tuple[ApplyStage, ...]
    artifacts: tuple[ExportArtifact, ...]
    lineage: Lineage


@dataclass(frozen=True)
class Measurements:
    """The steps that make artifacts and measure them beside the original."""

    steps: tuple[Step, ...]

    models: Mapping[str, Mapping[str, Measure]]
    """The measurements of a target, by the names of target and model, the original first."""

    latencies: Mapping[str, MeasureLatency]
    """By the names of targets; without those that have no server, or where no latency is asked for."""


def compression(recipe: Recipe, inputs: Inputs, sets: tuple[DataPin, ...], outlook: Forecast) -> Compression:
    """Return the steps from the original to the artifacts of a recipe."""
    before: list[Step] = []
    calibration = None
    if recipe.calibration is not None:
        calibration = Calibrate(recipe.calibration, sets, inputs.model, inputs.weights)
        # Before any stage: hours of compression on samples that are also evaluated would be worth nothing.
        before += [calibration, CheckOverlap(calibration, inputs.tasks)]
    names = [stage.stage for stage in recipe.stages]
    checkpoint, stages = inputs.weights, list[ApplyStage]()
    for position, stage in enumerate(recipe.stages):
        plan = outlook.stages[position] if outlook.stages else None
        step = ApplyStage(
            # Names are keys of events and reports: two stages of one kind need different ones.
            name=names[position] if names.count(names[position]) == 1 else f"{names[position]} {position}",
            stage=stage,
            before=checkpoint,
            calibration=calibration if stage.calibrated else None,
            seed=recipe.calibration.seed if recipe.calibration else 0,
            family=inputs.family,
            device=inputs.device,
            devices=inputs.devices,
            plan=plan,
            expected_bytes=None if plan is None else plan.max_bytes,
        )
        stages.append(step)
        checkpoint = step
    lineage = Lineage(inputs.model, recipe.model, recipe.stages, calibration, inputs.device)
    artifacts = tuple(
        ExportArtifact(
            name=f"export {export.artifact}",
            export=export,
            checkpoint=checkpoint,
            family=inputs.family,
            lineage=lineage,
            expected_bytes=outlook.export_bytes.get(position),
        )
        for position, export in enumerate(recipe.export)
    )
    return Compression((*before, *stages), tuple(stages), artifacts, lineage)


def measurements(evaluation: AnyEvaluation, inputs: Inputs, artifacts: Sequence[AnyArtifact]) -> Measurements:
    """Return the steps that make, verify and measure artifacts, each on the targets whose runtime runs it."""
    targets = evaluation.eval.places
    suffixes = {target.name: f" at {target.name}" if len(targets) > 1 else "" for target in targets}

    def measure(index: int, model: str, artifact: AnyArtifact | None, original: Measure | None) -> Measure:
        target = targets[index]
        name = f"measure {model}{suffixes[target.name]}"
        return Measure(name, evaluation, inputs.tasks, target, inputs.family, inputs.devices, inputs.weights, artifact, original)

    models = {target.name: {ORIGINAL: measure(index, ORIGINAL, None, None)} for index, target in enumerate(targets)}
    # The original first: artifacts are compared with its records, and a model that cannot be measured is found before exports are.
    steps: list[Step] = [by_model[ORIGINAL] for by_model in models.values()]
    for artifact in artifacts:
        if isinstance(artifact, ExportArtifact):
            steps += [artifact, *_verification(artifact)]
        for index, target in enumerate(targets):
            if target.runtime.runs(artifact.format):
                step = measure(index, artifact.artifact, artifact, models[target.name][ORIGINAL])
                models[target.name][artifact.artifact] = step
                steps.append(step)
    latencies: dict[str, MeasureLatency] = {}
    for target in targets:
        if evaluation.eval.latency is not None and isinstance(target.runtime, ServingRuntime):
            runnable = tuple(artifact for artifact in artifacts if target.runtime.runs(artifact.format))
            name = f"latency{suffixes[target.name]}"
            latencies[target.name] = MeasureLatency(
                name, evaluation.eval.latency, target.runtime, inputs.family, inputs.weights, runnable
            )
    # Latency last, when nothing else of this run uses the machine.
    return Measurements((*steps, *latencies.values()), models, latencies)


def _verification(artifact: ExportArtifact) -> list[Step]:
    """Return the step that compares an artifact with the checkpoint that it was exported from, where its format has one."""
    export = artifact.export
    return [VerifyArtifact(f"verify {artifact.artifact}", export, artifact)] if isinstance(export, VerifiedExport) else []
