"""Keys of recipes under the names that they once had."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import RecipeError
from compress.recipe.model import Recipe, read_recipe
from compress.stages.quantization.gptq import Gptq

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


def written(folder: Path, stage: dict[str, Any]) -> Path:
    recipe = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    recipe["stages"] = [stage]
    for part in ("eval", "gate"):
        recipe[part]["liveness"] = recipe[part].pop("grounding")
    for name in ("model", "calibration", "eval"):
        recipe[name] = _absolute(recipe[name])
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: str(DEMO.parent / item) if key == "source" else _absolute(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return [_absolute(item) for item in value] if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]


OLD = {"stage": "gptq", "bits": 4, "group_size": 64, "order": "activation", "dampening": 0.02, "leave_out": ["*.layers.0.*"]}


def test_old_names_are_read_and_told(tmp_path: Path) -> None:
    recipe, document = read_recipe(written(tmp_path, OLD), {"stages.0.dampening": 0.05})
    (stage,) = recipe.stages
    assert isinstance(stage, Gptq)
    assert (stage.actorder, stage.dampening_frac, stage.ignore) == ("static", 0.05, ("*.layers.0.*",))
    assert recipe.eval.grounding is not None
    assert recipe.gate.grounding is not None
    assert [note.partition(": ")[2] for note in document.notes] == [
        "stages.0.leave_out: is called ignore now; the old name is read, write the new one",
        "stages.0.dampening: is called dampening_frac now; the old name is read, write the new one",
        "stages.0.order: is called actorder: static now; the old name is read, write the new one",
        "eval.liveness: is called grounding now; the old name is read, write the new one",
        "gate.liveness: is called grounding now; the old name is read, write the new one",
    ]
    assert document.notes[1].startswith("--set stages.0.dampening=0.05: ")


def test_a_fault_below_an_old_name_has_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, {**OLD, "dampening": 7})
    line = next(number for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if "dampening" in text)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:{line}: stages\.0\.dampening_frac: "):
        read_recipe(path, {})


def test_both_names_at_once_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.0\.leave_out: is called ignore now, which stands there too; remove leave_out"):
        read_recipe(written(tmp_path, {**OLD, "ignore": []}), {})


def test_the_recipes_that_ship_use_none() -> None:
    names = {"leave_out", "dampening", "order", "liveness"}
    assert not names & set(Recipe.model_fields)
    paths = sorted(DEMO.parent.glob("*.yaml"))
    assert len(paths) > 20
    for path in paths:
        assert not read_recipe(path, {})[1].notes, path
