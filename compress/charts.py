"""Charts as inline SVG: points and lines on two axes, drawn without a library, so that a page needs no script and no network.

Colours come from the page's style sheet by class (`s0` … `s7`, `front`, `limit`), and every series has a shape of its own beside
its colour. A chart's data are also given as rows, for the table that stands below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 380, 262
_TOP, _RIGHT, _BOTTOM = 30, 18, 50
_CHARACTER = 6.5  # the width of one at the style sheet's 12 px
_LINE = 15
_TICKS = 5
STYLES = 8
"""How many series can be told apart; further ones begin again."""


@dataclass(frozen=True)
class Unit:
    """What the numbers along an axis are shown in: a value times `factor`, then `suffix`."""

    factor: float = 1.0
    suffix: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis: its title, the unit of its ticks, and how one value is told in words and tables.

    `zero` begins it at zero, `log` spaces it by ratios, for data above zero. Ticks are round numbers, or the data's own with
    `at_data`.
    """

    title: str
    show: Callable[[float], str]
    unit: Unit = field(default_factory=Unit)
    zero: bool = False
    log: bool = False
    at_data: bool = False


@dataclass(frozen=True)
class Point:
    """One value; `label` stands beside it where there is room, `bounds` are those of `y`."""

    x: float
    y: float
    label: str = ""
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together, in the style of this number; `joined` ones have a line from each to the next, or dashes."""

    name: str
    points: tuple[Point, ...]
    style: int
    joined: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Limit:
    """A line across the chart where a limit lies, on one of the two axes."""

    axis: str
    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart and what it says: `summary` in one sentence for those who do not see it, `better` the corner to be in."""

    title: str
    summary: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    front: tuple[Point, ...] = ()
    limits: tuple[Limit, ...] = ()
    better: str = ""

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
    """Return the points that no other one beats in worth without being worse in x, from small x to large; a small x is better.

    A point whose worth is not finite is in no front.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -worth(point))):
        if math.isfinite(point.x) and math.isfinite(worth(point)) and (not best or worth(point) > worth(best[-1])):
            best.append(point)
    return tuple(best)


def larger(point: Point) -> float:
    """Return the worth of a point whose figure is better the larger it is."""
    return point.y


def near(figure: float) -> Callable[[Point], float]:
    """Return the worth of points whose figure, above 0, is better the nearer it is to another one, as a ratio."""

    def worth(point: Point) -> float:
        return -abs(math.log(point.y / figure)) if point.y > 0 and figure > 0 and math.isfinite(point.y) else -math.inf

    return worth


def ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Return about `count` round numbers from `low` to `high`, equally spaced by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class _Scale:
    """Where a value lies between two pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def draw(chart: Chart, identity: str) -> str:
    """Return a chart as an SVG element whose ids begin with `identity`, which must be unique in the page.

    The chart must be drawable.
    """
    points = list(_finite(chart.series))
    across, up = [point.x for point in points], [point.y for point in points]
    up += [bound for point in points for bound in point.bounds or () if math.isfinite(bound)]
    across += [limit.value for limit in chart.limits if limit.axis == "x"]
    up += [limit.value for limit in chart.limits if limit.axis == "y"]
    y_range = _range(up, chart.y)
    y_ticks = _tick_values(chart.y, y_range, up)
    y_labels = _tick_labels(chart.y, y_ticks)
    left = 14 + _CHARACTER * max(map(len, y_labels))
    x_range = _range(across, chart.x)
    x_scale = _Scale(*x_range, left, WIDTH - _RIGHT, chart.x.log)
    y_scale = _Scale(*y_range, HEIGHT - _BOTTOM, _TOP, chart.y.log)
    parts = [
        _axes(chart, x_scale, y_scale, (_tick_values(chart.x, x_range, across), y_ticks, y_labels)),
        *(_limit(limit, x_scale, y_scale) for limit in chart.limits),
        _front(chart.front, x_scale, y_scale),
        *(_drawn(series, chart, x_scale, y_scale) for series in chart.series),
        *_labels(chart, x_scale, y_scale),
    ]
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{identity}-title {identity}-summary">'
        f'<title id="{identity}-title">{escape(chart.title)}</title><desc id="{identity}-summary">{escape(chart.summary)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def swatch(style: int, *, joined: bool = False) -> str:
    """Return the mark of a series for a legend; hidden from screen readers, which are told the name beside it."""
    line = f'<path class="line s{style % STYLES}" d="M1 8H27"/>' if joined else ""
    return f'<svg class="swatch" aria-hidden="true" viewBox="0 0 28 16">{line}{_mark(style, 14, 8)}</svg>'


