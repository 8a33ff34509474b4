"""In-place Cholesky factorization and permutation of symmetric matrices: a Hessian may take gigabytes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

_BLOCK = 512
"""Rows and columns that are copied or factored at once; a copy of them is all the memory that is needed beside the matrix."""


def permute(matrix: Tensor, order: Tensor) -> None:
    """Permute rows and columns in place: row and column `order[i]` become row and column i."""
    for start in range(0, len(matrix), _BLOCK):
        columns = matrix[:, start : start + _BLOCK]
        # advanced indexing copies the panel first, so that source and target may overlap
        columns.copy_(columns[order])
    for start in range(0, len(matrix), _BLOCK):
        rows = matrix[start : start + _BLOCK]
        rows.copy_(rows[:, order])


def factor(matrix: Tensor, damping: float) -> bool:
    """Replace a symmetric matrix by the factor L of matrix + damping·I = L·Lᵀ; the elements above its diagonal are then undefined.

    Returns False, with the matrix unchanged, where it is not positive definite.
    """
    size = len(matrix)
    starts = range(0, size, _BLOCK)
    # the caller tries again with more damping: what the loop overwrites must be restorable without a copy of the whole matrix
    diagonal_blocks = [matrix[start : start + _BLOCK, start : start + _BLOCK].clone() for start in starts]
    matrix.diagonal().add_(damping)
    for start in starts:
        stop = min(start + _BLOCK, size)
        # `cholesky_ex` reports an indefinite block in `info` instead of raising: it is expected here, more damping follows
        block, info = cast("tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(matrix[start:stop, start:stop]))
        if int(info):
            _restore(matrix, diagonal_blocks)
            return False
        matrix[start:stop, start:stop] = block
        below = matrix[stop:, start:stop]
        # X·Lᵀ = A: the panel of the factor below this block
        below.copy_(cast("Tensor", torch.linalg.solve_triangular(block.t(), below, upper=True, left=False)))
        # only on and below the diagonal: half the work, and the part above stays intact for `_restore`
        for first in range(stop, size, _BLOCK):
            last = min(first + _BLOCK, size)
            matrix[first:, first:last].addmm_(matrix[first:, start:stop], matrix[first:last, start:stop].t(), alpha=-1)
    return True


def _restore(matrix: Tensor, diagonal_blocks: list[Tensor]) -> None:
    """Restore a matrix from the blocks on its diagonal and the elements above them, which `factor` never writes to."""
    for index, block in enumerate(diagonal_blocks):
        start, stop = index * _BLOCK, index * _BLOCK + len(block)
        matrix[start:stop, start:stop] = block
        matrix[stop:, start:stop] = matrix[start:stop, stop:].t()
