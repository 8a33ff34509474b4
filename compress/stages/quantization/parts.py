"""The parts of a quantizer: transforms that move scales between layers, then a rounder, which has a search for its grids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.engine.hessian import HessianRequest
from compress.engine.statistics import InputStatistics
from compress.families import ScalePair
from compress.numerics.grids import Grid, QuantizedWeight, Scheme, full_range
from compress.stages.blockwise.block import BlockWeights

SearchGrid = Callable[[str, Tensor, Scheme, torch.dtype], Grid]
"""Returns the grid of a linear's rows: its name, float32 [rows, in] with pruned weights at zero, its scheme, the scales' type."""

RoundRows = Callable[[Tensor, Grid, Tensor | None], QuantizedWeight]
"""Rounds rows [rows, in], float32, of linears that share an input; the mask [rows, in] is False where a weight is pruned."""


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that share an input and its scale."""

    block: BlockWeights

    names: Sequence[str]
    schemes: Mapping[str, Scheme]

    statistics: InputStatistics | None
    """Those of the shared input; None for a method that reads none."""


class Transform(Protocol):
    """Folds a scale into a pair of layers, so that rounding costs less while the block computes the same."""

    def request(self, schemes: Collection[Scheme]) -> HessianRequest | None:
        """Return what it reads of the Hessians of linears with these schemes; None where it reads no statistics at all."""
        ...

    def apply(
        self, block: BlockWeights, pair: ScalePair, statistics: Mapping[str, InputStatistics], schemes: Mapping[str, Scheme]
    ) -> None:
        """Choose the pair's scale and fold it into the layers, or leave the pair as it is."""
        ...


class GridSearch(Protocol):
    """Chooses the scales and zero points of integer weights."""

    def request(self, schemes: Collection[Scheme]) -> HessianRequest | None:
        """Return what it reads of the Hessians of linears with these schemes; None where it reads no statistics at all."""
        ...

    def prepare(self, group: LinearGroup) -> SearchGrid:
        """Return the search for some linears; what it needs of their statistics is computed now."""
        ...


class Rounder(Protocol):
    """Rounds integer weights to their grids."""

    @property
    def grid(self) -> GridSearch:
        """The search for the grids."""
        ...

    def request(self, schemes: Collection[Scheme]) -> HessianRequest | None:
        """Return what it reads of the Hessians beyond what its search does; None where it reads no statistics at all."""
        ...

    def prepare(self, group: LinearGroup) -> RoundRows:
        """Return the rounding for some linears, whose statistics may be used up."""
        ...

    def optimism(self, channels: int, tokens: float) -> float:
        """Return by what factor the output error on other tokens exceeds that on the tokens whose Hessian it has followed."""
        ...


@dataclass(frozen=True)
class FullRange:
    """Grids that span each group's range."""

    def request(self, schemes: Collection[Scheme]) -> None:
        """Return that it reads nothing."""
        del schemes

    def prepare(self, group: LinearGroup) -> SearchGrid:
        """Return the range's grid."""
        del group
        return lambda name, weight, scheme, dtype: full_range(weight, scheme, dtype)


FULL_RANGE = FullRange()
