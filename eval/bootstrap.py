"""The paired bootstrap by clusters, under the hypothesis that the artifact keeps exactly a given share of the original's score.

Items of one image depend on each other, so whole clusters are drawn. For a recovery ρ the hypothesis mean(artifact) =
ρ · mean(original) says that the clusters' differences D = Σ artifact − ρ · Σ original have mean 0. Resampling the observed
clusters as they are would not do: where few items changed, the losses that were not seen are what the question is about. So
clusters are drawn with the likeliest probabilities that fulfil the hypothesis (Efron, Canadian Journal of Statistics 9, 1981;
Owen, Biometrika 75, 1988), where a cluster may also lose or gain all of its score although none was seen to. For right/wrong
items without clusters these are exactly the probabilities of the score test in `statistics`.

The distribution of the sum of the drawn differences is not simulated: it is computed on a grid by Fourier transform, so
there is no seed, and tail probabilities as small as group-sequential tests ask for are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_GRID = 2**14
_SMALLEST = 1e-14  # below it lies the transform's rounding error


@dataclass(frozen=True, eq=False)
class Totals:
    """Scores summed over each cluster, the number of items of each, and the largest score that an item had."""

    original: Floats
    artifact: Floats
    sizes: Floats
    largest: float

    @property
    def clusters(self) -> int:
        """The number of clusters."""
        return len(self.sizes)

    @cached_property
    def distinct(self) -> tuple[Floats, Floats, Floats]:
        """Each distinct (original, artifact), and the share of the clusters that have it."""
        pairs, counts = np.unique(np.round(np.column_stack([self.original, self.artifact]), 12), axis=0, return_counts=True)
        return pairs[:, 0], pairs[:, 1], counts / self.clusters

    @cached_property
    def unseen(self) -> tuple[float, float]:
        """How much a cluster may lose, and gain, at once although none was seen to: everything, at the size of a random item's.

        To take the size of the changes that were seen instead would let too many artifacts pass at the limit where the items of a
        cluster change together.
        """
        total = float(self.original.sum())
        loss = float((self.original**2).sum()) / total if total else 0.0
        return loss, self.largest * float((self.sizes**2).sum() / self.sizes.sum())


@dataclass(frozen=True)
class Tails:
    """How often the hypothesis gives a sum of differences as large as the one seen, and as small; `spread` is of one cluster's."""

    larger: float
    smaller: float
    spread: float


def tilted(totals: Totals, recovery: float) -> tuple[Floats, Floats]:
    """Return the clusters' possible differences and their likeliest probabilities with mean 0: those seen, and two unseen.

    Maximising Σ log p with Σ p = 1 and Σ p·D = 0 gives p = share / (1 + λ·D). A λ that would have to leave the range in which
    an unseen difference could gain likelihood stays at its end, and the unseen difference takes the remaining probability.
    """
    original, artifact, shares = totals.distinct
    differences = artifact - recovery * original
    low = min(float(differences.min()), -recovery * totals.unseen[0])
    high = max(float(differences.max()), totals.unseen[1])
    multiplier = _multiplier(differences, shares, low, high)
    weights = shares / (1 + multiplier * differences)
    rest = max(1 - float(weights.sum()), 0.0)
    extra = (rest, 0.0) if multiplier > 0 else (0.0, rest)
    values = np.concatenate([differences, [low, high]])
    probabilities = np.concatenate([weights, extra])
    return values, probabilities / probabilities.sum()


def _multiplier(differences: Floats, shares: Floats, low: float, high: float) -> float:
    """Solve Σ share·D / (1 + λ·D) = 0 by bisection; the sum falls with λ between its poles, or stays on one side of 0."""
    mean = float((shares * differences).sum())
    if abs(mean) <= 1e-12 * max(high, -low, 1e-300):
        return 0.0
    inner, outer = 0.0, (-1 / low if mean > 0 else -1 / high)
    edge = outer * (1 - 1e-12)
    if mean * float((shares * differences / (1 + edge * differences)).sum()) >= 0:
        return edge
    for _ in range(80):
        middle = (inner + outer) / 2
        if mean * float((shares * differences / (1 + middle * differences)).sum()) > 0:
            inner = middle
        else:
            outer = middle
        if abs(outer - inner) <= 1e-13 * abs(outer):
            break
    return inner


