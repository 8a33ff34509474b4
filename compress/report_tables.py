"""The tables of a run's report, each the same in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.eval.results import Fidelity, ScoreMetrics, WholeKl
from compress.figures import asked, bounded, check_values, divergence, kept_value, level_name, metric_value, share, size
from compress.gate import Check, Outcome
from compress.tabular import Column, Table

if TYPE_CHECKING:
    from compress.report import Report, Row, Timing

ORIGINAL = "original"
_WORST_FIRST: tuple[Outcome, ...] = ("fail", "inconclusive", "pass")


def task_names(rows: Iterable[Row]) -> list[str]:
    """Return the names of all tasks of which any row has figures, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def several_targets(rows: Iterable[Row]) -> bool:
    """Return whether the rows were measured on more than one target."""
    return len({row.target for row in rows}) > 1


def originals(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the original's row of each target."""
    return {row.target: row for row in rows if row.artifact == ORIGINAL}


def results_table(rows: Sequence[Row], verdicts: Mapping[str, Outcome] | None = None) -> Table:
    """Return accuracy against size: every artifact's bytes, bits per weight, and each task's figure.

    What is kept of the original's figure stands in brackets; items that failed are counted, and count 0. With `verdicts`, by
    artifact, the gate's decision stands beside the names.
    """
    names, before = task_names(rows), originals(rows)
    columns = [Column("artifact"), Column("verdict", "verdict"), Column("target"), Column("size", "number")]
    columns += [Column("bits/weight", "number"), *(Column(name, "number") for name in names)]
    lines: list[tuple[str, ...]] = []
    for row in rows:
        target = row.target if several_targets(rows) else ""
        own_size = f"{size(row.bytes)} ({row.size_ratio:.1%})"
        values = [_task_value(row, before.get(row.target), name) for name in names]
        verdict = (verdicts or {}).get(row.artifact, "")
        lines.append((row.artifact, verdict, target, own_size, f"{row.bits_per_weight:.2f}", *values))
    note = "In brackets: the share of the original's size and score that is kept, and how many times its perplexity."
    return Table("Accuracy against size", tuple(columns), tuple(lines), note).without_empty()


def _task_value(row: Row, original: Row | None, name: str) -> str:
    metrics = row.metrics.get(name)
    if metrics is None:
        return "not measured"
    before = original.metrics.get(name) if original is not None and original is not row else None
    against = kept_value(before, metrics) if before is not None else ""
    fewer = f", of {asked(metrics):,} items" if before is not None and asked(before) != asked(metrics) else ""
    failed = f", {metrics.failed:,} failed" if metrics.failed else ""
    return metric_value(metrics) + (f" ({against})" if against else "") + fewer + failed


def details_table(rows: Sequence[Row]) -> Table:
    """Return the further figures of tasks, such as recall@5: a line for each, a column for each artifact and target."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for place, row in enumerate(rows):
        for name, metrics in row.metrics.items():
            for figure, value in metrics.details.items() if isinstance(metrics, ScoreMetrics) else ():
                found.setdefault((name, figure), {})[place] = value
    heads = [f"{row.artifact} @{row.target}" if several_targets(rows) else row.artifact for row in rows]
    columns = (Column("task"), Column("figure"), *(Column(head, "number") for head in heads))
    lines = [
        (name, figure, *(f"{values[place]:.4g}" if place in values else "" for place in range(len(rows))))
        for (name, figure), values in found.items()
    ]
    return Table("Further figures of the tasks", columns, tuple(lines))


def fidelity_table(rows: Sequence[Row]) -> Table:
    """Return how alike each artifact's predictions are to the original's, task by task."""
    levels = {found.interval_level for row in rows for found in {**(row.fidelity or {}), **(row.noise or {})}.values()}
    named = level_name(levels.pop() if len(levels) == 1 else None)
    heads = ("KL", named, "KL, whole vocabulary", "KL p99", "same top token", "flips", "other answers")
    columns = (Column("artifact"), Column("target"), Column("task"), *(Column(head, "number") for head in heads))
    several = several_targets(rows)
    lines = [
        (label, row.target if several else "", name, *_fidelity_cells(found))
        for row in rows
        for label, by_task in ((row.artifact, row.fidelity), (f"{ORIGINAL}, asked again", row.noise))
        for name, found in (by_task or {}).items()
    ]
    note = (
        "KL divergence of the original's predictions from the artifact's, in nats per token or image; at least: over the likeliest "
        "tokens and the rest as one, a lower bound. Each bound holds with 95 % confidence, both together with 90 %. A flip is an "
        "item that scores less (lost) or more (gained) than with the original, which is asked again in another order and batch."
    )
    return Table("Fidelity to the original", columns, tuple(lines), note).without_empty()


def _fidelity_cells(found: Fidelity) -> tuple[str, ...]:
    interval = "–".join(divergence(bound) for bound in found.kl_interval) if found.kl_interval else ""
    flips = "" if found.lost is None else f"{found.lost:,} lost, {found.gained or 0:,} gained"
    changed = "" if found.changed is None else f"{found.changed:,}"
    shown = (bounded(found, found.kl_mean), interval, _whole(found.whole), bounded(found, found.kl_p99))
    return *shown, share(found.top1_agreement), flips, changed


def _whole(found: WholeKl | None) -> str:
    if found is None:
        return ""
    bounds = f" ({'–'.join(divergence(bound) for bound in found.kl_interval)})" if found.kl_interval else ""
    return f"{divergence(found.kl_mean)}{bounds} by {found.tokens:,}"


def checks_table(checks: Sequence[Check]) -> Table:
    """Return every check of the gate with its value, interval, limit, verdict and reason; what fails comes first."""
    levels = {check.interval_level for check in checks if check.interval is not None}
    named = level_name(next(iter(levels)) if len(levels) == 1 else None)
    columns = (
        Column("artifact"), Column("check", "code"), Column("verdict", "verdict"), Column("of", "brief"), Column("value", "number"),
        Column(named, "number"), Column("limit", "number"), Column("reason", "prose"),
    )  # fmt: skip
    several = len({check.target for check in checks}) > 1
    by_artifact: dict[str, list[Check]] = {}
    for check in sorted(checks, key=_badness):
        name = f"{check.artifact} @{check.target}" if several else check.artifact
        by_artifact.setdefault(name, []).append(check)
    lines: list[tuple[str, ...]] = []
    for name, own in by_artifact.items():
        for check in own:
            value, interval, limit = check_values(check)
            if interval and len(levels) > 1 and check.interval_level is not None:
                interval = f"{interval} ({100 * check.interval_level:.3g}%)"
            lines.append((name, check.check, check.verdict, check.task or "", value, interval, limit, check.reason))
    return replace(Table("Every check of the gate", columns, tuple(lines)).without_empty(), grouped=True)


def _badness(check: Check) -> int:
    return _WORST_FIRST.index(check.verdict)


def grounding_table(rows: Sequence[Row]) -> Table:
    """Return how much answers depend on the image: the right one, that of another item, none."""
    heads = ("items", "right image", "wrong image", "no image", "answers changed by a wrong image", "by no image", "failed")
    columns = (Column("artifact"), Column("target"), Column("task"), *(Column(head, "number") for head in heads))
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.grounding is not None:
            found = row.grounding
            scores = [_maybe_share(value) for value in (found.score_own, found.score_other, found.score_none)]
            changed = [_maybe_share(value) for value in (found.changed_other, found.changed_none)]
            target = row.target if several_targets(rows) else ""
            failed = f"{found.failed:,}" if found.failed else ""
            lines.append((row.artifact, target, found.task, f"{found.items:,}", *scores, *changed, failed))
    note = "The same questions with their own image, with that of another item, and with none: a live model's score falls."
    return Table("Do answers depend on the image?", columns, tuple(lines), note).without_empty()


def _maybe_share(value: float | None) -> str:
    return "" if value is None else share(value)


def timings_table(timings: Sequence[Timing]) -> Table:
    """Return what each step took."""
    from compress.display import duration

    columns = (Column("step"), Column("time", "number"), Column("peak memory", "number"), Column("cached"))
    lines = [(row.step, duration(row.seconds), _peak(row), "cached" if row.cached else "") for row in timings]
    return Table("What each step took", columns, tuple(lines))


def _peak(row: Timing) -> str:
    if row.cached:
        return ""
    return size(row.peak_host_bytes) + (f", device {size(row.peak_device_bytes)}" if row.peak_device_bytes else "")


def facts_table(report: Report) -> Table:
    """Return where the run's figures come from: model, runtime, versions, machine."""
    return Table("Where it comes from", (Column("what"), Column("which", "prose")), tuple(_facts(report)))


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    from compress.report import origin

    yield "source", origin(report.source)
    for name, digest in report.digests.items():
        yield f"digest of {name}", digest
    yield "runtime", ", ".join(dict.fromkeys(row.runtime for row in report.rows))
    yield "runtime's versions", listed(report.runtime_versions)
    yield "versions", listed(report.versions)
    yield "machine", ", ".join([str(report.hardware["processor"]), *map(str, report.hardware["gpus"])])
    for name, value in report.hardware.items():
        if name not in ("processor", "gpus"):
            yield name.removesuffix("_bytes"), size(float(value)) if name.endswith("_bytes") else str(value)
    yield "run", report.run
    yield "finished", report.finished


def listed(versions: Mapping[str, str]) -> str:
    """Return names with their versions, in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
