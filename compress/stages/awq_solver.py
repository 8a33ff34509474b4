"""AWQ's scales on one block: they move from a linear's input channels into the layer before (arXiv 2306.00978).

With W a weight, G the second moment of its input and Q rounding, a scale s per input channel is chosen to minimise tr(ΔW G ΔWᵀ),
ΔW = Q(W·s)/s - W: the squared error of the output over all calibration tokens, at a cost that does not depend on their number. It
is measured on some of the rows of W, which are rounded independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.engine.statistics import Moments
from compress.families import ScalePair
from compress.numerics.grids import Scheme
from compress.numerics.rounding import resolve_group_size, rounding_error
from compress.stages.block import BlockWeights, Repeats, movable, move, repeats_of

_STRIDE = 4
SAMPLE = 1 << 22
FEWEST_ROWS = 256
PIECE = 1 << 22
_SEED = 0
_EXTREME = 1e4
_FLOOR = 1e-3


def fold(block: BlockWeights, pair: ScalePair, moments: Mapping[str, Moments], schemes: Mapping[str, Scheme], steps: int) -> None:
    """Search a pair's scale, in `steps` steps of its exponent, and move it; a pair with a part left out stays as it is."""
    if not movable(block, pair):
        return
    repeats = repeats_of(block, pair)
    scale = search(block, pair, repeats, moments[pair.balance_layers[0]], schemes, steps)
    if scale is not None:
        move(block, pair, repeats, scale)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a pair's linears that are held alike, float32 [rows, in]; scales are stored in `dtype`.

    Each stands for `share` rows of the linears.
    """

    weight: Tensor
    scheme: Scheme
    dtype: torch.dtype
    share: float

    def error(self, spread: Tensor) -> Tensor:
        """Return what rounding the weight times a scale changes of the weight itself, float32 [rows, in]."""
        return rounding_error(self.weight * spread, self.scheme, self.dtype).div_(spread)


def parts_of(block: BlockWeights, pair: ScalePair, schemes: Mapping[str, Scheme]) -> list[RowGroup]:
    """Return a pair's linears by how they are held; of large ones some of the rows, drawn at random, always the same."""
    alike: dict[Scheme, list[str]] = {}
    for name in pair.balance_layers:
        alike.setdefault(schemes[name], []).append(name)
    parts: list[RowGroup] = []
    for scheme, names in alike.items():
        counts = [len(block.weights[name]) for name in names]
        share = max(1.0, sum(counts) / max(FEWEST_ROWS, SAMPLE // block.weights[names[0]].shape[1]))
        generator = torch.Generator().manual_seed(_SEED)
        drawn: list[Tensor] = []
        for name, count in zip(names, counts, strict=True):
            rows = torch.randperm(count, generator=generator)[: max(1, round(count / share))].sort().values
            drawn.append(block.weight(name, rows.to(block.weights[name].device)))
        weight = torch.cat(drawn)
        parts.append(RowGroup(weight, scheme, block.precision(f"{names[0]}.weight"), sum(counts) / len(weight)))
    return parts


def search(
    block: BlockWeights, pair: ScalePair, repeats: Repeats, moments: Moments, schemes: Mapping[str, Scheme], steps: int
) -> Tensor | None:
    """Return the best scale per source channel, float32, or None where none is better than no scale."""
    parts = parts_of(block, pair, schemes)
    before = block.input_scales.get(pair.balance_layers[0], torch.ones(()))
    importance = repeats.pool(_importance(block, pair, schemes)).clamp_(min=1e-4)
    magnitude = repeats.pool(moments.mean_abs())

    def loss(point: GridPoint) -> float:
        spread = repeats.spread(point.scale(magnitude, importance))
        return sum(part.share * moments.output_error(part.error(spread).div_(before)) for part in parts)

    best = best_point((GridPoint(0.0, duo=False), GridPoint(0.0, duo=True)), loss, steps)
    return None if best == GridPoint(0.0, duo=False) else best.scale(magnitude, importance)


def _importance(block: BlockWeights, pair: ScalePair, schemes: Mapping[str, Scheme]) -> Tensor:
    """Return the mean over all rows of a pair's linears of |W| relative to the largest of its group, float32 [in]."""
    rows, columns = 0, block.weights[pair.balance_layers[0]].shape[1]
    total = torch.zeros(columns, device=block.weights[pair.balance_layers[0]].device)
    for name in pair.balance_layers:
        size = resolve_group_size(schemes[name], columns).group_size
        for piece in block.pieces(name, PIECE):
            groups = piece.abs_().view(len(piece), -1, size)
            total += groups.div_(groups.amax(dim=-1, keepdim=True).clamp_(min=1e-12)).view(piece.shape).sum(dim=0)
            rows += len(piece)
    return total.div_(rows)


@dataclass(frozen=True)
class GridPoint:
    """A point of the search: the scale a^α, or with `duo` a^α / w^(1-α), with a the mean |x| and w the mean relative |W|."""

    exponent: float
    duo: bool

    def scale(self, magnitude: Tensor, importance: Tensor) -> Tensor:
        """Return the scale per channel, normalised to lie around 1."""
        scale = magnitude.pow(self.exponent)
        return normalised(scale / importance.pow(1 - self.exponent) if self.duo else scale)


def best_point(starts: Iterable[GridPoint], loss: Callable[[GridPoint], float], steps: int) -> GridPoint:
    """Return the point of least loss with an exponent from 0 to 1 on the lines that `starts` begin.

    The loss is smooth in the exponent, so every fourth step is tried first, then those around the best.
    """
    known: dict[GridPoint, float] = {}

    def cached(point: GridPoint) -> float:
        if point not in known:
            known[point] = loss(point)
        return known[point]

    coarse = [GridPoint(step / steps, start.duo) for start in starts for step in range(0, steps + 1, _STRIDE)]
    nearest = min(coarse, key=cached)
    around = range(1 - _STRIDE, _STRIDE)
    fine = [GridPoint(round(nearest.exponent * steps + step) / steps, nearest.duo) for step in around]
    return min((point for point in fine if 0 <= point.exponent <= 1), key=cached)


def normalised(scale: Tensor) -> Tensor:
    """Bring a scale to lie around 1; channels that are given (nearly) nothing must not take part in where that is."""
    live = scale[scale > 0]
    if not live.numel():
        return torch.ones_like(scale)
    scale = scale.clamp(min=float(torch.maximum(live.min(), live.median() * _FLOOR)))
    return (scale / (scale.max() * scale.min()).sqrt()).clamp_(1 / _EXTREME, _EXTREME)
