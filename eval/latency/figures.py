"""Percentiles, rates and goodput from the timings of requests, with confidence intervals of them and of their ratios."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.eval.latency.load_generator import Load
from compress.eval.latency.results import FIGURES, RATES, STATISTICS, Estimate, LoadResult, Percentiles
from compress.eval.latency.settings import LatencyGoal

Floats = NDArray[np.float64]

_MILLISECONDS = 1000.0
"""Per second: timings are in seconds, results in milliseconds."""

_REPLICATES = 200
"""Bootstrap replicates per round: they estimate a variance only, not a quantile."""

_EPSILON = 1e-12
"""Smaller durations and variances count as zero."""

_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_MAX_RESAMPLED = 2**22
"""The most inter-token times that are resampled at once: bounds the memory."""


@dataclass(frozen=True)
class RequestTimes:
    """One load's requests as arrays, times in milliseconds, NaN where a request failed."""

    ttft: Floats
    tpot: Floats
    e2el: Floats
    gaps: tuple[Floats, ...]
    """The times between tokens of each request."""

    tokens: Floats
    answered: NDArray[np.bool_]
    good: NDArray[np.bool_] | None
    """Whether a request meets the goal, None without one."""

    shares: Floats
    """The seconds of the load that each request accounts for, in proportion to its own time. Resampled with the requests, they give
    the rates of a closed loop (Little's law)."""


def times_of(load: Load, goal: LatencyGoal | None) -> RequestTimes:
    """Return the times of a load's requests; an answer of a single token has no TPOT."""
    answered = np.array([sample.fault is None for sample in load.samples], dtype=np.bool_)
    tokens = np.array([sample.tokens for sample in load.samples], dtype=np.float64)
    ttft = np.array([sample.ttft for sample in load.samples]) * _MILLISECONDS
    e2el = np.array([sample.seconds for sample in load.samples]) * _MILLISECONDS
    # The first token's time is TTFT's: TPOT is over the others, as in `vllm bench serve`.
    further = np.where(tokens > 1, tokens - 1, np.nan)
    tpot = (e2el - ttft) / further
    good = None
    if goal is not None:
        # A single token has no TPOT, and so none that could miss the goal.
        figures = {"ttft": ttft, "tpot": np.nan_to_num(tpot), "e2el": e2el}
        good = answered & np.all([figures[name] <= limit for name, limit in goal.limits.items()], axis=0)
    total = float(e2el[answered].sum())
    shares = np.where(answered, e2el, 0.0) * (load.seconds / total if total else 0.0)
    masked = {name: np.where(answered, values, np.nan) for name, values in (("ttft", ttft), ("tpot", tpot), ("e2el", e2el))}
    gaps = tuple(np.array(sample.between_tokens) * _MILLISECONDS for sample in load.samples)
    return RequestTimes(**masked, gaps=gaps, tokens=tokens, answered=answered, good=good, shares=shares)


def summarize(load: Load, goal: LatencyGoal | None) -> LoadResult:
    """Return a load's figures."""
    times = times_of(load, goal)
    answered = int(times.answered.sum())
    good = None if times.good is None else int(times.good.sum())
    faults = Counter(sample.fault for sample in load.samples if sample.fault is not None)
    # The whole load's duration, not the sum of the requests': rates are what the server gave.
    seconds = max(load.seconds, _EPSILON)
    return LoadResult(
        requests=len(load.samples),
        failed=len(load.samples) - answered,
        seconds=load.seconds,
        ttft=_percentiles(times.ttft),
        tpot=_percentiles(times.tpot),
        itl=_percentiles(_concatenate(times.gaps)),
        e2el=_percentiles(times.e2el),
        request_rate=answered / seconds,
        output_token_rate=float(times.tokens[times.answered].sum()) / seconds,
        goodput=None if good is None else good / seconds,
        within_goal=None if good is None else good / max(len(load.samples), 1),
        faults=dict(faults),
        client=load.client,
    )


def pool(loads: Sequence[Load]) -> Load:
    """Return the requests of several loads as one load."""
    samples = tuple(sample for load in loads for sample in load.samples)
    return Load(samples, sum(load.seconds for load in loads), loads[0].client)


def estimates(loads: Sequence[Load], goal: LatencyGoal | None, confidence: float) -> dict[str, Estimate]:
    """Return every figure of a model over its rounds, with its interval, by name: `ttft_p50`, …, the rates, `goodput`."""
    # Logarithms: ratios become differences, intervals cannot fall below zero, and times are skewed to the right.
    rounds = [_logs(times_of(load, goal), _resample(load, number)) for number, load in enumerate(loads)]
    values = _values(summarize(pool(loads), goal))
    return {name: _estimate(values[name], [logs.get(name) for logs in rounds], confidence) for name in values}


def ratios(original: Sequence[Load], artifact: Sequence[Load], goal: LatencyGoal | None, confidence: float) -> dict[str, Estimate]:
    """Return the ratio of every figure to the original's, with its interval, from rounds in which both got the same requests.

    In each round both models' requests are resampled together (the paired bootstrap), which gives the variance of that round's
    ratio; the differences between rounds give the variance between starts of a server. See `_estimate`.
    """
    rounds: list[dict[str, Floats]] = []
    for number, (original_load, artifact_load) in enumerate(zip(original, artifact, strict=True)):
        indices = _resample(original_load, number)
        original_logs, artifact_logs = _logs(times_of(original_load, goal), indices), _logs(times_of(artifact_load, goal), indices)
        with np.errstate(invalid="ignore"):  # where both are zero or missing, there is no ratio
            rounds.append({name: artifact_logs[name] - original_logs[name] for name in original_logs.keys() & artifact_logs.keys()})
    original_values, artifact_values = _values(summarize(pool(original), goal)), _values(summarize(pool(artifact), goal))
    # A ratio over 0 (no goodput at all) is none.
    names = [name for name in original_values if name in artifact_values and original_values[name] > 0]
    return {
        name: _estimate(artifact_values[name] / original_values[name], [logs.get(name) for logs in rounds], confidence)
        for name in names
    }


