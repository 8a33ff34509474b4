"""`report.html`: a run's report as one page that loads nothing and runs nothing, the verdict first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from compress import report_tables as tables
from compress.charts import Chart
from compress.eval.results import ScoreMetrics
from compress.figures import kl_value, share
from compress.gallery import Card, Gallery
from compress.gate import Outcome
from compress.page import Figure, LegendEntry, figures, legend, render_page
from compress.report import Report, published_lines
from compress.report_charts import WidthMap, latency_charts, sensitivity_chart, size_charts, styles_of, width_map
from compress.report_latency import (
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
from compress.stages.widths import UNQUANTIZED_WIDTH, GroupWidth, Widths
from compress.tabular import Column, Table
from compress.verification.table import answers_table
from compress.verification.table import components_table as verified_table


@dataclass(frozen=True)
class TablePart:
    """A table; its caption is kept for screen readers alone where a heading says the same."""

    kind: ClassVar[str] = "table"
    table: Table
    hidden_caption: bool = False


@dataclass(frozen=True)
class FoldedPart:
    """A long table behind a line that opens it."""

    kind: ClassVar[str] = "folded"
    title: str
    table: Table


@dataclass(frozen=True)
class ChartsPart:
    """Charts beside each other under one legend."""

    kind: ClassVar[str] = "charts"
    figures: tuple[Figure, ...]
    entries: tuple[LegendEntry, ...]


@dataclass(frozen=True)
class WordsPart:
    """A paragraph."""

    kind: ClassVar[str] = "words"
    text: str


@dataclass(frozen=True)
class HeadingPart:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class ListPart:
    """Lines of text in the style of this name."""

    kind: ClassVar[str] = "list"
    items: tuple[str, ...]
    style: str = "plain"


@dataclass(frozen=True)
class TermsPart:
    """Names, each with what is to be said of it."""

    kind: ClassVar[str] = "terms"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CodePart:
    """A text as it stands in a file, behind a line that opens it."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class WidthsPart:
    """A map of widths: kinds of layers by blocks."""

    kind: ClassVar[str] = "widths"
    caption: str
    map: WidthMap


@dataclass(frozen=True)
class CardsPart:
    """Flips."""

    kind: ClassVar[str] = "cards"
    cards: tuple[Card, ...]


Part = TablePart | FoldedPart | ChartsPart | WordsPart | HeadingPart | ListPart | TermsPart | CodePart | WidthsPart | CardsPart


@dataclass(frozen=True)
class Section:
    """One part of the page under a heading; `id` is what links to it name."""

    id: str
    title: str
    parts: tuple[Part, ...]


def render_html(report: Report, gallery: Gallery | None = None) -> str:
    """Return the page of a report, with a gallery of flips where there is one.

    Whatever comes from models and data sets is escaped; a policy in the page forbids it to load or run anything.
    """
    sections = [section for section in _sections(report, gallery) if section.parts]
    return render_page("report.html.jinja", report=report, sentence=verdict_sentence(report), sections=sections)


def verdict_sentence(report: Report) -> str:
    """Return what the verdict rests on, in one sentence."""
    outcomes = list(report.gate.artifacts.values())
    count = len(report.gate.checks)
    checks = f"{count} checks" if count != 1 else "its one check"
    if report.gate.verdict == "pass":
        every = "Both" if len(outcomes) == 2 else f"All {len(outcomes)}"
        told = "The artifact keeps" if len(outcomes) == 1 else f"{every} artifacts keep"
        return f"{told} every limit of the gate, {checks}."
    told = [_short_of(report, outcome) for outcome in ("fail", "inconclusive")]
    return f"Of {checks}, {' and '.join(text for text in told if text)}."


def _short_of(report: Report, outcome: Outcome) -> str:
    found = [check for check in report.gate.checks if check.verdict == outcome]
    if not found:
        return ""
    names = list(dict.fromkeys(f"{check.artifact} ({check.check})" for check in found))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    verb = {"fail": "fail" if len(found) > 1 else "fails", "inconclusive": "are open" if len(found) > 1 else "is open"}
    return f"{len(found)} {verb[outcome]}: {', '.join(names[:3])}{more}"


