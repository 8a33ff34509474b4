"""The report's charts: accuracy against size and against latency, and the bit allocation of stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.eval.results import Metrics
from compress.report.charts import Axis, Chart, Limit, Point, Series, Unit, larger, near, pareto_front
from compress.report.figures import metric_value, milliseconds, size
from compress.report.latency import lowest_load, models_of
from compress.report.run_tables import ORIGINAL, has_several_targets, originals, task_names
from compress.report.width_table import width_map
from compress.stages.quantization.widths import UNQUANTIZED_WIDTH, Widths

if TYPE_CHECKING:
    from compress.gate.gate import Check
    from compress.report.model import Report, Row

_BYTES = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


def styles_of(report: Report) -> dict[str, int]:
    """Return each artifact's style number, the original's first."""
    names = [ORIGINAL, *(row.artifact for row in report.rows)]
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def size_axis(sizes: Iterable[int]) -> Axis:
    """Return an axis of bytes from zero, in the unit that fits the largest of them."""
    largest = max(sizes, default=0)
    scale, suffix = next(((scale, suffix) for scale, suffix in _BYTES if largest >= scale), (1.0, " B"))
    # From zero: half the size should look like half.
    return Axis("size on disk", size, Unit(1 / scale, suffix), zero=True)


def task_axis(name: str, metrics: Metrics) -> Axis:
    """Return the axis of a task's figure."""
    unit = Unit(100, "%") if metrics.record.percent else Unit()
    return Axis(f"{name}: {metrics.metric}", metrics.record.show, unit)


@dataclass(frozen=True)
class _XAxis:
    """What a chart has on its x-axis."""

    axis: Axis
    value_of: Callable[[Row], float | None]
    """Returns a row's x, None where it has none."""

    title: str


def size_charts(report: Report) -> list[Chart]:
    """Return accuracy against size: a chart for each task and target, with the gate's limits."""
    axis = size_axis(row.bytes for row in report.rows)
    return _charts_against(report, report.rows, _XAxis(axis, lambda row: row.bytes, "size"))


def latency_charts(report: Report) -> list[Chart]:
    """Return accuracy against latency for each task and target: the first kind of requests at the lowest concurrency."""
    charts: list[Chart] = []
    for target, latency in report.latency.items():
        load = lowest_load(latency)
        if load is None:
            continue
        times: dict[str, float] = {}
        for name, model in models_of(latency).items():
            point = model.at(load)
            if point is not None and point.pooled.e2el is not None:
                times[name] = point.pooled.e2el.p95
        axis = Axis(f"end to end p95, {load.concurrency} at once", milliseconds, Unit(1, " ms"), zero=True)
        rows = [row for row in report.rows if row.target == target]
        charts += _charts_against(report, rows, _XAxis(axis, lambda row, times=times: times.get(row.artifact), "latency"))
    return charts


def _charts_against(report: Report, rows: Sequence[Row], x_axis: _XAxis) -> list[Chart]:
    charts: list[Chart] = []
    styles, multiple_targets = styles_of(report), has_several_targets(report.rows)
    for target in dict.fromkeys(row.target for row in rows):
        target_rows = [row for row in rows if row.target == target]
        for name in task_names(target_rows):
            chart = _chart(report, target_rows, name, x_axis, styles)
            if chart is not None and chart.drawable:
                title = f"{chart.title}, {target}" if multiple_targets else chart.title
                charts.append(replace(chart, title=title))
    return charts


