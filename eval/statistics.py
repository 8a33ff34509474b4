"""What paired measurements of two models prove: bounds on recovery and on the perplexity ratio, and three-way verdicts.

Every bound holds by itself with the confidence asked for: at 0.95, an artifact that truly stands at the limit passes in no more
than about 5 % of evaluations and fails in no more than about 5 %; between the two lies `inconclusive`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["pass", "fail", "inconclusive"]

_CONTINUITY = 0.5
_LARGEST_SAMPLE = 10**12


@dataclass(frozen=True)
class PairedCounts:
    """How many items each pair of outcomes has: `both` right, `lost` right→wrong, `gained` wrong→right, `neither` right."""

    both: int
    lost: int
    gained: int
    neither: int

    @property
    def items(self) -> int:
        """The number of items."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def original(self) -> int:
        """How many the original got right."""
        return self.both + self.lost

    @property
    def artifact(self) -> int:
        """How many the artifact got right."""
        return self.both + self.gained


@dataclass(frozen=True)
class Finding:
    """An estimate, its bounds (None where the data allow none), the verdict, and how many items would settle an open one."""

    value: float
    interval: tuple[float, float] | None
    outcome: Outcome
    items_needed: int | None
    level: float | None = field(default=None, kw_only=True)
    """The confidence of the interval as a whole: of two bounds with 95 % each, 90 %."""


@dataclass(frozen=True)
class Levels:
    """How often a verdict may err: an artifact at the limit passes at most `passing` of the time and fails at most `failing`."""

    passing: float
    failing: float

    @classmethod
    def at(cls, confidence: float) -> Levels:
        """Return the levels at which both verdicts hold with `confidence`."""
        return cls(1 - confidence, 1 - confidence)

    @property
    def interval(self) -> float:
        """The confidence of an interval of both bounds: each may err at its own end."""
        return 1 - self.passing - self.failing

    def outcome(self, p_pass: float, p_fail: float) -> Outcome:
        """Return the verdict that these one-sided p-values give."""
        if p_pass <= self.passing:
            return "pass"
        return "fail" if p_fail <= self.failing else "inconclusive"


Method = Literal["score test", "bootstrap by clusters"]


@dataclass(frozen=True)
class Recovery(Finding):
    """How much of the original's score is kept: `value` is mean(artifact) / mean(original), of `items` items.

    The lower bound holds with probability 1 − levels.passing, the upper with 1 − levels.failing. `p_pass` is the one-sided p-value
    against "the artifact stands at the limit or below", `p_fail` against "at the limit or above".
    """

    items: int
    p_pass: float
    p_fail: float
    levels: Levels
    method: Method


