"""The paired cluster bootstrap, under the hypothesis that the recovery has a given value.

Items of one image depend on each other, so clusters are resampled. For a recovery ρ the hypothesis mean(artifact) =
ρ · mean(original) says that the clusters' differences D = Σ artifact − ρ · Σ original have mean 0. Resampling the observed
clusters with equal weights would not do: where few items changed, it gives losses that were not observed no probability. So
clusters are drawn with the maximum-likelihood probabilities under the hypothesis (Efron, Canadian Journal of Statistics 9, 1981;
Owen, Biometrika 75, 1988), where a cluster may also lose or gain all of its score although none was observed to. For right/wrong
items without clusters these are exactly the probabilities of the score test in `statistics`.

The distribution of the resampled sum is not simulated: it is computed on a grid by Fourier transform, so there is no seed,
and tail probabilities as small as group-sequential tests need are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compress.eval.statistics.estimates import crossing

Floats = NDArray[np.float64]

_GRID = 2**14
"""Points of the grid, a power of two for the Fourier transform; fewer blur the tails (see `sum_tails`), more take longer."""

_MIN_TAIL = 1e-14
"""Smaller tail probabilities are rounding errors of the transform, and would become an infinite quantile."""

_ROUNDING = 1e-12
"""A smaller remainder of the probabilities is a rounding error: taken for a probability, it would make the grid coarser."""


@dataclass(frozen=True, eq=False)
class Totals:
    """Scores summed over each cluster."""

    original: Floats
    artifact: Floats
    sizes: Floats
    """The number of items of each cluster."""

    largest: float
    """The largest score of an item."""

    @property
    def clusters(self) -> int:
        """The number of clusters."""
        return len(self.sizes)

    @cached_property
    def distinct(self) -> tuple[Floats, Floats, Floats]:
        """The distinct pairs of sums (original, artifact), and the share of the clusters with each."""
        # Rounded: sums of scores such as 0.3 differ in their last bit by the order of addition, and would count as different pairs.
        pairs, counts = np.unique(np.round(np.column_stack([self.original, self.artifact]), 12), axis=0, return_counts=True)
        return pairs[:, 0], pairs[:, 1], counts / self.clusters

    @cached_property
    def unobserved(self) -> tuple[float, float]:
        """The loss and the gain that a cluster may have although none was observed: all of its score, for a random item's cluster.

        Taking the size of the observed changes instead would let too many artifacts pass at the limit where the items of a
        cluster change together.
        """
        total = float(self.original.sum())
        loss = float((self.original**2).sum()) / total if total else 0.0
        # A random item's cluster, not a random cluster: Σ size² / Σ size is its mean size.
        return loss, self.largest * float((self.sizes**2).sum() / self.sizes.sum())


@dataclass(frozen=True)
class Tails:
    """The one-sided p-values of the observed sum of differences."""

    larger: float
    """The probability of a sum at least as large."""

    smaller: float
    """The probability of a sum at least as small."""

    spread: float
    """The standard deviation of one cluster's difference under the hypothesis."""


def tilted(totals: Totals, recovery: float) -> tuple[Floats, Floats]:
    """Return the clusters' possible differences, observed and two unobserved ones, with their maximum-likelihood probabilities.

    Maximising Σ log p with Σ p = 1 and Σ p·D = 0 gives p = share / (1 + λ·D). λ is limited to the range in which
    1 + λ·D is positive for all of them; at its end, the unobserved difference takes the remaining probability.
    """
    original, artifact, shares = totals.distinct
    differences = artifact - recovery * original
    low = min(float(differences.min()), -recovery * totals.unobserved[0])
    high = max(float(differences.max()), totals.unobserved[1])
    multiplier = _multiplier(differences, shares, low, high)
    weights = shares / (1 + multiplier * differences)
    remainder = 1 - float(weights.sum())
    remainder = remainder if remainder > _ROUNDING else 0.0
    unobserved_weights = (remainder, 0.0) if multiplier > 0 else (0.0, remainder)
    values = np.concatenate([differences, [low, high]])
    probabilities = np.concatenate([weights, unobserved_weights])
    return values, probabilities / probabilities.sum()


def _multiplier(differences: Floats, shares: Floats, low: float, high: float) -> float:
    """Solve Σ share·D / (1 + λ·D) = 0; the sum falls with λ between its poles, or stays on one side of 0."""
    mean = float((shares * differences).sum())
    # The observed recovery is the hypothesis: equal weights are its maximum-likelihood probabilities.
    if abs(mean) <= 1e-12 * max(high, -low, 1e-300):
        return 0.0
    # Just inside the pole, where 1 + λ·D of the extreme difference is still positive.
    edge = (-1 / low if mean > 0 else -1 / high) * (1 - 1e-12)
    return edge * crossing(
        lambda part: mean * float((shares * differences / (1 + part * edge * differences)).sum()), 0.0, 1.0, precision=1e-15
    )


