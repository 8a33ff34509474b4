"""The tables of a run's report, each the same in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.eval.results import Fidelity, WholeKl
from compress.gate.gate import Check, Outcome
from compress.report.figures import (
    check_values,
    divergence,
    duration,
    format_kl,
    format_recovery,
    level_name,
    metric_value,
    share,
    size,
)
from compress.report.tabular import Column, Table

if TYPE_CHECKING:
    from compress.report.model import Report, Row, Timing

ORIGINAL = "original"
"""The artifact name of the original's rows."""

_WORST_FIRST: tuple[Outcome, ...] = ("fail", "inconclusive", "pass")


def task_names(rows: Iterable[Row]) -> list[str]:
    """Return the names of the tasks with metrics in any row, in order."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def has_several_targets(rows: Iterable[Row]) -> bool:
    """Return whether the rows were measured on more than one target."""
    return len({row.target for row in rows}) > 1


def originals(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the original's row of each target."""
    return {row.target: row for row in rows if row.artifact == ORIGINAL}


def results_table(rows: Sequence[Row], verdicts: Mapping[str, Outcome] | None = None) -> Table:
    """Return accuracy against size: every artifact's bytes, bits per weight, and each task's figure.

    The recovery is in brackets, followed by the number of failed items, which score 0. `verdicts` holds the gate's outcomes by
    artifact.
    """
    names, originals_by_target = task_names(rows), originals(rows)
    columns = [Column("artifact"), Column("verdict", "verdict"), Column("target"), Column("size", "number")]
    columns += [Column("bits/weight", "number"), *(Column(name, "number") for name in names)]
    lines: list[tuple[str, ...]] = []
    for row in rows:
        target = row.target if has_several_targets(rows) else ""
        size_cell = f"{size(row.bytes)} ({row.size_ratio:.1%})"
        values = [_task_value(row, originals_by_target.get(row.target), name) for name in names]
        verdict = (verdicts or {}).get(row.artifact, "")
        lines.append((row.artifact, verdict, target, size_cell, f"{row.bits_per_weight:.2f}", *values))
    note = "In brackets: the share of the original's size and score that is kept, and how many times its perplexity."
    return Table("Accuracy against size", tuple(columns), tuple(lines), note).without_empty()


def _task_value(row: Row, original: Row | None, name: str) -> str:
    metrics = row.metrics.get(name)
    if metrics is None:
        return "not measured"
    original_metrics = original.metrics.get(name) if original is not None and original is not row else None
    recovery = format_recovery(original_metrics, metrics) if original_metrics is not None else ""
    fewer_note = f", of {metrics.count:,} items" if original_metrics is not None and original_metrics.count != metrics.count else ""
    failed_note = f", {metrics.failed:,} failed" if metrics.failed else ""
    return metric_value(metrics) + (f" ({recovery})" if recovery else "") + fewer_note + failed_note


def details_table(rows: Sequence[Row]) -> Table:
    """Return the further figures of tasks, such as recall@5: a row for each, a column for each artifact and target."""
    values_of: dict[tuple[str, str], dict[int, float]] = {}
    for index, row in enumerate(rows):
        for name, metrics in row.metrics.items():
            for figure, value in metrics.details.items():
                values_of.setdefault((name, figure), {})[index] = value
    heads = [f"{row.artifact} @{row.target}" if has_several_targets(rows) else row.artifact for row in rows]
    columns = (Column("task"), Column("figure"), *(Column(head, "number") for head in heads))
    lines = [
        (name, figure, *(f"{values[index]:.4g}" if index in values else "" for index in range(len(rows))))
        for (name, figure), values in values_of.items()
    ]
    return Table("Further figures of the tasks", columns, tuple(lines))


def fidelity_table(rows: Sequence[Row]) -> Table:
    """Return each artifact's KL, top-1 agreement and flips against the original, task by task."""
    levels = {fidelity.interval_level for row in rows for fidelity in {**(row.fidelity or {}), **(row.noise or {})}.values()}
    interval_head = level_name(levels.pop() if len(levels) == 1 else None)
    heads = ("KL", interval_head, "KL, whole vocabulary", "KL p99", "same top token", "flips", "other answers")
    columns = (Column("artifact"), Column("target"), Column("task"), *(Column(head, "number") for head in heads))
    show_target = has_several_targets(rows)
    lines = [
        (label, row.target if show_target else "", name, *_fidelity_cells(fidelity))
        for row in rows
        for label, by_task in ((row.artifact, row.fidelity), (f"{ORIGINAL}, asked again", row.noise))
        for name, fidelity in (by_task or {}).items()
    ]
    note = (
        "KL divergence of the original's predictions from the artifact's, in nats per token or image; at least: over the likeliest "
        "tokens and the rest as one, a lower bound. Each bound holds with 95 % confidence, both together with 90 %. A flip is an "
        "item that scores less (lost) or more (gained) than with the original, which is asked again in another order and batch."
    )
    return Table("Fidelity to the original", columns, tuple(lines), note).without_empty()