def _sections(report: Report, gallery: Gallery | None) -> Iterator[Section]:
    yield Section("warnings", "Warnings", (ListPart(report.warnings, "warnings"),) if report.warnings else ())
    yield Section("results", "Accuracy against size", tuple(_results(report)))
    yield Section("checks", "The gate's checks", (TablePart(tables.checks_table(report.gate.checks), hidden_caption=True),))
    yield Section("fidelity", "Fidelity to the original", tuple(_filled(tables.fidelity_table(report.rows))))
    yield Section(
        "grounding", "Visual grounding: do answers depend on the image?", tuple(_filled(tables.grounding_table(report.rows)))
    )
    yield Section("verification", "Verification: does the artifact do what its checkpoint does?", tuple(_verification(report)))
    yield Section("latency", "Latency", tuple(_latency(report)))
    yield Section("flips", "Flips", tuple(_flips(gallery)) if gallery and _scored(report) else ())
    for number, (stage, widths) in enumerate(report.widths.items(), 1):
        yield Section(f"widths-{number}", f"Widths that {stage} chose", tuple(_widths(stage, widths, report)))
    yield Section("method", "How it was measured", (TermsPart(tuple(report.notes.items())),) if report.notes else ())
    yield Section("steps", "Steps and publishing", tuple(_steps(report)))
    yield Section("provenance", "Provenance", tuple(_provenance(report)))


def _filled(table: Table) -> Iterator[Part]:
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
    against = latency_charts(report)
    if against:
        first = dict.fromkeys(shape_name(shapes_of(latency)[0]) for latency in report.latency.values() if shapes_of(latency))
        yield WordsPart(f"Requests in these charts: {'; '.join(first)}.")
        yield from _charts(against, "against-latency")
    for number, (target, latency) in enumerate(report.latency.items()):
        if len(report.latency) > 1:
            yield HeadingPart(f"Target {target}")
        for place, shape in enumerate(shapes_of(latency)):
            drawn = curves(latency, shape, styles)
            yield HeadingPart(f"Requests: {shape_name(shape)}")
            if drawn:
                yield WordsPart("Solid lines are p50, dashed ones p95.")
            yield from _charts(drawn, f"curves-{number}-{place}")
            yield TablePart(latency_table(latency, shape))
            ratios = ratio_table(latency, shape)
            if ratios.rows:
                yield TablePart(ratios)
        for table in (best_table(latency), components_table(latency)):
            if table.rows:
                yield TablePart(table)
        used = resources_table(latency)
        if used.rows:
            yield FoldedPart(used.caption, used)
        if said := (*lowered(latency), *latency.notes):
            yield ListPart(said)


def _scored(report: Report) -> bool:
    return any(isinstance(metrics, ScoreMetrics) for row in report.rows for metrics in row.metrics.values())


def _flips(gallery: Gallery) -> Iterator[Part]:
    if not gallery.cards:
        yield WordsPart("No item scores otherwise with an artifact than with the original.")
        return
    shown = len(gallery.cards)
    told = f"{gallery.lost:,} items score less with an artifact than with the original, {gallery.gained:,} score more."
    rest = gallery.lost + gallery.gained - shown
    more = f" Shown are {shown} of them; {rest:,} more are not." if rest else ""
    yield WordsPart(told + more)
    if gallery.missing:
        yield ListPart(tuple(f"without questions and images: {reason}" for reason in gallery.missing))
    yield CardsPart(gallery.cards)


def _widths(stage: str, widths: Widths, report: Report) -> Iterator[Part]:
    measured = {row.artifact: row.fidelity for row in report.rows if row.fidelity}
    found = "; ".join(
        f"{artifact}: " + ", ".join(f"{task} {kl_value(fidelity)}" for task, fidelity in by_task.items())
        for artifact, by_task in measured.items()
    )
    measured_kl = f"; measured KL of {found}." if found else "."
    yield WordsPart(
        f"{widths.bits_per_weight:.3g} bits per weight in these layers, scales and zero points counted. Predicted: a loss of "
        f"{widths.predicted_loss:.2g} nats per text token of the calibration samples{measured_kl}"
    )
    drawn = width_map(widths)
    if drawn.rows:
        caption = f"Bits of each layer, by block ({UNQUANTIZED_WIDTH}: left as it was)"
        yield WidthsPart(caption, drawn)
    sensitivity = sensitivity_chart(stage, widths)
    yield from _charts([sensitivity] if sensitivity else [], f"sensitivity-{stage}")
    yield FoldedPart("Every layer with what each width would lose", _losses_table(widths.groups))


def _losses_table(groups: Sequence[GroupWidth]) -> Table:
    tried = sorted({width for group in groups for width in group.losses})
    columns = [Column("layers", "code"), Column("width", "number"), Column("bits/weight", "number"), Column("share", "number")]
    columns += [Column(f"loss at {width}", "number") for width in tried]
    weights = sum(group.weights for group in groups)
    rows = [
        (
            ", ".join(group.layers),
            f"{group.width}",
            f"{group.bytes * 8 / group.weights:.2f}",
            share(group.weights / weights),
            *(f"{group.losses[width]:.2g}" if width in group.losses else "" for width in tried),
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
    """Return a recipe as YAML, its keys in their order."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
