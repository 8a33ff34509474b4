"""A run's report: the data as JSON (schema 1), and `report.md` rendered from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field

from compress.eval.latency.results import Latency
from compress.eval.results import Fidelity, Grounding, Metrics
from compress.gate.gate import Verdict
from compress.recipe.schema import Frozen
from compress.report import run_tables as tables
from compress.report.figures import size as size
from compress.report.latency import latency_tables, lowered
from compress.report.run_tables import format_versions, origin
from compress.report.tabular import markdown
from compress.report.width_table import width_table
from compress.stages.quantization.widths import Widths
from compress.verification.results import Verification
from compress.verification.table import answers_table, components_table


class Row(Frozen):
    """One artifact in one runtime."""

    artifact: str
    runtime: str
    path: str
    bytes: int
    """On disk."""

    size_ratio: float
    """The bytes over the original's."""

    bits_per_weight: float
    """The bits of the weight files per weight of the original."""

    metrics: Mapping[str, Metrics]
    """By task; `fidelity` and `noise` likewise."""

    fidelity: Mapping[str, Fidelity] | None
    """Against the original; None for the original itself."""

    target: str = "local"
    """Where the runtime ran."""

    grounding: Grounding | None = Field(None, validation_alias=AliasChoices("grounding", "liveness"))
    """Earlier reports have it as `liveness`."""

    noise: Mapping[str, Fidelity] | None = None
    """Of the original alone: its second run against its first."""

    loaded_with: str = ""
    """The library that loaded the artifact, with versions; empty in earlier reports."""


class Timing(Frozen):
    """One step's time and peak memory; of a cached step, those of looking it up."""

    step: str
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int
    cached: bool


class Published(Frozen):
    """Where an artifact was published, and whether that was forced although the gate did not pass."""

    artifact: str
    path: str
    forced: bool


class Report(Frozen):
    """All results of one run, with their provenance: the content of `report.json`."""

    # `schema` as a field would hide a method of pydantic's: the JSON key is an alias.
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
    """The bit allocation of stages with `bits: auto`, by the stage's name."""
    latency: Mapping[str, Latency] = Field(default_factory=lambda: dict[str, Latency]())
    """The latency results, by target."""
    digests: Mapping[str, str] = Field(default_factory=lambda: dict[str, str]())
    """Digests of the original's content (`original`) and of each task's settings and data: equal ones make runs comparable."""

    verifications: Mapping[str, Verification] = Field(default_factory=lambda: dict[str, Verification]())
    """The comparison of artifacts with the checkpoint that they were exported from, by name."""

    def to_json(self) -> str:
        """Return the content of `report.json`."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)


def table(rows: Sequence[Row]) -> str:
    """Return the accuracy-against-size table in Markdown."""
    return markdown(tables.results_table(rows))


def fidelity_table(rows: Sequence[Row]) -> str:
    """Return the fidelity table in Markdown."""
    return markdown(tables.fidelity_table(rows))


def checks(gate: Verdict) -> str:
    """Return the gate's checks as a Markdown list, each with its reason."""
    return "\n".join(f"- **{check.verdict}** · {check.artifact} · {check.check}: {check.reason}" for check in gate.checks)


def checks_of(gate: Verdict, artifact: str) -> str:
    """Return the checks of one artifact as a Markdown list."""
    return checks(gate.model_copy(update={"checks": tuple(check for check in gate.checks if check.artifact == artifact)}))


def render(report: Report) -> str:
    """Return `report.md`: the verdict, the results, the details, and the provenance."""
    parts = [f"# {report.name}: {report.gate.verdict}", checks(report.gate), table(report.rows)]
    verification_tables = (components_table(report.verifications), answers_table(report.verifications))
    parts += [f"{table.caption}\n\n{markdown(table)}" for table in verification_tables if table.rows]
    detail_tables = (tables.details_table(report.rows), tables.fidelity_table(report.rows), tables.grounding_table(report.rows))
    parts += [markdown(table) for table in detail_tables if table.rows]
    for target, latency in report.latency.items():
        parts += [f"{table.caption} ({target})\n\n{markdown(table)}" for table in latency_tables(latency)]
        parts += (
            ["\n".join(f"- {line}" for line in latency_notes)] if (latency_notes := (*lowered(latency), *latency.notes)) else []
        )
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
        f"Runtime: {report.rows[0].runtime} ({format_versions(report.runtime_versions)})",
        f"Versions: {format_versions(report.versions)}",
        f"Machine: {machine}",
    ]
    parts.append("  \n".join(facts))
    return "\n\n".join(parts) + "\n"


def published_lines(report: Report) -> tuple[str, ...]:
    """Return where each artifact was published, or the reason why none was."""
    if report.published:
        return tuple(f"published {row.artifact} to {row.path}{_forced(row)}" for row in report.published)
    if not report.recipe.get("publish"):
        return ("Not published: the recipe does not say where to.",)
    return (f"Not published: the gate's verdict is {report.gate.verdict} (--force publishes all the same).",)


def _forced(row: Published) -> str:
    return " by force, though the gate did not pass" if row.forced else ""