def _estimate(value: float, rounds: Sequence[Floats | None], confidence: float) -> Estimate:
    """Return a figure with its interval, from each round's logarithms: the first as measured, the others of bootstrap replicates.

    The variance is the sum of that within rounds, from the bootstrap, and that between rounds beyond it. The bounds are Student's,
    with degrees of freedom by the share of the variance between the few rounds (Satterthwaite, Biometrics Bulletin 2, 1946).
    """
    complete = [logs for logs in rounds if logs is not None and bool(np.isfinite(logs).all())]
    if len(complete) < len(rounds) or len(complete) < 2 or value <= 0:
        return Estimate(value=value)
    from scipy.special import stdtrit

    count = len(complete)
    within = float(np.mean([logs[1:].var() for logs in complete]))
    # Rounds differ by what their requests' scatter explains, too: only what is beyond that is between starts of a server.
    between = max(float(np.var([logs[0] for logs in complete], ddof=1)) - within, 0.0)
    total = within + between
    degrees = (count - 1) * (total / between) ** 2 if between > _EPSILON else math.inf
    # Few rounds: with three and all of the variance between them, t has 2 degrees of freedom (2.9 instead of 1.64).
    reach = float(stdtrit(min(degrees, 1e6), confidence)) * math.sqrt(total / count)
    # At most e^50, which JSON and tables can hold: such an interval says nothing anyway.
    return Estimate(value=value, interval=(value * math.exp(-min(reach, 50.0)), value * math.exp(min(reach, 50.0))))


def _resample(load: Load, number: int) -> NDArray[np.int64]:
    """Return the resampled indices [replicates + 1, requests]; the first row is the requests themselves."""
    count = len(load.samples)
    # Seeded by round and size: both models' requests are drawn alike, which pairs them, and the report can be reproduced.
    random = np.random.default_rng([number, count])
    return np.vstack([np.arange(count), random.integers(0, count, (_REPLICATES, count))])


def _logs(times: RequestTimes, indices: NDArray[np.int64]) -> dict[str, Floats]:
    """Return the logarithm of each figure for each row of indices; NaN or infinite where there is none."""
    logs: dict[str, Floats] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, values in (("ttft", times.ttft), ("tpot", times.tpot), ("e2el", times.e2el)):
            logs |= {f"{name}_{statistic}": np.log(rows) for statistic, rows in _statistics(values[indices]).items()}
        logs |= _gap_logs(times, indices)
        seconds = times.shares[indices].sum(axis=1)
        logs["request_rate"] = np.log(times.answered[indices].sum(axis=1) / seconds)
        logs["output_token_rate"] = np.log(np.where(times.answered, times.tokens, 0.0)[indices].sum(axis=1) / seconds)
        if times.good is not None:
            logs["goodput"] = np.log(times.good[indices].sum(axis=1) / seconds)
    return logs


def _gap_logs(times: RequestTimes, indices: NDArray[np.int64]) -> dict[str, Floats]:
    """Return the same of the times between tokens, whose number differs between requests."""
    longest = max((len(gaps) for gaps in times.gaps), default=0)
    table = np.full((len(times.gaps), longest), np.nan)
    for row, gaps in zip(table, times.gaps, strict=True):
        row[: len(gaps)] = gaps
    step = max(_MAX_RESAMPLED // max(table.size, 1), 1)
    blocks = [
        _statistics(table[rows].reshape(len(rows), -1))
        for rows in (indices[start : start + step] for start in range(0, len(indices), step))
    ]
    return {f"itl_{name}": np.log(np.concatenate([block[name] for block in blocks])) for name in STATISTICS}


def _statistics(rows: Floats) -> dict[str, Floats]:
    """Return the mean and the percentiles of each row, ignoring NaN; NaN where a row has nothing else."""
    # One sort for all percentiles; numpy's nanpercentile loops over rows in Python.
    rows = np.sort(rows, axis=1)  # NaN last
    if not rows.shape[1]:
        return {name: np.full(len(rows), np.nan) for name in STATISTICS}
    counts = np.isfinite(rows).sum(axis=1)
    statistics = {"mean": np.where(counts > 0, np.nansum(rows, axis=1) / np.maximum(counts, 1), np.nan)}
    for name, share in _SHARES.items():
        position = np.maximum(counts - 1, 0) * share
        low = np.floor(position).astype(np.int64)
        high = np.minimum(low + 1, np.maximum(counts - 1, 0))
        below, above = (np.take_along_axis(rows, columns[:, None], axis=1)[:, 0] for columns in (low, high))
        statistics[name] = below + (above - below) * (position - low)
    return statistics


def _percentiles(values: Floats) -> Percentiles | None:
    if not np.isfinite(values).any():
        return None
    return Percentiles(**{name: float(rows[0]) for name, rows in _statistics(values[None]).items()})


def _concatenate(parts: Sequence[Floats]) -> Floats:
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
