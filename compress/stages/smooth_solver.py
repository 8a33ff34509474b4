"""SmoothQuant's scales on one block, for weights and inputs that are both rounded (arXiv 2211.10438).

A scale s per input channel takes the outliers out of a linear's input and into its weight: s = max|x|^α / max|W|^(1-α). The
strength α is chosen to minimise the expected squared error of the output. Rounding to steps of size d has an error of variance
d²/12, so that is Σ d_rg²/12 · Σ_{j in g} E[x_j²]/s_j² for weights with a step per row r and group g, and d²/12 · ‖W·s‖² for
inputs, with d the step that the range of x/s leaves between its codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.engine.statistics import Moments
from compress.families import ScalePair
from compress.numerics.grids import Scheme, grid
from compress.numerics.rounding import resolve_group_size
from compress.stages.awq_solver import PIECE, GridPoint, RowGroup, best_point, normalised, parts_of
from compress.stages.block import BlockWeights, Repeats, input_max, input_square, movable, move, repeats_of

_CODES = 127


@dataclass(frozen=True)
class Smoothing:
    """The strength α, None to search it for each pair in `steps` steps."""

    strength: float | None
    steps: int = 20


def smooth(
    block: BlockWeights, pair: ScalePair, moments: Mapping[str, Moments], schemes: Mapping[str, Scheme], settings: Smoothing
) -> None:
    """Find a pair's scale and move it; a pair with a part left out, or whose inputs are not rounded, stays as it is."""
    if not movable(block, pair) or any(schemes[name].activations is None for name in pair.balance_layers):
        return
    repeats = repeats_of(block, pair)
    given = moments[pair.balance_layers[0]]
    largest = repeats.pool_max(input_max(block, pair.balance_layers[0], given))
    if settings.strength is not None:
        scale = _scale(settings.strength, largest, _weight_max(block, pair, repeats))
    else:
        scale = search(block, pair, repeats, given, schemes, settings.steps)
    if scale is not None:
        move(block, pair, repeats, scale)


def search(
    block: BlockWeights, pair: ScalePair, repeats: Repeats, moments: Moments, schemes: Mapping[str, Scheme], steps: int
) -> Tensor | None:
    """Return the best scale per source channel, float32 (the linears' inputs are divided by it), or None for none."""
    parts = parts_of(block, pair, schemes)
    ranges, squares = input_max(block, pair.balance_layers[0], moments), input_square(block, pair.balance_layers[0], moments)
    largest, heaviest = repeats.pool_max(ranges), _weight_max(block, pair, repeats)

    def loss(spread: Tensor) -> float:
        given = squares / spread.square()
        total = 0.0
        for part in parts:
            weight = part.weight * spread
            noise = _noise(part.scheme, ranges / spread, given.sqrt())
            total += part.share * (_weight_error(weight, given, part) + noise * float(weight.square_().sum()))
        return total

    best = best_point(
        [GridPoint(0.0, duo=True)], lambda point: loss(repeats.spread(_scale(point.exponent, largest, heaviest))), steps
    )
    scale = _scale(best.exponent, largest, heaviest)
    return scale if loss(repeats.spread(scale)) < loss(torch.ones_like(ranges)) else None


def _weight_error(weight: Tensor, squares: Tensor, part: RowGroup) -> float:
    """Return the expected squared error of the output by rounding a weight, for inputs with the mean squares `squares` [in]."""
    scheme = resolve_group_size(part.scheme, weight.shape[1])
    steps, _ = grid(weight.view(weight.shape[0], -1, scheme.group_size), scheme, part.dtype)
    return float(steps.to(torch.float32).square_().sum(dim=0).mul_(squares.view(-1, scheme.group_size).sum(dim=1)).sum() / 12)


def _noise(scheme: Scheme, ranges: Tensor, spreads: Tensor) -> float:
    """Return the variance of rounding one input element, from the channels' largest magnitudes and root mean squares.

    A fixed scale has to reach the largest element there ever was; one that is found for each token the largest of that token,
    which for as many normal channels as widely spread as the widest is expected at √(2 ln 2n) times their spread.
    """
    largest = float(ranges.max())
    if scheme.activations != "tensor":
        largest = min(largest, float(spreads.max()) * math.sqrt(2 * math.log(2 * len(spreads))))
    return (largest / _CODES) ** 2 / 12


def _weight_max(block: BlockWeights, pair: ScalePair, repeats: Repeats) -> Tensor:
    pieces = (piece for name in pair.balance_layers for piece in block.pieces(name, PIECE))
    return repeats.pool_max(torch.stack([piece.abs_().amax(dim=0) for piece in pieces]).amax(dim=0))


def _scale(strength: float, largest: Tensor, heaviest: Tensor) -> Tensor:
    return normalised(largest.clamp(min=1e-5).pow(strength) / heaviest.clamp(min=1e-5).pow(1 - strength))
