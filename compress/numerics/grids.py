"""Quantized weights: their codes, scales and zero points, and the grids that a weight is rounded to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.numerics.floats import expand_scales
from compress.numerics.scheme import Scheme

_CHUNK = 1 << 22
"""Elements dequantized at once: their float32 copy takes 16 MiB, whatever the matrix's size."""

__all__ = ["Grid", "QuantizedWeight", "Scheme", "full_range", "grid", "resolve_group_size"]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight [out, in]: (code - zero point) · scale for integers, code · scale for floats."""

    codes: Tensor
    """uint8, or float8 e4m3fn, [out, in]."""

    scales: Tensor
    """In the type they are stored in: [out, in / group_size] for integers, [scale rows, groups] for floats."""

    zero_points: Tensor | None
    """uint8 [out, in / group_size]; None for floats."""

    scheme: Scheme
    """The scheme; its group size is resolved for integers."""

    input_scale: Tensor | None = None
    """The static scale of the input activations, float32 [1]; None where they are not quantized or their scales are dynamic."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantized weight [out, in], computed in float32 and rounded to `dtype`."""
        rows, columns = self.codes.shape
        if self.zero_points is None:
            return (self.codes.to(torch.float32) * expand_scales(self.scales, self.scheme, (rows, columns))).to(dtype)
        matrix = self.codes.new_empty(rows, columns, dtype=dtype)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            # in float32 even for bfloat16 results: code - zero point is exact there, and the product is rounded once
            groups = self.codes[chunk].view(-1, columns // self.scheme.group_size, self.scheme.group_size).to(torch.float32)
            groups.sub_(self.zero_points[chunk].unsqueeze(-1)).mul_(self.scales[chunk].unsqueeze(-1).to(torch.float32))
            matrix[chunk] = groups.view(-1, columns)
        return matrix


@dataclass(frozen=True)
class Grid:
    """The values that an integer weight [out, in] is rounded to: (code - zero point) · scale for each code of the scheme."""

    scales: Tensor
    """In the type they are stored in: [out, groups]."""

    zero_points: Tensor
    """Integers as float32 [out, groups], each one of the codes: so zero is on every grid, and a pruned weight is exactly zero."""

    scheme: Scheme
    """The scheme with its group size resolved."""

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        """Return the quantized weight with codes of this grid, [out, in] in any type."""
        return QuantizedWeight(codes.to(torch.uint8), self.scales, self.zero_points.to(torch.uint8), self.scheme)


def full_range(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0) -> Grid:
    """Return the grid that spans each group's range of a weight [out, in]; scales are rounded to `dtype`, in which they are stored.

    `shrink` multiplies each range, by a number or by one per group.
    """
    scheme = resolve_group_size(scheme, weight.shape[1])
    return Grid(*grid(weight.view(len(weight), -1, scheme.group_size), scheme, dtype, shrink), scheme)


def resolve_group_size(scheme: Scheme, columns: int) -> Scheme:
    """Return an integer scheme with a group size of -1 replaced by the number of input channels."""
    return replace(scheme, group_size=columns) if scheme.group_size == -1 else scheme


def grid(groups: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Return scales, in `dtype`, and zero points, float32, both [out, groups], for values [out, groups, group_size].

    An asymmetric grid spans from the lowest to the highest value and always includes zero; a symmetric one reaches half a step
    past its outermost codes. `shrink` multiplies the range, by a number or by one per group. A group of zeros has the scale 1.
    """
    return grid_of_range(*group_range(groups, scheme), scheme, dtype, shrink)


def group_range(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the lowest value that each group's grid reaches, and the grid's extent: both [...], for values [..., group_size]."""
    # a range that excludes zero would put the zero point outside of the codes, which no packed layout can store
    low = groups.amin(dim=-1).clamp_(max=0)
    high = groups.amax(dim=-1).clamp_(min=0)
    # symmetric: 2·max|W| over 2^bits - 1 steps, as compressed-tensors computes it (the negative side has one code more)
    return low, torch.maximum(-low, high) * 2 if scheme.symmetric else high - low


def grid_of_range(
    low: Tensor, extent: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return `grid` for groups whose `group_range` is known."""
    scales = (extent * shrink / (scheme.levels - 1)).to(dtype)
    # after the rounding to `dtype`: a tiny range underflows to 0 in float16, and dividing by it would give NaN
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if scheme.symmetric:
        return scales, torch.full_like(scales, scheme.levels // 2, dtype=torch.float32)
    # from the rounded scale, since that is the one a runtime multiplies by
    zero_points = (-low * shrink / scales.to(torch.float32)).round_().clamp_(0, scheme.levels - 1)
    return scales, zero_points
