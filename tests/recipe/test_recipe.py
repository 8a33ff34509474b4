from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from compress.calibration import SETS
from compress.errors import RecipeError
from compress.recipe.model import read_recipe, recipe_schema
from compress.runtimes import RUNTIMES
from compress.stages import STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("calibration.txt", "test.txt", "test.jsonl"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    return tmp_path


def whole() -> dict[str, Any]:
    return {
        "name": "r",
        "model": {"source": "model"},
        "calibration": {"seed": 0, "sets": [{"dataset": "text", "source": "calibration.txt", "samples": 1, "tokens": 8}]},
        "stages": [{"stage": "awq", "bits": 4, "group_size": 64}],
        "export": [{"format": "vllm", "layout": "awq"}],
        "eval": {
            "runtime": {"runtime": "transformers"},
            "tasks": [{"task": "perplexity", "dataset": "text", "source": "test.txt", "window": 64}],
        },
        "gate": {"perplexity": {"max_ratio": 1.1, "confidence": 0.95}},
    }


def names(table: Mapping[str, str]) -> str:
    """Return the names of a table's rows as messages list them."""
    return ", ".join(map(repr, table))


def faults(folder: Path, data: dict[str, Any], **settings: Any) -> tuple[str, ...]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, {key.replace("__", "."): value for key, value in settings.items()})
    return caught.value.faults


def read(folder: Path, data: dict[str, Any]) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return read_recipe(path, {})[0]


def test_a_whole_recipe_is_read_and_frozen(folder: Path) -> None:
    recipe = read(folder, whole())
    assert recipe.model.source == str(folder / "model")
    assert recipe.stages[0].stage == "awq"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"


def test_a_name_is_not_longer_than_a_folders_may_be(folder: Path) -> None:
    (fault,) = faults(folder, whole() | {"name": "n" * 201})
    assert "recipe.yaml:1: name: String should have at most 200 characters" in fault
    assert read(folder, whole() | {"name": "n" * 200}).name == "n" * 200


def test_all_faults_come_at_once_with_line_and_remedy(folder: Path) -> None:
    data = whole()
    data["stages"][0] |= {"bits": 5, "groupsize": 3}
    data["model"]["source"] = "./nowhere"
    data["export"] = []
    del data["gate"]
    found = faults(folder, data)
    assert "recipe.yaml:3: model.source: no file or folder at" in found[0]
    assert "recipe.yaml:13: stages.0.bits: Input should be 2, 3, 4, 8 or 'auto' (got 5)" in found
    assert any(fault.startswith("recipe.yaml:15: stages.0.groupsize: unknown key;") for fault in found)
    assert any("did you mean group_size?" in fault for fault in found)
    assert "recipe.yaml:16: export: is empty; needs at least one entry" in found
    assert "recipe.yaml:1: gate: missing; write it out, it has no default" in found
    assert len(found) == 5


def test_an_unknown_row_names_the_known_ones(folder: Path) -> None:
    data = whole()
    data["eval"]["runtime"]["runtime"] = "llama.cpp"
    data["calibration"]["sets"][0]["dataset"] = "c4"
    assert faults(folder, data) == (
        f"recipe.yaml:7: calibration.sets.0.dataset: 'c4' is not one of {names(SETS)}",
        f"recipe.yaml:20: eval.runtime.runtime: 'llama.cpp' is not one of {names(RUNTIMES)}",
    )


def test_faults_of_overrides_name_the_override(folder: Path) -> None:
    assert faults(folder, whole(), stages__0__bits=7) == (
        "--set stages.0.bits=7: stages.0.bits: Input should be 2, 3, 4, 8 or 'auto' (got 7)",
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("balance", 1.5, ".balance: Input should be 'tokens' or 'auto', or less than or equal to 1 (got 1.5)"),
        ("balance", "both", ".balance: Input should be 'tokens' or 'auto', or a valid number (got 'both')"),
        ("targets", ["encoder"], ".targets.0: Input should be 'decoder', 'vision', 'projector' or 'lm_head' (got 'encoder')"),
        ("targets", "decoder", ".targets: must be a list (got 'decoder')"),
        (
            "targets",
            [{"component": "vision", "bts": 8}],
            ".targets.0.bts: unknown key; allowed here: activations, bits, component, group_size, symmetric; did you mean bits?",
        ),
        ("budget", 4, ".budget: must be a table with the keys bits_per_weight, bytes (got 4)"),
        ("stage", "gtpq", f".stage: 'gtpq' is not one of {names(STAGES)}; did you mean gptq?"),
    ],
)
def test_a_value_that_may_be_of_several_kinds_has_one_fault(folder: Path, key: str, value: object, message: str) -> None:
    (fault,) = faults(folder, whole(), **{f"stages__0__{key}": value})
    assert fault.endswith(f": stages.0{message}")
    assert fault.startswith(f"--set stages.0.{key}=")


def test_what_an_override_holds_is_named_by_it_whatever_the_file_said(folder: Path) -> None:
    stage = {"stage": "awq", "bits": 4, "group_size": 64, "budget": {"bits_per_weight": 4}}
    (fault,) = faults(folder, whole(), stages__0=stage)
    assert fault == (
        "--set stages.0={stage: awq, bits: 4, group_size: 64, budget: {bits_per_weight: 4}}: stages.0: "
        "budget and widths go with bits: auto, not 4; remove them"
    )


def test_a_stage_without_its_calibration_is_refused(folder: Path) -> None:
    data = whole()
    del data["calibration"]
    (fault,) = faults(folder, data)
    assert "stages.0: needs calibration samples, and the recipe has no calibration; add calibration:" in fault


def test_empty_calibration_is_refused(folder: Path) -> None:
    data = whole()
    data["calibration"]["sets"] = []
    assert faults(folder, data) == ("recipe.yaml:6: calibration.sets: is empty; needs at least one entry",)


def test_a_limit_that_nothing_measures_is_refused(folder: Path) -> None:
    data = whole()
    data["gate"]["accuracy"] = {"min_recovery": 0.99, "confidence": 0.95}
    (fault,) = faults(folder, data)
    assert "gate.accuracy: nothing measures it; add a task of kind vqa or choice or caption or zero-shot or" in fault


def test_two_exports_or_tasks_of_one_name_are_refused(folder: Path) -> None:
    data = whole()
    data["export"] *= 2
    data["eval"]["tasks"] *= 2
    found = faults(folder, data)
    assert any("eval.tasks.1: a second task called text; give one of them another name" in fault for fault in found)
    assert any("export.1: a second export called vllm-awq; remove one" in fault for fault in found)


def test_publishing_goes_to_folders(folder: Path) -> None:
    data = whole() | {"publish": {"to": "hf://org/name"}}
    (fault,) = faults(folder, data)
    assert "publish.to: hf://org/name is no folder" in fault


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_whole(path: Path) -> None:
    recipe, _ = read_recipe(path, {})
    assert recipe.gate.accuracy is not None
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_schema_knows_every_row_and_forbids_the_rest() -> None:
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"name", "model", "stages", "export", "eval", "gate"}
    assert {"Awq", "Vllm", "Vqa", "Wikitext"} & set(schema["$defs"])
