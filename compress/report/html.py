"""`report.html`: a run's report as one self-contained page without scripts, the verdict first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from compress.gate.gate import Outcome
from compress.report import run_tables as tables
from compress.report.charts import Chart
from compress.report.figures import share
from compress.report.gallery import Card, Gallery
from compress.report.latency import (
    best_table,
    components_table,
    curves,
    latency_table,
    lowered,
    ratio_table,
    resources_table,
    shape_name,
    shapes_of,
)
from compress.report.model import Report, published_lines
from compress.report.page import Figure, LegendEntry, figures, legend, render_page
from compress.report.run_charts import latency_charts, sensitivity_chart, size_charts, styles_of
from compress.report.tabular import Column, Table
from compress.report.width_table import WidthMap, width_map, widths_sentence
from compress.stages.quantization.widths import UNQUANTIZED_WIDTH, FusedLayers, Widths
from compress.verification.table import answers_table
from compress.verification.table import components_table as verified_table


@dataclass(frozen=True)
class Part:
    """A part of a section; which of the other fields are set depends on its kind, as `report.html.jinja` shows it."""

    kind: Literal["table", "folded", "charts", "paragraph", "heading", "list", "terms", "code", "widths", "cards"]
    text: str = ""
    """Of a paragraph, a heading, or code: the text."""

    title: str = ""
    """Of what is collapsed (a `folded` table, code): the line that opens it; of a map of widths: its caption."""

    table: Table | None = None
    hidden_caption: bool = False
    """Of a table: shows the caption to screen readers only, where a heading says the same."""

    items: tuple[str, ...] | tuple[tuple[str, str], ...] = ()
    """Of a list: its texts; of terms: each with its text."""

    style: str = "plain"
    """Of a list: its class in the style sheet."""

    figures: tuple[Figure, ...] = ()
    """Of charts: side by side, with the `entries` of one legend."""

    entries: tuple[LegendEntry, ...] = ()
    map: WidthMap | None = None
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page with a heading; `id` is its anchor."""

    id: str
    title: str
    parts: tuple[Part, ...]


def render_html(report: Report, gallery: Gallery | None = None) -> str:
    """Return the page of a report, with the gallery of flips where there is one.

    Texts of models and data sets are escaped; the page's content security policy forbids to load or run anything.
    """
    sections = [section for section in _sections(report, gallery) if section.parts]
    return render_page("report.html.jinja", report=report, sentence=verdict_sentence(report), sections=sections)


def verdict_sentence(report: Report) -> str:
    """Return the reason of the verdict in one sentence."""
    outcomes = list(report.gate.artifacts.values())
    count = len(report.gate.checks)
    checks = f"{count} checks" if count != 1 else "its one check"
    if report.gate.verdict == "pass":
        quantity = "Both" if len(outcomes) == 2 else f"All {len(outcomes)}"
        subject = "The artifact keeps" if len(outcomes) == 1 else f"{quantity} artifacts keep"
        return f"{subject} every limit of the gate, {checks}."
    subject = [_outcome_text(report, outcome) for outcome in ("fail", "inconclusive")]
    return f"Of {checks}, {' and '.join(text for text in subject if text)}."


def _outcome_text(report: Report, outcome: Outcome) -> str:
    matching = [check for check in report.gate.checks if check.verdict == outcome]
    if not matching:
        return ""
    names = list(dict.fromkeys(f"{check.artifact} ({check.check})" for check in matching))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    verb = {"fail": "fail" if len(matching) > 1 else "fails", "inconclusive": "are open" if len(matching) > 1 else "is open"}
    return f"{len(matching)} {verb[outcome]}: {', '.join(names[:3])}{more}"


def _sections(report: Report, gallery: Gallery | None) -> Iterator[Section]:
    yield Section("warnings", "Warnings", (Part("list", items=report.warnings, style="warnings"),) if report.warnings else ())
    yield Section("results", "Accuracy against size", tuple(_results(report)))
    yield Section("checks", "The gate's checks", tuple(_table_part(tables.checks_table(report.gate.checks))))
    yield Section("fidelity", "Fidelity to the original", tuple(_table_part(tables.fidelity_table(report.rows))))
    yield Section(
        "grounding", "Visual grounding: do answers depend on the image?", tuple(_table_part(tables.grounding_table(report.rows)))
    )
    yield Section("verification", "Verification: does the artifact do what its checkpoint does?", tuple(_verification(report)))
    yield Section("latency", "Latency", tuple(_latency(report)))
    yield Section("flips", "Flips", tuple(_flips(gallery)) if gallery and _has_scores(report) else ())
    for number, (stage, widths) in enumerate(report.widths.items(), 1):
        yield Section(f"widths-{number}", f"Widths that {stage} chose", tuple(_widths(stage, widths, report)))
    yield Section("method", "How it was measured", (Part("terms", items=tuple(report.notes.items())),) if report.notes else ())
    yield Section("steps", "Steps and publishing", tuple(_steps(report)))
    yield Section("provenance", "Provenance", tuple(_provenance(report)))


