"""Comparison of runs: accuracy against size, for runs of the same original on the same questions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from compress.errors import DataError, UsageError
from compress.gate.gate import Outcome
from compress.report.figures import recovery
from compress.report.latency import lowest_load, models_of
from compress.report.model import Report, Row
from compress.report.run_tables import ORIGINAL, origin, originals
from compress.untrusted.limits import limits
from compress.untrusted.reading import read_bytes

REPORT = "report.json"


@dataclass(frozen=True)
class Value:
    """A figure of one line; field names are keys of the comparison's JSON, as those of the records below."""

    figure: float
    kept: float | None
    """The figure over the original's, None where they cannot be compared."""

    failed: int = 0
    items: int | None = None
    """The number of items where it is not the original's."""

    at_least: bool = False
    """Whether the figure is a lower bound."""

    @property
    def distance(self) -> float | None:
        """The absolute log ratio to the original's figure; None where it is unknown."""
        return None if self.kept is None or self.kept <= 0 else abs(math.log(self.kept))


@dataclass(frozen=True)
class Measure:
    """The figure of a column: a task's score or perplexity, its KL, or a latency."""

    key: str
    """Identifies the column among those of the same name."""

    name: str
    number: int | None
    """Its number among columns of the same name, from 1; None where the name is unique."""

    share: bool
    """Whether it is shown in per cent."""

    larger: bool
    """Whether larger is better. A perplexity is better the nearer it is to the original's: a lower one is another model's too."""

    metric: str
    latency: bool = False
    kl: bool = False

    @property
    def task(self) -> bool:
        """Whether it is a task's own figure, by which lines are ranked."""
        return not self.latency and not self.kl

    @property
    def head(self) -> str:
        """The column's head."""
        return self.name if self.number is None else f"{self.name} ({self.number})"


@dataclass(frozen=True)
class Line:
    """One artifact of one run on one target."""

    runs: tuple[str, ...]
    """The run's name; of an original, those of all runs with equal figures of it."""

    artifact: str
    target: str
    runtime: str
    verdict: Outcome | None
    bytes: int
    size_ratio: float
    bits_per_weight: float
    values: Mapping[str, Value]
    """By the measures' keys."""

    front: bool = False
    """Whether it is on the Pareto front of size and the tasks' figures."""

    @property
    def run(self) -> str:
        """The run's name, or the number of runs that share the original."""
        return self.runs[0] if len(self.runs) == 1 else f"{len(self.runs)} runs"


