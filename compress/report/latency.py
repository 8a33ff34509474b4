"""The report's latency section: tables of one target's measurements, and curves over concurrency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from compress.eval.latency.results import Estimate, Latency, ModelLatency, Percentiles, PointLatency
from compress.eval.latency.settings import LoadPoint
from compress.eval.statistics.estimates import two_sided
from compress.report.charts import Axis, Chart, Point, Series, Unit
from compress.report.figures import level_name, milliseconds, rate, size
from compress.report.run_tables import ORIGINAL
from compress.report.tabular import Column, Table
from compress.runtimes.runtime import runtime_named

_RATIOS = {
    "ttft_p50": "TTFT p50",
    "ttft_p95": "TTFT p95",
    "tpot_p50": "TPOT p50",
    "tpot_p95": "TPOT p95",
    "e2el_p95": "end to end p95",
    "output_token_rate": "tokens/s",
}
"""The columns of the ratio table: figure → head."""

_CURVES = (
    ("ttft", "Time to the first token"),
    ("tpot", "Time per further token"),
)


def models_of(latency: Latency) -> dict[str, ModelLatency]:
    """Return the results by model name, the original first."""
    return {ORIGINAL: latency.original, **latency.artifacts}


def shapes_of(latency: Latency) -> list[LoadPoint]:
    """Return the measured kinds of requests."""
    return list(dict.fromkeys(row.point.shape for model in models_of(latency).values() for row in model.points))


def lowest_load(latency: Latency) -> LoadPoint | None:
    """Return the load at which models are compared: the first kind of requests at the lowest concurrency."""
    shape = next(iter(shapes_of(latency)), None)
    concurrencies = [row.point.concurrency for row in latency.original.points if row.point.shape == shape]
    # The lowest load is measured of every model and hardly queues: differences there are the model's own.
    return shape.at(min(concurrencies)) if shape is not None else None


def shape_name(shape: LoadPoint) -> str:
    """Return a kind of requests in words, without the concurrency."""
    return shape.label.partition(", ")[2]


def latency_tables(latency: Latency) -> list[Table]:
    """Return the non-empty tables of one target, without the resources table."""
    by_shape = [table(latency, shape) for shape in shapes_of(latency) for table in (latency_table, ratio_table)]
    tables = (*by_shape, best_table(latency), components_table(latency))
    return [table for table in tables if table.rows]


def latency_table(latency: Latency, shape: LoadPoint) -> Table:
    """Return the times and rates of every model at every concurrency, for one kind of requests."""
    time_heads = [f"{figure} {statistic}" for figure in ("TTFT", "TPOT", "end to end") for statistic in ("p50", "p95")]
    heads = ("at once", *time_heads, "requests/s", "tokens/s", "in goal/s", "failed")
    columns = (Column("artifact"), *(Column(head, "number") for head in heads))
    lines: list[tuple[str, ...]] = []
    for name, row in _rows(latency, shape):
        result = row.pooled
        cells = [cell for figure in (result.ttft, result.tpot, result.e2el) for cell in _times(figure)]
        goodput = "" if result.goodput is None else rate(result.goodput)
        failed = f"{result.failed:,} of {result.requests:,}" if result.failed else ""
        rates = (rate(result.request_rate), rate(result.output_token_rate), goodput)
        lines.append((name, f"{row.point.concurrency}", *cells, *rates, failed))
    note = "TTFT: time to the first token. TPOT: mean time per further token of a request. Tokens are those of the answers."
    return Table(f"Latency: {shape_name(shape)}", columns, tuple(lines), note).without_empty()


def ratio_table(latency: Latency, shape: LoadPoint) -> Table:
    """Return every artifact's times and rates over the original's, with intervals, for one kind of requests."""
    columns = (Column("artifact"), Column("at once", "number"), *(Column(head, "number") for head in _RATIOS.values()))
    lines = [
        (name, f"{row.point.concurrency}", *(_ratio(row.ratios.get(figure)) for figure in _RATIOS))
        for name, row in _rows(latency, shape)
        if row.ratios
    ]
    note = (
        f"Times below ×1 and rates above ×1 are better than the original's. In brackets: the "
        f"{level_name(two_sided(latency.settings.confidence))}, each bound with {latency.settings.confidence:.0%} confidence."
    )
    return Table(f"Against the original: {shape_name(shape)}", columns, tuple(lines), note).without_empty()


def best_table(latency: Latency) -> Table:
    """Return the best concurrency of each model and kind of requests."""
    heads = (Column("at once", "number"), Column("tokens/s", "number"), Column("tried", "prose"))
    columns = (Column("artifact"), Column("requests"), *heads)
    lines = [
        (
            name,
            shape_name(best.shape),
            "none keeps the goal" if best.concurrency is None else f"{best.concurrency}",
            "" if best.output_token_rate is None else rate(best.output_token_rate),
            ", ".join(f"{trial.concurrency} ({'held' if trial.held else 'missed'})" for trial in best.trials),
        )
        for name, model in models_of(latency).items()
        for best in model.best
    ]
    goal = latency.settings.goal
    limits = ", ".join(f"{figure} {limit:g} ms" for figure, limit in goal.limits.items()) if goal else "none"
    return Table("The concurrency with the best throughput", columns, tuple(lines), f"Goal of a request: {limits}.")


def resources_table(latency: Latency) -> Table:
    """Return the resources of each model's server under load."""
    heads = ("memory", "CPU s per request", "GPU in use", "power", "energy per request")
    columns = (Column("artifact"), Column("load"), *(Column(head, "number") for head in heads))
    lines: list[tuple[str, ...]] = []
    for name, model in models_of(latency).items():
        for row in model.points:
            telemetry = row.telemetry
            if telemetry is not None:
                cells = (
                    _optional(telemetry.memory_bytes, size),
                    _optional(telemetry.cpu_seconds_per_request, lambda value: f"{value:.3g}"),
                    _optional(telemetry.gpu_utilisation, lambda value: f"{value:.0%}"),
                    _optional(telemetry.mean_watts, lambda value: f"{value:.0f} W"),
                    _optional(telemetry.joules_per_request, lambda value: f"{value:.3g} J"),
                )
                lines.append((name, row.point.label, *cells))
    note = "Memory: the most that the server held at once; on a GPU without its cache of keys and values."
    return Table("What the server used", columns, tuple(lines), note).without_empty()


