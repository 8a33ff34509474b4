"""Charts as inline SVG: points and lines on two axes, drawn without a library, so that a page needs no script and no network.

Colours come from the page's style sheet by class (`s0` … `s7`, `front`, `limit`), and every series has its own marker shape. A
chart's data are also available as rows, for the table below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 380, 262
_TOP, _RIGHT, _BOTTOM = 30, 18, 50
"""The drawing's size and the plot area's margins, in pixels; the left margin depends on the labels."""

_CHARACTER = 6.5  # the width of one at the style sheet's 12 px
_LINE = 15
"""The height of a line of text, in pixels."""

_TICKS = 5
"""About how many ticks an axis has."""

STYLES = 8
"""The number of distinct series styles; further series repeat them."""


@dataclass(frozen=True)
class Unit:
    """The unit of tick labels: a value times `factor`, followed by `suffix`."""

    factor: float = 1.0
    suffix: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis of a chart."""

    title: str
    show: Callable[[float], str]
    """Formats a value for texts and tables."""

    unit: Unit = field(default_factory=Unit)
    zero: bool = False
    """Whether the axis starts at zero."""

    log: bool = False
    """Whether the axis is logarithmic; for positive data."""

    at_data: bool = False
    """Whether ticks are at the data's values instead of round numbers."""


@dataclass(frozen=True)
class Point:
    """One value; its `label` is drawn where there is room, `bounds` are the error bars of `y`."""

    x: float
    y: float
    label: str = ""
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points in one style; `joined` ones are connected by a line, which may be `dashed`."""

    name: str
    points: tuple[Point, ...]
    style: int
    joined: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Limit:
    """A line across the chart at a limit on one axis, `x` or `y`."""

    axis: str
    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart of points on two axes."""

    title: str
    summary: str
    """The content in one sentence, for screen readers."""

    x: Axis
    y: Axis
    series: tuple[Series, ...]
    front: tuple[Point, ...] = ()
    """The Pareto front."""

    limits: tuple[Limit, ...] = ()
    better: str = ""
    """Which direction is better, in words."""

    @property
    def drawable(self) -> bool:
        """Whether there is anything to draw."""
        return any(True for _ in _finite(self.series))

    @property
    def bounded(self) -> bool:
        """Whether any point has bounds."""
        return any(point.bounds for series in self.series for point in series.points)

    def rows(self) -> list[list[str]]:
        """Return the data as a table's rows: series, x, y, and the bounds of y where any point has some."""
        rows: list[list[str]] = []
        for series in self.series:
            for point in series.points:
                cells = [point.label or series.name, self.x.show(point.x), self.y.show(point.y)]
                bounds = " to ".join(self.y.show(bound) for bound in point.bounds) if point.bounds else ""
                rows.append([*cells, bounds] if self.bounded else cells)
        return rows


