"""How a weight matrix is held as integers; free of torch, so that a plan can be made with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is held: `bits` per code, one scale (and zero point) per `group_size` input channels of each row.

    Symmetric grids have their zero point fixed at 2^(bits-1). A `group_size` of -1 stands for the whole row where a scheme
    covers matrices of several widths; a `QuantizedWeight` always has its own width written out.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    def groups(self, columns: int) -> int:
        """Return how many groups a row of so many input channels has."""
        return 1 if self.group_size == -1 else columns // self.group_size
