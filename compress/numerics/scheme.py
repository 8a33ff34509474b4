"""How a weight matrix, and what comes into it, is held in a few bits; free of torch, so that a plan can be made with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activations = Literal["token", "tensor", "group"]
"""How a linear's input is rounded: by a scale for each token as it comes, by one fixed for all, or per token and 128 channels."""

BLOCK = 128
"""The side of the square blocks that share a scale in fine-grained FP8."""


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is held: `bits` per code, a scale (and zero point) per `group_size` input channels of `block_rows` rows.

    Integer grids that are symmetric have their zero point fixed at 2^(bits-1); floating-point ones (8 bits are float8 e4m3fn) have
    none. A `group_size` or `block_rows` of -1 stands for all of them where a scheme covers matrices of several shapes; a
    `QuantizedWeight` of integers always has its own width written out. `activations` is None where the input stays as it is.
    """

    bits: int
    group_size: int
    symmetric: bool
    type: Literal["int", "float"] = "int"
    block_rows: int = 1
    activations: Activations | None = None

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def format(self) -> str:
        """What compressed-tensors calls the layout of such weights."""
        if self.type == "float":
            return "float-quantized"
        return "pack-quantized" if self.activations is None else "int-quantized"

    def groups(self, columns: int) -> int:
        """Return how many scales lie along a row of so many input channels."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    def scale_rows(self, rows: int) -> int:
        """Return how many scales lie along so many rows."""
        return 1 if self.block_rows == -1 else -(-rows // self.block_rows)
