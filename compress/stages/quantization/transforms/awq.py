"""AWQ's scales on one block: they move from a linear's input channels into the layer before it (arXiv 2306.00978).

With W a weight, H = Σ xᵀx the Hessian and Q rounding, a scale s per input channel is chosen to minimize tr(ΔW H ΔWᵀ),
ΔW = Q(W·s)/s - W: the squared output error over all calibration tokens, at a cost that does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.engine.hessian import HessianRequest
from compress.engine.statistics import InputStatistics
from compress.families import ScalePair
from compress.numerics.grids import Scheme, resolve_group_size
from compress.stages.blockwise.block import BlockWeights, fold_scale, foldable, grouped_heads
from compress.stages.quantization.transforms.scale_search import CHUNK_ELEMENTS, GridPoint, best_point, sample_rows


@dataclass(frozen=True)
class AwqScaling:
    """Scales up the input channels with large activations."""

    steps: int = 20
    """Steps of the grid of exponents from 0 to 1."""

    def request(self, schemes: Collection[Scheme]) -> HessianRequest:
        """Return that it estimates the output error of rounded weights."""
        del schemes
        return HessianRequest(full=False, sketch=True)

    def apply(
        self, block: BlockWeights, pair: ScalePair, statistics: Mapping[str, InputStatistics], schemes: Mapping[str, Scheme]
    ) -> None:
        """Search the pair's scale and move it; a pair with an ignored layer stays as it is."""
        if not foldable(block, pair):
            return
        scale = _search(block, pair, statistics[pair.balance_layers[0]], schemes, self.steps)
        if scale is not None:
            fold_scale(block, pair, grouped_heads(block, pair), scale)


def _search(
    block: BlockWeights, pair: ScalePair, statistics: InputStatistics, schemes: Mapping[str, Scheme], steps: int
) -> Tensor | None:
    """Return the best scale per channel of the smooth layer, float32, or None where none is better than no scale."""
    repeats, row_groups = grouped_heads(block, pair), sample_rows(block, pair, schemes)
    # the Hessian is that of the inputs before earlier scales; an error of the scaled weight is brought back to them
    applied = block.smoothing_scales.get(pair.balance_layers[0], torch.ones(()))
    # a column of zeros would give an infinite scale; AutoAWQ adds the same 1e-4
    importance = repeats.pool(_importance(block, pair, schemes)).clamp_(min=1e-4)
    magnitude = repeats.pool(statistics.mean_abs())

    def loss(point: GridPoint) -> float:
        scale = repeats.expand(point.scale(magnitude, importance))
        return sum(group.sample_weight * statistics.output_error(group.error(scale).div_(applied)) for group in row_groups)

    # the first point is no scale at all, and wins a tie
    best = best_point((GridPoint(0.0, duo=False), GridPoint(0.0, duo=True)), loss, steps)
    return None if best == GridPoint(0.0, duo=False) else best.scale(magnitude, importance)


def _importance(block: BlockWeights, pair: ScalePair, schemes: Mapping[str, Scheme]) -> Tensor:
    """Return the mean over all rows of a pair's linears of |W| relative to the largest of its group, float32 [in]."""
    rows, columns = 0, block.weights[pair.balance_layers[0]].shape[1]
    total = torch.zeros(columns, device=block.weights[pair.balance_layers[0]].device)
    for name in pair.balance_layers:
        size = resolve_group_size(schemes[name], columns).group_size
        for chunk in block.chunks(name, CHUNK_ELEMENTS):
            groups = chunk.abs_().view(len(chunk), -1, size)
            # relative to the group's largest, which sets the group's steps; 1e-12 for groups of zeros
            total += groups.div_(groups.amax(dim=-1, keepdim=True).clamp_(min=1e-12)).view(chunk.shape).sum(dim=0)
            rows += len(chunk)
    return total.div_(rows)
