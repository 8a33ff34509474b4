"""Several runs side by side: accuracy against size, only where the original and the questions are the same ones."""

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
from compress.eval.results import ScoreMetrics
from compress.figures import item_count, main_figure, recovery
from compress.gate import Outcome
from compress.limits import limits
from compress.report import Report, Row, origin
from compress.report_latency import models_of, shapes_of
from compress.report_tables import ORIGINAL, originals
from compress.untrusted import read_bytes

REPORT = "report.json"


@dataclass(frozen=True)
class Value:
    """A figure of one line: as measured, and how many times the original's it is; None where that says nothing.

    `items` is of how many items it is where that is not of as many as the original's; `at_least` says that it is a lower bound.
    """

    figure: float
    kept: float | None
    failed: int = 0
    items: int | None = None
    at_least: bool = False

    @property
    def distance(self) -> float | None:
        """How far the figure is from the original's, as a ratio either way; None where that is not known."""
        return None if self.kept is None or self.kept <= 0 else abs(math.log(self.kept))


@dataclass(frozen=True)
class Measure:
    """What a column holds: a task's figure, its KL or a latency; `key` tells it from another of the same name.

    `number` is None where no other has the name, otherwise its place among them, from 1. `share` figures are told in per cent;
    `larger` ones are better. A perplexity is better the nearer it is to the original's: one below it is of another model too.
    """

    key: str
    name: str
    number: int | None
    share: bool
    larger: bool
    metric: str
    latency: bool = False
    kl: bool = False

    @property
    def task(self) -> bool:
        """Whether it is a task's own figure, by which lines are better or worse than others."""
        return not self.latency and not self.kl

    @property
    def head(self) -> str:
        """The column's head."""
        return self.name if self.number is None else f"{self.name} ({self.number})"


@dataclass(frozen=True)
class Line:
    """One artifact of one run on one target; `values` are by the measures' keys. `front`: no other is better in all of them."""

    runs: tuple[str, ...]
    artifact: str
    target: str
    runtime: str
    verdict: Outcome | None
    bytes: int
    size_ratio: float
    bits_per_weight: float
    values: Mapping[str, Value]
    front: bool = False

    @property
    def run(self) -> str:
        """The run's name, or of how many runs an original is."""
        return self.runs[0] if len(self.runs) == 1 else f"{len(self.runs)} runs"


