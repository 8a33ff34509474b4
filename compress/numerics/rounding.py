"""Rounding matrices to grids, and the search for the ranges that lose least on given inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.numerics.floats import float_scales, spread_scales, to_float8
from compress.numerics.grids import QuantizedWeight, Scheme, grid

PANEL = 256
"""How many columns of a symmetric matrix are worked on at once; what lies above them is never computed."""

_CHUNK = 1 << 24


def quantize(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0) -> QuantizedWeight:
    """Round a matrix [out, in] to the nearest codes; scales are rounded to `dtype` first, so that codes fit them as stored.

    `shrink` makes the range of each part that has a scale smaller by a factor (a number, or one per scale).
    """
    rows, columns = weight.shape
    if scheme.type == "float":
        scales = float_scales(weight, scheme, dtype, shrink)
        codes = to_float8(weight.to(torch.float32) / spread_scales(scales, scheme, (rows, columns)))
        return QuantizedWeight(codes, scales, None, scheme)
    scheme = resolve_group_size(scheme, columns)
    groups = weight.to(torch.float32).view(rows, -1, scheme.group_size)
    scales, zero_points = grid(groups, scheme, dtype, shrink)
    codes = round_to(groups, scales, zero_points, scheme)
    return QuantizedWeight(codes.to(torch.uint8).view(rows, columns), scales, zero_points.to(torch.uint8), scheme)


def resolve_group_size(scheme: Scheme, columns: int) -> Scheme:
    """Return an integer scheme with its group size written out for a matrix of so many input channels."""
    return replace(scheme, group_size=columns) if scheme.group_size == -1 else scheme


def round_to(groups: Tensor, scales: Tensor, zero_points: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest codes, float32 [out, groups, group_size], for values of that shape and grids [out, groups]."""
    steps = scales.to(torch.float32).unsqueeze(-1)
    return (groups / steps).round_().add_(zero_points.unsqueeze(-1)).clamp_(0, scheme.levels - 1)


def rounding_error(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return rounded minus given, float32 [out, in]."""
    if scheme.type == "float":
        return quantize(weight, scheme, dtype).dequantize().sub_(weight)
    rows, columns = weight.shape
    scheme = resolve_group_size(scheme, columns)
    groups = weight.view(rows, -1, scheme.group_size)
    scales, zero_points = grid(groups, scheme, dtype)
    codes = round_to(groups, scales, zero_points, scheme)
    return codes.sub_(zero_points.unsqueeze(-1)).mul_(scales.to(torch.float32).unsqueeze(-1)).sub_(groups).view(rows, columns)


def output_error(error: Tensor, gram: Tensor) -> Tensor:
    """Return tr(ΔW G ΔWᵀ), the squared error of a linear's output over all tokens, for ΔW [out, in] and a symmetric G [in, in].

    Of G, only the squares of `PANEL` channels along the diagonal and what is below them are read.
    """
    total = torch.zeros((), device=error.device)
    for start in range(0, gram.shape[0], PANEL):
        panel, below = slice(start, start + PANEL), slice(start + PANEL, None)
        own = error[:, panel]
        mixed = (error[:, below] @ gram[below, panel]).mul_(2).addmm_(own, gram[panel, panel])
        total += torch.einsum("oi,oi->", mixed, own)
    return total


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Return the squares of `size` rows and columns along the diagonal of a matrix [n, n], [n / size, size, size]."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def clip(weight: Tensor, blocks: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int) -> Tensor:
    """Return the shrink factor of each group's range, [out, in / group_size], that loses least on given inputs.

    Minimises ΔW_g G_gg ΔW_gᵀ for each row and group over `steps` factors from 1 down to above 0.5 (arXiv 2306.00978,
    section 3.2), with G_gg the second moment of the group's inputs: `blocks` [in / group_size, group_size, group_size].
    """
    columns = weight.shape[1]
    scheme = resolve_group_size(scheme, columns)
    parts = torch.split(weight.to(torch.float32), max(1, _CHUNK // columns))
    return torch.cat([_clip_rows(part.reshape(len(part), -1, scheme.group_size), blocks, scheme, dtype, steps) for part in parts])


def _clip_rows(groups: Tensor, blocks: Tensor, scheme: Scheme, dtype: torch.dtype, steps: int) -> Tensor:
    best = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    shrink = torch.ones_like(best)
    for step in range(steps):
        factor = 1 - step / (2 * steps)
        scales, zero_points = grid(groups, scheme, dtype, factor)
        codes = round_to(groups, scales, zero_points, scheme)
        error = codes.sub_(zero_points.unsqueeze(-1)).mul_(scales.to(torch.float32).unsqueeze(-1)).sub_(groups).transpose(0, 1)
        loss = (torch.bmm(error, blocks) * error).sum(dim=-1).t()
        better = loss < best
        best = torch.where(better, loss, best)
        shrink = torch.where(better, factor, shrink)
    return shrink
