"""Rounding to nearest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from compress.engine.hessian import DIAGONAL_ONLY, HessianRequest
from compress.numerics.grids import Grid, QuantizedWeight, Scheme
from compress.numerics.rounding import round_nearest
from compress.stages.quantization.parts import FULL_RANGE, GridSearch, LinearGroup, RoundRows


@dataclass(frozen=True)
class Nearest:
    """Rounds each weight to the nearest value of its grid."""

    grid: GridSearch = FULL_RANGE

    def request(self, schemes: Collection[Scheme]) -> HessianRequest:
        """Return the request for the diagonal alone, which every method gets: it reads no Hessian."""
        del schemes
        return DIAGONAL_ONLY

    def prepare(self, group: LinearGroup) -> RoundRows:
        """Return the rounding."""
        del group
        return _round


def _round(weight: Tensor, grid: Grid, kept: Tensor | None) -> QuantizedWeight:
    # zero is on every grid, so a pruned weight rounds to exactly zero
    return round_nearest(weight if kept is None else weight * kept, grid)


NEAREST = Nearest()
