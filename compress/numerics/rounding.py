"""Rounding to nearest, its error, and the search for each group's clipping range."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.floats import expand_scales, float_scales, to_float8
from compress.numerics.grids import (
    Grid,
    QuantizedWeight,
    Scheme,
    full_range,
    grid,
    grid_of_range,
    group_range,
    resolve_group_size,
)

PANEL = 256
"""Columns of a symmetric matrix that are computed at once; above the diagonal only their own square block is.

`FullHessian.add` fills the squares that `output_errors` reads, so both take this one constant.
"""

_TILE_COLUMNS = 2048
"""Columns whose clipping ranges are searched at once: the blocks of the Hessian that belong to them stay in the cache."""

_TILE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements whose clipping ranges are searched at once: on a CPU their copies stay in the cache, which is four times as fast."""

_TILE_ROWS = 128
"""At least so many rows at once, of groups as long as whole rows too: with fewer, reading the Hessian is most of the work."""

_STRIDE = 2
"""Steps between the first candidates of a clipping range; the next are half as far from the best, and so on."""


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


def output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """Return diag(ΔW H ΔWᵀ), the squared error of each output channel summed over tokens: [out].

    ΔW is [out, in] and H = Σ xᵀx [in, in]. Of H only the `PANEL`-wide blocks along the diagonal and the elements below are read.
    """
    total = torch.zeros(len(error), device=error.device)
    for start in range(0, hessian.shape[0], PANEL):
        panel, below = slice(start, start + PANEL), slice(start + PANEL, None)
        columns = error[:, panel]
        # the part above the diagonal is the mirror image of the part below: counted twice instead of read
        product = (error[:, below] @ hessian[below, panel]).mul_(2).addmm_(columns, hessian[panel, panel])
        total += product.mul_(columns).sum(dim=1)  # an einsum multiplies rows one by one, ten times as slow on a CPU
    return total


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the blocks of `size` rows and columns along the diagonal of a matrix [n, n]: [n / size, size, size]."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def clip(weight: Tensor, blocks: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int) -> Tensor:
    """Return the shrink factor of each group's range, [out, in / group_size], of the least output error.

    Minimizes ΔW_g H_gg ΔW_gᵀ for each row and group over `steps` factors from 1 down to above 0.5 (arXiv 2306.00978, section 3.2),
    in passes that halve their stride around each group's best. H_gg are the blocks along the Hessian's diagonal: `blocks`
    [in / group_size, group_size, group_size].
    """
    rows, columns = weight.shape
    scheme = resolve_group_size(scheme, columns)
    size = scheme.group_size
    groups_at_once = max(1, _TILE_COLUMNS // size)
    rows_at_once = max(_TILE_ROWS, _TILE["cuda" if weight.is_cuda else "cpu"] // min(columns, groups_at_once * size))
    shrink = torch.empty(rows, columns // size, device=weight.device)
    # rows and groups are independent of each other
    for first in range(0, columns // size, groups_at_once):
        groups = slice(first, first + groups_at_once)
        for start in range(0, rows, rows_at_once):
            chunk = slice(start, start + rows_at_once)
            values = weight[chunk, first * size : (first + groups_at_once) * size].to(torch.float32)
            # groups first, as the batched product wants them
            values = values.view(len(values), -1, size).transpose(0, 1).contiguous()
            shrink[chunk, groups] = _clip_groups(values, blocks[groups], scheme, dtype, steps).t()
    return shrink


def _clip_groups(groups: Tensor, blocks: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int) -> Tensor:
    """Return the best factors [groups, out] for values [groups, out, group_size]."""
    low, extent = group_range(groups, scheme)
    codes, product = torch.empty_like(groups), torch.empty_like(groups)

    def loss(step: Tensor | int) -> Tensor:
        scales, zero_points = grid_of_range(low, extent, scheme, dtype, 1 - step / (2 * steps))
        sizes, zeros = scales.to(torch.float32).unsqueeze(-1), zero_points.unsqueeze(-1)
        torch.div(groups, sizes, out=codes).round_().add_(zeros).clamp_(0, scheme.levels - 1)
        error = codes.sub_(zeros).mul_(sizes).sub_(groups)
        return torch.bmm(error, blocks, out=product).mul_(error).sum(dim=-1)

    # starts at the full range: a group is only shrunk where that is strictly better
    best, best_step = loss(0), torch.zeros_like(low)
    stride = min(_STRIDE, steps - 1)
    candidates: list[Tensor | int] = list(range(stride, steps, max(1, stride)))
    while candidates:
        for step in candidates:
            found = loss(step)
            better = found < best
            best = torch.where(better, found, best)
            best_step = torch.where(better, step, best_step)
        stride //= 2
        # from each group's best so far; both sides of it before it may move again
        candidates = [(best_step + side * stride).clamp_(0, steps - 1) for side in (-1, 1)] if stride else []
    return 1 - best_step / (2 * steps)