def _chart(report: Report, rows: Sequence[Row], name: str, x_axis: _XAxis, styles: Mapping[str, int]) -> Chart | None:
    measured = [(row, row.metrics[name], x) for row in rows if name in row.metrics and (x := x_axis.value_of(row)) is not None]
    if len(measured) < 2:
        return None
    original = originals(rows).get(rows[0].target)
    original_metrics = original.metrics.get(name) if original else None
    series = tuple(
        Series(
            row.artifact,
            (Point(x, metrics.figure, row.artifact, _bounds(report, row, name, original_metrics)),),
            styles[row.artifact],
        )
        for row, metrics, x in measured
    )
    larger_is_better = measured[0][1].record.larger_is_better
    worth = larger if larger_is_better else near(original_metrics.figure if original_metrics is not None else math.nan)
    points = [point for each in series for point in each.points]
    summary_points = "; ".join(f"{row.artifact} {metric_value(metrics)} at {x_axis.axis.show(x)}" for row, metrics, x in measured)
    return Chart(
        title=f"{name} against {x_axis.title}",
        summary=f"{name} against {x_axis.title}, each artifact a point: {summary_points}.",
        x=x_axis.axis,
        y=task_axis(name, measured[0][1]),
        series=series,
        front=pareto_front(points, worth),
        limits=tuple(_limits(report, rows, name, original_metrics, original if x_axis.title == "size" else None)),
        better="better: up and left" if larger_is_better else "better: left, and near the original",
    )


def _bounds(report: Report, row: Row, task: str, original_metrics: Metrics | None) -> tuple[float, float] | None:
    """Return the bounds of a task's figure: those of the gate's recovery times the original's figure."""
    check = _check(report, row.target, task, row.artifact)
    if check is None or check.interval is None or original_metrics is None or original_metrics.count != row.metrics[task].count:
        return None
    # The gate's interval is of a ratio; its variance already includes the original's, which is why the original has no bars.
    return check.interval[0] * original_metrics.figure, check.interval[1] * original_metrics.figure


def _limits(
    report: Report, rows: Sequence[Row], task: str, original_metrics: Metrics | None, sized_original: Row | None
) -> Iterable[Limit]:
    check = _check(report, rows[0].target, task, None)
    if check is not None and original_metrics is not None:
        yield Limit("y", check.limit * original_metrics.figure, "gate")
    ratio = next((check.limit for check in report.gate.checks if check.check == "size.max_ratio"), None)
    if ratio is not None and sized_original is not None:
        yield Limit("x", ratio * sized_original.bytes, "gate")


def _check(report: Report, target: str, task: str, artifact: str | None) -> Check | None:
    """Return the gate's check of an artifact's (or any artifact's) recovery or perplexity ratio on a task."""
    matching = (
        check
        for check in report.gate.checks
        if check.check in ("accuracy.min_recovery", "perplexity.max_ratio")
        and (check.task, check.target) == (task, target)
        and artifact in (None, check.artifact)
    )
    return next(matching, None)


def sensitivity_chart(stage: str, widths: Widths) -> Chart | None:
    """Return the predicted loss of each block at the smallest width tried, by kind of layer; None for fewer than two blocks."""
    widths_by_block = width_map(widths)
    tried_widths = {width for group in widths.groups for width in group.losses if width != UNQUANTIZED_WIDTH}
    if len(widths_by_block.blocks) < 2 or not tried_widths:
        return None
    width = min(tried_widths)
    series = tuple(
        Series(
            kind,
            tuple(
                Point(block, group.losses[width])
                for block, group in zip(widths_by_block.blocks, groups, strict=True)
                if group is not None and group.losses.get(width, 0) > 0
            ),
            index,
            joined=True,
        )
        for index, (kind, groups) in enumerate(widths_by_block.rows)
    )
    highest = max(((point.y, each.name, point.x) for each in series for point in each.points), default=None)
    if highest is None:
        return None
    return Chart(
        title=f"{stage}: sensitivity of each layer",
        summary=f"What each layer would lose at {width} bits, by block. The most sensitive: {highest[1]} in block {highest[2]:g}.",
        x=Axis("block", lambda value: f"{value:.0f}", at_data=True),
        y=Axis(f"predicted loss at {width} bits, nats per token", lambda value: f"{value:.2g}", log=True),
        series=series,
    )
