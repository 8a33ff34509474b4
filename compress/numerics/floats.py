"""Matrices held as 8-bit floats (e4m3fn: 4 bits of exponent, 3 of mantissa, up to 448) with a scale per row, block or matrix.

The format: arXiv 2209.05433. It has no infinities; what lies beyond 448 is held as 448.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.numerics.scheme import Scheme

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0


def float_scales(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0) -> Tensor:
    """Return the scales, in `dtype`, which bring the largest value of each part of a matrix [out, in] to 448.

    One for each part that shares it, [scale rows, groups]; blocks at the edges may be smaller than the others. Where all is zero
    the scale is 1.
    """
    rows, columns = weight.shape
    height, width = _part(scheme, rows, columns)
    padded = pad(weight.to(torch.float32).abs(), (0, -columns % width, 0, -rows % height))
    parts = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scales = (parts.amax(dim=(1, 3)) * shrink / FLOAT8_MAX).to(dtype)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def spread_scales(scales: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Return one float32 scale per value of a matrix [out, in], or per row of it where a row has just one ([out or 1, in or 1])."""
    rows, columns = shape
    height, width = _part(scheme, rows, columns)
    spread = scales.to(torch.float32)
    if scales.shape[1] > 1:
        spread = spread.repeat_interleave(width, dim=1)[:, :columns]
    if scales.shape[0] > 1 and height > 1:
        spread = spread.repeat_interleave(height, dim=0)[:rows]
    return spread


def to_float8(values: Tensor) -> Tensor:
    """Return the nearest float8 e4m3fn numbers, ties to even; what lies beyond the largest becomes the largest."""
    return values.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def _part(scheme: Scheme, rows: int, columns: int) -> tuple[int, int]:
    """Return the height and width of the parts that share a scale."""
    return (rows if scheme.block_rows == -1 else scheme.block_rows, columns if scheme.group_size == -1 else scheme.group_size)
