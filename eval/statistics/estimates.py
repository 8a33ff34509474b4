"""Paired statistics of two models: confidence intervals of recovery and of the perplexity ratio, and three-way outcomes.

Each bound holds by itself with the given confidence: at 0.95, an artifact that is truly at the limit passes in no more than about
5 % of evaluations and fails in no more than about 5 %; all others are `inconclusive`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["pass", "fail", "inconclusive"]

_CONTINUITY = 0.5
"""The correction for continuity, in items: the statistic moves by whole items; see `_score_bounds`."""

_MAX_SAMPLE = 10**12
"""Findings that need more items are reported as undecidable: no benchmark has a trillion."""


@dataclass(frozen=True)
class PairedCounts:
    """The paired 2×2 table of right/wrong items: `both` right, `lost` right→wrong, `gained` wrong→right, `neither` right."""

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
        """The number that the original answers right."""
        return self.both + self.lost

    @property
    def artifact(self) -> int:
        """The number that the artifact answers right."""
        return self.both + self.gained


@dataclass(frozen=True)
class Finding:
    """An estimate with its confidence interval, judged against a limit."""

    value: float
    interval: tuple[float, float] | None
    """None where the data allow no bounds, as with a single cluster."""

    outcome: Outcome
    items_needed: int | None
    """How many items would decide an inconclusive outcome at the observed rates; None if no number would, or it is decided."""

    level: float | None = field(default=None, kw_only=True)
    """The confidence of the interval as a whole: of two bounds with 95 % each, 90 %."""


@dataclass(frozen=True)
class Levels:
    """One-sided error rates: the highest probability that an artifact at the limit passes, and that it fails."""

    passing: float
    failing: float

    @classmethod
    def at(cls, confidence: float) -> Levels:
        """Return equal levels of 1 − confidence."""
        return cls(1 - confidence, 1 - confidence)

    @property
    def interval(self) -> float:
        """The confidence of the interval as a whole: each bound may miss on its own side."""
        return 1 - self.passing - self.failing

    def outcome(self, p_pass: float, p_fail: float) -> Outcome:
        """Return the outcome for the one-sided p-values."""
        if p_pass <= self.passing:
            return "pass"
        return "fail" if p_fail <= self.failing else "inconclusive"


Method = Literal["score test", "bootstrap by clusters"]


@dataclass(frozen=True)
class Recovery(Finding):
    """The recovery, `value` = mean(artifact) / mean(original)."""

    items: int
    p_pass: float
    """The one-sided p-value of the hypothesis "at the limit or below"."""

    p_fail: float
    """The one-sided p-value of the hypothesis "at the limit or above"."""

    levels: Levels
    """The lower bound holds with probability 1 − passing, the upper one with 1 − failing."""

    method: Method


def constrained_flips(counts: PairedCounts, ratio: float) -> tuple[float, float]:
    """Return the maximum-likelihood shares of (lost, gained) items given accuracy(artifact) = ratio · accuracy(original).

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
    # All four shares must be at least 0: rounding may put the root just outside.
    gained = min(max(root, 0.0, -offset / ratio), ratio * share / (1 + ratio))
    return ratio * gained + offset, gained


def recovery_score(counts: PairedCounts, ratio: float, shift: float = 0.0) -> float:
    """Return the score statistic for "the artifact's accuracy is `ratio` times the original's"; positive where it is more.

    The variance is the constrained maximum-likelihood one, items · ratio · (lost + gained), which is not zero where no item
    flipped. `shift` items are added to the artifact's right ones, as a correction for continuity.
    """
    lost, gained = constrained_flips(counts, ratio)
    # The variance under the hypothesis: with no flips observed, an estimated one would be 0 and any artifact would pass.
    spread = math.sqrt(counts.items * ratio * (lost + gained))
    distance = counts.artifact - ratio * counts.original + shift
    if spread == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / spread


def _score_bounds(counts: PairedCounts, levels: Levels) -> tuple[float, float]:
    """Return the bounds of accuracy(artifact) / accuracy(original) by inverting the score test.

    The statistic moves by whole items, so half an item is taken off in either direction: without it an artifact at the limit,
    whose few flips are all losses, would pass in up to 7 % of evaluations instead of 5 %. The original must have right items.
    """
    z_low, z_high = normal_quantile(levels.passing), normal_quantile(levels.failing)
    estimate = counts.artifact / counts.original
    low = 0.0
    if counts.artifact > _CONTINUITY:
        # Bounds by inverting the test itself: they agree with the verdict at every limit, which Wald's bounds do not.
        low = crossing(lambda ratio: recovery_score(counts, ratio, -_CONTINUITY) - z_low, 1e-9, max(estimate, 1e-9))
    upper = max(2 * estimate, 2.0)
    # Few right items of the original's make the upper bound arbitrarily large.
    while recovery_score(counts, upper, _CONTINUITY) > -z_high:
        upper *= 2
    return low, crossing(lambda ratio: recovery_score(counts, ratio, _CONTINUITY) + z_high, max(estimate, 1e-9), upper)


def score_tails(counts: PairedCounts, limit: float) -> tuple[float, float]:
    """Return the score test's one-sided p-values, for passing and for failing the limit."""
    above, below = recovery_score(counts, limit, -_CONTINUITY), recovery_score(counts, limit, _CONTINUITY)
    # erfc keeps tails as small as 1e-300, where 1 minus a cumulative probability would be 0: sequential looks need them.
    return 0.5 * math.erfc(above / math.sqrt(2)), 0.5 * math.erfc(-below / math.sqrt(2))


