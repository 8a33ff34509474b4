"""The summary of a run that a terminal shows at its end; the reports have the details."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compress.cli.options import console as console_of
from compress.eval.results import Metrics
from compress.report.figures import counted, format_recovery, kl_value, metric_value, size
from compress.report.model import Report, Row, published_lines
from compress.report.run_tables import ORIGINAL, has_several_targets, originals
from compress.report.terminal import VERDICT_STYLES
from compress.untrusted.reading import printable

if TYPE_CHECKING:
    from rich.console import Console

Line = tuple[str, str, str]
"""A line of the summary: head, text, and style."""

_ARROW = " → "

_LATENCY_RATIOS = {"ttft_p95": "TTFT p95", "tpot_p95": "TPOT p95", "e2el_p95": "end to end p95", "output_token_rate": "tokens/s"}
"""The latency ratios in the summary: figure → label."""


def print_report(report: Report, options: argparse.Namespace) -> int:
    """Print a run's result, as JSON where the options ask for it, and return the exit code: 0 if the gate passed."""
    if options.json:
        print(report.to_json())
    print_summary(report, console_of(options))
    return 0 if report.gate.verdict == "pass" else 1


def print_summary(report: Report, console: Console) -> None:
    """Print the verdict, each artifact's figures and the checks that did not pass, and last the run's folder."""
    style = VERDICT_STYLES[report.gate.verdict]
    console.print(f"{report.name}: {report.gate.verdict}", style=f"bold {style}", highlight=False, markup=False)
    for row in report.rows:
        if row.artifact != ORIGINAL:
            console.print()
            _print_artifact(report, row, console)
    console.print()
    for line in _closing_lines(report):
        console.print(printable(line), markup=False, highlight=False)
    console.print(report.run, markup=False, highlight=False)


def _print_artifact(report: Report, row: Row, console: Console) -> None:
    name = f"{row.artifact} @{row.target}" if has_several_targets(report.rows) else row.artifact
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
    """Yield one artifact's lines: sizes and figures beside the original's, and every check that does not pass."""
    original = originals(report.rows)[row.target]
    checks = [check for check in report.gate.checks if (check.artifact, check.target) == (row.artifact, row.target)]
    passed = sum(check.verdict == "pass" for check in checks)
    verdict = report.gate.artifacts.get(row.artifact)
    if checks and verdict is not None:
        passed_note = "all of" if passed == len(checks) else f"{passed} of"
        yield "gate", f"{verdict}, {passed_note} {counted(len(checks), 'check')} passed", VERDICT_STYLES[verdict]
    yield (
        "size",
        f"{size(original.bytes)}{_ARROW}{size(row.bytes)} ({row.size_ratio:.1%}), {row.bits_per_weight:.2f} bits per weight",
        "",
    )
    for name, metrics in row.metrics.items():
        yield name, _figure(original.metrics.get(name), metrics), ""
    if row.fidelity:
        yield "KL", ", ".join(f"{name} {kl_value(fidelity)}" for name, fidelity in row.fidelity.items()), ""
    yield from _latency_lines(report, row)
    for check in checks:
        if check.verdict != "pass":
            yield check.verdict, f"{check.check}: {check.reason}", VERDICT_STYLES[check.verdict]


def _figure(original: Metrics | None, metrics: Metrics) -> str:
    """Return a task's figure after the original's, with the recovery."""
    kind = "" if metrics.record.percent else f"{metrics.metric} "
    if original is None:
        return kind + metric_value(metrics)
    recovery = format_recovery(original, metrics)
    recovery_note = f" ({'' if kind else 'recovery '}{recovery})" if recovery else ""
    failed = f", {counted(metrics.failed, 'item')} failed" if metrics.failed else ""
    return f"{kind}{metric_value(original)}{_ARROW}{metric_value(metrics)}{recovery_note}{failed}"


def _latency_lines(report: Report, row: Row) -> Iterator[Line]:
    """Yield the artifact's latency over the original's, at the first load."""
    latency = report.latency.get(row.target)
    model = None if latency is None else latency.artifacts.get(row.artifact)
    if model is None or not model.points:
        return
    ratios = model.points[0].ratios
    figures = [f"{label} ×{ratios[name].value:.2f}" for name, label in _LATENCY_RATIOS.items() if name in ratios]
    if figures:
        yield "latency", f"{', '.join(figures)} at concurrency {model.points[0].point.concurrency}", ""


def _closing_lines(report: Report) -> Iterator[str]:
    yield from published_lines(report)
    if report.warnings:
        yield f"{counted(len(report.warnings), 'warning')} above, repeated in the report"
    yield f"the full report: {Path(report.run) / 'report.html'}"
