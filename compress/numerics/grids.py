"""Integer grids for weights: which codes, scales and zero points stand for a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is held: `bits` per code, one scale (and zero point) per `group_size` input channels of each row.

    Symmetric grids have their zero point fixed at 2^(bits-1).
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [out, in] as codes: weight = (code - zero point) · scale, per group along the input.

    `codes` uint8 [out, in]; `scales` [out, in / group_size] in the type they are stored in; `zero_points` uint8 of the same shape.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """Return the matrix the codes stand for, float32 [out, in]."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, -1, self.scheme.group_size).to(torch.float32)
        shifted = groups - self.zero_points.unsqueeze(-1).to(torch.float32)
        return (shifted * self.scales.unsqueeze(-1).to(torch.float32)).view(rows, columns)