@dataclass(frozen=True)
class Group:
    """The lines of all runs of one original."""

    original: str
    digest: str
    measures: tuple[Measure, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs by their originals; `notes` tell what keeps figures from being compared."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]


def read_report(path: Path) -> Report:
    """Read a run's report from its folder or from its `report.json`.

    Raises:
        DataError: there is none, or it cannot be read as one of this version.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        content = read_bytes(file, limits().json_bytes, DataError)
    except FileNotFoundError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); name a run's folder or its {REPORT}") from error
    try:
        return Report.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file}: no report of this version of compress ({place + ': ' if place else ''}{first['msg']}); run its recipe again: "
            "what is stored is not made anew"
        ) from error


def read_reports(paths: Sequence[Path], warn: Callable[[str], None]) -> list[Report]:
    """Read the reports of several runs; a folder without one, as a run that is not done leaves it, is passed over with a warning.

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
    """Put runs side by side, those of one original together, and a task's figures in one column only where it is one task.

    Raises:
        UsageError: there is no run, or one is given twice.
    """
    if not reports:
        raise UsageError("compare: no run is given; name at least one run's folder")
    names = _names(reports)
    by_original: dict[str, list[int]] = {}
    for place, report in enumerate(reports):
        by_original.setdefault(_original_key(report), []).append(place)
    groups: list[Group] = []
    notes: list[str] = []
    for digest, places in by_original.items():
        own = {names[place]: reports[place] for place in places}
        groups.append(_group(digest, own))
        notes += _task_notes(groups[-1], own)
    if len(groups) > 1:
        notes.insert(0, f"These runs began with {len(groups)} different originals; each has a table of its own.")
    return Comparison(tuple(groups), (*notes, *_gate_notes(names, reports), *_other_notes(names, reports)))


def _names(reports: Sequence[Report]) -> list[str]:
    """Return what to call each run: its recipe's name where only one has it, otherwise its folder's."""
    recipes = [report.name for report in reports]
    names = [report.name if recipes.count(report.name) == 1 else Path(report.run).name for report in reports]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UsageError(f"compare: the run {double} is given twice; name each once")
    return names


def _original_key(report: Report) -> str:
    told = report.digests.get(ORIGINAL)
    return told or _digest(report.source, [row.bytes for row in report.rows if row.artifact == ORIGINAL])


def _task_key(report: Report, name: str) -> str:
    """Return what tells a task from others of its name: the digest of its questions and settings, else how the recipe writes it."""
    tasks: object = report.recipe.get("eval", {}).get("tasks")
    return f"{name}/{report.digests.get(name) or _digest(tasks, report.notes.get(name))}"


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _group(digest: str, reports: Mapping[str, Report]) -> Group:
    measures = _measures(reports.values())
    lines = [line for name, report in reports.items() for line in _lines(name, report)]
    merged = _marked(_merged(lines), measures)
    return Group(origin(next(iter(reports.values())).source), digest, measures, tuple(merged))


def _measures(reports: Iterable[Report]) -> tuple[Measure, ...]:
    found: dict[str, Measure] = {}
    for report in reports:
        for row in report.rows:
            for name, metrics in row.metrics.items():
                scored = isinstance(metrics, ScoreMetrics)
                metric = metrics.metric if isinstance(metrics, ScoreMetrics) else "perplexity"
                key = _task_key(report, name)
                found.setdefault(key, Measure(key, name, None, share=scored, larger=scored, metric=metric))
                if any(name in (other.fidelity or {}) for other in report.rows):
                    told = "mean KL from the original in nats"
                    found.setdefault(_kl(key), Measure(_kl(key), f"{name} KL", None, False, False, told, kl=True))
        for label in _loads(report).values():
            metric = f"end to end p95: {label}"
            found.setdefault(label, Measure(label, "p95 latency", None, share=False, larger=False, metric=metric, latency=True))
    heads = [measure.name for measure in found.values()]
    seen: dict[str, int] = {}
    numbered: list[Measure] = []
    for measure in found.values():
        seen[measure.name] = seen.get(measure.name, 0) + 1
        numbered.append(replace(measure, number=seen[measure.name] if heads.count(measure.name) > 1 else None))
    return tuple(sorted(numbered, key=lambda measure: (measure.latency, measure.kl)))


def _kl(key: str) -> str:
    return f"{key}/KL"


def _loads(report: Report) -> dict[str, str]:
    """Return the load at which each target's latency is compared: requests of the first kind, at the fewest at once."""
    found: dict[str, str] = {}
    for target, latency in report.latency.items():
        shapes = shapes_of(latency)
        if shapes:
            fewest = min(row.point.concurrency for row in latency.original.points if row.point.shape == shapes[0])
            found[target] = shapes[0].at(fewest).label
    return found


def _lines(name: str, report: Report) -> Iterator[Line]:
    before = originals(report.rows)
    for row in report.rows:
        values = dict(_values(report, row, before.get(row.target)))
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
        before = original.metrics.get(name) if original is not None else None
        share = recovery(before, metrics) if before is not None else None
        fewer = item_count(metrics) if before is not None and item_count(before) != item_count(metrics) else None
        yield _task_key(report, name), Value(main_figure(metrics), share, metrics.failed, fewer)
    for name, fidelity in (row.fidelity or {}).items():
        whole = fidelity.whole
        kl = Value(fidelity.kl_mean, None, at_least=fidelity.at_least) if whole is None else Value(whole.kl_mean, None)
        yield _kl(_task_key(report, name)), kl


def _latency(report: Report, row: Row) -> dict[str, Value]:
    latency, label = report.latency.get(row.target), _loads(report).get(row.target)
    if latency is None or label is None:
        return {}
    model = models_of(latency).get(row.artifact)
    point = next((each for each in model.points if each.point.label == label), None) if model else None
    if point is None or point.pooled.e2el is None:
        return {}
    ratio = point.ratios.get("e2el_p95")
    same = 1.0 if row.artifact == ORIGINAL else None
    return {label: Value(point.pooled.e2el.p95, ratio.value if ratio else same)}


def _merged(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with an original that came out alike in several runs told once, before all others."""
    found: list[Line] = []
    for line in lines:
        if line.artifact != ORIGINAL:
            continue
        place = next((place for place, other in enumerate(found) if _alike(other, line)), None)
        if place is None:
            found.append(line)
        else:
            other = found[place]
            found[place] = replace(other, runs=(*other.runs, *line.runs), values={**other.values, **line.values})
    return found + [line for line in lines if line.artifact != ORIGINAL]


def _alike(one: Line, other: Line) -> bool:
    """Return whether two lines of the original tell the same wherever both tell something."""
    same = replace(one, runs=other.runs, values=other.values) == other
    return same and all(one.values[key] == other.values[key] for key in one.values.keys() & other.values.keys())


def _marked(lines: Sequence[Line], measures: Sequence[Measure]) -> Iterator[Line]:
    tasks = [measure for measure in measures if measure.task]
    for line in lines:
        yield replace(line, front=not any(_beats(other, line, tasks) for other in lines))


def _beats(other: Line, line: Line, tasks: Sequence[Measure]) -> bool:
    """Return whether a line is no larger and in no task worse than another that was asked the same, and better in something."""
    shared = [measure for measure in tasks if measure.key in line.values]
    if not shared or any(measure.key not in other.values for measure in shared):
        return False
    gains = [float(line.bytes - other.bytes)]
    for measure in shared:
        theirs, own = other.values[measure.key], line.values[measure.key]
        if measure.larger:
            gains.append(theirs.figure - own.figure)
        elif theirs.distance is None or own.distance is None:
            return False
        else:
            gains.append(own.distance - theirs.distance)
    return min(gains) >= 0 and max(gains) > 0


def _task_notes(group: Group, reports: Mapping[str, Report]) -> Iterator[str]:
    for name in dict.fromkeys(measure.name for measure in group.measures if measure.number is not None and not measure.kl):
        parts: list[str] = []
        for measure in group.measures:
            if measure.name == name:
                runs = [run for run, report in reports.items() if _has(report, measure)]
                parts.append(f"{measure.head} in {', '.join(runs)}")
        why = "was put under other loads" if name == "p95 latency" else "asks other questions, or in another way"
        yield f"{name} {why}, so its figures stand in columns of their own: {'; '.join(parts)}."


def _has(report: Report, measure: Measure) -> bool:
    if measure.latency:
        return measure.key in _loads(report).values()
    return any(measure.key == _task_key(report, name) for row in report.rows for name in row.metrics)


def _other_notes(names: Sequence[str], reports: Sequence[Report]) -> Iterator[str]:
    for what, told in (
        (
            "in the same runtime",
            [", ".join(f"{key} {value}" for key, value in report.runtime_versions.items()) for report in reports],
        ),
        ("on the same machine", [", ".join([str(report.hardware.get("processor")), *_gpus(report)]) for report in reports]),
    ):
        if len(set(told)) > 1:
            by_told: dict[str, list[str]] = {}
            for name, each in zip(names, told, strict=True):
                by_told.setdefault(each, []).append(name)
            yield (
                f"Not all were measured {what}: " + "; ".join(f"{', '.join(runs)}: {each}" for each, runs in by_told.items()) + "."
            )


def _gate_notes(names: Sequence[str], reports: Sequence[Report]) -> Iterator[str]:
    """Yield which limits differ between the runs' gates, so that their verdicts do not mean the same."""
    gates = [dict(_limits(report.recipe.get("gate") or {})) for report in reports]
    for limit in dict.fromkeys(name for gate in gates for name in gate):
        by_value: dict[str, list[str]] = {}
        for name, gate in zip(names, gates, strict=True):
            by_value.setdefault(gate.get(limit, "not checked"), []).append(name)
        if len(by_value) > 1:
            told = "; ".join(f"{value} in {', '.join(runs)}" for value, runs in by_value.items())
            yield f"The gates differ, so that one verdict is not the other: {limit}: {told}."


def _limits(gate: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    for key, value in gate.items():
        if isinstance(value, Mapping):
            yield from _limits(cast("Mapping[str, Any]", value), f"{place}{key}.")
        elif value is not None:
            yield f"{place}{key}", f"{value:g}" if isinstance(value, float) else str(value)


def _gpus(report: Report) -> list[str]:
    return [str(gpu) for gpu in report.hardware.get("gpus", ())]
