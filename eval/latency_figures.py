"""From the times of single requests to percentiles, rates, goodput, and how sure they and their ratios are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.eval.latency import LatencyGoal
from compress.eval.latency_results import FIGURES, RATES, STATISTICS, Estimate, LoadResult, Percentiles
from compress.eval.load_generator import Load

Floats = NDArray[np.float64]

_MILLISECONDS = 1000.0
_REPLICATES = 200
_LEAST = 1e-12
_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_LARGEST_TABLE = 2**22
"""How many times between tokens are drawn at once."""


@dataclass(frozen=True)
class Times:
    """The times of one load's requests in milliseconds, NaN where one failed, `gaps` between tokens; and what the rates are from.

    `shares` are the seconds of the whole load that each request stands for: its own time's share of all requests' time. Resampled
    with the requests, they give the rates of a closed loop (Little's law).
    """

    ttft: Floats
    tpot: Floats
    e2el: Floats
    gaps: tuple[Floats, ...]
    tokens: Floats
    answered: NDArray[np.bool_]
    good: NDArray[np.bool_] | None
    shares: Floats


def times_of(load: Load, goal: LatencyGoal | None) -> Times:
    """Return the times of a load's requests; a request of a single token has no time per further token."""
    answered = np.array([sample.fault is None for sample in load.samples], dtype=np.bool_)
    tokens = np.array([sample.tokens for sample in load.samples], dtype=np.float64)
    ttft = np.array([sample.ttft for sample in load.samples]) * _MILLISECONDS
    e2el = np.array([sample.seconds for sample in load.samples]) * _MILLISECONDS
    further = np.where(tokens > 1, tokens - 1, np.nan)
    tpot = (e2el - ttft) / further
    good = None
    if goal is not None:
        figures = {"ttft": ttft, "tpot": np.nan_to_num(tpot), "e2el": e2el}
        good = answered & np.all([figures[name] <= limit for name, limit in goal.limits.items()], axis=0)
    total = float(e2el[answered].sum())
    shares = np.where(answered, e2el, 0.0) * (load.seconds / total if total else 0.0)
    masked = {name: np.where(answered, values, np.nan) for name, values in (("ttft", ttft), ("tpot", tpot), ("e2el", e2el))}
    gaps = tuple(np.array(sample.between_tokens) * _MILLISECONDS for sample in load.samples)
    return Times(**masked, gaps=gaps, tokens=tokens, answered=answered, good=good, shares=shares)


def summarize(load: Load, goal: LatencyGoal | None) -> LoadResult:
    """Return a load's figures."""
    times = times_of(load, goal)
    answered = int(times.answered.sum())
    good = None if times.good is None else int(times.good.sum())
    faults = Counter(sample.fault for sample in load.samples if sample.fault is not None)
    seconds = max(load.seconds, _LEAST)
    return LoadResult(
        requests=len(load.samples),
        failed=len(load.samples) - answered,
        seconds=load.seconds,
        ttft=_percentiles(times.ttft),
        tpot=_percentiles(times.tpot),
        itl=_percentiles(_all(times.gaps)),
        e2el=_percentiles(times.e2el),
        request_rate=answered / seconds,
        output_token_rate=float(times.tokens[times.answered].sum()) / seconds,
        goodput=None if good is None else good / seconds,
        within_goal=None if good is None else good / max(len(load.samples), 1),
        faults=dict(faults),
        client=load.client,
    )


def pool(loads: Sequence[Load]) -> Load:
    """Return several loads as one."""
    samples = tuple(sample for load in loads for sample in load.samples)
    return Load(samples, sum(load.seconds for load in loads), loads[0].client)


def estimates(loads: Sequence[Load], goal: LatencyGoal | None, confidence: float) -> dict[str, Estimate]:
    """Return every figure of a model over its rounds, with bounds, by its name: `ttft_p50`, …, the rates, `goodput`."""
    rounds = [_logs(times_of(load, goal), _draw(load, number)) for number, load in enumerate(loads)]
    values = _values(summarize(pool(loads), goal))
    return {name: _estimate(values[name], [logs.get(name) for logs in rounds], confidence) for name in values}


def ratios(original: Sequence[Load], artifact: Sequence[Load], goal: LatencyGoal | None, confidence: float) -> dict[str, Estimate]:
    """Return every figure of the artifact over the original's, with bounds, from rounds in which both got the same requests.

    In each round both models' requests are drawn anew together (the bootstrap), which gives the spread of that round's ratio; the
    rounds' ratios tell how much a server differs from one start to the next. See `_estimate`.
    """
    rounds: list[dict[str, Floats]] = []
    for number, (before, after) in enumerate(zip(original, artifact, strict=True)):
        draw = _draw(before, number)
        first, second = _logs(times_of(before, goal), draw), _logs(times_of(after, goal), draw)
        with np.errstate(invalid="ignore"):  # where both are nothing, their ratio is none
            rounds.append({name: second[name] - first[name] for name in first.keys() & second.keys()})
    before_values, after_values = _values(summarize(pool(original), goal)), _values(summarize(pool(artifact), goal))
    names = [name for name in before_values if name in after_values and before_values[name] > 0]
    return {
        name: _estimate(after_values[name] / before_values[name], [logs.get(name) for logs in rounds], confidence) for name in names
    }


def _estimate(value: float, rounds: Sequence[Floats | None], confidence: float) -> Estimate:
    """Return a figure with its bounds, from the logarithms of each round: first as measured, then of requests drawn anew.

    The variance of a round is what the drawing gives, and beyond it what the rounds differ by. The bounds are Student's, with as
    many degrees of freedom as the part that stems from the few rounds leaves (Satterthwaite, Biometrics Bulletin 2, 1946).
    """
    known = [logs for logs in rounds if logs is not None and bool(np.isfinite(logs).all())]
    if len(known) < len(rounds) or len(known) < 2 or value <= 0:
        return Estimate(value=value)
    from scipy.special import stdtrit

    number = len(known)
    within = float(np.mean([logs[1:].var() for logs in known]))
    between = max(float(np.var([logs[0] for logs in known], ddof=1)) - within, 0.0)
    total = within + between
    freedom = (number - 1) * (total / between) ** 2 if between > _LEAST else math.inf
    reach = float(stdtrit(min(freedom, 1e6), confidence)) * math.sqrt(total / number)
    return Estimate(value=value, interval=(value * math.exp(-min(reach, 50.0)), value * math.exp(min(reach, 50.0))))


def _draw(load: Load, number: int) -> NDArray[np.int64]:
    """Return the requests drawn for each replicate [replicates + 1, requests]; the first row is the requests as they are."""
    count = len(load.samples)
    random = np.random.default_rng([number, count])
    return np.vstack([np.arange(count), random.integers(0, count, (_REPLICATES, count))])


def _logs(times: Times, draw: NDArray[np.int64]) -> dict[str, Floats]:
    """Return the logarithm of each figure for each row of `draw`; NaN or infinite where it has none."""
    found: dict[str, Floats] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, values in (("ttft", times.ttft), ("tpot", times.tpot), ("e2el", times.e2el)):
            found |= {f"{name}_{statistic}": np.log(rows) for statistic, rows in _statistics(values[draw]).items()}
        found |= _gap_logs(times, draw)
        seconds = times.shares[draw].sum(axis=1)
        found["request_rate"] = np.log(times.answered[draw].sum(axis=1) / seconds)
        found["output_token_rate"] = np.log(np.where(times.answered, times.tokens, 0.0)[draw].sum(axis=1) / seconds)
        if times.good is not None:
            found["goodput"] = np.log(times.good[draw].sum(axis=1) / seconds)
    return found


def _gap_logs(times: Times, draw: NDArray[np.int64]) -> dict[str, Floats]:
    """Return the same of the times between tokens, of which each request has its own number."""
    longest = max((len(gaps) for gaps in times.gaps), default=0)
    table = np.full((len(times.gaps), longest), np.nan)
    for row, gaps in zip(table, times.gaps, strict=True):
        row[: len(gaps)] = gaps
    step = max(_LARGEST_TABLE // max(table.size, 1), 1)
    parts = [_statistics(table[rows].reshape(len(rows), -1)) for rows in (draw[at : at + step] for at in range(0, len(draw), step))]
    return {f"itl_{name}": np.log(np.concatenate([part[name] for part in parts])) for name in STATISTICS}


def _statistics(rows: Floats) -> dict[str, Floats]:
    """Return the mean and the percentiles of each row, NaN left out; NaN where a row holds nothing else."""
    rows = np.sort(rows, axis=1)  # NaN last
    if not rows.shape[1]:
        return {name: np.full(len(rows), np.nan) for name in STATISTICS}
    known = np.isfinite(rows).sum(axis=1)
    found = {"mean": np.where(known > 0, np.nansum(rows, axis=1) / np.maximum(known, 1), np.nan)}
    for name, share in _SHARES.items():
        place = np.maximum(known - 1, 0) * share
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, np.maximum(known - 1, 0))
        below, above = (np.take_along_axis(rows, where[:, None], axis=1)[:, 0] for where in (low, high))
        found[name] = below + (above - below) * (place - low)
    return found


def _percentiles(values: Floats) -> Percentiles | None:
    if not np.isfinite(values).any():
        return None
    return Percentiles(**{name: float(rows[0]) for name, rows in _statistics(values[None]).items()})


def _all(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.empty(0)


def _values(result: LoadResult) -> dict[str, float]:
    """Return a result's figures by the names of `estimates`."""
    values: dict[str, float] = {}
    for figure in FIGURES:
        percentiles = result.figure(figure)
        if percentiles is not None:
            values |= {f"{figure}_{statistic}": float(getattr(percentiles, statistic)) for statistic in STATISTICS}
    values |= {rate: float(getattr(result, rate)) for rate in RATES}
    return values | ({"goodput": result.goodput} if result.goodput is not None else {})
