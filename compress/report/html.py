"""`report.html`: a run's report as one self-contained page without scripts, the verdict first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from compress.gate.gate import Outcome
from compress.report import run_tables as tables
from compress.report.charts import Chart
from compress.report.figures import kl_value, share
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
from compress.report.run_charts import WidthMap, latency_charts, sensitivity_chart, size_charts, styles_of, width_map
from compress.report.tabular import Column, Table
from compress.stages.quantization.widths import UNQUANTIZED_WIDTH, GroupWidth, Widths
from compress.verification.table import answers_table
from compress.verification.table import components_table as verified_table


@dataclass(frozen=True)
class TablePart:
    """A table."""

    kind: ClassVar[str] = "table"
    table: Table
    hidden_caption: bool = False
    """Shows the caption to screen readers only, where a heading says the same."""


@dataclass(frozen=True)
class FoldedPart:
    """A collapsed table."""

    kind: ClassVar[str] = "folded"
    title: str
    table: Table


@dataclass(frozen=True)
class ChartsPart:
    """Charts side by side with one legend."""

    kind: ClassVar[str] = "charts"
    figures: tuple[Figure, ...]
    entries: tuple[LegendEntry, ...]


@dataclass(frozen=True)
class ParagraphPart:
    """A paragraph."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class HeadingPart:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class ListPart:
    """A list of texts, in a style of the style sheet."""

    kind: ClassVar[str] = "list"
    items: tuple[str, ...]
    style: str = "plain"