def _finite(series: Iterable[Series]) -> Iterable[Point]:
    return (point for each in series for point in each.points if math.isfinite(point.x) and math.isfinite(point.y))


def _range(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """Return from where to where an axis goes: a little more than the data take."""
    low, high = min(values), max(values)
    if axis.log:
        return low / 1.15, high * 1.15
    spread = high - low or abs(high) * 0.1 or 1.0
    bottom = 0.0 if axis.zero and low >= 0 else low - 0.12 * spread
    return bottom, high + 0.12 * spread


def _tick_values(axis: Axis, limits: tuple[float, float], values: Sequence[float]) -> list[float]:
    factor = axis.unit.factor
    if axis.at_data:
        return _apart(axis, limits, sorted(set(values)))
    if not axis.log:
        return [tick / factor for tick in ticks(limits[0] * factor, limits[1] * factor)]
    low, high = (math.log10(limit * factor) for limit in limits)
    factors = (1,) if high - low > 3 else (1, 2, 5)
    found = [step * 10.0**power / factor for power in range(math.floor(low), math.ceil(high) + 1) for step in factors]
    return [value for value in found if limits[0] <= value <= limits[1]] or [math.sqrt(limits[0] * limits[1])]


def _apart(axis: Axis, limits: tuple[float, float], values: Sequence[float]) -> list[float]:
    """Return the values without those too close to the one before for both to be read."""
    scale, kept = _Scale(*limits, 0.0, 1.0, axis.log), list[float]()
    for value in values:
        if not kept or scale.place(value) - scale.place(kept[-1]) > 0.07:
            kept.append(value)
    return kept


def _tick_labels(axis: Axis, values: Sequence[float]) -> list[str]:
    scaled = [value * axis.unit.factor for value in values]
    if axis.log or axis.at_data or len(scaled) < 2:
        return [f"{value:.3g}{axis.unit.suffix}" for value in scaled]
    decimals = max(0, -math.floor(math.log10(scaled[1] - scaled[0]) + 1e-9))
    return [f"{value + 0.0:,.{decimals}f}{axis.unit.suffix}" for value in scaled]


def _axes(chart: Chart, x: _Scale, y: _Scale, at: tuple[list[float], list[float], list[str]]) -> str:
    x_ticks, y_ticks, y_labels = at
    parts: list[str] = []
    for value, label in zip(y_ticks, y_labels, strict=True):
        height = y.place(value)
        parts.append(f'<path class="grid" d="M{x.start:.1f} {height:.1f}H{x.end:.1f}"/>')
        parts.append(_text(label, "tick", x.start - 7, height + 4, "end"))
    for value, label in zip(x_ticks, _tick_labels(chart.x, x_ticks), strict=True):
        place = x.place(value)
        parts.append(f'<path class="axis" d="M{place:.1f} {y.start:.1f}v4"/>')
        parts.append(_text(label, "tick", place, y.start + 18))
    parts.append(f'<path class="axis" d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}"/>')
    parts.append(_text(chart.y.title, "name", 2, 14, "start"))
    wide = _CHARACTER * len(chart.x.title) > x.end - x.start
    parts.append(_text(chart.x.title, "name", WIDTH / 2 if wide else (x.start + x.end) / 2, HEIGHT - 10))
    if chart.better:
        parts.append(_text(chart.better, "better", x.end, 14, "end"))
    return "".join(parts)


def _limit(limit: Limit, x: _Scale, y: _Scale) -> str:
    if limit.axis == "x":
        place = x.place(limit.value)
        line = f"M{place:.1f} {y.start:.1f}V{y.end:.1f}"
        right = place < x.end - _CHARACTER * len(limit.label) - 8
        label = _text(limit.label, "limit-name", place + (5 if right else -5), y.start - 6, "start" if right else "end")
    else:
        height = y.place(limit.value)
        line = f"M{x.start:.1f} {height:.1f}H{x.end:.1f}"
        label = _text(limit.label, "limit-name", x.start + 4, height - 5, "start")
    return f'<path class="limit" d="{line}"/>{label}'


def _front(front: Sequence[Point], x: _Scale, y: _Scale) -> str:
    if len(front) < 2:
        return ""
    path = f"M{x.place(front[0].x):.1f} {y.place(front[0].y):.1f}"
    path += "".join(f"H{x.place(point.x):.1f}V{y.place(point.y):.1f}" for point in front[1:])
    return f'<path class="front" d="{path}"/>'


def _drawn(series: Series, chart: Chart, x: _Scale, y: _Scale) -> str:
    style = f"s{series.style % STYLES}"
    points = list(_finite([series]))
    parts: list[str] = []
    if series.joined and len(points) > 1:
        way = "L".join(f"{x.place(point.x):.1f} {y.place(point.y):.1f}" for point in points)
        parts.append(f'<path class="line {style}{" dashed" if series.dashed else ""}" d="M{way}"/>')
    for point in points:
        across, height = x.place(point.x), y.place(point.y)
        if point.bounds and all(map(math.isfinite, point.bounds)):
            low, high = (y.place(bound) for bound in point.bounds)
            bar = f"M{across:.1f} {low:.1f}V{high:.1f}M{across - 4:.1f} {low:.1f}h8M{across - 4:.1f} {high:.1f}h8"
            parts.append(f'<path class="bar {style}" d="{bar}"/>')
        name = f"{point.label or series.name}: {chart.y.show(point.y)} at {chart.x.show(point.x)}"
        parts.append(f"<g><title>{escape(name)}</title>{_mark(series.style, across, height)}</g>")
    return "".join(parts)


def _mark(style: int, x: float, y: float) -> str:
    """Return the shape of a style, about ten pixels wide."""
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


def _labels(chart: Chart, x: _Scale, y: _Scale) -> Iterable[str]:
    """Yield the names beside points that find room between the marks, the limits' names and each other."""
    points = [point for point in _finite(chart.series) if point.label]
    taken = [_around(x.place(point.x), y.place(point.y)) for point in _finite(chart.series)]
    taken += [_limit_box(limit, x, y) for limit in chart.limits]
    for point in points:
        across, height = x.place(point.x), y.place(point.y)
        width = _CHARACTER * len(point.label)
        places = (
            (across + 9, height + 4, "start", across + 9),
            (across - 9, height + 4, "end", across - 9 - width),
            (across, height - 10, "middle", across - width / 2),
            (across, height + 19, "middle", across - width / 2),
            (across + 6, height - 9, "start", across + 6),
            (across - 6, height - 9, "end", across - 6 - width),
            (across + 6, height + 17, "start", across + 6),
            (across - 6, height + 17, "end", across - 6 - width),
        )
        for text_x, text_y, anchor, left in places:
            box = _Box(left, text_y - 11, left + width, text_y + 3)
            inside = left >= x.start and left + width <= WIDTH - 2 and box.top >= _TOP - 12 and box.bottom <= y.start
            if inside and not any(box.meets(other) for other in taken):
                taken.append(box)
                yield _text(point.label, "label", text_x, text_y, anchor)
                break


def _around(x: float, y: float) -> _Box:
    return _Box(x - 6, y - 6, x + 6, y + 6)


def _limit_box(limit: Limit, x: _Scale, y: _Scale) -> _Box:
    width = _CHARACTER * len(limit.label) + 6
    if limit.axis == "y":
        height = y.place(limit.value)
        return _Box(x.start, height - 5 - _LINE, x.start + width, height + 2)
    place = x.place(limit.value)
    left = place if place < x.end - width - 2 else place - width
    return _Box(left, y.start - 6 - _LINE, left + width, y.start)


def _text(text: str, kind: str, x: float, y: float, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
