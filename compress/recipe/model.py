"""The recipe: the YAML file parsed to a frozen, fully checked model; all faults are reported at once, each with its line."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, NonNegativeInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from compress.calibration import SETS
from compress.errors import RecipeError
from compress.eval import TASKS
from compress.eval.grounding import GroundingCheck
from compress.eval.latency.settings import LatencySettings
from compress.eval.tasks.adapter import SHORT_FORM, expand_short_name
from compress.eval.tasks.task import kinds_judged_by
from compress.export import FORMATS
from compress.gate.gate import Gate
from compress.recipe.document import Place, RecipeDocument, dotted, override, read_document
from compress.recipe.renamed_keys import rename_keys
from compress.recipe.schema import Frozen, Source, union_of
from compress.runtimes import RUNTIMES
from compress.runtimes.runtime import ServingRuntime, runtimes_for, runtimes_that
from compress.stages import STAGES


def _or_short(task: Any) -> Any:
    """Return the type of a task that may also be written `lmms:NAME` or `lm:NAME`."""
    written = Union[task, Annotated[str, Field(pattern=SHORT_FORM)]]  # noqa: UP007 - built at run time
    return Annotated[task, BeforeValidator(expand_short_name, json_schema_input_type=written)]


if TYPE_CHECKING:
    from compress.calibration.sets import TextSet, VqaSet, WikitextSet
    from compress.eval.tasks.task import Task as AnyTask
    from compress.export.format import Export as AnyExport
    from compress.runtimes.runtime import Runtime as AnyRuntime
    from compress.stages.stage import Stage as AnyStage

    AnySet = TextSet | WikitextSet | VqaSet
else:
    AnySet = union_of(SETS, "dataset")
    AnyStage = union_of(STAGES, "stage")
    AnyExport = union_of(FORMATS, "format")
    AnyTask = _or_short(union_of(TASKS, "task"))
    AnyRuntime = union_of(RUNTIMES, "runtime")


LOCAL = "local"
"""The one target of a recipe that names none."""

_LONGEST_NAME = 200
"""Characters of a recipe's name: folders are called after it and the time, and file systems take 255 bytes."""

_SHOULD = "Input should be "
_NO_TABLE = ("model_type", "dict_type")


class Model(Frozen):
    """The model to compress: a folder, or an id on a hub, pinned to the commit that `revision` names when the plan is made."""

    source: Source
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    # ModelScope's default branch is master.
    revision: str = Field(default_factory=lambda data: "master" if data.get("hub") == "modelscope" else "main")
    allow_pickle: bool = False
    trust_remote_code: bool = False


class Calibration(Frozen):
    """The samples every stage sees, drawn with `seed`."""

    seed: int
    sets: Annotated[tuple[AnySet, ...], Field(min_length=1)]


