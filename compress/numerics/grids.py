"""Grids for weights: which codes, scales and zero points stand for a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.numerics.floats import spread_scales
from compress.numerics.scheme import Scheme

_CHUNK = 1 << 22

__all__ = ["QuantizedWeight", "Scheme", "grid"]


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [out, in] as codes, with the scales in the type they are stored in.

    Integers: weight = (code - zero point) · scale, per group along the input; `codes` uint8 [out, in], `scales` [out, in /
    group_size], `zero_points` uint8 of the same shape. Floats: weight = code · scale; `codes` float8 e4m3fn [out, in], `scales`
    [scale rows, groups], no zero points. `input_scale`, float32 [1], is that of the linear's input where it is fixed.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    scheme: Scheme
    input_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix the codes stand for [out, in], computed in float32 and rounded to `dtype`."""
        rows, columns = self.codes.shape
        if self.zero_points is None:
            return (self.codes.to(torch.float32) * spread_scales(self.scales, self.scheme, (rows, columns))).to(dtype)
        matrix = self.codes.new_empty(rows, columns, dtype=dtype)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            groups = self.codes[part].view(-1, columns // self.scheme.group_size, self.scheme.group_size).to(torch.float32)
            groups.sub_(self.zero_points[part].unsqueeze(-1)).mul_(self.scales[part].unsqueeze(-1).to(torch.float32))
            matrix[part] = groups.view(-1, columns)
        return matrix


def grid(groups: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Return scales, in `dtype`, and zero points, float32, both [out, groups], for values [out, groups, group_size].

    An asymmetric grid spans from the lowest to the highest value, and always holds zero; a symmetric one reaches half a step
    past its outermost codes. `shrink` makes the range smaller by a factor. A group of zeros has the scale 1.
    """
    low = groups.amin(dim=-1).clamp_(max=0)
    extent = groups.abs().amax(dim=-1) * 2 if scheme.symmetric else groups.amax(dim=-1).clamp_(min=0) - low
    scales = (extent * shrink / (scheme.levels - 1)).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if scheme.symmetric:
        return scales, torch.full_like(scales, scheme.levels // 2, dtype=torch.float32)
    zero_points = (-low * shrink / scales.to(torch.float32)).round_().clamp_(0, scheme.levels - 1)
    return scales, zero_points
