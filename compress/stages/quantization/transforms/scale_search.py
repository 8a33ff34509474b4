"""Search of a scale per channel that moves from a linear's input into the layer before it: formula, grid and sample of rows.

What is minimized is measured on a sample of the rows of a pair's linears, which are rounded independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.families import ScalePair
from compress.numerics.grids import Scheme
from compress.numerics.rounding import rounding_error
from compress.stages.blockwise.block import BlockWeights

_STRIDE = 4
"""The grid's first pass tries every fourth step; the loss is smooth, so that the best step is near the best of them."""

SAMPLE_ELEMENTS = 1 << 19
"""How many weights of a pair's linears the search rounds at each grid point; more rows cost more and change the choice little."""

MIN_SAMPLE_ROWS = 256
"""At least so many rows are sampled, however long they are."""

CHUNK_ELEMENTS = 1 << 22
"""Weights that are copied to float32 at once: 16 MiB."""

_SEED = 0
"""Seed of the sample of rows: the same weights always give the same scales."""

_MAX_SCALE = 1e4
"""Scales are clamped to its inverse, the lower bound in AWQ's own code, and to it."""

_DEAD_CHANNEL = 1e-3
"""Channels with less than this share of the median scale do not take part in the normalization: (nearly) no input reaches them."""


@dataclass(frozen=True)
class RowGroup:
    """A sample of the rows of a pair's linears that have one scheme."""

    weight: Tensor
    """float32 [rows, in]."""

    scheme: Scheme

    dtype: torch.dtype
    """The type that quantization scales are stored in."""

    sample_weight: float
    """How many of the linears' rows each sampled row represents."""

    def error(self, scale: Tensor) -> Tensor:
        """Return ΔW = Q(W·s)/s - W for a scale s [in], float32 [rows, in]."""
        return rounding_error(self.weight * scale, self.scheme, self.dtype).div_(scale)


def sample_rows(block: BlockWeights, pair: ScalePair, schemes: Mapping[str, Scheme]) -> list[RowGroup]:
    """Return the rows of a pair's linears by scheme; of large linears a random sample, the same each time."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name in pair.balance_layers:
        by_scheme.setdefault(schemes[name], []).append(name)
    row_groups: list[RowGroup] = []
    for scheme, names in by_scheme.items():
        counts = [len(block.weights[name]) for name in names]
        # the same share of each linear's rows, so that losses of several linears add up as they would in full
        sample_weight = max(1.0, sum(counts) / max(MIN_SAMPLE_ROWS, SAMPLE_ELEMENTS // block.weights[names[0]].shape[1]))
        # on the CPU: the same rows on every device
        generator = torch.Generator().manual_seed(_SEED)
        sampled: list[Tensor] = []
        for name, count in zip(names, counts, strict=True):
            rows = torch.randperm(count, generator=generator)[: max(1, round(count / sample_weight))].sort().values
            sampled.append(block.weight(name, rows.to(block.weights[name].device)))
        weight = torch.cat(sampled)
        row_groups.append(RowGroup(weight, scheme, block.precision(f"{names[0]}.weight"), sum(counts) / len(weight)))
    return row_groups


@dataclass(frozen=True)
class GridPoint:
    """A point of the search: the scale a^α, or with `duo` a^α / w^(1-α), with a the mean |x| and w the mean relative |W|."""

    exponent: float
    duo: bool

    def scale(self, magnitude: Tensor, importance: Tensor) -> Tensor:
        """Return the scale per channel, normalized around 1."""
        scale = magnitude.pow(self.exponent)
        return normalize(scale / importance.pow(1 - self.exponent) if self.duo else scale)


def best_point(starts: Iterable[GridPoint], loss: Callable[[GridPoint], float], steps: int) -> GridPoint:
    """Return the point of least loss among exponents from 0 to 1, for each of the formulas in `starts`.

    The loss is smooth in the exponent, so every `_STRIDE`-th step is tried first, then those around the best.
    """
    losses: dict[GridPoint, float] = {}

    def cached(point: GridPoint) -> float:
        if point not in losses:
            losses[point] = loss(point)
        return losses[point]

    coarse = [GridPoint(step / steps, start.duo) for start in starts for step in range(0, steps + 1, _STRIDE)]
    # of equal losses the first, so the smaller exponent: weaker scaling
    coarse_best = min(coarse, key=cached)
    around = range(1 - _STRIDE, _STRIDE)
    # from whole steps again: sums of fractions would miss the cached points by a last digit
    fine = [GridPoint(round(coarse_best.exponent * steps + step) / steps, coarse_best.duo) for step in around]
    return min((point for point in fine if 0 <= point.exponent <= 1), key=cached)


def normalize(scale: Tensor) -> Tensor:
    """Return a scale with its geometric mid-range at 1; channels with (nearly) no input do not count."""
    positive = scale[scale > 0]
    if not positive.numel():
        return torch.ones_like(scale)
    # a dead channel's tiny scale would otherwise set the mid-range for all others
    scale = scale.clamp(min=float(torch.maximum(positive.min(), positive.median() * _DEAD_CHANNEL)))
    # around 1, as in AWQ's own code, so that norm weights stay in the middle of their type's range
    return (scale / (scale.max() * scale.min()).sqrt()).clamp_(1 / _MAX_SCALE, _MAX_SCALE)
