"""Rounding with error feedback: GPTQ (arXiv 2210.17323); the mathematics is in `compress/numerics/gptq.py`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from compress.engine.hessian import HessianRequest
from compress.numerics.gptq import Feedback, GptqOptions, optimism, round_columns
from compress.numerics.grids import Grid, QuantizedWeight, Scheme
from compress.stages.blockwise.block import take_hessian
from compress.stages.quantization.parts import FULL_RANGE, GridSearch, LinearGroup, RoundRows


@dataclass(frozen=True)
class GptqRounder:
    """Rounds column by column and compensates each column's error in those not yet rounded."""

    options: GptqOptions
    grid: GridSearch = FULL_RANGE

    def request(self, schemes: Collection[Scheme]) -> HessianRequest:
        """Return that it reads the full Hessian."""
        del schemes
        return HessianRequest(full=True, sketch=False)

    def prepare(self, group: LinearGroup) -> RoundRows:
        """Factor the Hessian, in its own memory, and return the rounding."""
        assert group.statistics is not None
        # factored once for all linears that read the input, in the memory of the sums: the largest matrix of a block
        options = self.options.of(group.block.weights[group.names[0]].shape[1], group.statistics.tokens)
        return partial(_round, Feedback.of(take_hessian(group.block, group.names[0], group.statistics), options))

    def optimism(self, channels: int, tokens: float) -> float:
        """Return that of a least-squares fit: `compress.numerics.gptq.optimism`."""
        return optimism(channels, tokens)


def _round(feedback: Feedback, weight: Tensor, grid: Grid, kept: Tensor | None) -> QuantizedWeight:
    return round_columns(weight, feedback, grid, kept)
