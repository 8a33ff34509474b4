"""Every row of a table leads to its class, is tested by name, and stands in a recipe that ships."""

from pathlib import Path
from typing import Any, cast, get_args

import pytest
import yaml

from compress.calibration import SETS
from compress.eval import TASKS
from compress.export import FORMATS
from compress.families import FAMILIES, Family
from compress.recipe.schema import load_row
from compress.runtimes import RUNTIMES
from compress.stages import STAGES

ROOT = Path(__file__).parents[2]
TABLES = {"dataset": SETS, "task": TASKS, "format": FORMATS, "runtime": RUNTIMES, "stage": STAGES}
ROWS = [(key, name) for key, table in TABLES.items() for name in table]


def values(content: Any, key: str) -> set[str]:
    """Return every value that stands under a key anywhere in plain data."""
    if isinstance(content, dict):
        fields = cast("dict[str, Any]", content)
        own = {fields[key]} if isinstance(fields.get(key), str) else set[str]()
        return own.union(*(values(value, key) for value in fields.values()))
    if isinstance(content, list):
        return set[str]().union(*(values(value, key) for value in cast("list[Any]", content)))
    return set()


@pytest.mark.parametrize(("key", "name"), ROWS)
def test_a_row_leads_to_the_class_of_that_name(key: str, name: str) -> None:
    assert get_args(load_row(TABLES[key], name).model_fields[key].annotation) == (name,)


@pytest.mark.parametrize(("key", "name"), ROWS)
def test_a_row_is_tested(key: str, name: str) -> None:
    module, _, attribute = TABLES[key][name].partition(":")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert any(f"from {module} import" in line and attribute in line for line in tests.splitlines()), f"no test imports {module}"


@pytest.mark.parametrize(("key", "name"), ROWS)
def test_a_row_stands_in_a_recipe(key: str, name: str) -> None:
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "recipes").glob("*.yaml")]
    assert name in set[str]().union(*(values(recipe, key) for recipe in recipes))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_own_name(name: str) -> None:
    module, _, attribute = FAMILIES[name].partition(":")
    family = getattr(__import__(module, fromlist=[attribute]), attribute)
    assert isinstance(family, Family)
    assert family.name == name
