"""FP8 quantization (e4m3fn: 4 bits of exponent, 3 of mantissa, up to 448) with a scale per output channel, block or tensor.

The format: arXiv 2209.05433. It has no infinities; values beyond ±448 are clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.numerics.scheme import Scheme

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
"""The largest finite e4m3fn number."""


def float_scales(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0) -> Tensor:
    """Return scales [scale rows, groups], in `dtype`, that map the largest magnitude of each block of a matrix [out, in] to 448.

    A block is what shares a scale by the scheme's strategy; blocks at the edges may be smaller. A block of zeros has the scale 1.
    """
    rows, columns = weight.shape
    height, width = _block_shape(scheme, rows, columns)
    # zeros never are the largest magnitude, so partial blocks need no case of their own
    padded = pad(weight.to(torch.float32).abs(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scales = (blocks.amax(dim=(1, 3)) * shrink / FLOAT8_MAX).to(dtype)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def expand_scales(scales: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Return scales expanded to broadcast over a matrix [out, in], float32 [out or 1, in or 1]."""
    rows, columns = shape
    height, width = _block_shape(scheme, rows, columns)
    expanded = scales.to(torch.float32)
    if scales.shape[1] > 1:
        expanded = expanded.repeat_interleave(width, dim=1)[:, :columns]
    if scales.shape[0] > 1 and height > 1:
        expanded = expanded.repeat_interleave(height, dim=0)[:rows]
    return expanded


def to_float8(values: Tensor) -> Tensor:
    """Return the nearest float8 e4m3fn numbers, ties to even, clamped to ±448."""
    # e4m3fn has no infinity, and torch's cast of larger values is NaN in some supported versions and 448 in others
    return values.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def _block_shape(scheme: Scheme, rows: int, columns: int) -> tuple[int, int]:
    """Return the height and width of the blocks that share a scale."""
    return (rows if scheme.block_rows == -1 else scheme.block_rows, columns if scheme.group_size == -1 else scheme.group_size)
