"""The report's charts of accuracy against size and latency, and of the widths that stages chose."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.charts import Axis, Chart, Limit, Point, Series, Unit, larger, near, pareto_front
from compress.eval.results import Metrics, ScoreMetrics
from compress.figures import asked, main_figure, metric_value, milliseconds, share, size
from compress.report_latency import models_of, shapes_of
from compress.report_tables import ORIGINAL, originals, several_targets, task_names
from compress.stages.widths import UNQUANTIZED_WIDTH, GroupWidth, Widths

if TYPE_CHECKING:
    from compress.gate import Check
    from compress.report import Report, Row

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
_BYTES = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


def styles_of(report: Report) -> dict[str, int]:
    """Return the number of each artifact's style, the original's first."""
    names = [ORIGINAL, *(row.artifact for row in report.rows)]
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def size_axis(sizes: Iterable[int]) -> Axis:
    """Return an axis of bytes from zero, in the unit that fits the largest of them."""
    most = max(sizes, default=0)
    scale, suffix = next(((scale, suffix) for scale, suffix in _BYTES if most >= scale), (1.0, " B"))
    return Axis("size on disk", size, Unit(1 / scale, suffix), zero=True)


def task_axis(name: str, metrics: Metrics) -> Axis:
    """Return the axis of a task's figure."""
    if isinstance(metrics, ScoreMetrics):
        return Axis(f"{name}: {metrics.metric}", share, Unit(100, "%"))
    return Axis(f"{name}: perplexity", lambda value: f"{value:.4g}")


@dataclass(frozen=True)
class _Place:
    """Where a row's points lie across, and what the axis is."""

    axis: Axis
    of: Callable[[Row], float | None]
    title: str


def size_charts(report: Report) -> list[Chart]:
    """Return accuracy against size: a chart for each task and target, with the gate's limits."""
    axis = size_axis(row.bytes for row in report.rows)
    return _against(report, report.rows, _Place(axis, lambda row: row.bytes, "size"))


def latency_charts(report: Report) -> list[Chart]:
    """Return accuracy against latency for each task and target: requests of the first kind, at the fewest at once."""
    charts: list[Chart] = []
    for target, latency in report.latency.items():
        shapes = shapes_of(latency)
        if not shapes:
            continue
        times: dict[str, float] = {}
        fewest = min(row.point.concurrency for row in latency.original.points if row.point.shape == shapes[0])
        for name, model in models_of(latency).items():
            found = model.at(shapes[0].at(fewest))
            if found is not None and found.pooled.e2el is not None:
                times[name] = found.pooled.e2el.p95
        axis = Axis(f"end to end p95, {fewest} at once", milliseconds, Unit(1, " ms"), zero=True)
        rows = [row for row in report.rows if row.target == target]
        charts += _against(report, rows, _Place(axis, lambda row, times=times: times.get(row.artifact), "latency"))
    return charts


def _against(report: Report, rows: Sequence[Row], across: _Place) -> list[Chart]:
    charts: list[Chart] = []
    styles, several = styles_of(report), several_targets(report.rows)
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target]
        for name in task_names(own):
            chart = _chart(report, own, name, across, styles)
            if chart is not None and chart.drawable:
                title = f"{chart.title}, {target}" if several else chart.title
                charts.append(replace(chart, title=title))
    return charts


def _chart(report: Report, rows: Sequence[Row], name: str, across: _Place, styles: Mapping[str, int]) -> Chart | None:
    measured = [(row, row.metrics[name], place) for row in rows if name in row.metrics and (place := across.of(row)) is not None]
    if len(measured) < 2:
        return None
    original = originals(rows).get(rows[0].target)
    before = original.metrics.get(name) if original else None
    series = tuple(
        Series(
            row.artifact, (Point(x, main_figure(found), row.artifact, _bounds(report, row, name, before)),), styles[row.artifact]
        )
        for row, found, x in measured
    )
    scored = isinstance(measured[0][1], ScoreMetrics)
    worth = larger if scored else near(main_figure(before) if before is not None else math.nan)
    points = [point for each in series for point in each.points]
    told = "; ".join(f"{row.artifact} {metric_value(found)} at {across.axis.show(x)}" for row, found, x in measured)
    return Chart(
        title=f"{name} against {across.title}",
        summary=f"{name} against {across.title}, each artifact a point: {told}.",
        x=across.axis,
        y=task_axis(name, measured[0][1]),
        series=series,
        front=pareto_front(points, worth),
        limits=tuple(_limits(report, rows, name, before, original if across.title == "size" else None)),
        better="better: up and left" if scored else "better: left, and near the original",
    )