def components_table(latency: Latency) -> Table:
    """Return the times of each model's components, where they were measured."""
    timed = {name: model.components for name, model in models_of(latency).items() if model.components}
    components = list(dict.fromkeys(row.component for table in timed.values() for row in table.components))
    columns = (Column("artifact"), *(Column(component, "number") for component in components), Column("on"))
    lines: list[tuple[str, ...]] = []
    for name, table in timed.items():
        medians = {row.component: milliseconds(row.median_ms) for row in table.components}
        lines.append((name, *(medians.get(component, "") for component in components), f"{table.device}, {table.dtype}"))
    methods = " or ".join(dict.fromkeys(runtime_named(table.runtime).components_note for table in timed.values()))
    note = f"Medians, computed in one process {methods}; decode is one further token."
    return Table("Where the time goes in the model", columns, tuple(lines), note).without_empty()


def lowered(latency: Latency) -> list[str]:
    """Return the settings that were lowered because a server ran out of memory, a sentence each."""
    sentences = [(f"{step.rung} lowered from {step.before} to {step.after}", step.cause) for step in latency.steps]
    return [": ".join(part for part in parts if part) for parts in sentences]


def curves(latency: Latency, shape: LoadPoint, styles: Mapping[str, int]) -> list[Chart]:
    """Return the curves over concurrency for one kind of requests; empty where only one concurrency was measured."""
    rows = list(_rows(latency, shape))
    if len({row.point.concurrency for _, row in rows}) < 2:
        return []
    charts = [_time_curve(figure, title, rows, styles) for figure, title in _CURVES]
    charts.append(_rate_curve(rows, styles))
    return [chart for chart in charts if chart.drawable]


def _time_curve(figure: str, title: str, rows: Sequence[tuple[str, PointLatency]], styles: Mapping[str, int]) -> Chart:
    series: list[Series] = []
    for name in dict.fromkeys(name for name, _ in rows):
        percentiles_at = [
            (row.point.concurrency, percentiles)
            for model, row in rows
            if model == name and (percentiles := row.pooled.figure(figure))
        ]
        for statistic in ("p50", "p95"):
            points = tuple(Point(concurrency, getattr(percentiles, statistic)) for concurrency, percentiles in percentiles_at)
            series.append(Series(f"{name}, {statistic}", points, styles[name], joined=True, dashed=statistic == "p95"))
    y = Axis("milliseconds", milliseconds, Unit(), zero=True)
    summary = f"{title} in milliseconds over the number of requests at once, p50 and p95. {_range_text(series, milliseconds)}"
    return Chart(title, summary, _concurrency_axis(), y, tuple(series), better="lower is better")


def _rate_curve(rows: Sequence[tuple[str, PointLatency]], styles: Mapping[str, int]) -> Chart:
    series: list[Series] = []
    for name in dict.fromkeys(name for name, _ in rows):
        points = tuple(Point(row.point.concurrency, row.pooled.output_token_rate) for model, row in rows if model == name)
        series.append(Series(name, points, styles[name], joined=True))
    y = Axis("output tokens per second", rate, zero=True)
    summary = f"Output tokens per second over the number of requests at once. {_range_text(series, rate)}"
    return Chart("Throughput", summary, _concurrency_axis(), y, tuple(series), better="higher is better")


def _concurrency_axis() -> Axis:
    return Axis("requests at once", lambda value: f"{value:.0f}", log=True, at_data=True)


def _range_text(series: Iterable[Series], show: Callable[[float], str]) -> str:
    ranges = [f"{each.name}: {show(each.points[0].y)} to {show(each.points[-1].y)}" for each in series if each.points]
    return "From the fewest to the most at once: " + "; ".join(ranges) + "."


def _rows(latency: Latency, shape: LoadPoint) -> Iterator[tuple[str, PointLatency]]:
    """Yield each model's points of one shape, by concurrency; the original comes first at each."""
    rows = [(name, row) for name, model in models_of(latency).items() for row in model.points if row.point.shape == shape]
    yield from sorted(rows, key=lambda pair: pair[1].point.concurrency)


def _times(figure: Percentiles | None) -> tuple[str, str]:
    return ("", "") if figure is None else (milliseconds(figure.p50), milliseconds(figure.p95))


def _ratio(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    interval = f" ({estimate.interval[0]:.2f}–{estimate.interval[1]:.2f})" if estimate.interval else ""
    return f"×{estimate.value:.2f}{interval}"


def _optional(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)
