"""Cholesky factorisation and reordering of symmetric matrices in their own memory, which may be gigabytes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

_BLOCK = 512


def permute(matrix: Tensor, order: Tensor) -> None:
    """Put row and column `order[i]` of a square matrix in place i; of both kinds some at a time, so that copies stay small."""
    for start in range(0, len(matrix), _BLOCK):
        columns = matrix[:, start : start + _BLOCK]
        columns.copy_(columns[order])
    for start in range(0, len(matrix), _BLOCK):
        rows = matrix[start : start + _BLOCK]
        rows.copy_(rows[:, order])


def factor(matrix: Tensor, extra: float) -> bool:
    """Replace a symmetric matrix by the factor L of matrix + extra·I = L·Lᵀ; what lies above its diagonal then has no meaning.

    Returns whether there is one; where there is none, the matrix is as it was.
    """
    size = len(matrix)
    starts = range(0, size, _BLOCK)
    squares = [matrix[start : start + _BLOCK, start : start + _BLOCK].clone() for start in starts]
    matrix.diagonal().add_(extra)
    for start in starts:
        stop = min(start + _BLOCK, size)
        block, info = cast("tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(matrix[start:stop, start:stop]))
        if int(info):
            _restore(matrix, squares)
            return False
        matrix[start:stop, start:stop] = block
        below = matrix[stop:, start:stop]
        below.copy_(cast("Tensor", torch.linalg.solve_triangular(block.t(), below, upper=True, left=False)))
        for first in range(stop, size, _BLOCK):
            last = min(first + _BLOCK, size)
            matrix[first:, first:last].addmm_(matrix[first:, start:stop], matrix[first:last, start:stop].t(), alpha=-1)
    return True


def _restore(matrix: Tensor, squares: list[Tensor]) -> None:
    """Make a matrix again what it was, by the blocks on its diagonal and what is above them, which is never written to."""
    for place, square in enumerate(squares):
        start, stop = place * _BLOCK, place * _BLOCK + len(square)
        matrix[start:stop, start:stop] = square
        matrix[stop:, start:stop] = matrix[start:stop, stop:].t()