def _fidelity_cells(fidelity: Fidelity) -> tuple[str, ...]:
    interval = "–".join(divergence(bound) for bound in fidelity.kl_interval) if fidelity.kl_interval else ""
    flips = "" if fidelity.lost is None else f"{fidelity.lost:,} lost, {fidelity.gained or 0:,} gained"
    changed = "" if fidelity.changed is None else f"{fidelity.changed:,}"
    kl_cells = (format_kl(fidelity, fidelity.kl_mean), interval, _full_kl(fidelity.whole), format_kl(fidelity, fidelity.kl_p99))
    return *kl_cells, share(fidelity.top1_agreement), flips, changed


def _full_kl(full: WholeKl | None) -> str:
    if full is None:
        return ""
    interval = f" ({'–'.join(divergence(bound) for bound in full.kl_interval)})" if full.kl_interval else ""
    return f"{divergence(full.kl_mean)}{interval} by {full.tokens:,}"


def checks_table(checks: Sequence[Check]) -> Table:
    """Return every check of the gate with its value, interval, limit, verdict and reason; failed ones come first."""
    levels = {check.interval_level for check in checks if check.interval is not None}
    interval_head = level_name(next(iter(levels)) if len(levels) == 1 else None)
    columns = (
        Column("artifact"), Column("check", "code"), Column("verdict", "verdict"), Column("of", "brief"), Column("value", "number"),
        Column(interval_head, "number"), Column("limit", "number"), Column("reason", "prose"),
    )  # fmt: skip
    show_target = len({check.target for check in checks}) > 1
    by_artifact: dict[str, list[Check]] = {}
    for check in sorted(checks, key=_severity):
        name = f"{check.artifact} @{check.target}" if show_target else check.artifact
        by_artifact.setdefault(name, []).append(check)
    lines: list[tuple[str, ...]] = []
    for name, artifact_checks in by_artifact.items():
        for check in artifact_checks:
            value, interval, limit = check_values(check)
            if interval and len(levels) > 1 and check.interval_level is not None:
                interval = f"{interval} ({100 * check.interval_level:.3g}%)"
            lines.append((name, check.check, check.verdict, check.task or "", value, interval, limit, check.reason))
    return replace(Table("Every check of the gate", columns, tuple(lines)).without_empty(), grouped=True)


def _severity(check: Check) -> int:
    # `sorted` is stable: within a verdict checks keep the gate's order.
    return _WORST_FIRST.index(check.verdict)


def grounding_table(rows: Sequence[Row]) -> Table:
    """Return the visual grounding figures: scores with the own image, with another item's, and with none."""
    heads = ("items", "right image", "wrong image", "no image", "answers changed by a wrong image", "by no image", "failed")
    columns = (Column("artifact"), Column("target"), Column("task"), *(Column(head, "number") for head in heads))
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.grounding is not None:
            grounding = row.grounding
            scores = [_optional_share(value) for value in (grounding.score_own, grounding.score_other, grounding.score_none)]
            changed = [_optional_share(value) for value in (grounding.changed_other, grounding.changed_none)]
            target = row.target if has_several_targets(rows) else ""
            failed = f"{grounding.failed:,}" if grounding.failed else ""
            lines.append((row.artifact, target, grounding.task, f"{grounding.items:,}", *scores, *changed, failed))
    note = "The same questions with their own image, with that of another item, and with none: a live model's score falls."
    return Table("Do answers depend on the image?", columns, tuple(lines), note).without_empty()


def _optional_share(value: float | None) -> str:
    return "" if value is None else share(value)


def timings_table(timings: Sequence[Timing]) -> Table:
    """Return each step's time and peak memory."""
    columns = (Column("step"), Column("time", "number"), Column("peak memory", "number"), Column("cached"))
    lines = [(row.step, duration(row.seconds), _peak(row), "cached" if row.cached else "") for row in timings]
    return Table("What each step took", columns, tuple(lines))


def _peak(row: Timing) -> str:
    if row.cached:
        return ""
    return size(row.peak_host_bytes) + (f", device {size(row.peak_device_bytes)}" if row.peak_device_bytes else "")


def facts_table(report: Report) -> Table:
    """Return the provenance of the run's figures: model, runtime, versions, machine."""
    return Table("Where it comes from", (Column("what"), Column("which", "prose")), tuple(_facts(report)))


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "source", origin(report.source)
    for name, digest in report.digests.items():
        yield f"digest of {name}", digest
    yield "runtime", ", ".join(dict.fromkeys(row.runtime for row in report.rows))
    yield "runtime's versions", format_versions(report.runtime_versions)
    yield "versions", format_versions(report.versions)
    yield "machine", ", ".join([str(report.hardware["processor"]), *map(str, report.hardware["gpus"])])
    for name, value in report.hardware.items():
        if name not in ("processor", "gpus"):
            yield name.removesuffix("_bytes"), size(float(value)) if name.endswith("_bytes") else str(value)
    yield "run", report.run
    yield "finished", report.finished


def origin(source: Mapping[str, Any]) -> str:
    """Return a model's source and revision, in one line."""
    return ", ".join([str(source["source"]), *(f"{key} {value}" for key, value in source.items() if key != "source")])


def format_versions(versions: Mapping[str, str]) -> str:
    """Return names with their versions, comma-separated."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
