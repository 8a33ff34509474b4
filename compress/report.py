"""A run's report: the facts as JSON (schema 1), and the page that people read, rendered from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from compress.eval.latency_results import Latency
from compress.eval.results import Fidelity, Liveness, Metrics, ScoreMetrics
from compress.gate import Verdict
from compress.schema import Frozen
from compress.stages.widths import Widths
from compress.width_table import width_table

if TYPE_CHECKING:
    from rich.console import Console


class Row(Frozen):
    """One artifact in one runtime; `metrics` and `fidelity` hold each task's figures by the task's name.

    `bytes` are those on disk, `size_ratio` to the original's, `bits_per_weight` the weight files' over the original's weights.
    `target` names where the runtime ran.
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
    liveness: Liveness | None = None


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

    def to_json(self) -> str:
        """Return the report as `report.json` holds it."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)


def size(count: float) -> str:
    """Return a number of bytes the way people say it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table(rows: tuple[Row, ...]) -> str:
    """Return the accuracy-against-size table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    lines = [_line(["artifact", "size", "bits/weight", *names]), _line(["---", *["---:"] * (2 + len(names))])]
    for row in rows:
        values = [_value(row.metrics[name]) for name in names]
        lines.append(_line([row.artifact, f"{size(row.bytes)} ({row.size_ratio:.1%})", f"{row.bits_per_weight:.2f}", *values]))
    return "\n".join(lines)


def fidelity_table(rows: tuple[Row, ...]) -> str:
    """Return, in Markdown, how alike each artifact's predictions are to the original's, task by task."""
    heads = ["artifact", "task", "KL", "KL p99", "same top token", "flips"]
    lines = [_line(heads), _line(["---", "---", *["---:"] * 4])]
    for row in rows:
        for name, found in (row.fidelity or {}).items():
            flips = "" if found.lost is None else f"{found.lost} lost, {found.gained} gained"
            cells = [f"{found.kl_mean:.2g}", f"{found.kl_p99:.2g}", f"{found.top1_agreement:.2%}", flips]
            lines.append(_line([row.artifact, name, *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _value(metrics: Metrics) -> str:
    return f"{metrics.score:.2%}" if isinstance(metrics, ScoreMetrics) else f"{metrics.perplexity:.4g}"


def checks(gate: Verdict) -> str:
    """Return the gate's checks as a Markdown list, each with its reason."""
    return "\n".join(f"- **{check.verdict}** · {check.artifact} · {check.check}: {check.reason}" for check in gate.checks)


def checks_of(gate: Verdict, artifact: str) -> str:
    """Return the checks of one artifact alone."""
    return checks(gate.model_copy(update={"checks": tuple(check for check in gate.checks if check.artifact == artifact)}))


def render(report: Report) -> str:
    """Return `report.md`: the verdict first, then the table, what lies behind it, and where it comes from."""
    from compress.display import duration

    parts = [f"# {report.name}: {report.gate.verdict}", checks(report.gate), table(report.rows), fidelity_table(report.rows)]
    measured = {row.artifact: row.fidelity for row in report.rows if row.fidelity}
    parts += [width_table(stage, widths, measured) for stage, widths in report.widths.items()]
    parts += [f"{name}: {text}" for name, text in report.notes.items()]
    if report.warnings:
        parts.append("\n".join(f"- warning: {warning}" for warning in report.warnings))
    parts.append("\n".join(_published(row) for row in report.published) or _unpublished(report))
    lines = ["| step | time | peak memory | |", "| --- | ---: | ---: | --- |"]
    for row in report.timings:
        peak = size(row.peak_host_bytes) + (f", device {size(row.peak_device_bytes)}" if row.peak_device_bytes else "")
        lines.append(f"| {row.step} | {duration(row.seconds)} | {'' if row.cached else peak} | {'cached' if row.cached else ''} |")
    parts.append("\n".join(lines))
    machine = ", ".join([str(report.hardware["processor"]), *report.hardware["gpus"]])
    facts = [
        f"Source: {origin(report.source)}",
        f"Runtime: {report.rows[0].runtime} ({_listed(report.runtime_versions)})",
        f"Versions: {_listed(report.versions)}",
        f"Machine: {machine}",
    ]
    parts.append("  \n".join(facts))
    return "\n\n".join(parts) + "\n"


def origin(source: Mapping[str, Any]) -> str:
    """Return where a model came from, in one line."""
    return ", ".join([str(source["source"]), *(f"{key} {value}" for key, value in source.items() if key != "source")])


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _unpublished(report: Report) -> str:
    if not report.recipe.get("publish"):
        return "Not published: the recipe does not say where to."
    return f"Not published: the gate's verdict is {report.gate.verdict} (--force publishes all the same)."


def _published(row: Published) -> str:
    forced = " by force, though the gate did not pass" if row.forced else ""
    return f"- published {row.artifact} to {row.path}{forced}"


def show(report: Report, console: Console) -> None:
    """Print the report's page and, last, the run's folder."""
    from rich.markdown import Markdown

    page = render(report)
    if console.is_terminal:
        console.print(Markdown(page), soft_wrap=False)
    else:
        console.print(page, markup=False, highlight=False)
    console.print(report.run, markup=False, highlight=False)