def count_pairs(original: Sequence[bool], artifact: Sequence[bool]) -> PairedCounts:
    """Count the pairs of outcomes of the same items in the same order."""
    pairs = list(zip(original, artifact, strict=True))
    return PairedCounts(
        both=pairs.count((True, True)),
        lost=pairs.count((True, False)),
        gained=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def constrained_flips(counts: PairedCounts, ratio: float) -> tuple[float, float]:
    """Return the most likely shares of (lost, gained) items if the artifact's accuracy were `ratio` times the original's.

    With λ the number of items, the Lagrange conditions leave neither = counts.neither / items, and with s the share of the rest
    lost = ratio · gained + (1 − ratio) · s and both = ratio · s − (1 + ratio) · gained; `gained` is then the larger root of a
    quadratic (Nam and Blackwelder, Statistics in Medicine 21, 2002; Tang, Tang and Chan, Statistics in Medicine 22, 2003).
    """
    rest = counts.both + counts.lost + counts.gained
    share = rest / counts.items
    offset = (1 - ratio) * share
    a = -(1 + ratio) * ratio * rest
    b = (
        -counts.both * (1 + ratio) * offset
        + counts.lost * ratio**2 * share
        + counts.gained * (ratio**2 * share - (1 + ratio) * offset)
    )
    c = counts.gained * offset * ratio * share
    root = (-b - math.sqrt(max(b * b - 4 * a * c, 0.0))) / (2 * a)
    gained = min(max(root, 0.0, -offset / ratio), ratio * share / (1 + ratio))
    return ratio * gained + offset, gained


def recovery_score(counts: PairedCounts, ratio: float, shift: float = 0.0) -> float:
    """Return the score statistic for "the artifact's accuracy is `ratio` times the original's"; positive where it is more.

    The variance is the constrained maximum-likelihood one, items · ratio · (lost + gained), which is not zero where no item
    flipped. `shift` items are added to the artifact's right ones, as a correction for continuity.
    """
    lost, gained = constrained_flips(counts, ratio)
    spread = math.sqrt(counts.items * ratio * (lost + gained))
    distance = counts.artifact - ratio * counts.original + shift
    if spread == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / spread


def recovery_interval(counts: PairedCounts, confidence: float) -> tuple[float, float]:
    """Return the bounds of accuracy(artifact) / accuracy(original), each with `confidence`, by inverting the score test.

    The statistic moves by whole items, so half an item is taken off in either direction: without it an artifact at the limit,
    whose few flips are all losses, would pass in up to 7 % of evaluations instead of 5 %. The original must have items right.
    """
    return _score_bounds(counts, Levels.at(confidence))


def _score_bounds(counts: PairedCounts, levels: Levels) -> tuple[float, float]:
    reach_low, reach_high = normal_quantile(levels.passing), normal_quantile(levels.failing)
    estimate = counts.artifact / counts.original
    low = 0.0
    if counts.artifact > _CONTINUITY:
        low = crossing(lambda ratio: recovery_score(counts, ratio, -_CONTINUITY) - reach_low, 1e-9, max(estimate, 1e-9))
    top = max(2 * estimate, 2.0)
    while recovery_score(counts, top, _CONTINUITY) > -reach_high:
        top *= 2
    return low, crossing(lambda ratio: recovery_score(counts, ratio, _CONTINUITY) + reach_high, max(estimate, 1e-9), top)


def judge_recovery(counts: PairedCounts, limit: float, confidence: float) -> Finding:
    """Judge whether the artifact keeps at least `limit` of the original's accuracy; the original must have items right."""
    return judge_counts(counts, limit, Levels.at(confidence))


def score_tails(counts: PairedCounts, limit: float) -> tuple[float, float]:
    """Return the score test's one-sided p-values, for passing and for failing the limit."""
    above, below = recovery_score(counts, limit, -_CONTINUITY), recovery_score(counts, limit, _CONTINUITY)
    return 0.5 * math.erfc(above / math.sqrt(2)), 0.5 * math.erfc(-below / math.sqrt(2))


def judge_counts(counts: PairedCounts, limit: float, levels: Levels) -> Recovery:
    """Judge by the score test whether the artifact keeps at least `limit` of the original's accuracy, at the levels given.

    The items must not depend on each other, and the original must have some right.
    """
    p_pass, p_fail = score_tails(counts, limit)
    outcome = levels.outcome(p_pass, p_fail)
    value = counts.artifact / counts.original
    level = levels.passing if value > limit else levels.failing
    return Recovery(
        value=value,
        interval=_score_bounds(counts, levels),
        outcome=outcome,
        items_needed=_items_to_settle(counts, limit, normal_quantile(level)) if outcome == "inconclusive" else None,
        items=counts.items,
        p_pass=p_pass,
        p_fail=p_fail,
        levels=levels,
        method="score test",
        level=levels.interval,
    )


def _items_to_settle(counts: PairedCounts, limit: float, z: float) -> int | None:
    """Solve n·d − z·√(n·v) = ½ for n, with distance d and variance v per item as observed; None where d is zero."""
    distance = abs(counts.artifact - limit * counts.original) / counts.items
    if distance < 1e-12:
        return None
    lost, gained = constrained_flips(counts, limit)
    spread = z * math.sqrt(limit * (lost + gained))
    root = (spread + math.sqrt(spread**2 + 4 * distance * _CONTINUITY)) / (2 * distance)
    return max(math.ceil(root**2), counts.items + 1)


def normal_quantile(tail: float) -> float:
    """Return the z that a standard normal variable exceeds with probability `tail`."""
    return -NormalDist().inv_cdf(tail)


def clustered_mean(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean over all tokens and its standard error, where the tokens of one cluster (window, answer) may depend.

    `sums` and `sizes` are per cluster: the sum of the values and the number of tokens. The error is the linearised one of a
    ratio of two sums (arXiv 2411.00640, equation 4, with the small-sample factor); nan for a single cluster.
    """
    total, clusters = float(sizes.sum()), len(sums)
    mean = float(sums.sum()) / total
    if clusters < 2:
        return mean, math.nan
    residuals = sums - mean * sizes
    return mean, math.sqrt(clusters / (clusters - 1) * float((residuals**2).sum())) / total


def two_sided(confidence: float) -> float:
    """Return the confidence of an interval whose bounds hold with `confidence` each."""
    return 2 * confidence - 1


def mean_interval(sums: NDArray[np.float64], sizes: NDArray[np.float64], confidence: float) -> tuple[float, float] | None:
    """Return the bounds of the mean over all tokens, each with `confidence`, by Student's t over clusters; None for one."""
    mean, error = clustered_mean(sums, sizes)
    if math.isnan(error):
        return None
    reach = student_quantile(confidence, len(sums) - 1) * error
    return mean - reach, mean + reach


def judge_perplexity(
    original: NDArray[np.float64], artifact: NDArray[np.float64], sizes: NDArray[np.float64], limit: float, confidence: float
) -> Finding:
    """Judge whether perplexity(artifact) / perplexity(original) is at most `limit`, paired over the windows of the text.

    `original` and `artifact` are the negative log-likelihoods in nats summed over each window, `sizes` the tokens scored in it.
    """
    change = artifact - original
    mean, error = clustered_mean(change, sizes)
    interval = mean_interval(change, sizes, confidence)
    if interval is None:
        return Finding(bounded_exp(mean), None, "inconclusive", None)
    bounds = (bounded_exp(interval[0]), bounded_exp(interval[1]))
    outcome: Outcome = "inconclusive"
    if bounds[1] <= limit:
        outcome = "pass"
    elif bounds[0] > limit:
        outcome = "fail"
    needed = None
    if outcome == "inconclusive":
        needed = _windows_to_settle(abs(mean - math.log(limit)), error * math.sqrt(len(change)), len(change), confidence)
    return Finding(bounded_exp(mean), bounds, outcome, needed, level=two_sided(confidence))


@dataclass(frozen=True)
class Excess:
    """How far a mean lies above its noise floor: both means, the bounds of the difference, and whether it is shown to be above."""

    value: float
    floor: float
    interval: tuple[float, float] | None
    p_value: float
    above: bool


def above_floor(
    artifact: tuple[NDArray[np.float64], NDArray[np.float64]],
    floor: tuple[NDArray[np.float64], NDArray[np.float64]],
    clusters: NDArray[np.int64],
    confidence: float,
) -> Excess:
    """Tell whether the artifact's mean KL per token is above that of the original asked again, with `confidence`.

    Both give per item, in the same order, the sum over its tokens and the number of its tokens, both 0 where an item was not asked;
    items of one cluster may depend. The difference of the two means is linearised by clusters and held against Student's t, with
    the degrees of freedom of the one that has fewer clusters.
    """
    codes = np.unique(clusters, return_inverse=True)[1]
    means: list[float] = []
    residuals: list[NDArray[np.float64]] = []
    asked: list[int] = []
    for sums, tokens in (artifact, floor):
        total = float(tokens.sum())
        means.append(float(sums.sum()) / total)
        residuals.append(np.bincount(codes, sums - means[-1] * tokens).astype(np.float64) / total)
        asked.append(int((np.bincount(codes, tokens) > 0).sum()))
    count = min(asked)
    difference = means[0] - means[1]
    if count < 2:
        return Excess(means[0], means[1], None, 1.0, above=False)
    error = math.sqrt(count / (count - 1) * float(((residuals[0] - residuals[1]) ** 2).sum()))
    reach = student_quantile(confidence, count - 1) * error
    above = difference > reach
    p_value = 1.0 if difference <= 0 else 0.0
    if error > 0:
        from scipy.special import stdtr

        p_value = float(stdtr(count - 1, -difference / error))
    return Excess(means[0], means[1], (difference - reach, difference + reach), p_value, above)


def bounded_exp(exponent: float) -> float:
    """Return exp, kept within what JSON can hold: a ruined model's perplexity is huge, not infinite."""
    return math.exp(min(exponent, 700.0))


def _windows_to_settle(distance: float, deviation: float, windows: int, confidence: float) -> int | None:
    def settled(count: int) -> bool:
        return distance >= student_quantile(confidence, count - 1) * deviation / math.sqrt(count)

    if distance < 1e-12 or not settled(_LARGEST_SAMPLE):
        return None
    low, high = windows, _LARGEST_SAMPLE
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high


def student_quantile(confidence: float, degrees: int) -> float:
    """Return the value that Student's t with so many degrees of freedom stays below with probability `confidence`."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, confidence))


def crossing(function: Callable[[float], float], low: float, high: float, precision: float = 1e-12) -> float:
    """Return where a falling function crosses zero between `low` and `high`, by bisection; `low` if it is not above zero."""
    if function(low) <= 0:
        return low
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
        if high - low <= precision * high:
            break
    return (low + high) / 2
