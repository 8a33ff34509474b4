"""What a run found out, in the few lines that a terminal shows at its end; the reports have the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compress.eval.results import Metrics, ScoreMetrics
from compress.figures import counted, kept_value, kl_value, metric_value, size
from compress.report import Report, Row, published_lines
from compress.report_tables import ORIGINAL, originals, several_targets
from compress.terminal import VERDICT_STYLES
from compress.untrusted import printable

if TYPE_CHECKING:
    from rich.console import Console

Line = tuple[str, str, str]
"""A line of the summary: what it is about, what it says, and its style."""

_ARROW = " → "

_LATENCY = {"ttft_p95": "TTFT p95", "tpot_p95": "TPOT p95", "e2el_p95": "end to end p95", "output_token_rate": "tokens/s"}
"""The ratios that the summary shows, with their names in it."""


def show(report: Report, console: Console) -> None:
    """Print the verdict, what became of each artifact, what did not pass, and last the run's folder."""
    style = VERDICT_STYLES[report.gate.verdict]
    console.print(f"{report.name}: {report.gate.verdict}", style=f"bold {style}", highlight=False, markup=False)
    for row in report.rows:
        if row.artifact != ORIGINAL:
            console.print()
            _print_artifact(report, row, console)
    console.print()
    for line in _endings(report):
        console.print(printable(line), markup=False, highlight=False)
    console.print(report.run, markup=False, highlight=False)


def _print_artifact(report: Report, row: Row, console: Console) -> None:
    name = f"{row.artifact} @{row.target}" if several_targets(report.rows) else row.artifact
    console.print(name, style="bold", highlight=False, markup=False)
    lines = [(printable(head), printable(text), style) for head, text, style in _lines(report, row)]
    width = max(len(head) for head, _, _ in lines)
    if not console.is_terminal:
        for head, text, _ in lines:
            console.print(f"  {head:<{width}}  {text}", markup=False, highlight=False)
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=2)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for head, text, style in lines:
        grid.add_row("", Text(head, style="dim"), Text(text, style=style))
    console.print(grid, soft_wrap=False)


def _lines(report: Report, row: Row) -> Iterator[Line]:
    """Yield what is told of one artifact: sizes and figures beside the original's, and every check that does not pass."""
    original = originals(report.rows)[row.target]
    checks = [check for check in report.gate.checks if (check.artifact, check.target) == (row.artifact, row.target)]
    passed = sum(check.verdict == "pass" for check in checks)
    verdict = report.gate.artifacts.get(row.artifact)
    if checks and verdict is not None:
        told = "all of" if passed == len(checks) else f"{passed} of"
        yield "gate", f"{verdict}, {told} {counted(len(checks), 'check')} passed", VERDICT_STYLES[verdict]
    yield (
        "size",
        f"{size(original.bytes)}{_ARROW}{size(row.bytes)} ({row.size_ratio:.1%}), {row.bits_per_weight:.2f} bits per weight",
        "",
    )
    for name, metrics in row.metrics.items():
        yield name, _figure(original.metrics.get(name), metrics), ""
    if row.fidelity:
        yield "KL", ", ".join(f"{name} {kl_value(found)}" for name, found in row.fidelity.items()), ""
    yield from _speed(report, row)
    for check in checks:
        if check.verdict != "pass":
            yield check.verdict, f"{check.check}: {check.reason}", VERDICT_STYLES[check.verdict]


def _figure(before: Metrics | None, metrics: Metrics) -> str:
    """Return a task's figure after the original's, and what is kept of it."""
    kind = "" if isinstance(metrics, ScoreMetrics) else "perplexity "
    if before is None:
        return kind + metric_value(metrics)
    share = kept_value(before, metrics)
    kept = f" ({'' if kind else 'recovery '}{share})" if share else ""
    failed = f", {counted(metrics.failed, 'item')} failed" if metrics.failed else ""
    return f"{kind}{metric_value(before)}{_ARROW}{metric_value(metrics)}{kept}{failed}"


def _speed(report: Report, row: Row) -> Iterator[Line]:
    """Yield how an artifact's latency compares with the original's, at the first load that was put on both."""
    latency = report.latency.get(row.target)
    model = None if latency is None else latency.artifacts.get(row.artifact)
    if model is None or not model.points:
        return
    ratios = model.points[0].ratios
    told = [f"{label} ×{ratios[name].value:.2f}" for name, label in _LATENCY.items() if name in ratios]
    if told:
        yield "latency", f"{', '.join(told)} at concurrency {model.points[0].point.concurrency}", ""


def _endings(report: Report) -> Iterator[str]:
    yield from published_lines(report)
    if report.warnings:
        yield f"{counted(len(report.warnings), 'warning')} above, repeated in the report"
    yield f"the full report: {Path(report.run) / 'report.html'}"
