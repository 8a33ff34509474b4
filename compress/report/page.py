"""Self-contained HTML pages: the package's templates and style sheet, with charts and legends for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.report.charts import Chart, draw, swatch
from compress.version import __version__

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend: a mark and the name of its series."""

    mark: Markup
    name: str


@dataclass(frozen=True)
class Figure:
    """A chart in a page."""

    id: str
    """The id of the title's element."""

    drawing: Markup
    """The SVG element."""

    title: str
    heads: tuple[str, ...]
    """The heads of the table with the chart's data; `rows` are its rows."""

    rows: tuple[tuple[str, ...], ...]


def render_page(template: str, **content: object) -> str:
    """Return a page with the style sheet inlined; everything in `content` is escaped except Markup."""
    # Answers of models and texts of data sets are in the page: unescaped they could run scripts in a reader's browser.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))  # noqa: S704 - our own file
    return environment.get_template(template).render(style=style, version=__version__, **content)


def figures(charts: Sequence[Chart], identity: str) -> tuple[Figure, ...]:
    """Return the drawn charts, with ids that begin with `identity`."""
    return tuple(_figure(chart, f"{identity}-{index}") for index, chart in enumerate(charts))


def legend(charts: Sequence[Chart]) -> tuple[LegendEntry, ...]:
    """Return an entry for each name and mark in the charts; series that differ only by dashes share one."""
    entries: dict[tuple[str, int], bool] = {}
    for chart in charts:
        for series in chart.series:
            entries.setdefault((series.name.partition(", ")[0], series.style), series.joined)
    return tuple(LegendEntry(_markup(swatch(style, joined=joined)), name) for (name, style), joined in entries.items())


def _figure(chart: Chart, identity: str) -> Figure:
    heads = ("of", chart.x.title, chart.y.title, *(["bounds"] if chart.bounded else []))
    return Figure(
        f"{identity}-caption", _markup(draw(chart, identity)), chart.title, heads, tuple(tuple(row) for row in chart.rows())
    )


def _markup(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704 - all text in it was escaped where it was drawn