def bootstrap_tails(totals: Totals, recovery: float) -> Tails:
    """Return the bootstrap's one-sided p-values for "the artifact's mean score is `recovery` times the original's", which is not 0.

    The spread is estimated from the clusters, so the p-values are widened from the normal to Student's distribution; a single
    cluster tells nothing, and both are 1. Where few clusters changed it is those few that tell of the spread: the degrees of
    freedom are as many as give a sample variance the coefficient of variation that it has here (Satterthwaite, Biometrics Bulletin
    2, 1946), and at most one less than there are clusters.
    """
    values, probabilities = tilted(totals, recovery)
    spread = math.sqrt(float((probabilities * values**2).sum()))
    seen = float(totals.artifact.sum() - recovery * totals.original.sum())
    if totals.clusters < 2 or spread == 0:
        return Tails(1.0, 1.0, spread)
    larger, smaller = sum_tails([(values, probabilities, totals.clusters)], seen)
    freedom = min(totals.clusters - 1, 2 * totals.clusters / max(_uncertainty(values / spread, probabilities), 1e-9))
    return Tails(_widen(larger, totals.clusters, freedom), _widen(smaller, totals.clusters, freedom), spread)


def _uncertainty(values: Floats, probabilities: Floats) -> float:
    """Return how many times its own square over the clusters the variance 1 of such values is uncertain by, their mean being known.

    That is their kurtosis, less 1 and less what follows from the mean, the square of their skewness (Owen, as above): with the mean
    a distribution of two values, as of items that are right or wrong, has a known variance, and only that of more is estimated.
    """
    skewness, kurtosis = (float((probabilities * values**power).sum()) for power in (3, 4))
    return kurtosis - 1 - skewness**2


def sum_tails(parts: Sequence[tuple[Floats, Floats, int]], seen: float) -> tuple[float, float]:
    """Return with which probability a sum of independent draws is at least `seen`, and at most `seen`.

    Each part gives the values that its draws take, their probabilities, and the number of draws; the values' mean is 0. A value
    between two points of the grid is shared between them so that the mean stays; sums that this may have blurred across `seen`
    count in both tails. The grid spans ten standard deviations and four of the largest steps to either side; what lies beyond
    has a probability below the transform's rounding error.
    """
    variance = sum(draws * float((chances * values**2).sum()) for values, chances, draws in parts)
    largest = max(float(np.abs(values[chances > 0]).max()) for values, chances, _ in parts)
    reach = 10 * math.sqrt(variance) + 4 * largest
    step = 2 * reach / _GRID
    spectrum = np.ones(_GRID // 2 + 1, dtype=np.complex128)
    blurred = 0.0
    for values, chances, draws in parts:
        below = np.floor(values / step)
        share = values / step - below
        places = below.astype(np.int64)
        here, next_one = np.bincount(places % _GRID, chances * (1 - share), _GRID), (places + 1) % _GRID
        spectrum *= np.fft.rfft(here + np.bincount(next_one, chances * share, _GRID)) ** draws
        blurred += draws * float((chances * share * (1 - share)).sum())
    masses = np.maximum(np.fft.irfft(spectrum, _GRID), 0.0)
    sums = np.fft.fftfreq(_GRID, 1 / _GRID) * step
    blur = 4 * step * math.sqrt(blurred) + 1e-9 * reach
    return min(float(masses[sums >= seen - blur].sum()), 1.0), min(float(masses[sums <= seen + blur].sum()), 1.0)


def _widen(tail: float, clusters: int, freedom: float) -> float:
    from scipy.special import ndtri, stdtr

    normal = float(ndtri(min(max(tail, _SMALLEST), 1.0)))
    return float(stdtr(freedom, normal * math.sqrt((clusters - 1) / clusters)))