def _table_part(table: Table) -> Iterator[Part]:
    if table.rows:
        yield Part("table", table=table, hidden_caption=True)


def _verification(report: Report) -> Iterator[Part]:
    for table in (verified_table(report.verifications), answers_table(report.verifications)):
        if table.rows:
            yield Part("table", table=table)


def _charts(charts: Sequence[Chart], identity: str) -> Iterator[Part]:
    if charts:
        yield Part("charts", figures=figures(charts, identity), entries=legend(charts))


def _results(report: Report) -> Iterator[Part]:
    yield Part("table", table=tables.results_table(report.rows, report.gate.artifacts), hidden_caption=True)
    yield from _charts(size_charts(report), "size")
    details = tables.details_table(report.rows)
    if details.rows:
        yield Part("folded", title=details.caption, table=details)


def _latency(report: Report) -> Iterator[Part]:
    styles = styles_of(report)
    accuracy_charts = latency_charts(report)
    if accuracy_charts:
        shapes = dict.fromkeys(shape_name(shapes_of(latency)[0]) for latency in report.latency.values() if shapes_of(latency))
        yield Part("paragraph", f"Requests in these charts: {'; '.join(shapes)}.")
        yield from _charts(accuracy_charts, "against-latency")
    for number, (target, latency) in enumerate(report.latency.items()):
        if len(report.latency) > 1:
            yield Part("heading", f"Target {target}")
        for shape_index, shape in enumerate(shapes_of(latency)):
            curve_charts = curves(latency, shape, styles)
            yield Part("heading", f"Requests: {shape_name(shape)}")
            if curve_charts:
                yield Part("paragraph", "Solid lines are p50, dashed ones p95.")
            yield from _charts(curve_charts, f"curves-{number}-{shape_index}")
            yield Part("table", table=latency_table(latency, shape))
            ratios = ratio_table(latency, shape)
            if ratios.rows:
                yield Part("table", table=ratios)
        for table in (best_table(latency), components_table(latency)):
            if table.rows:
                yield Part("table", table=table)
        resources = resources_table(latency)
        if resources.rows:
            yield Part("folded", title=resources.caption, table=resources)
        if notes := (*lowered(latency), *latency.notes):
            yield Part("list", items=notes)


def _has_scores(report: Report) -> bool:
    return any("flips" in metrics.judged_by for row in report.rows for metrics in row.metrics.values())


def _flips(gallery: Gallery) -> Iterator[Part]:
    if not gallery.cards:
        yield Part("paragraph", "No item scores otherwise with an artifact than with the original.")
        return
    shown = len(gallery.cards)
    counts = f"{gallery.lost:,} items score less with an artifact than with the original, {gallery.gained:,} score more."
    hidden = gallery.lost + gallery.gained - shown
    hidden_note = f" Shown are {shown} of them; {hidden:,} more are not." if hidden else ""
    yield Part("paragraph", counts + hidden_note)
    if gallery.missing:
        yield Part("list", items=tuple(f"without questions and images: {reason}" for reason in gallery.missing))
    yield Part("cards", cards=gallery.cards)


def _widths(stage: str, widths: Widths, report: Report) -> Iterator[Part]:
    measured = {row.artifact: row.fidelity for row in report.rows if row.fidelity}
    yield Part("paragraph", f"{widths_sentence(widths, measured, 'in these layers')}.")
    widths_by_block = width_map(widths)
    if widths_by_block.rows:
        caption = f"Bits of each layer, by block ({UNQUANTIZED_WIDTH}: left as it was)"
        yield Part("widths", title=caption, map=widths_by_block)
    sensitivity = sensitivity_chart(stage, widths)
    yield from _charts([sensitivity] if sensitivity else [], f"sensitivity-{stage}")
    yield Part("folded", title="Every layer with what each width would lose", table=_losses_table(widths.groups))


def _losses_table(groups: Sequence[FusedLayers]) -> Table:
    tried_widths = sorted({width for group in groups for width in group.losses})
    columns = [Column("layers", "code"), Column("width", "number"), Column("bits/weight", "number"), Column("share", "number")]
    columns += [Column(f"loss at {width}", "number") for width in tried_widths]
    weights = sum(group.weights for group in groups)
    rows = [
        (
            ", ".join(group.layers),
            f"{group.width}",
            f"{group.bytes * 8 / group.weights:.2f}",
            share(group.weights / weights),
            *(f"{group.losses[width]:.2g}" if width in group.losses else "" for width in tried_widths),
        )
        for group in groups
    ]
    return Table("Predicted loss of each layer, in nats per token", tuple(columns), tuple(rows))


def _steps(report: Report) -> Iterator[Part]:
    yield Part("list", items=published_lines(report))
    yield Part("table", table=tables.timings_table(report.timings))


def _provenance(report: Report) -> Iterator[Part]:
    yield Part("table", table=tables.facts_table(report), hidden_caption=True)
    yield Part("code", recipe_text(report.recipe), "The recipe, as it was run")


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, with its order of keys."""
    # Unsorted: the recipe's own order is how its author reads it.
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
