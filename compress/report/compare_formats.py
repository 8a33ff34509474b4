"""Renderings of a comparison of runs: text table, Markdown, CSV, JSON, and an HTML page with charts."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from compress.errors import UsageError
from compress.report.charts import Axis, Chart, Point, Series, Unit, larger, near, pareto_front
from compress.report.compare import Comparison, Group, Measure, Value
from compress.report.figures import divergence, milliseconds, share, size
from compress.report.run_charts import size_axis
from compress.report.run_tables import ORIGINAL
from compress.report.tabular import Column, Table, markdown
from compress.report.terminal import as_renderables as table_renderables

if TYPE_CHECKING:
    from rich.console import RenderableType

Format = Literal["table", "markdown", "csv", "html", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, Format] = {".md": "markdown", ".csv": "csv", ".html": "html", ".json": "json"}
"""File name suffix → format."""

_TEXT_WIDTH = 400
"""Columns of the plain text, so that no table is broken: it is written for files and pipes, which wrap nothing."""

_FRONT = "in front"
_NOTE = (
    "In brackets: the share of the original's size and score that is kept, and how many times its perplexity or latency. In front "
    "is what no other line beats: as small, in every score as good, and in perplexity as near to the original."
)


def format_of(output: Path | None, requested: Format | None) -> Format:
    """Return the requested format, else that of the file's suffix; without a suffix it is the text table.

    Raises:
        UsageError: the suffix belongs to no format.
    """
    if requested is not None or output is None or not output.suffix:
        return requested or "table"
    if output.suffix not in SUFFIXES:
        raise UsageError(
            f"compare: {output}: {output.suffix} is none of the endings that are written, {', '.join(SUFFIXES)}; change it, or say "
            "--format"
        )
    return SUFFIXES[output.suffix]


def show_value(measure: Measure, value: Value) -> str:
    """Return a value as tables show it, with the ratio to the original's in brackets."""
    figure = ("at least " if value.at_least else "") + _formatter(measure)(value.figure)
    ratio = "" if value.kept is None or value.kept == 1 else f" ({_format_ratio(measure, value.kept)})"
    failed = f", {value.failed:,} failed" if value.failed else ""
    items = f", of {value.items:,} items" if value.items is not None else ""
    return figure + ratio + items + failed


def group_table(group: Group) -> Table:
    """Return the table of one original's runs: size, bits per weight and every task's figure."""
    columns = (
        Column("run"), Column("artifact"), Column("target"), Column("runtime"), Column("verdict", "verdict"),
        Column("size", "number"), Column("bits/weight", "number"),
        *(Column(measure.head, "number") for measure in group.measures), Column(_FRONT, "mark"),
    )  # fmt: skip
    targets, runtimes = {line.target for line in group.lines}, {line.runtime for line in group.lines}
    rows = [
        (
            line.run,
            line.artifact,
            line.target if len(targets) > 1 else "",
            line.runtime if len(runtimes) > 1 else "",
            line.verdict or "",
            f"{size(line.bytes)} ({line.size_ratio:.1%})",
            f"{line.bits_per_weight:.2f}",
            *(show_value(measure, line.values[measure.key]) if measure.key in line.values else "" for measure in group.measures),
            "yes" if line.front else "",
        )
        for line in group.lines
    ]
    return Table(group.original, columns, tuple(rows), _NOTE).without_empty()


def render(comparison: Comparison, form: Format) -> str:
    """Return a comparison in one of the formats."""
    writers = {"table": as_text, "markdown": as_markdown, "csv": as_csv, "html": as_html, "json": as_json}
    return writers[form](comparison)


def as_text(comparison: Comparison) -> str:
    """Return the terminal's tables as plain text, unwrapped."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=_TEXT_WIDTH, color_system=None)
    for part in as_renderables(comparison, _TEXT_WIDTH):
        console.print(part)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def as_markdown(comparison: Comparison) -> str:
    """Return a table for each original with its legend, and the notes."""
    parts: list[str] = []
    for group in comparison.groups:
        parts += [
            f"## {group.original}",
            markdown(group_table(group)),
            _NOTE,
            "\n".join(f"- {line}" for line in legend_lines(group)),
        ]
    if comparison.notes:
        parts.append("\n".join(f"- note: {note}" for note in comparison.notes))
    return "\n\n".join(["# Accuracy against size", *parts]) + "\n"


def legend_lines(group: Group) -> list[str]:
    """Return each column's metric."""
    return [f"{measure.head}: {measure.metric}" for measure in group.measures]


