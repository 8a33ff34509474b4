"""The page about recipes names every row of a table and every key of it."""

import re
from pathlib import Path

import pytest

from compress.calibration import SETS
from compress.eval import TASKS
from compress.export import FORMATS
from compress.recipe.schema import load_row
from compress.runtimes import RUNTIMES
from compress.stages import STAGES

PAGE = (Path(__file__).parent.parent / "docs" / "recipe.md").read_text(encoding="utf-8")
TABLES = {"dataset": SETS, "stage": STAGES, "format": FORMATS, "runtime": RUNTIMES, "task": TASKS}
NAMES = {name for part in re.findall(r"`([^`\n]+)`", PAGE) for name in re.findall(r"[A-Za-z0-9_-]+", part)}
"""Every word that stands in code."""


@pytest.mark.parametrize(("key", "row"), [(key, row) for key, table in TABLES.items() for row in table])
def test_a_row_and_its_keys_are_described(key: str, row: str) -> None:
    assert {key, row} <= NAMES
    fields = set(load_row(TABLES[key], row).model_fields)
    if key != "runtime":  # the page leaves the rarer ones of these to the schema
        assert fields <= NAMES
