"""A page of HTML in one file: templates and style sheet of this package, and charts and tables for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress import __version__
from compress.charts import Chart, draw, swatch

TEMPLATES = Path(__file__).parent / "html"


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend: a mark and what it stands for."""

    mark: Markup
    name: str


@dataclass(frozen=True)
class Figure:
    """A chart as a page holds it: the drawing, its title and the title's id, and its data for the table below it."""

    id: str
    drawing: Markup
    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render_page(template: str, **content: object) -> str:
    """Return a page with the style sheet in it; everything in `content` is escaped but what is Markup."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))  # noqa: S704 - our own file
    return environment.get_template(template).render(style=style, version=__version__, **content)


def figures(charts: Sequence[Chart], identity: str) -> tuple[Figure, ...]:
    """Return charts drawn, with ids that begin with `identity`."""
    return tuple(_figure(chart, f"{identity}-{place}") for place, chart in enumerate(charts))


def legend(charts: Sequence[Chart]) -> tuple[LegendEntry, ...]:
    """Return a line for each name and mark in the charts; those that differ by dashes alone share one."""
    found: dict[tuple[str, int], bool] = {}
    for chart in charts:
        for series in chart.series:
            found.setdefault((series.name.partition(", ")[0], series.style), series.joined)
    return tuple(LegendEntry(_markup(swatch(style, joined=joined)), name) for (name, style), joined in found.items())


def _figure(chart: Chart, identity: str) -> Figure:
    heads = ("of", chart.x.title, chart.y.title, *(["bounds"] if chart.bounded else []))
    return Figure(
        f"{identity}-caption", _markup(draw(chart, identity)), chart.title, heads, tuple(tuple(row) for row in chart.rows())
    )


def _markup(drawn: str) -> Markup:
    return Markup(drawn)  # noqa: S704 - all text in it was escaped where it was drawn
