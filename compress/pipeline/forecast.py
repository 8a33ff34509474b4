"""What a recipe's stages and exports will leave: the stages' plans, each made with the spec that the one before it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.quantization_config import KernelKind
from compress.checkpoints.spec import CheckpointSpec, spec_of
from compress.data.sources import QuestionSource
from compress.errors import RecipeError
from compress.families import Family
from compress.pipeline.plan_notes import outlook_notes, size_notes
from compress.recipe.document import RecipeDocument
from compress.recipe.model import Recipe
from compress.stages.stage import StagePlan


@dataclass(frozen=True)
class Forecast:
    """The results of stages and exports, as far as known before the run; empty where the model's headers cannot be read yet."""

    stages: tuple[StagePlan, ...] = ()
    """The plan of each stage."""

    export_bytes: Mapping[int, int] = field(default_factory=lambda: dict[int, int]())
    """The predicted bytes of exports, by position."""

    notes: tuple[str, ...] = ()

    gate_notes: tuple[str, ...] = ()
    """Limits of the gate that the results cannot meet."""

    kernel_kinds: Mapping[str, frozenset[KernelKind]] = field(default_factory=lambda: dict[str, frozenset[KernelKind]]())
    """The matrix products that each artifact's linears need kernels for."""


def forecast(recipe: Recipe, document: RecipeDocument, checkpoint: Checkpoint, family: Family) -> Forecast:
    """Return what the stages and exports of a recipe leave of a checkpoint.

    Raises:
        RecipeError: a stage does not fit the checkpoint that it is given, or an export the last one; every fault at once.
    """
    source = spec_of(checkpoint, family)
    faults: list[str] = []
    plans: list[StagePlan] = []
    exact, assumed = True, False  # assumed: that a stage whose result only the run knows left the tensors unchanged
    known = before = (source,)  # after a stage whose result only the run knows, the last known specs
    for position, stage in enumerate(recipe.stages):
        each = [stage.plan(spec) for spec in known]
        stage_faults = list(dict.fromkeys(fault for plan in each for fault in plan.faults))
        if any(plan.reads_images for plan in each) and not _calibrates_with_images(recipe):
            stage_faults.append(
                f"{stage.stage} observes layers of {family.name} that only images reach, and calibration.sets has none; add a set "
                "of questions about images (dataset: vqa)"
            )
        faults += located(document, ("stages", position), stage_faults)
        if not stage_faults:
            exact = all(plan.after and plan.exact for plan in each) and (exact or not before)
            before = tuple(spec for plan in each for spec in plan.after)
            known, assumed = before or known, assumed or not before
            plans.append(_joined(each, before, exact and not assumed))
    if faults:
        raise RecipeError(faults)
    sizes: dict[int, int] = {}
    for position, export in enumerate(recipe.export):
        export_faults = list(dict.fromkeys(fault for spec in before for fault in export.check(spec)))
        faults += located(document, ("export", position), export_faults)
        if not faults and exact:
            sizes[position] = export.predict_bytes(before[0])
    if faults:
        raise RecipeError(faults)
    schemes = [scheme for spec in before for scheme in spec.schemes.values()]
    return Forecast(
        stages=tuple(plans),
        export_bytes=sizes,
        notes=(
            *dict.fromkeys(note for plan in plans for note in plan.notes),
            *outlook_notes(recipe, before or (source,), source.weight_bytes),
        ),
        # Only a size that will be met says that a limit cannot be.
        gate_notes=size_notes(recipe, checkpoint, {} if assumed else sizes),
        kernel_kinds={export.artifact: export.kernel_kinds(schemes) for export in recipe.export},
    )


def _joined(plans: list[StagePlan], after: tuple[CheckpointSpec, ...], exact: bool) -> StagePlan:
    """Return the one plan of a stage that was planned for each example of the checkpoint before it."""
    sizes = [plan.max_bytes for plan in plans if plan.max_bytes is not None]
    return StagePlan(
        after=after,
        exact=exact,
        max_bytes=max(sizes) if len(sizes) == len(plans) and sizes else None,
        notes=tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
    )


def _calibrates_with_images(recipe: Recipe) -> bool:
    return recipe.calibration is None or any(isinstance(data, QuestionSource) for data in recipe.calibration.sets)


def located(document: RecipeDocument, key: tuple[str | int, ...], faults: list[str]) -> list[str]:
    """Return faults of a place of the recipe, each with file, line and key."""
    where = f"{document.whereabouts(key)}: {key[0]}.{key[1]}"
    return [f"{where}: {fault}" for fault in faults]
