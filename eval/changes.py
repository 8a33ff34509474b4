"""Exact tests and intervals for the share of flips, and the test of visual grounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.eval.statistics.bootstrap import sum_tails
from compress.eval.statistics.estimates import Finding, Outcome, mean_interval, two_sided
from compress.eval.statistics.paired import Pairs

Floats = NDArray[np.float64]


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided McNemar p-value: the chance that flips, each as likely lost as gained, are at least as uneven."""
    return min(2 * mcnemar_gain(max(lost, gained), min(lost, gained)), 1.0)


def mcnemar_gain(gained: int, lost: int) -> float:
    """Return the exact one-sided McNemar p-value: the chance that flips, each as likely lost as gained, gain at least as many."""
    from scipy.special import bdtrc

    # P(X ≥ gained) for a binomial: bdtrc is the mass above its argument.
    return float(bdtrc(gained - 1, gained + lost, 0.5)) if gained > 0 else 1.0


def sign_flip_tail(differences: Floats) -> float:
    """Return the exact permutation p-value of a sum of differences under random signs: the chance of a sum at least as large.

    The differences are of independent clusters. With differences of −1, 0 and 1 this is McNemar's exact test.
    """
    # Equal sizes are one distribution: its power by the number of draws is one Fourier transform. Zeros have no sign to flip.
    sizes, counts = np.unique(np.round(np.abs(differences), 12), return_counts=True)
    distributions = [
        (np.array([-size, size]), np.array([0.5, 0.5]), int(count)) for size, count in zip(sizes, counts, strict=True) if size > 0
    ]
    return sum_tails(distributions, float(differences.sum()))[0] if distributions else 1.0


def share_interval(count: float, items: float, confidence: float) -> tuple[float, float]:
    """Return the exact bounds of a proportion, each with `confidence` (Clopper and Pearson, Biometrika 26, 1934)."""
    from scipy.special import betaincinv

    # `count` and `items` need not be whole: the effective sample size of clustered items is not.
    low = float(betaincinv(count, items - count + 1, 1 - confidence)) if count > 0 else 0.0
    high = float(betaincinv(count + 1, items - count, confidence)) if count < items else 1.0
    return low, high


def effective_items(flipped: NDArray[np.bool_], clusters: NDArray[np.int64]) -> float:
    """Return the effective sample size for the share of flips (Korn and Graubard, 1998).

    It is the number of items by the design effect, which is the share's variance by clusters over that of independent items, at
    least 1. Where none or all items flipped, the correlation within clusters cannot be estimated and is taken as 1.
    """
    codes, sizes = np.unique(clusters, return_inverse=True, return_counts=True)[1:]
    items, share, cluster_count = len(flipped), float(flipped.mean()), len(sizes)
    # The design effect where all items of a cluster flip together.
    full_effect = float((sizes.astype(np.float64) ** 2).sum() / items)
    if share in {0.0, 1.0} or cluster_count < 2:
        return items / full_effect
    residuals = np.bincount(codes, flipped - share)
    effect = cluster_count / (cluster_count - 1) * float((residuals**2).sum()) / (items * share * (1 - share))
    # Not below 1 (an estimate by chance must not claim more information than independent items hold), nor above full correlation.
    return items / min(max(effect, 1.0), max(full_effect, 1.0))


@dataclass(frozen=True)
class Flips:
    """The items whose score changed."""

    lost: int
    """Items with a lower score than the original's."""

    gained: int
    """Items with a higher score."""

    items: int
    share: float
    """The share of items with another score."""

    interval: tuple[float, float]
    p_value: float
    """Two-sided, of the hypothesis that flips are as likely lost as gained."""

    level: float
    """The confidence of the interval as a whole."""


def count_flips(pairs: Pairs, confidence: float) -> Flips:
    """Count the items whose score changed, with bounds of their share, each with `confidence`.

    The p-value is McNemar's exact one for right/wrong items without clusters, else the permutation test's over clusters' signs.
    """
    lost, gained = pairs.artifact < pairs.original, pairs.artifact > pairs.original
    items = effective_items(lost | gained, pairs.clusters)
    share = float((lost | gained).mean())
    # McNemar is exact for single right/wrong items; with clusters or graded scores the unit whose sign may flip is the cluster.
    if pairs.independent and pairs.binary:
        p_value = mcnemar(int(lost.sum()), int(gained.sum()))
    else:
        totals = pairs.totals
        change = totals.artifact - totals.original
        p_value = min(2 * min(sign_flip_tail(change), sign_flip_tail(-change)), 1.0)
    return Flips(
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        items=pairs.items,
        share=share,
        # Clopper-Pearson, not Wald: with no flip in 100 items the upper bound is 3 %, not 0.
        interval=share_interval(share * items, items, confidence),
        p_value=p_value,
        level=two_sided(confidence),
    )


def judge_flips(flips: Flips, limit: float) -> Finding:
    """Judge the share of flips: passes if its upper bound is at most the limit, fails if its lower bound is above."""
    low, high = flips.interval
    outcome: Outcome = "inconclusive"
    if high <= limit:
        outcome = "pass"
    elif low > limit:
        outcome = "fail"
    items_needed = None
    if outcome == "inconclusive" and abs(flips.share - limit) > 1e-12:
        bound = high if flips.share < limit else low
        # Intervals shrink with the root of the number of items.
        ratio = (bound - flips.share) / (limit - flips.share)
        items_needed = max(math.ceil(flips.items * ratio**2), flips.items + 1)
    return Finding(flips.share, flips.interval, outcome, items_needed, level=flips.level)


@dataclass(frozen=True)
class ImageGain(Finding):
    """The gain in mean score from the right image, `value` = `right` − `wrong`; passes where it is significant, else fails."""

    right: float
    """The mean score with the question's own image."""

    wrong: float
    """The mean score with another question's image."""

    items: int
    p_value: float
    """One-sided."""

    changed: float
    """The share of items whose score differs with the wrong image."""


def image_gain(right: Sequence[float], wrong: Sequence[float], clusters: Sequence[str] | None, confidence: float) -> ImageGain:
    """Test whether the same questions score higher with their own image than with another one (or none).

    McNemar's exact one-sided test for right/wrong items without clusters, else the permutation test that flips the signs of whole
    clusters' differences; the bounds of the gain are Student's t over clusters.

    Raises:
        ValueError: the scores cannot be paired, or there are none.
    """
    pairs = Pairs.of(wrong, right, clusters)
    totals = pairs.totals
    gains = totals.artifact - totals.original
    exact = pairs.independent and pairs.binary
    p_value = mcnemar_gain(pairs.counts.gained, pairs.counts.lost) if exact else sign_flip_tail(gains)
    return ImageGain(
        value=float(gains.sum()) / pairs.items,
        interval=mean_interval(gains, totals.sizes, confidence),
        outcome="pass" if p_value <= 1 - confidence else "fail",
        items_needed=None,
        right=float(pairs.artifact.mean()),
        wrong=float(pairs.original.mean()),
        items=pairs.items,
        p_value=p_value,
        changed=float((pairs.original != pairs.artifact).mean()),
        level=two_sided(confidence),
    )
