"""The limits are set by the environment, and the documentation lists each with its value."""

import dataclasses
import re
from pathlib import Path

import pytest

from compress.errors import UsageError
from compress.untrusted.limits import PREFIX, Limits, limits

ROOT = Path(__file__).parents[2]


def test_a_limit_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits() == Limits()
    monkeypatch.setenv(PREFIX + "JSON_DEPTH", "7")
    assert limits() == Limits(json_depth=7)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "", "٣"])
def test_a_limit_must_be_a_whole_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(PREFIX + "JSON_DEPTH", value)
    with pytest.raises(UsageError, match="COMPRESS_LIMIT_JSON_DEPTH: must be a whole number above 0"):
        limits()


def test_a_limit_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "JSON_DEPHT", "7")
    with pytest.raises(
        UsageError, match=r"COMPRESS_LIMIT_JSON_DEPHT: there is no such limit; the limits are .*COMPRESS_LIMIT_JSON_DEPTH"
    ):
        limits()


def test_the_documentation_lists_every_limit_with_its_value() -> None:
    rows = re.findall(rf"^\| `{PREFIX}(\w+)` \| ([\d,]+) \|", (ROOT / "docs/limits.md").read_text(), flags=re.MULTILINE)
    assert {name.lower(): int(value.replace(",", "")) for name, value in rows} == dataclasses.asdict(Limits())