class Target(Frozen):
    """Where artifacts are measured: a runtime here, or servers elsewhere, under a name for reports and the gate."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    runtime: AnyRuntime


class Eval(Frozen):
    """What is measured on the original and on every exported artifact, and where: in one `runtime`, or at several `targets`.

    `latency` is measured at every target that has a server. Of the original the first `noise` items of each task are asked twice
    more there, to see how much its answers change by themselves.
    """

    runtime: AnyRuntime | None = None
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] | None = None
    tasks: Annotated[tuple[AnyTask, ...], Field(min_length=1)]
    grounding: GroundingCheck | None = None
    latency: LatencySettings | None = None
    noise: NonNegativeInt = 64

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.runtime is None) == (self.targets is None):
            raise ValueError("needs either runtime, to measure in one place, or targets, a list of places; write one of them")
        return self

    @property
    def judged_tasks(self) -> list[str]:
        """The names of the tasks whose items have scores."""
        return [task.name for task in self.tasks if "accuracy" in task.judged_by()]

    @property
    def places(self) -> tuple[Target, ...]:
        """Where is measured; a single runtime is the target `local`."""
        return self.targets or (Target.model_construct(name=LOCAL, runtime=self.runtime),)


def _folder(value: str) -> str:
    # "hf://…" would become a folder called `hf:`.
    if "://" in value:
        raise ValueError(f"{value} is no folder; artifacts are published to folders, upload from there")
    return value


class Publish(Frozen):
    """Where artifacts go that passed the gate: a folder, relative to where the command runs."""

    to: Annotated[str, Field(min_length=1), AfterValidator(_folder)]


RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=_LONGEST_NAME)]
"""The name of a recipe, which folders are called after."""


class Recipe(Frozen):
    """One compression job, from the published weights to the published artifact."""

    name: RecipeName
    model: Model
    calibration: Calibration | None = None
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]
    export: Annotated[tuple[AnyExport, ...], Field(min_length=1)]
    eval: Eval
    gate: Gate
    publish: Publish | None = None


class Evaluation(Frozen):
    """What of a recipe existing artifacts are measured and judged by."""

    name: RecipeName
    eval: Eval
    gate: Gate


AnyEvaluation = Recipe | Evaluation
"""What models are measured and judged by."""


def read_recipe(path: Path, settings: Mapping[str, Any]) -> tuple[Recipe, RecipeDocument]:
    """Read a recipe, lay `settings` (dotted path → value) over it, and check everything that needs no model.

    The document is given back too: it knows the line of every place.

    Raises:
        RecipeError: with every fault found, each naming file and line, or the override, and what is allowed.
    """
    document = read_document(path)
    override(document, settings)
    document.notes = tuple(rename_keys(document))
    try:
        recipe = Recipe.model_validate(document.data, context={"base": path.resolve().parent})
    except ValidationError as error:
        # Without pydantic's links: a reader's next step is the recipe, not pydantic's documentation.
        details = [detail for detail in error.errors(include_url=False) if not _follows(detail)]
        raise RecipeError(_faults(document, details)) from error
    faults = _cross_check(document, recipe)
    if faults:
        raise RecipeError(faults)
    return recipe, document


def read_evaluation(
    path: Path, settings: Mapping[str, Any], original: str, artifacts: Mapping[str, str]
) -> tuple[Evaluation, Model, RecipeDocument]:
    """Read the name, tasks and gate of a recipe, or of a file that holds these alone, for artifacts that are there already.

    `original` is a folder or hub id, as a recipe's `model.source`, and given back as a model; `artifacts` gives the format of each.
    What else a recipe says is left out, unread.

    Raises:
        RecipeError: with every fault found, each naming file and line, or the override, and what is allowed.
    """
    document = read_document(path)
    override(document, settings)
    document.notes = tuple(rename_keys(document))
    unknown = [key for key in document.data if key not in Recipe.model_fields]
    if unknown:
        places = [f"{document.whereabouts((key,))}: {key}: unknown key; allowed here: name, eval, gate" for key in unknown]
        raise RecipeError(places)
    kept = {key: value for key, value in document.data.items() if key in Evaluation.model_fields}
    try:
        evaluation = Evaluation.model_validate(kept, context={"base": path.resolve().parent})
        model = Model.model_validate({"source": original}, context={"base": Path.cwd()})
    except ValidationError as error:
        details = [detail for detail in error.errors(include_url=False) if not _follows(detail)]
        raise RecipeError(_faults(document, details)) from error
    if faults := [*_eval_faults(document, evaluation, artifacts), *_gate_faults(document, evaluation)]:
        raise RecipeError(faults)
    return evaluation, model, document


def _cross_check(document: RecipeDocument, recipe: Recipe) -> list[str]:
    faults: list[str] = []
    if recipe.calibration is None:
        faults += [
            f"{document.whereabouts(('stages', position))}: stages.{position}: needs calibration samples, and the recipe has "
            "no calibration; add calibration: with a seed and at least one set"
            for position, stage in enumerate(recipe.stages)
            if stage.calibrated
        ]
    named = {
        ("eval", "tasks"): ("task", [task.name for task in recipe.eval.tasks], "give one of them another name"),
        ("export",): ("export", [export.artifact for export in recipe.export], "remove one"),
    }
    for place, (kind, names, remedy) in named.items():
        for position, name in enumerate(names):
            if name in names[:position]:
                where = document.whereabouts((*place, position))
                faults.append(f"{where}: {dotted((*place, position))}: a second {kind} called {name}; {remedy}")
    artifacts = {export.artifact: str(export.format) for export in recipe.export}
    for position, export in enumerate(recipe.export):
        if not any(target.runtime.runs(export.format) for target in recipe.eval.places):
            where, usable = document.whereabouts(("export", position)), " or ".join(runtimes_for(export.format))
            faults.append(
                f"{where}: export.{position}: {export.format} runs in {usable}, and eval measures in none of "
                "these; set eval.runtime to one, or add a target with it"
            )
    return [*faults, *_eval_faults(document, recipe, artifacts), *_gate_faults(document, recipe)]


def _eval_faults(document: RecipeDocument, recipe: AnyEvaluation, artifacts: Mapping[str, str]) -> list[str]:
    """Return what of the targets, of latency and of grounding cannot be measured as it stands.

    `artifacts` gives the format of each.
    """
    faults: list[str] = []
    several = recipe.eval.targets is not None
    for position, target in enumerate(recipe.eval.places):
        place = ("eval", "targets", position) if several else ("eval", "runtime")
        where = f"{document.whereabouts(place)}: {dotted(place)}"
        if target.name in [other.name for other in recipe.eval.places[:position]]:
            faults.append(f"{where}: a second target called {target.name}; give one of them another name")
        here = [name for name, export_format in artifacts.items() if target.runtime.runs(export_format)]
        if not here:
            needed = " or ".join(runtimes_for(*artifacts.values()))
            faults.append(f"{where}: runtime {target.runtime.runtime} runs none of the artifacts; they run in {needed}")
        else:
            faults += [f"{where}: {fault}" for fault in target.runtime.faults(here)]
    if recipe.eval.latency is not None and not any(isinstance(target.runtime, ServingRuntime) for target in recipe.eval.places):
        where = document.whereabouts(("eval", "latency"))
        serving = " or ".join(runtimes_that(lambda runtime: issubclass(runtime, ServingRuntime)))
        faults.append(f"{where}: eval.latency: is measured of a server, and no target has one; set a runtime to {serving}")
    check = recipe.eval.grounding
    if check is not None and not any(task.name == check.task and task.asks for task in recipe.eval.tasks):
        asking = ", ".join(task.name for task in recipe.eval.tasks if task.asks) or "none"
        where = document.whereabouts(("eval", "grounding", "task"))
        faults.append(f"{where}: eval.grounding.task: no task called {check.task} asks about images; those that do: {asking}")
    return faults


def _gate_faults(document: RecipeDocument, recipe: AnyEvaluation) -> list[str]:
    """Return which limits nothing is measured for."""
    faults: list[str] = []
    names = [target.name for target in recipe.eval.places]
    for target in recipe.gate.targets:
        if target not in names:
            where = document.whereabouts(("gate", "targets", target))
            faults.append(f"{where}: gate.targets.{target}: no such target; those of eval are {', '.join(names)}")
    limits = {("gate",): recipe.gate, **{("gate", "targets", name): limit for name, limit in recipe.gate.targets.items()}}
    for place, limit in limits.items():
        for check in limit.task_checks():
            if not any(check in task.judged_by() for task in recipe.eval.tasks):
                where = document.whereabouts((*place, check))
                kinds = " or ".join(kinds_judged_by(check))
                faults.append(f"{where}: {dotted((*place, check))}: nothing measures it; add a task of kind {kinds} to eval.tasks")
        for name in limit.accuracy.tasks if limit.accuracy is not None else ():
            if name not in recipe.eval.judged_tasks:
                where = document.whereabouts((*place, "accuracy", "tasks", name))
                listed = ", ".join(recipe.eval.judged_tasks) or "none"
                faults.append(
                    f"{where}: {dotted((*place, 'accuracy', 'tasks', name))}: no such task with scores; there are: {listed}"
                )
        latency = recipe.eval.latency
        if limit.latency is not None and limit.latency.needs_goal and latency is not None and latency.goal is None:
            where = document.whereabouts((*place, "latency"))
            faults.append(
                f"{where}: {dotted((*place, 'latency'))}: goodput counts requests that keep a goal; add eval.latency.goal"
            )
        for check, part in limit.required_eval_sections().items():
            if getattr(recipe.eval, part) is None:
                where = document.whereabouts((*place, check))
                faults.append(f"{where}: {dotted((*place, check))}: nothing measures it; add eval.{part}")
    return faults


def _follows(detail: ErrorDetails) -> bool:
    """Return whether a fault only follows from others: a list whose entries cannot be read counts as too short."""
    return detail["type"] == "default_factory_not_called" or (detail["type"] == "too_short" and bool(detail["input"]))


def _faults(document: RecipeDocument, details: list[ErrorDetails]) -> list[str]:
    """Return one line for each place that is at fault; where a value may be of several kinds, what each would have it be."""
    found: dict[Place, list[ErrorDetails]] = {}
    for detail in details:
        found.setdefault(_place_of(document.data, detail), []).append(detail)
    lines: list[str] = []
    for place, here in found.items():
        within = any(other[: len(place)] == place and len(other) > len(place) for other in found)
        if within and isinstance(here[0]["input"], dict) and all(detail["type"] == "literal_error" for detail in here):
            continue  # it was meant as the table in which the fault lies, not as the name that might stand there
        lines.append(f"{document.whereabouts(place)}: {dotted(place) or 'the recipe'}: {_joined(here)}")
    return lines


def _joined(details: list[ErrorDetails]) -> str:
    first, *others = [detail for detail in details if detail["type"] not in _NO_TABLE] or details
    if not others or not all(detail["msg"].startswith(_SHOULD) for detail in (first, *others)):
        return "; ".join(dict.fromkeys(_message(detail) for detail in (first, *others)))
    kinds = [first["msg"], *(detail["msg"].removeprefix(_SHOULD).partition(",")[0] for detail in others)]
    return ", or ".join(dict.fromkeys(kinds)) + _shown(first)


def _place_of(data: Any, detail: ErrorDetails) -> Place:
    """Drop from a pydantic location what is no key of the document: the tags of unions."""
    location = detail["loc"]
    place: list[str | int] = []
    current = data
    for depth, part in enumerate(location):
        held = (isinstance(current, dict) and part in current) or (
            isinstance(current, list) and isinstance(part, int) and part < len(cast("list[Any]", current))
        )
        if held:
            current = cast("Any", current)[part]
        elif depth < len(location) - 1 or detail["type"] != "missing":
            continue
        place.append(part)
    if detail["type"] == "union_tag_invalid":
        place.append(str(detail.get("ctx", {}).get("discriminator")).strip("'"))
    return tuple(place)


def _message(detail: ErrorDetails) -> str:
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(detail["loc"])
        case "missing":
            return "missing; write it out, it has no default"
        case "union_tag_invalid":
            context = detail.get("ctx", {})
            known = str(context.get("expected_tags"))
            near = difflib.get_close_matches(str(context.get("tag")), [tag.strip(" '") for tag in known.split(",")], n=1)
            return f"{context.get('tag')!r} is not one of {known}{f'; did you mean {near[0]}?' if near else ''}"
        case "union_tag_not_found":
            return f"needs the key {detail.get('ctx', {}).get('discriminator')}, which says what it is"
        case "too_short":
            return "is empty; needs at least one entry"
        case "value_error":
            return detail["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch":
            return f"does not have the form {detail.get('ctx', {}).get('pattern')}{_shown(detail)}"
        case "tuple_type":
            return f"must be a list{_shown(detail)}"
        case "model_attributes_type":
            return f"must be a table{_shown(detail)}"
        case "model_type":
            return f"must be a table with the keys {', '.join(sorted(_fields_at(detail['loc'])))}{_shown(detail)}"
        case _:
            return detail["msg"] + _shown(detail)


def _shown(detail: ErrorDetails) -> str:
    given: object = detail["input"]
    if given is None:
        return " (got null)"
    return f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""


def _unknown_key(location: tuple[str | int, ...]) -> str:
    allowed = sorted(_fields_at(location[:-1]))
    near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key; allowed here: {', '.join(allowed)}{hint}"


def _fields_at(location: tuple[str | int, ...]) -> set[str]:
    """Return the keys that a part of the recipe may have, following fields, list items and union tags."""
    candidates = _models_in(Recipe)
    for part in location:
        if isinstance(part, int):
            continue
        tagged = [model for model in candidates if part in _tags(model)]
        if tagged:
            candidates = tagged
            continue
        fields = [model.model_fields[part].annotation for model in candidates if part in model.model_fields]
        if not fields:
            continue  # the tag of a union
        candidates = [model for annotation in fields for model in _models_in(annotation)]
    return {name for model in candidates for name in model.model_fields}


def _tags(model: type[BaseModel]) -> set[object]:
    return {
        value
        for info in model.model_fields.values()
        if typing.get_origin(info.annotation) is Literal
        for value in typing.get_args(info.annotation)
    }


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, tuple, Annotated, Mapping):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "compress recipe"}
