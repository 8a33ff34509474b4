"""Every recipe that ships is planned as it is, against the published model it names and stand-ins for the hub and the server."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Generator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoints.spec import spec_of
from compress.errors import RecipeError
from compress.eval.harness import ENVIRONMENTS
from compress.eval.tasks.adapter import Adapter
from compress.export.format import VerifiedExport
from compress.families import FAMILIES
from compress.families.resolve import family_of
from compress.hubs.hub import open_pinned, resolve_model
from compress.pipeline.plan import Plan, make_plan
from compress.pipeline.steps.export import ExportArtifact
from compress.pipeline.steps.stage import ApplyStage
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.recipe.document import parse_setting
from compress.recipe.model import Recipe, read_recipe
from compress.recipe.schema import is_local
from compress.runtimes.endpoint.runtime import Endpoint
from compress.runtimes.vllm.runtime import Vllm
from compress.stages.linears import Target
from compress.stages.quantization.int8 import Int8
from compress.workers.environment import install
from tests.published import Published, published
from tests.published_hub import published_hub

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "demo"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
APART = "llmcompressor"
"""The stage whose library is installed apart."""
GENAI = "onnxruntime-genai"
"""The runtime whose environment plans with its export ask the versions of."""
INSTALLS = (f"stage: {APART}", "task: adapter", f"runtime: {GENAI}")
"""What in a recipe asks for an environment of its own."""

every_recipe = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if any(word in path.read_text() for word in INSTALLS) else [])
        for path in RECIPES
    ],
)
METHODS = ("awq", "gptq", "int8")


class _Version(BaseHTTPRequestHandler):
    """Tells vLLM's version, which is all that a plan asks of a server."""

    def do_GET(self) -> None:
        content = json.dumps({"version": "0.32.0"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        del format, args


@pytest.fixture(scope="module")
def server() -> Generator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Version) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    with published_hub(tmp_path_factory.mktemp("hub")):
        yield


def settings_for(recipe: Recipe, server: str) -> dict[str, Any]:
    """Return what lets a recipe be planned here: vLLM's version comes from a server, a library's from its environment."""
    if any(stage.stage == APART for stage in recipe.stages):
        install(APART, Silent())
    if any(target.runtime.runtime == GENAI for target in recipe.eval.places):
        install(GENAI, Silent())
    for task in recipe.eval.tasks:
        if isinstance(task, Adapter):
            install(ENVIRONMENTS[task.harness], Silent())
    found: dict[str, Any] = {}
    for place, target in enumerate(recipe.eval.places):
        path = "eval.runtime" if recipe.eval.targets is None else f"eval.targets.{place}.runtime"
        if isinstance(target.runtime, Vllm):
            found[f"{path}.url"] = server
        elif isinstance(target.runtime, Endpoint):
            found |= {f"{path}.original.url": server, f"{path}.key_variable": None}
            found |= {f"{path}.artifacts.{name}.url": server for name in target.runtime.artifacts}
    return found


@pytest.fixture(scope="module")
def plan_of(hub: None, server: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Plan]:
    """Return what plans a recipe as it ships, once."""
    del hub
    store = Store(tmp_path_factory.mktemp("store"))

    @cache
    def plan(path: Path) -> Plan:
        return make_plan(path, settings_for(read_recipe(path, {})[0], server), store)

    return plan


def shown(path: Path, label: str) -> list[str]:
    """Return the words of the command that a recipe's opening comment shows under a label; none where it shows none."""
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    start = next((number for number, line in enumerate(lines) if line.startswith(f"{label}:")), None)
    if start is None:
        return []
    text = lines[start].removeprefix(f"{label}:")
    for line in lines[start + 1 :]:
        if not text.endswith("\\"):
            break
        text = text.removesuffix("\\") + line
    return text.split()


def overrides(command: list[str]) -> dict[str, Any]:
    """Return what the options of a command set."""
    values = [value for option, value in pairwise(command) if option == "--set"]
    return dict(parse_setting(value) for value in values)


def intended(recipe: Recipe, model: Published) -> dict[str, tuple[int, int]]:
    """Return the linears that a recipe's stages say they quantize, found in transformers' model."""
    parts = {"decoder": model.blocks, "vision": model.tower, "projector": model.projector}
    found = dict[str, tuple[int, int]]()
    for stage in recipe.stages:
        for target in stage.model_dump().get("targets", ()):
            found |= model.linears(*parts[target if isinstance(target, str) else target["component"]])
    return found


def quantized(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the linears that the plan's stages may quantize, by their names on disk, with their shapes there."""
    checkpoint = open_pinned(plan.inputs.model.pin)
    assert checkpoint is not None
    before = spec_of(checkpoint, plan.family)
    possible = [spec for stage in plan.stages for spec in stage.plan(before).after]
    return {name: spec.shape(name) for spec in possible for name in spec.schemes}


@every_recipe
def test_a_shipped_recipe_can_be_planned(path: Path, plan_of: Callable[[Path], Plan]) -> None:
    plan = plan_of(path)
    recipe = plan.recipe
    assert recipe is not None
    places = [f" at {target.name}" if recipe.eval.targets else "" for target in recipe.eval.places]
    exports = [
        [
            f"export {export.artifact}",
            *([f"verify {export.artifact}"] if isinstance(export, VerifiedExport) else []),
            *(
                f"measure {export.artifact}{place}"
                for place, target in zip(places, recipe.eval.places, strict=True)
                if target.runtime.runs(export.format)
            ),
        ]
        for export in recipe.export
    ]
    prepared = ["calibration", "overlap of calibration and evaluation"] if recipe.calibration else []
    assert [step.name for step in plan.steps] == [
        *prepared,
        *(stage.stage for stage in recipe.stages),
        *(f"measure original{place}" for place in places),
        *(name for names in exports for name in names),
        *(f"latency{place}" for place in places if recipe.eval.latency),
    ]
    assert len({step.key for step in plan.steps}) == len(plan.steps)


@every_recipe
def test_a_shipped_recipe_quantizes_what_it_says_and_no_more(path: Path, plan_of: Callable[[Path], Plan]) -> None:
    plan = plan_of(path)
    recipe = plan.recipe
    assert recipe is not None
    if is_local(recipe.model.source):
        assert Path(recipe.model.source) in (DEMO / "model", DEMO / "clip" / "model")
        return
    model = published()[recipe.model.source]
    assert quantized(plan) == intended(recipe, model)
    assert recipe.gate.size is not None
    expected = [step.expected_bytes for step in plan.steps if isinstance(step, ApplyStage | ExportArtifact)]
    if recipe.stages[0].stage == APART:
        assert expected == [None, None]  # only the run can tell
        return
    if "auto" not in recipe.stages[0].model_dump().values():
        assert None not in expected
    for size in filter(None, (step.expected_bytes for step in plan.steps if isinstance(step, ExportArtifact))):
        limit = recipe.gate.size.max_ratio
        assert limit is not None
        assert 0.9 * limit < size / model.weight_bytes < limit


@every_recipe
@pytest.mark.usefixtures("hub")
def test_commands_that_a_recipe_shows_are_right(path: Path, server: str, tmp_path: Path) -> None:
    assert shown(path, "Run") == ["compress", "run", f"recipes/{path.name}"]
    if command := shown(path, "Override"):
        recipe, _ = read_recipe(path, changed := overrides(command))
        make_plan(path, {**changed, **settings_for(recipe, server)}, Store(tmp_path / "store"))
    if command := shown(path, "Offline"):
        changed = overrides(command)
        for key, value in changed.items():
            (tmp_path / Path(value).name).touch()
            changed[key] = str(tmp_path / Path(value).name)
        recipe, _ = read_recipe(path, changed)
        sources = [entry.source for entry in recipe.calibration.sets] if recipe.calibration else []
        sources += [recipe.model.source, *(task.data.source for task in recipe.eval.tasks if task.data)]
        assert all(is_local(source) for source in sources)


@pytest.mark.parametrize(
    ("name", "key", "value", "fault"),
    [
        (
            "qwen-vl-awq",
            "stages.0.targets",
            ["decoder", "vision"],
            r"mlp.down_proj \(and 31 more layers as wide\): .* 3420 .* add 'model.visual.blocks.\*.mlp.down_proj' to ignore",
        ),
        ("qwen3-vl-gptq", "stages.0.targets", ["vision"], r"blocks.0.mlp.linear_fc2 \(and 26 more layers as wide\): .* 4304"),
        ("qwen2-vl-gptq", "export.0.layout", "gptq", r"export.0: model.layers.0.self_attn.q_proj \(and 195 more\): .* symmetric"),
        ("llava-int8", "export.0.layout", "gptq", r"\(and 223 more\): layout gptq holds integer weights alone"),
        ("internvl3-awq", "stages.0.targets", ["lm_head"], "language_model.lm_head: .* by eights, not 151674"),
        ("blip-2-awq", "stages.0.targets", ["lm_head"], "its output head is the embedding's own matrix"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_a_published_model_cannot_hold_is_refused(
    name: str, key: str, value: object, fault: str, server: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=fault):
        make_plan(ROOT / "recipes" / f"{name}.yaml", {key: value, "eval.runtime.url": server}, Store(tmp_path / "store"))


@pytest.mark.parametrize("targets", [("decoder",), ("vision",), ("projector",), ("decoder", "vision", "projector")])
@pytest.mark.parametrize("model", published().values(), ids=lambda model: model.family)
@pytest.mark.usefixtures("hub")
def test_a_target_is_its_own_linears_alone(model: Published, targets: tuple[Target, ...]) -> None:
    checkpoint = open_pinned(resolve_model(model.source, "huggingface", "main"))
    assert checkpoint is not None
    family = family_of(checkpoint.config)
    stage = Int8(stage="int8", targets=targets)
    planned = stage.plan(spec_of(checkpoint, family))
    assert planned.faults == ()
    parts = {"decoder": model.blocks, "vision": model.tower, "projector": model.projector}
    wanted = model.linears(*(container for target in targets for container in parts[target]))
    assert set(planned.after[0].schemes) == set(wanted)


def test_the_plan_says_which_vllm_still_serves_a_model(plan_of: Callable[[Path], Plan]) -> None:
    notes = plan_of(ROOT / "recipes" / "mllama-awq.yaml").notes
    assert any("vLLM served MllamaForConditionalGeneration up to version 0.10.2" in note for note in notes)


def test_every_family_has_a_recipe_for_each_method() -> None:
    recipes = [read_recipe(path, {})[0] for path in RECIPES]
    shipped = {
        (published()[recipe.model.source].family, recipe.stages[0].stage) for recipe in recipes if not is_local(recipe.model.source)
    }
    assert {(family, method) for family in FAMILIES for method in METHODS} <= shipped


@pytest.mark.parametrize("model", published().values(), ids=lambda model: model.family)
def test_a_published_config_gives_the_model_that_the_hub_counts(model: Published) -> None:
    counted = sum(math.prod(shape) for dtype, shape in model.tensors.values() if dtype != "I64")
    assert counted == model.parameters


@pytest.mark.parametrize("model", published().values(), ids=lambda model: model.family)
def test_a_family_finds_its_parts_in_the_published_model(model: Published) -> None:
    family = family_of(json.loads(model.config_file.read_text(encoding="utf-8")))
    assert family.name == model.family
    assert family.architecture == type(model.model).__name__
    parameters = {name for name, _ in model.model.named_parameters(remove_duplicate=False)}
    extra = {name for name, _, _ in model.extra}
    assert {family.module_name(name) for name in model.tensors if name not in extra} == parameters - {model.tied}
    modules = {name for name, _ in model.model.named_modules()}
    parts = {family.blocks, family.embeddings, *family.vision, *family.vision_blocks, *family.projector}
    assert parts <= modules
    assert family.head is None or family.head in modules
    assert (family.blocks,) == model.blocks
    assert family.vision_blocks == model.tower
    assert set(model.linears(*family.projector)) == set(model.linears(*model.projector))
