"""Rounding to nearest, its error, and the search for each group's clipping range."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.floats import expand_scales, float_scales, to_float8
from compress.numerics.grids import Grid, QuantizedWeight, Scheme, full_range, grid, resolve_group_size

PANEL = 256
"""Columns of a symmetric matrix that are computed at once; above the diagonal only their own square block is.

`FullHessian.add` fills the squares that `output_error` reads, so both take this one constant.
"""

_CHUNK = 1 << 24
"""Elements whose clipping range is searched at once: a float32 copy of them takes 64 MiB."""


def quantize(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0) -> QuantizedWeight:
    """Round a matrix [out, in] to the nearest codes; scales are rounded to `dtype` first, so that codes fit the stored scales.

    `shrink` multiplies each range, by a number or by one per scale.
    """
    if scheme.type == "float":
        # codes divide by the scale as stored: one rounded afterwards would leave every weight of its group off by the same factor
        scales = float_scales(weight, scheme, dtype, shrink)
        codes = to_float8(weight.to(torch.float32) / expand_scales(scales, scheme, (weight.shape[0], weight.shape[1])))
        return QuantizedWeight(codes, scales, None, scheme)
    weight = weight.to(torch.float32)
    return round_nearest(weight, full_range(weight, scheme, dtype, shrink))


def round_nearest(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Round a weight [out, in], float32, to the nearest codes of a grid."""
    groups = weight.view(len(weight), -1, grid.scheme.group_size)
    return grid.quantized(round_to(groups, grid.scales, grid.zero_points, grid.scheme).view(weight.shape))


def round_to(groups: Tensor, scales: Tensor, zero_points: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest codes, float32 [out, groups, group_size], for values of that shape and grids [out, groups]."""
    steps = scales.to(torch.float32).unsqueeze(-1)
    # ties to even, as compressed-tensors rounds; `groups` is a view of the weight, so it is not divided in place
    return (groups / steps).round_().add_(zero_points.unsqueeze(-1)).clamp_(0, scheme.levels - 1)


def rounding_error(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return ΔW = Q(W) - W of rounding to nearest, float32 [out, in]."""
    if scheme.type == "float":
        return quantize(weight, scheme, dtype).dequantize().sub_(weight)
    rows, columns = weight.shape
    scheme = resolve_group_size(scheme, columns)
    groups = weight.view(rows, -1, scheme.group_size)
    scales, zero_points = grid(groups, scheme, dtype)
    codes = round_to(groups, scales, zero_points, scheme)
    return codes.sub_(zero_points.unsqueeze(-1)).mul_(scales.to(torch.float32).unsqueeze(-1)).sub_(groups).view(rows, columns)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Return tr(ΔW H ΔWᵀ), the squared error of a linear's output summed over tokens, for ΔW [out, in] and H = Σ xᵀx [in, in].

    Of H only the `PANEL`-wide blocks along the diagonal and the elements below them are read.
    """
    total = torch.zeros((), device=error.device)
    for start in range(0, hessian.shape[0], PANEL):
        panel, below = slice(start, start + PANEL), slice(start + PANEL, None)
        columns = error[:, panel]
        # the part above the diagonal is the mirror image of the part below: counted twice instead of read
        product = (error[:, below] @ hessian[below, panel]).mul_(2).addmm_(columns, hessian[panel, panel])
        total += torch.einsum("oi,oi->", product, columns)
    return total


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the blocks of `size` rows and columns along the diagonal of a matrix [n, n]: [n / size, size, size]."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def clip(weight: Tensor, blocks: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int) -> Tensor:
    """Return the shrink factor of each group's range, [out, in / group_size], of the least output error.

    Minimizes ΔW_g H_gg ΔW_gᵀ for each row and group over `steps` factors from 1 down to above 0.5 (arXiv 2306.00978, section 3.2).
    H_gg are the blocks along the Hessian's diagonal: `blocks` [in / group_size, group_size, group_size].
    """
    columns = weight.shape[1]
    scheme = resolve_group_size(scheme, columns)
    # rows are independent: each chunk's copies of errors and losses are freed before the next
    chunks = torch.split(weight.to(torch.float32), max(1, _CHUNK // columns))
    return torch.cat([_clip_rows(rows.reshape(len(rows), -1, scheme.group_size), blocks, scheme, dtype, steps) for rows in chunks])


def _clip_rows(groups: Tensor, blocks: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int) -> Tensor:
    best = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    shrink = torch.ones_like(best)
    for step in range(steps):
        # starts at the full range: a group is only shrunk where that is strictly better
        factor = 1 - step / (2 * steps)
        scales, zero_points = grid(groups, scheme, dtype, factor)
        codes = round_to(groups, scales, zero_points, scheme)
        error = codes.sub_(zero_points.unsqueeze(-1)).mul_(scales.to(torch.float32).unsqueeze(-1)).sub_(groups).transpose(0, 1)
        loss = (torch.bmm(error, blocks) * error).sum(dim=-1).t()
        better = loss < best
        best = torch.where(better, loss, best)
        shrink = torch.where(better, factor, shrink)
    return shrink
