"""What people see while a run goes on never counts more than there is, and says one server, two servers."""

import io
import re

import pytest
from rich.console import Console

from compress.cli.display import Display, rate, share_of
from compress.report.figures import counted, singular


def shown(terminal: bool, units: list[int], total: int, unit: str = "B") -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Display(console).task("fetch", total, unit) as advance:
        for count in units:
            advance(count)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_work_done_twice_is_not_more_than_all(terminal: bool) -> None:
    text = shown(terminal, [800, 400, 500], 1000)
    assert "1 kB of 1 kB" in text
    assert "1.7 kB" not in text


def test_what_is_cut_short_says_how_far_it_came() -> None:
    assert re.fullmatch(r" +fetch: 3/12 prompts in [\d.]+ s.*\n", shown(False, [1, 2], 12, "prompts"))


def test_what_was_there_already_has_no_speed() -> None:
    assert re.fullmatch(r" +fetch: 12/12 prompts in 0.0 s\n", shown(False, [12], 12, "prompts"))


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [(1, 1, "servers", "1/1 server"), (0, 2, "classes", "0/2 classes"), (1234, 56789, "tokens", "1,234/56,789 tokens")],
)
def test_units_are_one_or_many(done: int, total: int, unit: str, text: str) -> None:
    assert share_of(done, total, unit) == text


def test_a_speed_has_three_digits() -> None:
    assert rate(1234.5, "tokens") == "1,234 tokens/s"
    assert rate(3_210_000, "B") == "3.21 MB/s"


@pytest.mark.parametrize("noun", ["item", "entry", "class", "box", "batch", "key", "server"])
def test_nouns_are_counted(noun: str) -> None:
    one, many = counted(1, noun), counted(2, noun)
    assert one == f"1 {noun}"
    assert singular(many.removeprefix("2 ")) == noun
    assert counted(1000, "class") == "1,000 classes"
    assert counted(0, "entry") == "0 entries"
