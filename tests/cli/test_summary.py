"""The lines at the end of a run: the verdict first, what became of each artifact, what did not pass, the run's folder last."""

import io

import pytest
from rich.console import Console

from compress.cli.display import print_table
from compress.cli.summary import print_summary
from compress.report.tabular import Column, Table
from tests import reports


def told(width: int, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    print_summary(reports.report(), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_verdict_comes_first_and_the_run_folder_last() -> None:
    lines = told(80, terminal=False)
    report = reports.report()
    assert lines[0] == f"{report.name}: fail"
    assert lines[-1] == report.run
    assert not any(line.startswith(("|", "#", "- ", "**")) for line in lines)  # no raw Markdown


def test_each_artifact_says_what_it_shrank_to_and_what_it_kept() -> None:
    lines = [" ".join(line.split()) for line in told(200, terminal=False)]
    awq = lines[lines.index("vllm-awq") : lines.index("vllm-int8")]
    assert "gate inconclusive, 5 of 6 checks passed" in awq
    assert "size 16.6 GB → 6.94 GB (41.9%), 6.70 bits per weight" in awq
    assert "textvqa 84.25% → 83.90% (recovery 99.58%)" in awq
    assert "text perplexity 8.412 → 8.596 (×1.0219)" in awq
    assert any(line.startswith("KL ") and "textvqa 0.0041" in line for line in awq)
    assert any(line.startswith("latency TTFT p95 ×0.62") for line in awq)
    (reason,) = (line for line in awq if line.startswith("inconclusive "))
    assert "chartqa" in reason
    assert "3 items failed" in "".join(lines)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_cuts_no_number(width: int) -> None:
    wide = " ".join(" ".join(told(400, terminal=True)).split())
    lines = told(width, terminal=True)
    assert all(len(line) <= width for line in lines)
    narrow = " ".join(" ".join(lines).split())
    numbers = [word for word in wide.split() if word[0].isdigit() and "/" not in word]
    assert len(numbers) > 20
    assert [word for word in narrow.split() if word in numbers] == [word for word in wide.split() if word in numbers]


def test_what_steers_a_terminal_does_not_reach_it() -> None:
    report = reports.report()
    check = report.gate.checks[-1].model_copy(update={"reason": "item \x1b[2Jq1 is missing"})
    gate = report.gate.model_copy(update={"checks": (check,)})
    console = Console(file=io.StringIO(), width=200, color_system=None)
    print_summary(report.model_copy(update={"gate": gate}), console)
    assert isinstance(console.file, io.StringIO)
    assert "item \\x1b[2Jq1 is missing" in console.file.getvalue()


TABLE = Table(
    "Steps",
    (Column("step"), Column("key", "code"), Column("expected size", "number")),
    (("overlap of calibration and evaluation", "5421f22a3099", "3.83 MB"), ("awq", "b0ad", "12.1 GB")),
)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [30, 60, 120])
def test_a_table_is_whole_at_any_width(width: int, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_table(console, TABLE)
    assert isinstance(console.file, io.StringIO)
    text = " ".join(console.file.getvalue().replace("\u00a0", " ").split())
    assert all(" ".join(cell.split()) in text for row in TABLE.rows for cell in row)
    if not terminal:
        assert len(console.file.getvalue().splitlines()) == 3
