"""SmoothQuant's scales on one block, where weights and activations are both quantized (arXiv 2211.10438).

A scale s per input channel moves outliers from the activations into the weight: s = max|x|^α / max|W|^(1-α). The migration
strength α is chosen to minimize the expected squared output error. Rounding to steps of size d has an error of variance
d²/12, so that is Σ d_rg²/12 · Σ_{j in g} E[x_j²]/s_j² for weights with a step per row r and group g, and d²/12 · ‖W·s‖² for
activations, with d the step of the grid that covers the range of x/s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.engine.hessian import DIAGONAL_ONLY, HessianRequest
from compress.engine.statistics import InputStatistics
from compress.families import ScalePair
from compress.numerics.grids import Scheme, grid, resolve_group_size
from compress.stages.blockwise.block import BlockWeights, GroupedHeads, fold_scale, foldable, grouped_heads, input_max, input_square
from compress.stages.quantization.transforms.scale_search import (
    CHUNK_ELEMENTS,
    GridPoint,
    RowGroup,
    best_point,
    normalize,
    sample_rows,
)

_CODES = 127
"""The largest int8 code that activations are scaled to."""


@dataclass(frozen=True)
class SmoothQuant:
    """Moves outliers of activations into the weights, where both are quantized."""

    strength: float | None = None
    """The migration strength α; None to search it for each pair."""

    steps: int = 20
    """The number of grid steps of the search from 0 to 1."""

    def request(self, schemes: Collection[Scheme]) -> HessianRequest:
        """Return that it reads only magnitudes and the Hessian's diagonal."""
        del schemes
        return DIAGONAL_ONLY

    def apply(
        self, block: BlockWeights, pair: ScalePair, statistics: Mapping[str, InputStatistics], schemes: Mapping[str, Scheme]
    ) -> None:
        """Compute the pair's scale and move it.

        A pair with an ignored layer, or without activation quantization, stays as it is.
        """
        # with weights alone quantized, moving outliers into them only makes their steps coarser
        if not foldable(block, pair) or any(schemes[name].activations is None for name in pair.balance_layers):
            return
        repeats = grouped_heads(block, pair)
        inputs = statistics[pair.balance_layers[0]]
        # a shared key-value channel must cover all query heads that read it, so the maximum and not the mean
        activation_max = repeats.pool_max(input_max(block, pair.balance_layers[0], inputs))
        if self.strength is not None:
            scale = _scale(self.strength, activation_max, _weight_max(block, pair, repeats))
        else:
            scale = _search(block, pair, inputs, schemes, self.steps)
        if scale is not None:
            fold_scale(block, pair, repeats, scale)


def _search(
    block: BlockWeights, pair: ScalePair, statistics: InputStatistics, schemes: Mapping[str, Scheme], steps: int
) -> Tensor | None:
    """Return the best scale per channel of the smooth layer, float32, or None where none is better than no scale."""
    repeats, row_groups = grouped_heads(block, pair), sample_rows(block, pair, schemes)
    ranges, squares = input_max(block, pair.balance_layers[0], statistics), input_square(block, pair.balance_layers[0], statistics)
    activation_max, weight_max = repeats.pool_max(ranges), _weight_max(block, pair, repeats)

    def loss(scale: Tensor) -> float:
        mean_squares = squares / scale.square()
        total = 0.0
        for group in row_groups:
            weight = group.weight * scale
            noise = _rounding_variance(group.scheme, ranges / scale, mean_squares.sqrt())
            total += group.sample_weight * (_weight_error(weight, mean_squares, group) + noise * float(weight.square_().sum()))
        return total

    best = best_point(
        [GridPoint(0.0, duo=True)], lambda point: loss(repeats.expand(_scale(point.exponent, activation_max, weight_max))), steps
    )
    scale = _scale(best.exponent, activation_max, weight_max)
    # strength 0 is not "no scale": it is 1 / max|W|, so both are compared
    return scale if loss(repeats.expand(scale)) < loss(torch.ones_like(ranges)) else None


def _weight_error(weight: Tensor, mean_squares: Tensor, group: RowGroup) -> float:
    """Return the expected squared output error of rounding a weight, for activations with the mean squares `mean_squares` [in]."""
    scheme = resolve_group_size(group.scheme, weight.shape[1])
    steps, _ = grid(weight.view(weight.shape[0], -1, scheme.group_size), scheme, group.dtype)
    return float(steps.to(torch.float32).square_().sum(dim=0).mul_(mean_squares.view(-1, scheme.group_size).sum(dim=1)).sum() / 12)


def _rounding_variance(scheme: Scheme, ranges: Tensor, deviations: Tensor) -> float:
    """Return the rounding variance of an activation, from the channels' largest magnitudes and root mean squares.

    A static scale covers the largest activation of all tokens. A dynamic one covers the largest of its token: among n normal
    channels with the deviation of the widest, √(2 ln 2n) times that deviation is expected.
    """
    largest = float(ranges.max())
    if scheme.activations != "tensor":
        largest = min(largest, float(deviations.max()) * math.sqrt(2 * math.log(2 * len(deviations))))
    return (largest / _CODES) ** 2 / 12


def _weight_max(block: BlockWeights, pair: ScalePair, repeats: GroupedHeads) -> Tensor:
    chunks = (chunk for name in pair.balance_layers for chunk in block.chunks(name, CHUNK_ELEMENTS))
    return repeats.pool_max(torch.stack([chunk.abs_().amax(dim=0) for chunk in chunks]).amax(dim=0))


def _scale(strength: float, activation_max: Tensor, weight_max: Tensor) -> Tensor:
    # 1e-5, as in SmoothQuant's own code: a channel of zeros would divide by zero
    return normalize(activation_max.clamp(min=1e-5).pow(strength) / weight_max.clamp(min=1e-5).pow(1 - strength))