def _bounds(report: Report, row: Row, task: str, before: Metrics | None) -> tuple[float, float] | None:
    """Return the bounds of a task's figure: those of what the gate found to be kept, times the original's."""
    check = _check(report, row.target, task, row.artifact)
    if check is None or check.interval is None or before is None or asked(before) != asked(row.metrics[task]):
        return None
    return check.interval[0] * main_figure(before), check.interval[1] * main_figure(before)


def _limits(report: Report, rows: Sequence[Row], task: str, before: Metrics | None, sized: Row | None) -> Iterable[Limit]:
    check = _check(report, rows[0].target, task, None)
    if check is not None and before is not None:
        yield Limit("y", check.limit * main_figure(before), "gate")
    ratio = next((check.limit for check in report.gate.checks if check.check == "size.max_ratio"), None)
    if ratio is not None and sized is not None:
        yield Limit("x", ratio * sized.bytes, "gate")


def _check(report: Report, target: str, task: str, artifact: str | None) -> Check | None:
    """Return the gate's check on how much of a task's figure an artifact (or any) keeps."""
    found = (
        check
        for check in report.gate.checks
        if check.check in ("accuracy.min_recovery", "perplexity.max_ratio")
        and (check.task, check.target) == (task, target)
        and artifact in (None, check.artifact)
    )
    return next(found, None)


@dataclass(frozen=True)
class WidthMap:
    """The widths of a stage: a row for each kind of layer, a column for each block; None where there is no such layer."""

    blocks: tuple[int, ...]
    rows: tuple[tuple[str, tuple[GroupWidth | None, ...]], ...]
    others: tuple[GroupWidth, ...]


def width_map(widths: Widths) -> WidthMap:
    """Return the widths as a map of kinds and blocks; layers outside of blocks come by themselves."""
    found: dict[str, dict[int, GroupWidth]] = {}
    others: list[GroupWidth] = []
    for group in widths.groups:
        match = _NUMBERED.fullmatch(group.layers[0])
        if match is None:
            others.append(group)
        else:
            own = [match[3], *(layer.rpartition(".")[2] for layer in group.layers[1:])]
            found.setdefault(f"{match[1]}: {', '.join(own)}", {})[int(match[2])] = group
    blocks = tuple(sorted({number for by_block in found.values() for number in by_block}))
    rows = tuple((_short(kind, found), tuple(by_block.get(number) for number in blocks)) for kind, by_block in found.items())
    return WidthMap(blocks, rows, tuple(others))


def _short(kind: str, kinds: Iterable[str]) -> str:
    """Return a kind without where its blocks are, unless it takes that to tell it from another."""
    name = kind.partition(": ")[2]
    return name if [other.partition(": ")[2] for other in kinds].count(name) == 1 else kind


def sensitivity_chart(stage: str, widths: Widths) -> Chart | None:
    """Return what each block would lose at the smallest width that was tried, by the kind of layer; None for too few blocks."""
    shown = width_map(widths)
    tried = {width for group in widths.groups for width in group.losses if width != UNQUANTIZED_WIDTH}
    if len(shown.blocks) < 2 or not tried:
        return None
    width = min(tried)
    series = tuple(
        Series(
            kind,
            tuple(
                Point(block, group.losses[width])
                for block, group in zip(shown.blocks, groups, strict=True)
                if group is not None and group.losses.get(width, 0) > 0
            ),
            place,
            joined=True,
        )
        for place, (kind, groups) in enumerate(shown.rows)
    )
    most = max(((point.y, each.name, point.x) for each in series for point in each.points), default=None)
    if most is None:
        return None
    return Chart(
        title=f"{stage}: sensitivity of each layer",
        summary=f"What each layer would lose at {width} bits, by block. The most sensitive: {most[1]} in block {most[2]:g}.",
        x=Axis("block", lambda value: f"{value:.0f}", at_data=True),
        y=Axis(f"predicted loss at {width} bits, nats per token", lambda value: f"{value:.2g}", log=True),
        series=series,
    )