@dataclass(frozen=True)
class Group:
    """The comparison of all runs of one original."""

    original: str
    digest: str
    measures: tuple[Measure, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs grouped by original; `notes` name the figures that are not comparable."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]


def read_report(path: Path) -> Report:
    """Read a run's report from its folder or from its `report.json`.

    Raises:
        DataError: there is none, or it cannot be read as one of this version.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        # A report to compare may come from anyone.
        content = read_bytes(file, limits().json_bytes, DataError)
    except FileNotFoundError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); name a run's folder or its {REPORT}") from error
    try:
        return Report.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file}: no report of this version of compress ({location + ': ' if location else ''}{first['msg']}); run its recipe "
            "again: what is stored is not made anew"
        ) from error


def read_reports(paths: Sequence[Path], warn: Callable[[str], None]) -> list[Report]:
    """Read the reports of several runs; a folder without one, as of an unfinished run, is skipped with a warning.

    Raises:
        DataError: no folder has a report, or one cannot be read.
    """
    without = [path for path in paths if path.is_dir() and not (path / REPORT).exists()]
    for path in without:
        warn(f"{path}: has no {REPORT} and is passed over; a run has one once it is done")
    if without and len(without) == len(paths):
        raise DataError(f"none of the {len(paths)} folders has a {REPORT}; name runs that are done")
    return [read_report(path) for path in paths if path not in without]


def compare(reports: Sequence[Report]) -> Comparison:
    """Compare runs, grouped by original; a task's figures share a column only where its questions and settings are equal.

    Raises:
        UsageError: there is no run, or one is given twice.
    """
    if not reports:
        raise UsageError("compare: no run is given; name at least one run's folder")
    names = _names(reports)
    by_original: dict[str, list[int]] = {}
    for index, report in enumerate(reports):
        by_original.setdefault(_original_key(report), []).append(index)
    groups: list[Group] = []
    notes: list[str] = []
    for digest, indices in by_original.items():
        group_reports = {names[index]: reports[index] for index in indices}
        groups.append(_group(digest, group_reports))
        notes += _task_notes(groups[-1], group_reports)
    if len(groups) > 1:
        notes.insert(0, f"These runs began with {len(groups)} different originals; each has a table of its own.")
    return Comparison(tuple(groups), (*notes, *_gate_notes(names, reports), *_other_notes(names, reports)))


def _names(reports: Sequence[Report]) -> list[str]:
    """Return each run's name: its recipe's where that is unique, otherwise its folder's."""
    recipes = [report.name for report in reports]
    names = [report.name if recipes.count(report.name) == 1 else Path(report.run).name for report in reports]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise UsageError(f"compare: the run {duplicate} is given twice; name each once")
    return names


def _original_key(report: Report) -> str:
    digest = report.digests.get(ORIGINAL)
    # Reports of versions without digests: source and size stand in.
    return digest or _digest(report.source, [row.bytes for row in report.rows if row.artifact == ORIGINAL])


def _task_key(report: Report, name: str) -> str:
    """Return a task's key: the digest of its questions and settings, or in reports without one that of its text in the recipe."""
    tasks: object = report.recipe.get("eval", {}).get("tasks")
    return f"{name}/{report.digests.get(name) or _digest(tasks, report.notes.get(name))}"


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _group(digest: str, reports: Mapping[str, Report]) -> Group:
    measures = _measures(reports.values())
    lines = [line for name, report in reports.items() for line in _lines(name, report)]
    merged = _mark_front(_merge_originals(lines), measures)
    return Group(origin(next(iter(reports.values())).source), digest, measures, tuple(merged))


def _measures(reports: Iterable[Report]) -> tuple[Measure, ...]:
    measures: dict[str, Measure] = {}
    for report in reports:
        for row in report.rows:
            for name, metrics in row.metrics.items():
                key, record = _task_key(report, name), metrics.record
                measure = Measure(key, name, None, record.percent, record.larger_is_better, metrics.metric)
                measures.setdefault(key, measure)
                if any(name in (other.fidelity or {}) for other in report.rows):
                    metric_text = "mean KL from the original in nats"
                    measures.setdefault(_kl_key(key), Measure(_kl_key(key), f"{name} KL", None, False, False, metric_text, kl=True))
        for label in _compared_loads(report).values():
            metric = f"end to end p95: {label}"
            measures.setdefault(label, Measure(label, "p95 latency", None, share=False, larger=False, metric=metric, latency=True))
    heads = [measure.name for measure in measures.values()]
    counts: dict[str, int] = {}
    numbered: list[Measure] = []
    for measure in measures.values():
        counts[measure.name] = counts.get(measure.name, 0) + 1
        numbered.append(replace(measure, number=counts[measure.name] if heads.count(measure.name) > 1 else None))
    return tuple(sorted(numbered, key=lambda measure: (measure.latency, measure.kl)))


def _kl_key(key: str) -> str:
    return f"{key}/KL"


def _compared_loads(report: Report) -> dict[str, str]:
    """Return the load at which each target's latency is compared."""
    loads = {target: lowest_load(latency) for target, latency in report.latency.items()}
    return {target: load.label for target, load in loads.items() if load is not None}


def _lines(name: str, report: Report) -> Iterator[Line]:
    originals_by_target = originals(report.rows)
    for row in report.rows:
        values = dict(_values(report, row, originals_by_target.get(row.target)))
        yield Line(
            runs=(name,),
            artifact=row.artifact,
            target=row.target,
            runtime=row.runtime,
            verdict=report.gate.artifacts.get(row.artifact),
            bytes=row.bytes,
            size_ratio=row.size_ratio,
            bits_per_weight=row.bits_per_weight,
            values=values | _latency(report, row),
        )


def _values(report: Report, row: Row, original: Row | None) -> Iterator[tuple[str, Value]]:
    for name, metrics in row.metrics.items():
        original_metrics = original.metrics.get(name) if original is not None else None
        ratio = recovery(original_metrics, metrics) if original_metrics is not None else None
        items = metrics.count if original_metrics is not None and original_metrics.count != metrics.count else None
        yield _task_key(report, name), Value(metrics.figure, ratio, metrics.failed, items)
    for name, fidelity in (row.fidelity or {}).items():
        full = fidelity.whole
        kl = Value(fidelity.kl_mean, None, at_least=fidelity.at_least) if full is None else Value(full.kl_mean, None)
        yield _kl_key(_task_key(report, name)), kl


def _latency(report: Report, row: Row) -> dict[str, Value]:
    latency, label = report.latency.get(row.target), _compared_loads(report).get(row.target)
    if latency is None or label is None:
        return {}
    model = models_of(latency).get(row.artifact)
    point = next((each for each in model.points if each.point.label == label), None) if model else None
    if point is None or point.pooled.e2el is None:
        return {}
    ratio = point.ratios.get("e2el_p95")
    own_ratio = 1.0 if row.artifact == ORIGINAL else None
    return {label: Value(point.pooled.e2el.p95, ratio.value if ratio else own_ratio)}


def _merge_originals(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with originals of equal figures merged, before all others."""
    merged: list[Line] = []
    for line in lines:
        if line.artifact != ORIGINAL:
            continue
        index = next((index for index, other in enumerate(merged) if _equal_values(other, line)), None)
        if index is None:
            merged.append(line)
        else:
            other = merged[index]
            merged[index] = replace(other, runs=(*other.runs, *line.runs), values={**other.values, **line.values})
    return merged + [line for line in lines if line.artifact != ORIGINAL]


def _equal_values(one: Line, other: Line) -> bool:
    """Return whether two lines of the original have equal values wherever both have one."""
    same = replace(one, runs=other.runs, values=other.values) == other
    return same and all(one.values[key] == other.values[key] for key in one.values.keys() & other.values.keys())


def _mark_front(lines: Sequence[Line], measures: Sequence[Measure]) -> Iterator[Line]:
    tasks = [measure for measure in measures if measure.task]
    for line in lines:
        # The originals are among the others: an artifact that is larger and worse than its original is not in front.
        yield replace(line, front=not any(_dominates(other, line, tasks) for other in lines))


def _dominates(other: Line, line: Line, tasks: Sequence[Measure]) -> bool:
    """Return whether `other` dominates `line`: it has all its tasks, is nowhere worse, and better in size or a task."""
    shared = [measure for measure in tasks if measure.key in line.values]
    # A line that lacks a task cannot be said to be as good in it.
    if not shared or any(measure.key not in other.values for measure in shared):
        return False
    gains = [float(line.bytes - other.bytes)]
    for measure in shared:
        other_value, line_value = other.values[measure.key], line.values[measure.key]
        if measure.larger:
            gains.append(other_value.figure - line_value.figure)
        elif other_value.distance is None or line_value.distance is None:
            return False
        else:
            gains.append(line_value.distance - other_value.distance)
    return min(gains) >= 0 and max(gains) > 0


def _task_notes(group: Group, reports: Mapping[str, Report]) -> Iterator[str]:
    for name in dict.fromkeys(measure.name for measure in group.measures if measure.number is not None and not measure.kl):
        parts: list[str] = []
        for measure in group.measures:
            if measure.name == name:
                runs = [run for run, report in reports.items() if _has_measure(report, measure)]
                parts.append(f"{measure.head} in {', '.join(runs)}")
        reason = "was put under other loads" if name == "p95 latency" else "asks other questions, or in another way"
        yield f"{name} {reason}, so its figures stand in columns of their own: {'; '.join(parts)}."


def _has_measure(report: Report, measure: Measure) -> bool:
    if measure.latency:
        return measure.key in _compared_loads(report).values()
    return any(measure.key == _task_key(report, name) for row in report.rows for name in row.metrics)


def _other_notes(names: Sequence[str], reports: Sequence[Report]) -> Iterator[str]:
    for condition, values in (
        (
            "in the same runtime",
            [", ".join(f"{key} {value}" for key, value in report.runtime_versions.items()) for report in reports],
        ),
        ("on the same machine", [", ".join([str(report.hardware.get("processor")), *_gpus(report)]) for report in reports]),
    ):
        if len(set(values)) > 1:
            runs_by_value: dict[str, list[str]] = {}
            for name, value in zip(names, values, strict=True):
                runs_by_value.setdefault(value, []).append(name)
            yield (
                f"Not all were measured {condition}: "
                + "; ".join(f"{', '.join(runs)}: {value}" for value, runs in runs_by_value.items())
                + "."
            )


def _gate_notes(names: Sequence[str], reports: Sequence[Report]) -> Iterator[str]:
    """Yield the limits that differ between the runs' gates, so that their verdicts are not comparable."""
    gates = [dict(_limits(report.recipe.get("gate") or {})) for report in reports]
    for limit in dict.fromkeys(name for gate in gates for name in gate):
        by_value: dict[str, list[str]] = {}
        for name, gate in zip(names, gates, strict=True):
            by_value.setdefault(gate.get(limit, "not checked"), []).append(name)
        if len(by_value) > 1:
            differences = "; ".join(f"{value} in {', '.join(runs)}" for value, runs in by_value.items())
            yield f"The gates differ, so that one verdict is not the other: {limit}: {differences}."


def _limits(gate: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in gate.items():
        if isinstance(value, Mapping):
            yield from _limits(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", f"{value:g}" if isinstance(value, float) else str(value)


def _gpus(report: Report) -> list[str]:
    return [str(gpu) for gpu in report.hardware.get("gpus", ())]
