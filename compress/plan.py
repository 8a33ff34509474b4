"""The plan: what a run of a recipe would do, step by step, each with the key its output is stored under; made without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress.artifact import artifact_format
from compress.calibration.sets import QuestionSource
from compress.checkpoint import Checkpoint, open_checkpoint, read_config
from compress.document import Document, dotted
from compress.errors import RecipeError, UsageError
from compress.export.format import Outlook, runtimes_of, warnings_of
from compress.families import Family, family_of
from compress.hub import ModelPin, open_pinned, resolve_model, weights_notes
from compress.layouts import has_kv_scales, quantized_linears
from compress.numerics.scheme import Scheme
from compress.output_head import check_head, head_notes
from compress.places import check_places
from compress.plan_data import count_items
from compress.plan_notes import (
    export_notes,
    kernels,
    outlook_notes,
    power,
    size_notes,
    tokenizer_notes,
    unmeasured,
    whole_vocabulary,
)
from compress.planner import ORIGINAL, DataPin, Planner, Sizes, Step, digest_of
from compress.quantization_config import Product, foreign_format, products_in, products_of
from compress.recipe import Recipe, read_evaluation, read_recipe
from compress.runtimes import RUNTIMES
from compress.runtimes.runtime import Runtime
from compress.schema import load_row
from compress.store import Store
from compress.tabular import Column, Table
from compress.terminal import print_table
from compress.tokens_check import check_tokens
from compress.word_layouts import check_words

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Plan:
    """A recipe with everything it reads pinned, its steps in the order they run, and what one should know of what it makes.

    `source_notes` are those of `notes` that are about the original as it is. `power` says what the tasks' items can show, and which
    are not measured. `given` are artifacts that are there already, by their names; where there are any, the recipe makes none.
    `items` is how many items each task asks whose data could be read, `gate_notes` which limits of the gate cannot be kept,
    `warnings` what is wrong with artifacts that are given, `unfit` why this machine cannot measure what is to be measured.
    """

    recipe: Recipe
    model: ModelPin
    source_digest: str
    family: Family
    device: str
    sets: tuple[DataPin, ...]
    tasks: tuple[DataPin | None, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    source_notes: tuple[str, ...] = ()
    given: Mapping[str, Path] = field(default_factory=lambda: dict[str, Path]())
    power: tuple[str, ...] = ()
    items: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())
    gate_notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    @property
    def artifacts(self) -> list[str]:
        """The names of what is measured beside the original: what is exported, or was given."""
        return list(self.given) or [export.artifact for export in self.recipe.export]

    def artifacts_at(self, place: int) -> list[str]:
        """Return the names of what is measured at one of the recipe's places: what its runtime runs."""
        measured = [step.artifact for step in self.steps if step.kind == "measure" and step.place == place]
        return [name for name in measured if name != ORIGINAL]

    def measured(self, place: int, artifact: str) -> Step:
        """Return the step that measures an artifact, or the original, at one of the recipe's places."""
        return next(step for step in self.steps if step.kind == "measure" and (step.place, step.artifact) == (place, artifact))

    def sources_of(self, step: Step) -> list[Step]:
        """Return the steps whose outputs a stage or an export is computed from; none of the original as it was published."""
        stages = [other for other in self.steps if other.kind == "stage"]
        before = stages[: step.position if step.kind == "stage" else len(stages)][-1:]
        before = before or [other for other in self.steps if other.kind == "convert"]
        if step.kind == "stage" and self.recipe.stages[step.position].calibrated:
            before += [other for other in self.steps if other.kind == "calibration"]
        return before

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the original and of each task with its data: figures of equal ones can be compared between runs."""
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
            "power": list(self.power),
            "items": dict(self.items),
            "gate": list(self.gate_notes),
            "unfit": list(self.unfit),
        }


def _unheard(message: str) -> None:
    """Take a warning that belongs to a run, not to a plan."""
    del message


def make_plan(path: Path, settings: Mapping[str, Any], store: Store) -> Plan:
    """Read a recipe, pin what it reads, and check its stages and exports against the model's own shapes.

    Raises:
        RecipeError: the recipe is at fault, or asks for what this model cannot hold; every fault at once.
        CheckpointError, DataError, MissingError: the model or data cannot be read.
        StoreError: the place to publish to cannot be written, or holds something else.
    """
    plan = _plan(*read_recipe(path, settings), store, {})
    if plan.recipe.publish:
        check_places(Path(plan.recipe.publish.to), plan.recipe.name, plan.artifacts, store.fingerprint)
    return plan


def plan_evaluation(path: Path, settings: Mapping[str, Any], store: Store, *, artifacts: Sequence[Path], original: str) -> Plan:
    """Plan to measure and judge artifacts that are there against an original, by the tasks and the gate of a recipe.

    Raises:
        RecipeError: the recipe is at fault, or asks for what this model cannot do; every fault at once.
        CheckpointError, DataError, MissingError: a model or data cannot be read.
        UsageError: two artifacts have one name.
    """
    given: dict[str, Path] = {}
    for folder in (artifact.expanduser().resolve() for artifact in artifacts):
        if folder.name in (*given, ORIGINAL):
            raise UsageError(f"{folder}: a second artifact called {folder.name}; reports name them by their folders: rename one")
        if artifact_format(folder) == "vllm":
            check_words(open_checkpoint(folder))
        given[folder.name] = folder
    recipe, document = read_evaluation(path, settings, original, {name: runtimes_of(folder) for name, folder in given.items()})
    plan = _plan(recipe, document, store, given)
    _check_graphs(plan)
    return replace(plan, warnings=tuple(line for folder in given.values() for line in warnings_of(folder, plan.family)))


def _check_graphs(plan: Plan) -> None:
    """Check the files of artifacts that are graphs before anything is measured, where there is what reads them."""
    graphs = [folder for folder in plan.given.values() if artifact_format(folder) != "vllm"]
    if not graphs or find_spec("onnx") is None:
        return
    from compress.onnx_files import check_artifact

    for folder in graphs:
        check_artifact(folder, plan.family)


def _plan(recipe: Recipe, document: Document, store: Store, given: Mapping[str, Path]) -> Plan:
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
    sizes = _check(recipe, document, checkpoint, family) if checkpoint else Sizes({}, {})
    planner = Planner(recipe, pin, store, sizes, given)
    items = count_items(recipe.eval.tasks, planner.tasks)
    steps = planner.steps()
    unfit, kernel_notes = kernels(recipe, _products(recipe, sizes, given))
    return Plan(
        recipe=recipe,
        model=pin,
        source_digest=planner.source_key,
        family=family,
        device=planner.device,
        sets=planner.sets,
        tasks=planner.tasks,
        steps=steps,
        notes=(*source_notes, *sizes.notes, *kernel_notes, *whole_vocabulary(recipe, pin.config)),
        source_notes=source_notes,
        given=given,
        power=(*power(recipe, items), *unmeasured(recipe)),
        items=items,
        gate_notes=sizes.gate_notes,
        unfit=tuple(unfit),
    )


def _products(recipe: Recipe, sizes: Sizes, given: Mapping[str, Path]) -> dict[str, frozenset[Product]]:
    """Return what each artifact needs kernels for in vLLM; graphs bring operators of their own."""
    if given:
        return {name: products_in(read_config(folder)) for name, folder in given.items() if artifact_format(folder) == "vllm"}
    return {export.artifact: sizes.products for export in recipe.export if export.format == "vllm"}


def _check(recipe: Recipe, document: Document, checkpoint: Checkpoint, family: Family) -> Sizes:
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
    notes = outlook_notes(recipe, outlooks or [Outlook(checkpoint, family, {})])
    products = products_of(scheme for outlook in outlooks for scheme in outlook.schemes.values())
    return Sizes(stages, exports, notes, size_notes(recipe, checkpoint, exports), products)


def _shows_images(recipe: Recipe) -> bool:
    return recipe.calibration is None or any(isinstance(data, QuestionSource) for data in recipe.calibration.sets)


def _task_faults(recipe: Recipe, document: Document, family: Family) -> list[str]:
    """Return which tasks, and what else is measured, ask what the model does not do, or the runtime does not offer of it."""
    writes = family.head is not None
    faults: list[str] = []
    if recipe.eval.latency is not None and not writes:
        where = document.whereabouts(("eval", "latency"))
        faults.append(
            f"{where}: eval.latency: is measured of answers, and {family.name} compares images with texts and writes none; leave "
            "it out"
        )
    for position, task in enumerate(recipe.eval.tasks):
        place = ("eval", "tasks", position)
        where = f"{document.whereabouts(place)}: {dotted(place)}"
        if writes != (task.needs != "comparison"):
            does, instead = ("writes text", "vqa or perplexity") if writes else ("compares images with texts", "zero-shot")
            faults.append(f"{where}: {family.name} {does}, which {task.task} does not measure; use {instead}")
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


def _length_faults(recipe: Recipe, document: Document, config: Mapping[str, Any]) -> list[str]:
    """Return which runtimes cannot take as many tokens as the recipe says, or as its tasks' windows have."""
    windows = (getattr(task, "window", None) for task in recipe.eval.tasks)
    longest = max((window for window in windows if isinstance(window, int)), default=0)
    faults: list[str] = []
    for position, target in enumerate(recipe.eval.places):
        place = ("eval", "runtime") if recipe.eval.targets is None else ("eval", "targets", position)
        where = f"{document.whereabouts(place)}: {dotted(place)}"
        faults += [f"{where}: {fault}" for fault in target.runtime.length_faults(config, longest)]
    return faults


