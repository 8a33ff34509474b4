"""Rounding to nearest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from compress.numerics.grids import Grid, QuantizedWeight, Scheme
from compress.numerics.rounding import round_nearest
from compress.stages.quantization.parts import FULL_RANGE, GridSearch, LinearGroup, RoundRows


@dataclass(frozen=True)
class Nearest:
    """Rounds each weight to the nearest value of its grid."""

    grid: GridSearch = FULL_RANGE

    def request(self, schemes: Collection[Scheme]) -> None:
        """Return that it reads nothing."""
        del schemes

    def prepare(self, group: LinearGroup) -> RoundRows:
        """Return the rounding."""
        del group
        return _round

    def optimism(self, channels: int, tokens: float) -> float:
        """Return 1: no weight is fitted to the tokens."""
        del channels, tokens
        return 1.0


def _round(weight: Tensor, grid: Grid, kept: Tensor | None) -> QuantizedWeight:
    # zero is on every grid, so a pruned weight rounds to exactly zero
    return round_nearest(weight if kept is None else weight * kept, grid)


NEAREST = Nearest()
