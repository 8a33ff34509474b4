"""A comparison of runs as people and programs read it: a terminal's table, Markdown, CSV, JSON, and a page of HTML with charts."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from compress.charts import Axis, Chart, Point, Series, Unit, larger, near, pareto_front
from compress.compare import Comparison, Group, Measure, Value
from compress.errors import UsageError
from compress.figures import divergence, milliseconds, share, size
from compress.report_charts import size_axis
from compress.report_tables import ORIGINAL
from compress.tabular import Column, Table, markdown
from compress.terminal import as_renderables as table_renderables

if TYPE_CHECKING:
    from rich.console import RenderableType

Format = Literal["table", "markdown", "csv", "html", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, Format] = {".md": "markdown", ".csv": "csv", ".html": "html", ".json": "json"}
"""What a file's name says of its format."""

_WIDE = 400
_FRONT = "in front"
_NOTE = (
    "In brackets: the share of the original's size and score that is kept, and how many times its perplexity or latency. In front "
    "is what no other line beats: as small, in every score as good, and in perplexity as near to the original."
)


def format_of(output: Path | None, given: Format | None) -> Format:
    """Return the format that is asked for, or that a file's name says; a name without an ending is of a plain table.

    Raises:
        UsageError: the name's ending is of no format.
    """
    if given is not None or output is None or not output.suffix:
        return given or "table"
    if output.suffix not in SUFFIXES:
        raise UsageError(
            f"compare: {output}: {output.suffix} is none of the endings that are written, {', '.join(SUFFIXES)}; change it, or say "
            "--format"
        )
    return SUFFIXES[output.suffix]


def show_value(measure: Measure, value: Value) -> str:
    """Return a value as tables show it, with what is kept in brackets."""
    told = ("at least " if value.at_least else "") + _teller(measure)(value.figure)
    against = "" if value.kept is None or value.kept == 1 else f" ({_kept(measure, value.kept)})"
    failed = f", {value.failed:,} failed" if value.failed else ""
    fewer = f", of {value.items:,} items" if value.items is not None else ""
    return told + against + fewer + failed


def group_table(group: Group) -> Table:
    """Return the runs of one original: size, bits per weight and every task's figure."""
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
    match form:
        case "markdown":
            return as_markdown(comparison)
        case "csv":
            return as_csv(comparison)
        case "json":
            return as_json(comparison)
        case "html":
            return as_html(comparison)
        case "table":
            return as_text(comparison)


def as_text(comparison: Comparison) -> str:
    """Return what a terminal shows as plain text, as wide as it takes."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=_WIDE, color_system=None)
    for part in as_renderables(comparison, _WIDE):
        console.print(part)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def as_markdown(comparison: Comparison) -> str:
    """Return a table for each original, what its columns are, and the notes."""
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
    """Return what each measure's column holds."""
    return [f"{measure.head}: {measure.metric}" for measure in group.measures]


def as_csv(comparison: Comparison) -> str:
    """Return one line per artifact with plain numbers; a measure has two columns: its figure, and how many times the original's.

    Of KL the second says whether the first is a lower bound (1) or not (0).
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
                    second = int(value.at_least)
                figures += ["", ""] if value is None else [value.figure, second]
            writer.writerow([*plain, line.bytes, line.size_ratio, line.bits_per_weight, int(line.front), *figures])
    return buffer.getvalue()


def as_json(comparison: Comparison) -> str:
    """Return the comparison as JSON (schema 1)."""
    return json.dumps({"schema": 1, **asdict(comparison)}, indent=2, ensure_ascii=False) + "\n"


def as_html(comparison: Comparison) -> str:
    """Return a page with a table and charts for each original."""
    from compress.page import figures, legend, render_page

    groups: list[dict[str, object]] = []
    for number, group in enumerate(comparison.groups, 1):
        drawn = charts(group)
        groups.append(
            {
                "id": f"original-{number}",
                "name": group.original,
                "table": group_table(group),
                "figures": figures(drawn, f"size-{number}"),
                "legend": legend(drawn),
                "measures": legend_lines(group),
            }
        )
    return render_page("compare.html.jinja", groups=groups, notes=comparison.notes)


def as_renderables(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """Yield what a terminal of so many columns shows: each original's table, or a list where that is too wide; then the notes."""
    from rich.text import Text

    for group in comparison.groups:
        table = group_table(group)
        yield Text(group.original, style="bold")
        yield from table_renderables(table, width)
        yield Text("\n".join([*legend_lines(group), _NOTE]) + "\n", style="dim")
    for note in comparison.notes:
        yield Text(f"note: {note}", style="yellow")


def charts(group: Group) -> list[Chart]:
    """Return each task's figure against size, and against latency where that was measured: the original, and a series a run."""
    across = [measure for measure in group.measures if measure.latency]
    tasks = [measure for measure in group.measures if measure.task]
    found = [_chart(group, task, None) for task in tasks]
    found += [_chart(group, task, latency) for latency in across for task in tasks]
    return [chart for chart in found if chart.drawable and any(series.name != ORIGINAL for series in chart.series)]


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
    against = f"{task.head} against {'size' if latency is None else latency.head}"
    original = next((line.values[task.key].figure for line in lines if line.artifact == ORIGINAL), math.nan)
    front = pareto_front((point for points in by_name.values() for point in points), larger if task.larger else near(original))
    told = ", ".join(f"{point.label} {_teller(task)(point.y)} at {x_axis.show(point.x)}" for point in front)
    return Chart(
        title=against,
        summary=f"{against}: {len(lines)} artifacts of {len(order) - 1} runs. In front, from the smallest on: {told}.",
        x=x_axis,
        y=Axis(f"{task.head}: {task.metric}", _teller(task), unit),
        series=tuple(Series(name, tuple(points), order.index(name)) for name, points in by_name.items()),
        front=front,
        better="better: up and left" if task.larger else "better: left, and near the original",
    )


def _teller(measure: Measure) -> Callable[[float], str]:
    if measure.latency:
        return milliseconds
    if measure.kl:
        return divergence
    return share if measure.share else _four_digits


def _four_digits(value: float) -> str:
    return f"{value:.4g}"


def _kept(measure: Measure, value: float) -> str:
    if measure.share:
        return share(value)
    return f"×{value:.2f}" if measure.latency else f"×{value:.4f}"
