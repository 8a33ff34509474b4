"""A run's report: the facts as JSON (schema 1), and the page that people read, rendered from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field

from compress import report_tables as tables
from compress.eval.latency_results import Latency
from compress.eval.results import Fidelity, Grounding, Metrics
from compress.figures import size as size
from compress.gate import Verdict
from compress.report_latency import latency_tables, lowered
from compress.report_tables import listed
from compress.schema import Frozen
from compress.stages.widths import Widths
from compress.tabular import markdown
from compress.verification.results import Verification
from compress.verification.table import answers_table, components_table
from compress.width_table import width_table


class Row(Frozen):
    """One artifact in one runtime; `metrics` and `fidelity` hold each task's figures by the task's name.

    `bytes` are those on disk, `size_ratio` to the original's, `bits_per_weight` the weight files' over the original's weights.
    `target` names where the runtime ran. `noise` is the original's alone: how alike it is to itself, asked again.
    `loaded_with` says what loaded it to be measured, with versions; nothing where a report was written before this was noted.
    """

    artifact: str
    runtime: str
    path: str
    bytes: int
    size_ratio: float
    bits_per_weight: float
    metrics: Mapping[str, Metrics]
    fidelity: Mapping[str, Fidelity] | None
    target: str = "local"
    grounding: Grounding | None = Field(None, validation_alias=AliasChoices("grounding", "liveness"))  # as reports before called it
    noise: Mapping[str, Fidelity] | None = None
    loaded_with: str = ""


class Timing(Frozen):
    """What one step took; a cached one shows what finding it took."""

    step: str
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int
    cached: bool


class Published(Frozen):
    """Where an artifact was published, and whether the gate had to be forced."""

    artifact: str
    path: str
    forced: bool


class Report(Frozen):
    """Everything one run found out."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: str
    run: str
    finished: str
    source: Mapping[str, Any]
    rows: tuple[Row, ...]
    gate: Verdict
    timings: tuple[Timing, ...]
    warnings: tuple[str, ...]
    published: tuple[Published, ...]
    notes: Mapping[str, str]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    runtime_versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    widths: Mapping[str, Widths] = Field(default_factory=lambda: dict[str, Widths]())
    """What stages with `bits: auto` chose, by the stage's name."""
    latency: Mapping[str, Latency] = Field(default_factory=lambda: dict[str, Latency]())
    """What was measured of latency, by target."""
    digests: Mapping[str, str] = Field(default_factory=lambda: dict[str, str]())
    """Of the original's content (`original`) and of each task's settings and data; figures of equal digests can be compared."""

    verifications: Mapping[str, Verification] = Field(default_factory=lambda: dict[str, Verification]())
    """How far artifacts are from the checkpoint that they were exported from, by their names."""

    def to_json(self) -> str:
        """Return the report as `report.json` holds it."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)


def table(rows: Sequence[Row]) -> str:
    """Return the accuracy-against-size table in Markdown."""
    return markdown(tables.results_table(rows))


def fidelity_table(rows: Sequence[Row]) -> str:
    """Return, in Markdown, how alike each artifact's predictions are to the original's, task by task."""
    return markdown(tables.fidelity_table(rows))


def checks(gate: Verdict) -> str:
    """Return the gate's checks as a Markdown list, each with its reason."""
    return "\n".join(f"- **{check.verdict}** · {check.artifact} · {check.check}: {check.reason}" for check in gate.checks)


def checks_of(gate: Verdict, artifact: str) -> str:
    """Return the checks of one artifact alone."""
    return checks(gate.model_copy(update={"checks": tuple(check for check in gate.checks if check.artifact == artifact)}))


def render(report: Report) -> str:
    """Return `report.md`: the verdict first, then the table, what lies behind it, and where it comes from."""
    parts = [f"# {report.name}: {report.gate.verdict}", checks(report.gate), table(report.rows)]
    verified = (components_table(report.verifications), answers_table(report.verifications))
    parts += [f"{each.caption}\n\n{markdown(each)}" for each in verified if each.rows]
    compared = (tables.details_table(report.rows), tables.fidelity_table(report.rows), tables.grounding_table(report.rows))
    parts += [markdown(each) for each in compared if each.rows]
    for target, latency in report.latency.items():
        parts += [f"{each.caption} ({target})\n\n{markdown(each)}" for each in latency_tables(latency)]
        parts += ["\n".join(f"- {line}" for line in said)] if (said := (*lowered(latency), *latency.notes)) else []
    measured = {row.artifact: row.fidelity for row in report.rows if row.fidelity}
    parts += [width_table(stage, widths, measured) for stage, widths in report.widths.items()]
    parts += [f"{name}: {text}" for name, text in report.notes.items()]
    if report.warnings:
        parts.append("\n".join(f"- warning: {warning}" for warning in report.warnings))
    parts.append("\n".join(f"- {line}" if report.published else line for line in published_lines(report)))
    parts.append(markdown(tables.timings_table(report.timings)))
    machine = ", ".join([str(report.hardware["processor"]), *report.hardware["gpus"]])
    facts = [
        f"Source: {origin(report.source)}",
        f"Runtime: {report.rows[0].runtime} ({listed(report.runtime_versions)})",
        f"Versions: {listed(report.versions)}",
        f"Machine: {machine}",
    ]
    parts.append("  \n".join(facts))
    return "\n\n".join(parts) + "\n"


def origin(source: Mapping[str, Any]) -> str:
    """Return where a model came from, in one line."""
    return ", ".join([str(source["source"]), *(f"{key} {value}" for key, value in source.items() if key != "source")])


def published_lines(report: Report) -> tuple[str, ...]:
    """Return where each artifact was published, or why none was."""
    if report.published:
        return tuple(f"published {row.artifact} to {row.path}{_forced(row)}" for row in report.published)
    if not report.recipe.get("publish"):
        return ("Not published: the recipe does not say where to.",)
    return (f"Not published: the gate's verdict is {report.gate.verdict} (--force publishes all the same).",)


def _forced(row: Published) -> str:
    return " by force, though the gate did not pass" if row.forced else ""