def pareto_front(points: Iterable[Point], worth: Callable[[Point], float]) -> tuple[Point, ...]:
    """Return the Pareto front by increasing x, where smaller x and larger worth are better.

    Points whose worth is not finite are left out.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -worth(point))):
        if math.isfinite(point.x) and math.isfinite(worth(point)) and (not best or worth(point) > worth(best[-1])):
            best.append(point)
    return tuple(best)


def larger(point: Point) -> float:
    """Return the worth of a point where larger figures are better."""
    return point.y


def near(figure: float) -> Callable[[Point], float]:
    """Return a worth function where positive figures are better the nearer their ratio to `figure` is to 1."""

    def worth(point: Point) -> float:
        # On a log scale: a perplexity of half and one of twice the original's are as far from it.
        return -abs(math.log(point.y / figure)) if point.y > 0 and figure > 0 and math.isfinite(point.y) else -math.inf

    return worth


def ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Return about `count` ticks from `low` to `high`, at multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    # The tolerance keeps a step that is exactly 1, 2 or 5 from being skipped by a rounding error.
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class _Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def pixel(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def draw(chart: Chart, identity: str) -> str:
    """Return a chart as an SVG element whose ids begin with `identity`, which must be unique in the page.

    The chart must be drawable.
    """
    points = list(_finite(chart.series))
    x_values, y_values = [point.x for point in points], [point.y for point in points]
    y_values += [bound for point in points for bound in point.bounds or () if math.isfinite(bound)]
    x_values += [limit.value for limit in chart.limits if limit.axis == "x"]
    y_values += [limit.value for limit in chart.limits if limit.axis == "y"]
    y_range = _range(y_values, chart.y)
    y_ticks = _tick_values(chart.y, y_range, y_values)
    y_labels = _tick_labels(chart.y, y_ticks)
    left = 14 + _CHARACTER * max(map(len, y_labels))
    x_range = _range(x_values, chart.x)
    x_scale = _Scale(*x_range, left, WIDTH - _RIGHT, chart.x.log)
    y_scale = _Scale(*y_range, HEIGHT - _BOTTOM, _TOP, chart.y.log)
    parts = [
        _draw_axes(chart, x_scale, y_scale, (_tick_values(chart.x, x_range, x_values), y_ticks, y_labels)),
        *(_draw_limit(limit, x_scale, y_scale) for limit in chart.limits),
        _draw_front(chart.front, x_scale, y_scale),
        *(_draw_series(series, chart, x_scale, y_scale) for series in chart.series),
        *_draw_labels(chart, x_scale, y_scale),
    ]
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{identity}-title {identity}-summary">'
        f'<title id="{identity}-title">{escape(chart.title)}</title><desc id="{identity}-summary">{escape(chart.summary)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def swatch(style: int, *, joined: bool = False) -> str:
    """Return the marker of a series for a legend; hidden from screen readers, which read the name beside it."""
    line = f'<path class="line s{style % STYLES}" d="M1 8H27"/>' if joined else ""
    return f'<svg class="swatch" aria-hidden="true" viewBox="0 0 28 16">{line}{_marker(style, 14, 8)}</svg>'


def _finite(series: Iterable[Series]) -> Iterable[Point]:
    return (point for each in series for point in each.points if math.isfinite(point.x) and math.isfinite(point.y))


def _range(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """Return an axis's range: the data's with some margin."""
    low, high = min(values), max(values)
    if axis.log:
        return low / 1.15, high * 1.15
    spread = high - low or abs(high) * 0.1 or 1.0
    bottom = 0.0 if axis.zero and low >= 0 else low - 0.12 * spread
    return bottom, high + 0.12 * spread


def _tick_values(axis: Axis, limits: tuple[float, float], values: Sequence[float]) -> list[float]:
    factor = axis.unit.factor
    if axis.at_data:
        return _spaced_values(axis, limits, sorted(set(values)))
    if not axis.log:
        return [tick / factor for tick in ticks(limits[0] * factor, limits[1] * factor)]
    low, high = (math.log10(limit * factor) for limit in limits)
    factors = (1,) if high - low > 3 else (1, 2, 5)
    candidates = [step * 10.0**power / factor for power in range(math.floor(low), math.ceil(high) + 1) for step in factors]
    return [value for value in candidates if limits[0] <= value <= limits[1]] or [math.sqrt(limits[0] * limits[1])]


def _spaced_values(axis: Axis, limits: tuple[float, float], values: Sequence[float]) -> list[float]:
    """Return the values without those whose label would overlap the previous one."""
    scale, spaced = _Scale(*limits, 0.0, 1.0, axis.log), list[float]()
    for value in values:
        if not spaced or scale.pixel(value) - scale.pixel(spaced[-1]) > 0.07:
            spaced.append(value)
    return spaced


def _tick_labels(axis: Axis, values: Sequence[float]) -> list[str]:
    scaled = [value * axis.unit.factor for value in values]
    if axis.log or axis.at_data or len(scaled) < 2:
        return [f"{value:.3g}{axis.unit.suffix}" for value in scaled]
    decimals = max(0, -math.floor(math.log10(scaled[1] - scaled[0]) + 1e-9))
    # + 0.0 turns -0.0 into 0: no axis should begin at "-0".
    return [f"{value + 0.0:,.{decimals}f}{axis.unit.suffix}" for value in scaled]


def _draw_axes(chart: Chart, x: _Scale, y: _Scale, tick_data: tuple[list[float], list[float], list[str]]) -> str:
    x_ticks, y_ticks, y_labels = tick_data
    parts: list[str] = []
    for value, label in zip(y_ticks, y_labels, strict=True):
        height = y.pixel(value)
        parts.append(f'<path class="grid" d="M{x.start:.1f} {height:.1f}H{x.end:.1f}"/>')
        parts.append(_text(label, "tick", x.start - 7, height + 4, "end"))
    for value, label in zip(x_ticks, _tick_labels(chart.x, x_ticks), strict=True):
        pixel = x.pixel(value)
        parts.append(f'<path class="axis" d="M{pixel:.1f} {y.start:.1f}v4"/>')
        parts.append(_text(label, "tick", pixel, y.start + 18))
    parts.append(f'<path class="axis" d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}"/>')
    parts.append(_text(chart.y.title, "name", 2, 14, "start"))
    is_wide = _CHARACTER * len(chart.x.title) > x.end - x.start
    parts.append(_text(chart.x.title, "name", WIDTH / 2 if is_wide else (x.start + x.end) / 2, HEIGHT - 10))
    if chart.better:
        parts.append(_text(chart.better, "better", x.end, 14, "end"))
    return "".join(parts)


def _draw_limit(limit: Limit, x: _Scale, y: _Scale) -> str:
    if limit.axis == "x":
        pixel = x.pixel(limit.value)
        line = f"M{pixel:.1f} {y.start:.1f}V{y.end:.1f}"
        right = pixel < x.end - _CHARACTER * len(limit.label) - 8
        label = _text(limit.label, "limit-name", pixel + (5 if right else -5), y.start - 6, "start" if right else "end")
    else:
        height = y.pixel(limit.value)
        line = f"M{x.start:.1f} {height:.1f}H{x.end:.1f}"
        label = _text(limit.label, "limit-name", x.start + 4, height - 5, "start")
    return f'<path class="limit" d="{line}"/>{label}'


def _draw_front(front: Sequence[Point], x: _Scale, y: _Scale) -> str:
    if len(front) < 2:
        return ""
    path = f"M{x.pixel(front[0].x):.1f} {y.pixel(front[0].y):.1f}"
    # Steps, not slanted lines: between two artifacts there is none that could be had.
    path += "".join(f"H{x.pixel(point.x):.1f}V{y.pixel(point.y):.1f}" for point in front[1:])
    return f'<path class="front" d="{path}"/>'


def _draw_series(series: Series, chart: Chart, x: _Scale, y: _Scale) -> str:
    style = f"s{series.style % STYLES}"
    points = list(_finite([series]))
    parts: list[str] = []
    if series.joined and len(points) > 1:
        path = "L".join(f"{x.pixel(point.x):.1f} {y.pixel(point.y):.1f}" for point in points)
        parts.append(f'<path class="line {style}{" dashed" if series.dashed else ""}" d="M{path}"/>')
    for point in points:
        pixel_x, pixel_y = x.pixel(point.x), y.pixel(point.y)
        if point.bounds and all(map(math.isfinite, point.bounds)):
            low, high = (y.pixel(bound) for bound in point.bounds)
            bar = f"M{pixel_x:.1f} {low:.1f}V{high:.1f}M{pixel_x - 4:.1f} {low:.1f}h8M{pixel_x - 4:.1f} {high:.1f}h8"
            parts.append(f'<path class="bar {style}" d="{bar}"/>')
        tooltip = f"{point.label or series.name}: {chart.y.show(point.y)} at {chart.x.show(point.x)}"
        parts.append(f"<g><title>{escape(tooltip)}</title>{_marker(series.style, pixel_x, pixel_y)}</g>")
    return "".join(parts)


def _marker(style: int, x: float, y: float) -> str:
    """Return the marker of a style, about ten pixels wide."""
    shapes = (
        "m0 -5a5 5 0 1 1 0 10a5 5 0 1 1 0 -10z",
        "m-4.5 -4.5h9v9h-9z",
        "m0 -5.5l5.5 9.5h-11z",
        "m0 -6l6 6l-6 6l-6 -6z",
        "m0 5.5l5.5 -9.5h-11z",
        "m-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
        "m0 -6l5.7 4.1l-2.2 6.8h-7l-2.2 -6.8z",
        "m-3 -5h6l3 5l-3 5h-6l-3 -5z",
    )
    kind = style % STYLES
    return f'<path class="mark s{kind}" d="M{x:.1f} {y:.1f}{shapes[kind]}"/>'


def _draw_labels(chart: Chart, x: _Scale, y: _Scale) -> Iterable[str]:
    """Yield the labels of points where they overlap no marker, limit label or other label."""
    points = [point for point in _finite(chart.series) if point.label]
    occupied = [_marker_box(x.pixel(point.x), y.pixel(point.y)) for point in _finite(chart.series)]
    occupied += [_limit_box(limit, x, y) for limit in chart.limits]
    for point in points:
        pixel_x, pixel_y = x.pixel(point.x), y.pixel(point.y)
        width = _CHARACTER * len(point.label)
        candidates = (
            (pixel_x + 9, pixel_y + 4, "start", pixel_x + 9),
            (pixel_x - 9, pixel_y + 4, "end", pixel_x - 9 - width),
            (pixel_x, pixel_y - 10, "middle", pixel_x - width / 2),
            (pixel_x, pixel_y + 19, "middle", pixel_x - width / 2),
            (pixel_x + 6, pixel_y - 9, "start", pixel_x + 6),
            (pixel_x - 6, pixel_y - 9, "end", pixel_x - 6 - width),
            (pixel_x + 6, pixel_y + 17, "start", pixel_x + 6),
            (pixel_x - 6, pixel_y + 17, "end", pixel_x - 6 - width),
        )
        for text_x, text_y, anchor, left in candidates:
            box = _Box(left, text_y - 11, left + width, text_y + 3)
            fits = left >= x.start and left + width <= WIDTH - 2 and box.top >= _TOP - 12 and box.bottom <= y.start
            if fits and not any(box.overlaps(other) for other in occupied):
                occupied.append(box)
                yield _text(point.label, "label", text_x, text_y, anchor)
                break


def _marker_box(x: float, y: float) -> _Box:
    return _Box(x - 6, y - 6, x + 6, y + 6)


def _limit_box(limit: Limit, x: _Scale, y: _Scale) -> _Box:
    width = _CHARACTER * len(limit.label) + 6
    if limit.axis == "y":
        height = y.pixel(limit.value)
        return _Box(x.start, height - 5 - _LINE, x.start + width, height + 2)
    pixel = x.pixel(limit.value)
    left = pixel if pixel < x.end - width - 2 else pixel - width
    return _Box(left, y.start - 6 - _LINE, left + width, y.start)


def _text(text: str, kind: str, x: float, y: float, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