def judge_counts(counts: PairedCounts, limit: float, levels: Levels) -> Recovery:
    """Judge by the score test whether the recovery is at least `limit`.

    The items must be independent, and the original must have right items.
    """
    p_pass, p_fail = score_tails(counts, limit)
    outcome = levels.outcome(p_pass, p_fail)
    value = counts.artifact / counts.original
    # More items would move the outcome to the side on which the value is.
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
    """Return the mean over all tokens and its standard error, clustered: tokens of one window or answer may be dependent.

    `sums` and `sizes` are per cluster: the sum of the values and the number of tokens. The error is the linearised one of a
    ratio of two sums (arXiv 2411.00640, equation 4, with the small-sample factor); nan for a single cluster.
    """
    total, clusters = float(sizes.sum()), len(sums)
    mean = float(sums.sum()) / total
    if clusters < 2:
        return mean, math.nan
    # Per cluster: tokens of one window are conditioned on each other, and as independent ones would make errors too small.
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
    # Paired: hard windows are hard for both models, and their spread cancels.
    differences = artifact - original
    mean, error = clustered_mean(differences, sizes)
    interval = mean_interval(differences, sizes, confidence)
    if interval is None:
        return Finding(bounded_exp(mean), None, "inconclusive", None)
    bounds = (bounded_exp(interval[0]), bounded_exp(interval[1]))
    outcome: Outcome = "inconclusive"
    if bounds[1] <= limit:
        outcome = "pass"
    elif bounds[0] > limit:
        outcome = "fail"
    items_needed = None
    if outcome == "inconclusive":
        items_needed = _windows_to_settle(
            abs(mean - math.log(limit)), error * math.sqrt(len(differences)), len(differences), confidence
        )
    return Finding(bounded_exp(mean), bounds, outcome, items_needed, level=two_sided(confidence))


@dataclass(frozen=True)
class Excess:
    """A mean compared with its noise floor."""

    value: float
    floor: float
    interval: tuple[float, float] | None
    """The bounds of `value` − `floor`; None for a single cluster."""

    p_value: float
    """One-sided, of the hypothesis that the mean is at the floor or below."""

    above: bool
    """Whether the mean is significantly above the floor."""


def above_floor(
    artifact: tuple[NDArray[np.float64], NDArray[np.float64]],
    floor: tuple[NDArray[np.float64], NDArray[np.float64]],
    clusters: NDArray[np.int64],
    confidence: float,
) -> Excess:
    """Test whether the artifact's mean per token is above that of the original's second run, with `confidence`.

    Both arguments hold per item, in the same order, the sum over its tokens and their number, both 0 where an item is missing;
    items of one cluster may be dependent. The difference of the two means is linearised by clusters and tested by Student's t,
    with the degrees of freedom of the side with fewer clusters.
    """
    codes = np.unique(clusters, return_inverse=True)[1]
    means: list[float] = []
    residuals: list[NDArray[np.float64]] = []
    cluster_counts: list[int] = []
    for sums, tokens in (artifact, floor):
        total = float(tokens.sum())
        means.append(float(sums.sum()) / total)
        # The second run covers a subset of the items: clusters outside it contribute to one side only.
        residuals.append(np.bincount(codes, sums - means[-1] * tokens).astype(np.float64) / total)
        cluster_counts.append(int((np.bincount(codes, tokens) > 0).sum()))
    cluster_count = min(cluster_counts)
    difference = means[0] - means[1]
    if cluster_count < 2:
        return Excess(means[0], means[1], None, 1.0, above=False)
    # Of the difference, cluster by cluster: both figures come from the same items and are not independent.
    error = math.sqrt(cluster_count / (cluster_count - 1) * float(((residuals[0] - residuals[1]) ** 2).sum()))
    reach = student_quantile(confidence, cluster_count - 1) * error
    above = difference > reach
    # Without any spread the sign alone decides.
    p_value = 1.0 if difference <= 0 else 0.0
    if error > 0:
        from scipy.special import stdtr

        p_value = float(stdtr(cluster_count - 1, -difference / error))
    return Excess(means[0], means[1], (difference - reach, difference + reach), p_value, above)


def bounded_exp(exponent: float) -> float:
    """Return exp, at most e^700 so that it fits a float64 and JSON: a broken model's perplexity is huge, not infinite."""
    return math.exp(min(exponent, 700.0))


def _windows_to_settle(distance: float, deviation: float, windows: int, confidence: float) -> int | None:
    def is_decided(count: int) -> bool:
        return distance >= student_quantile(confidence, count - 1) * deviation / math.sqrt(count)

    if distance < 1e-12 or not is_decided(_MAX_SAMPLE):
        return None
    return windows + 1 + bisect_left(range(windows + 1, _MAX_SAMPLE), True, key=is_decided)


def student_quantile(confidence: float, degrees: int) -> float:
    """Return the `confidence` quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, confidence))


def crossing(
    function: Callable[[float], float], low: float, high: float, precision: float = 1e-12, *, steps: bool = False
) -> float:
    """Return where a falling function crosses zero between `low` and `high`; the nearer of the two if it does not.

    `precision` is relative. The function may be infinite; `steps` says that it falls in steps.
    """
    value = cache(function)  # the solver asks for the ends again
    if value(low) <= 0:
        return low
    if value(high) >= 0:
        return high
    from scipy import optimize

    # Between the sides of a step there is nothing to interpolate.
    solver = cast("Callable[..., float]", optimize.bisect if steps else optimize.brentq)
    # Roots differ by many powers of ten, so no absolute error is asked for.
    return solver(value, low, high, xtol=1e-300, rtol=precision, maxiter=1000)