def _remedy(recipe: Recipe, does: Callable[[type[Runtime]], bool]) -> str:
    """Return which runtimes do what is asked and run what is exported."""
    known = {name: cast("type[Runtime]", load_row(RUNTIMES, name)) for name in RUNTIMES}
    found = [name for name in sorted(known, reverse=True) if does(known[name])]
    formats = sorted({export.format for export in recipe.export})
    run = [name for name in found if not formats or any(name in export.runtimes for export in recipe.export)]
    if run:
        return f"set eval.runtime to {' or '.join(run)}"
    return f"what does ({', '.join(found)}) runs no {' or '.join(formats)}; use another format, or leave the task out"


def notes_of(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Return what one should know of the exports of the checkpoint that the last stage wrote to `folder`."""
    checkpoint = open_checkpoint(folder)
    if foreign_format(checkpoint.config):
        return plan.notes
    outlook = Outlook(checkpoint, plan.family, quantized_linears(checkpoint), has_kv_scales(checkpoint))
    return export_notes(plan.recipe, outlook)


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


def show(plan: Plan, store: Store, console: Console) -> None:
    """Print the plan: what each step would do, and what is there already."""
    from compress.figures import size

    summary = plan.summary(store)
    source = ", ".join(f"{key} {value}" for key, value in summary["source"].items())
    console.print(f"{plan.recipe.name}: {source}; on {plan.device}", highlight=False, markup=False)
    rows = [
        (
            str(step["step"]),
            str(step["key"])[:12],
            "yes" if step["cached"] else "no",
            size(step["expected_bytes"]) if step["expected_bytes"] else "",
        )
        for step in summary["steps"]
    ]
    columns = (Column("step"), Column("key", "code"), Column("cached"), Column("expected size", "number"))
    print_table(console, Table("Steps", columns, tuple(rows)))
    if plan.family.derived:
        console.print(f"warning: {plan.family.derived}", highlight=False, markup=False)
    for note in (*plan.unfit, *plan.gate_notes):
        console.print(f"warning: {note}", highlight=False, markup=False)
    for note in (*plan.power, *plan.notes):
        console.print(f"note: {note}", highlight=False, markup=False)