@dataclass(frozen=True)
class TermsPart:
    """A description list: terms with their texts."""

    kind: ClassVar[str] = "terms"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CodePart:
    """A collapsed text in a monospaced font."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class WidthsPart:
    """A map of bit widths: kinds of layers by blocks."""

    kind: ClassVar[str] = "widths"
    caption: str
    map: WidthMap


@dataclass(frozen=True)
class CardsPart:
    """The cards of flips."""

    kind: ClassVar[str] = "cards"
    cards: tuple[Card, ...]


Part = TablePart | FoldedPart | ChartsPart | ParagraphPart | HeadingPart | ListPart | TermsPart | CodePart | WidthsPart | CardsPart


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
    yield Section("warnings", "Warnings", (ListPart(report.warnings, "warnings"),) if report.warnings else ())
    yield Section("results", "Accuracy against size", tuple(_results(report)))
    yield Section("checks", "The gate's checks", (TablePart(tables.checks_table(report.gate.checks), hidden_caption=True),))
    yield Section("fidelity", "Fidelity to the original", tuple(_table_part(tables.fidelity_table(report.rows))))
    yield Section(
        "grounding", "Visual grounding: do answers depend on the image?", tuple(_table_part(tables.grounding_table(report.rows)))
    )
    yield Section("verification", "Verification: does the artifact do what its checkpoint does?", tuple(_verification(report)))
    yield Section("latency", "Latency", tuple(_latency(report)))
    yield Section("flips", "Flips", tuple(_flips(gallery)) if gallery and _has_scores(report) else ())
    for number, (stage, widths) in enumerate(report.widths.items(), 1):
        yield Section(f"widths-{number}", f"Widths that {stage} chose", tuple(_widths(stage, widths, report)))
    yield Section("method", "How it was measured", (TermsPart(tuple(report.notes.items())),) if report.notes else ())
    yield Section("steps", "Steps and publishing", tuple(_steps(report)))
    yield Section("provenance", "Provenance", tuple(_provenance(report)))


def _table_part(table: Table) -> Iterator[Part]:
    if table.rows:
        yield TablePart(table, hidden_caption=True)


def _verification(report: Report) -> Iterator[Part]:
    for table in (verified_table(report.verifications), answers_table(report.verifications)):
        if table.rows:
            yield TablePart(table)


def _charts(charts: Sequence[Chart], identity: str, *, with_legend: bool = True) -> Iterator[Part]:
    if charts:
        yield ChartsPart(figures(charts, identity), legend(charts) if with_legend else ())


def _results(report: Report) -> Iterator[Part]:
    yield TablePart(tables.results_table(report.rows, report.gate.artifacts), hidden_caption=True)
    yield from _charts(size_charts(report), "size")
    details = tables.details_table(report.rows)
    if details.rows:
        yield FoldedPart(details.caption, details)


def _latency(report: Report) -> Iterator[Part]:
    styles = styles_of(report)
    accuracy_charts = latency_charts(report)
    if accuracy_charts:
        shapes = dict.fromkeys(shape_name(shapes_of(latency)[0]) for latency in report.latency.values() if shapes_of(latency))
        yield ParagraphPart(f"Requests in these charts: {'; '.join(shapes)}.")
        yield from _charts(accuracy_charts, "against-latency")
    for number, (target, latency) in enumerate(report.latency.items()):
        if len(report.latency) > 1:
            yield HeadingPart(f"Target {target}")
        for shape_index, shape in enumerate(shapes_of(latency)):
            curve_charts = curves(latency, shape, styles)
            yield HeadingPart(f"Requests: {shape_name(shape)}")
            if curve_charts:
                yield ParagraphPart("Solid lines are p50, dashed ones p95.")
            yield from _charts(curve_charts, f"curves-{number}-{shape_index}")
            yield TablePart(latency_table(latency, shape))
            ratios = ratio_table(latency, shape)
            if ratios.rows:
                yield TablePart(ratios)
        for table in (best_table(latency), components_table(latency)):
            if table.rows:
                yield TablePart(table)
        resources = resources_table(latency)
        if resources.rows:
            yield FoldedPart(resources.caption, resources)
        if notes := (*lowered(latency), *latency.notes):
            yield ListPart(notes)


def _has_scores(report: Report) -> bool:
    return any("flips" in metrics.judged_by for row in report.rows for metrics in row.metrics.values())


def _flips(gallery: Gallery) -> Iterator[Part]:
    if not gallery.cards:
        yield ParagraphPart("No item scores otherwise with an artifact than with the original.")
        return
    shown = len(gallery.cards)
    counts = f"{gallery.lost:,} items score less with an artifact than with the original, {gallery.gained:,} score more."
    hidden = gallery.lost + gallery.gained - shown
    hidden_note = f" Shown are {shown} of them; {hidden:,} more are not." if hidden else ""
    yield ParagraphPart(counts + hidden_note)
    if gallery.missing:
        yield ListPart(tuple(f"without questions and images: {reason}" for reason in gallery.missing))
    yield CardsPart(gallery.cards)


def _widths(stage: str, widths: Widths, report: Report) -> Iterator[Part]:
    fidelity_of = {row.artifact: row.fidelity for row in report.rows if row.fidelity}
    measured_kl = "; ".join(
        f"{artifact}: " + ", ".join(f"{task} {kl_value(fidelity)}" for task, fidelity in by_task.items())
        for artifact, by_task in fidelity_of.items()
    )
    measured_note = f"; measured KL of {measured_kl}." if measured_kl else "."
    yield ParagraphPart(
        f"{widths.bits_per_weight:.3g} bits per weight in these layers, scales and zero points counted. Predicted: a loss of "
        f"{widths.predicted_loss:.2g} nats per text token of the calibration samples{measured_note}"
    )
    widths_by_block = width_map(widths)
    if widths_by_block.rows:
        caption = f"Bits of each layer, by block ({UNQUANTIZED_WIDTH}: left as it was)"
        yield WidthsPart(caption, widths_by_block)
    sensitivity = sensitivity_chart(stage, widths)
    yield from _charts([sensitivity] if sensitivity else [], f"sensitivity-{stage}")
    yield FoldedPart("Every layer with what each width would lose", _losses_table(widths.groups))


def _losses_table(groups: Sequence[GroupWidth]) -> Table:
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
    yield ListPart(published_lines(report))
    yield TablePart(tables.timings_table(report.timings))


def _provenance(report: Report) -> Iterator[Part]:
    yield TablePart(tables.facts_table(report), hidden_caption=True)
    yield CodePart("The recipe, as it was run", recipe_text(report.recipe))


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, with its order of keys."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