def bootstrap_tails(totals: Totals, recovery: float) -> Tails:
    """Return the bootstrap's one-sided p-values for "the recovery is `recovery`"; the original's mean must not be 0.

    The spread is estimated from the clusters, so the p-values are widened from the normal to Student's distribution; for a single
    cluster both are 1. Where few clusters changed, the spread is estimated from those few: the degrees of freedom follow from the
    coefficient of variation of the sample variance (Satterthwaite, Biometrics Bulletin 2, 1946), at most one less than there are
    clusters.
    """
    values, probabilities = tilted(totals, recovery)
    spread = math.sqrt(float((probabilities * values**2).sum()))
    observed = float(totals.artifact.sum() - recovery * totals.original.sum())
    if totals.clusters < 2 or spread == 0:
        return Tails(1.0, 1.0, spread)
    # As many draws as clusters: the distribution that resampling clusters would have without end.
    larger, smaller = sum_tails([(values, probabilities, totals.clusters)], observed)
    degrees = min(totals.clusters - 1, 2 * totals.clusters / max(_variance_uncertainty(values / spread, probabilities), 1e-9))
    return Tails(_widen(larger, totals.clusters, degrees), _widen(smaller, totals.clusters, degrees), spread)


def _variance_uncertainty(values: Floats, probabilities: Floats) -> float:
    """Return the number of clusters times the squared coefficient of variation of the sample variance, where the mean is known.

    `values` have variance 1. It is their kurtosis less 1 and less the square of their skewness, which the known mean explains
    (Owen, as above): of a distribution of two values, as of right/wrong items, the mean determines the variance.
    """
    skewness, kurtosis = (float((probabilities * values**power).sum()) for power in (3, 4))
    return kurtosis - 1 - skewness**2


def sum_tails(distributions: Sequence[tuple[Floats, Floats, int]], observed: float) -> tuple[float, float]:
    """Return the probabilities that a sum of independent draws is at least, and at most, `observed`.

    Each distribution is its values, with mean 0, their probabilities, and the number of draws. A value between two grid points is
    split between them so that the mean stays; sums that this may have moved across `observed` count in both tails. The grid spans
    ten standard deviations and four of the largest steps to either side; the mass beyond is below the transform's rounding error.
    """
    # The values have mean 0 under the hypothesis, so that their square is the variance.
    variance = sum(draws * float((probabilities * values**2).sum()) for values, probabilities, draws in distributions)
    largest = max(float(np.abs(values[probabilities > 0]).max()) for values, probabilities, _ in distributions)
    reach = 10 * math.sqrt(variance) + 4 * largest
    step = 2 * reach / _GRID
    spectrum = np.ones(_GRID // 2 + 1, dtype=np.complex128)
    blurred = 0.0
    for values, probabilities, draws in distributions:
        below = np.floor(values / step)
        share = values / step - below
        # Modulo the grid: negative values wrap to its upper half, as `fftfreq` reads it below.
        indices = below.astype(np.int64)
        mass_below, next_indices = np.bincount(indices % _GRID, probabilities * (1 - share), _GRID), (indices + 1) % _GRID
        spectrum *= np.fft.rfft(mass_below + np.bincount(next_indices, probabilities * share, _GRID)) ** draws
        blurred += draws * float((probabilities * share * (1 - share)).sum())
    masses = np.maximum(np.fft.irfft(spectrum, _GRID), 0.0)
    sums = np.fft.fftfreq(_GRID, 1 / _GRID) * step
    # Four standard deviations of what splitting values between grid points adds: counted in both tails, it can only make a test
    # more conservative.
    blur = 4 * step * math.sqrt(blurred) + 1e-9 * reach
    return min(float(masses[sums >= observed - blur].sum()), 1.0), min(float(masses[sums <= observed + blur].sum()), 1.0)


def _widen(tail: float, clusters: int, degrees: float) -> float:
    from scipy.special import ndtri, stdtr

    normal = float(ndtri(min(max(tail, _MIN_TAIL), 1.0)))
    # The plug-in variance divides by the number of clusters, Student's t by one less.
    return float(stdtr(degrees, normal * math.sqrt((clusters - 1) / clusters)))
