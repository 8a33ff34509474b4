"""Items that changed, whichever way: exact tests and bounds for the share of flips, and what an image adds to the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.eval.bootstrap import sum_tails
from compress.eval.paired import Pairs
from compress.eval.statistics import Finding, Outcome, mean_interval, two_sided

Floats = NDArray[np.float64]


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided McNemar p-value: how often as many flips, each as likely lost as gained, are as uneven."""
    return min(2 * mcnemar_gain(max(lost, gained), min(lost, gained)), 1.0)


def mcnemar_gain(gained: int, lost: int) -> float:
    """Return the exact one-sided McNemar p-value: how often as many flips, each as likely lost as gained, gain as many."""
    from scipy.special import bdtrc

    return float(bdtrc(gained - 1, gained + lost, 0.5)) if gained > 0 else 1.0


def sign_flip_tail(differences: Floats) -> float:
    """Return how often a sum of differences is as large if each may as well have the other sign (the exact permutation p-value).

    The differences are of independent clusters. With differences of −1, 0 and 1 this is McNemar's exact test.
    """
    sizes, counts = np.unique(np.round(np.abs(differences), 12), return_counts=True)
    parts = [
        (np.array([-size, size]), np.array([0.5, 0.5]), int(count)) for size, count in zip(sizes, counts, strict=True) if size > 0
    ]
    return sum_tails(parts, float(differences.sum()))[0] if parts else 1.0


def share_interval(count: float, items: float, confidence: float) -> tuple[float, float]:
    """Return the exact bounds of a share, each with `confidence` (Clopper and Pearson, Biometrika 26, 1934)."""
    from scipy.special import betaincinv

    low = float(betaincinv(count, items - count + 1, 1 - confidence)) if count > 0 else 0.0
    high = float(betaincinv(count + 1, items - count, confidence)) if count < items else 1.0
    return low, high


def effective_items(flipped: NDArray[np.bool_], clusters: NDArray[np.int64]) -> float:
    """Return how many independent items say as much about the share of flips as these (Korn and Graubard, 1998).

    The number is divided by the design effect, the share's variance by clusters over that of independent items, where it is above
    1. Where none or all flipped nothing shows how alike the items of a cluster are, and they count as wholly alike.
    """
    codes, sizes = np.unique(clusters, return_inverse=True, return_counts=True)[1:]
    items, share, groups = len(flipped), float(flipped.mean()), len(sizes)
    alike = float((sizes.astype(np.float64) ** 2).sum() / items)
    if share in {0.0, 1.0} or groups < 2:
        return items / alike
    residuals = np.bincount(codes, flipped - share)
    effect = groups / (groups - 1) * float((residuals**2).sum()) / (items * share * (1 - share))
    return items / min(max(effect, 1.0), max(alike, 1.0))


@dataclass(frozen=True)
class Flips:
    """How many items' scores fell (`lost`) and rose (`gained`), the share that did either with its bounds, and whether evenly.

    `level` is the confidence of the interval as a whole.

    `p_value` is two-sided: how often flips that go either way as likely would be as uneven.
    """

    lost: int
    gained: int
    items: int
    share: float
    interval: tuple[float, float]
    p_value: float
    level: float


def count_flips(pairs: Pairs, confidence: float) -> Flips:
    """Count the items whose score is another, with bounds of their share that hold with `confidence` each.

    The p-value is McNemar's exact one for right/wrong items without clusters, else that of flipping whole clusters' signs.
    """
    lost, gained = pairs.artifact < pairs.original, pairs.artifact > pairs.original
    items = effective_items(lost | gained, pairs.clusters)
    share = float((lost | gained).mean())
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
        interval=share_interval(share * items, items, confidence),
        p_value=p_value,
        level=two_sided(confidence),
    )


def judge_flips(flips: Flips, limit: float) -> Finding:
    """Judge whether at most this share of the items flipped: pass where the upper bound is, fail where the lower one is above."""
    low, high = flips.interval
    outcome: Outcome = "inconclusive"
    if high <= limit:
        outcome = "pass"
    elif low > limit:
        outcome = "fail"
    needed = None
    if outcome == "inconclusive" and abs(flips.share - limit) > 1e-12:
        bound = high if flips.share < limit else low
        ratio = (bound - flips.share) / (limit - flips.share)
        needed = max(math.ceil(flips.items * ratio**2), flips.items + 1)
    return Finding(flips.share, flips.interval, outcome, needed, level=flips.level)


@dataclass(frozen=True)
class ImageGain(Finding):
    """How much the right image adds to the mean score: `value` is mean(right) − mean(wrong).

    Passes where the gain is shown, fails where it is not. `p_value` is one-sided; `changed` is the share of items whose
    score is another with the wrong image.
    """

    right: float
    wrong: float
    items: int
    p_value: float
    changed: float


def image_gain(right: Sequence[float], wrong: Sequence[float], clusters: Sequence[str] | None, confidence: float) -> ImageGain:
    """Judge whether the same questions are answered better with their own image than with another one (or none).

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