def as_csv(comparison: Comparison) -> str:
    """Return a row per artifact with plain numbers; a measure has two columns: its figure, and the ratio to the original's.

    Of KL the second column is 1 where the first is a lower bound, else 0.
    """
    heads = ["original", "run", "artifact", "target", "runtime", "verdict", "bytes", "size_ratio", "bits_per_weight", "front"]
    measures = [(group, measure) for group in comparison.groups for measure in group.measures]
    keys = list(dict.fromkeys(measure.key for _, measure in measures))
    names: list[str] = []
    for key in keys:
        head = next(f"{measure.head}: {measure.metric}" for _, measure in measures if measure.key == key)
        kl = any(measure.kl for _, measure in measures if measure.key == key)
        names += [head, f"{head}, at least" if kl else f"{head} / original"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*heads, *names])
    for group in comparison.groups:
        for line in group.lines:
            plain = [group.original, "; ".join(line.runs), line.artifact, line.target, line.runtime, line.verdict or ""]
            figures: list[float | str] = []
            for key in keys:
                value = line.values.get(key)
                second = "" if value is None or value.kept is None else value.kept
                if value is not None and key.endswith("/KL"):
                    # CSV keeps numbers plain: "at least" would make the column text.
                    second = int(value.at_least)
                figures += ["", ""] if value is None else [value.figure, second]
            writer.writerow([*plain, line.bytes, line.size_ratio, line.bits_per_weight, int(line.front), *figures])
    return buffer.getvalue()


def as_json(comparison: Comparison) -> str:
    """Return the comparison as JSON (schema 1)."""
    return json.dumps({"schema": 1, **asdict(comparison)}, indent=2, ensure_ascii=False) + "\n"


def as_html(comparison: Comparison) -> str:
    """Return a page with a table and charts for each original."""
    from compress.report.page import figures, legend, render_page

    groups: list[dict[str, object]] = []
    for number, group in enumerate(comparison.groups, 1):
        group_charts = charts(group)
        groups.append(
            {
                "id": f"original-{number}",
                "name": group.original,
                "table": group_table(group),
                "figures": figures(group_charts, f"size-{number}"),
                "legend": legend(group_charts),
                "measures": legend_lines(group),
            }
        )
    return render_page("compare.html.jinja", groups=groups, notes=comparison.notes)


def as_renderables(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """Yield each original's table, or a list where that is wider than `width` columns; then the notes."""
    from rich.text import Text

    for group in comparison.groups:
        table = group_table(group)
        yield Text(group.original, style="bold")
        yield from table_renderables(table, width)
        yield Text("\n".join([*legend_lines(group), _NOTE]) + "\n", style="dim")
    for note in comparison.notes:
        yield Text(f"note: {note}", style="yellow")


def charts(group: Group) -> list[Chart]:
    """Return charts of each task's figure against size, and against latency where it was measured, with a series per run."""
    latencies = [measure for measure in group.measures if measure.latency]
    tasks = [measure for measure in group.measures if measure.task]
    all_charts = [_chart(group, task, None) for task in tasks]
    all_charts += [_chart(group, task, latency) for latency in latencies for task in tasks]
    return [chart for chart in all_charts if chart.drawable and any(series.name != ORIGINAL for series in chart.series)]


def _chart(group: Group, task: Measure, latency: Measure | None) -> Chart:
    lines = [line for line in group.lines if task.key in line.values and (latency is None or latency.key in line.values)]
    by_name: dict[str, list[Point]] = {}
    for line in lines:
        value = line.values[task.key].figure
        x = line.bytes if latency is None else line.values[latency.key].figure
        name = line.artifact if line.artifact == ORIGINAL else f"{line.run}: {line.artifact}"
        label = name if line.target == "local" else f"{name} @{line.target}"
        by_name.setdefault(ORIGINAL if line.artifact == ORIGINAL else line.run, []).append(Point(x, value, label))
    order = list(dict.fromkeys([ORIGINAL, *(line.run for line in group.lines if line.artifact != ORIGINAL)]))
    x_axis = Axis("end to end p95", milliseconds, Unit(1, " ms"), zero=True) if latency else size_axis(line.bytes for line in lines)
    unit = Unit(100, "%") if task.share else Unit()
    title = f"{task.head} against {'size' if latency is None else latency.head}"
    original = next((line.values[task.key].figure for line in lines if line.artifact == ORIGINAL), math.nan)
    front = pareto_front((point for points in by_name.values() for point in points), larger if task.larger else near(original))
    front_text = ", ".join(f"{point.label} {_formatter(task)(point.y)} at {x_axis.show(point.x)}" for point in front)
    return Chart(
        title=title,
        summary=f"{title}: {len(lines)} artifacts of {len(order) - 1} runs. In front, from the smallest on: {front_text}.",
        x=x_axis,
        y=Axis(f"{task.head}: {task.metric}", _formatter(task), unit),
        series=tuple(Series(name, tuple(points), order.index(name)) for name, points in by_name.items()),
        front=front,
        better="better: up and left" if task.larger else "better: left, and near the original",
    )


def _formatter(measure: Measure) -> Callable[[float], str]:
    if measure.latency:
        return milliseconds
    if measure.kl:
        return divergence
    return share if measure.share else _four_digits


def _four_digits(value: float) -> str:
    return f"{value:.4g}"


def _format_ratio(measure: Measure, value: float) -> str:
    if measure.share:
        return share(value)
    return f"×{value:.2f}" if measure.latency else f"×{value:.4f}"
