"""GPTQ: rounding a matrix column by column, each column's error made good by those still to come (arXiv 2210.17323).

With H the second moment of the input, the error tr(ΔW H ΔWᵀ) is minimised greedily. Written as in arXiv 2307.13304 (theorem 6),
which shows that the method needs no inverse: with H = (U + I) D (U + I)ᵀ, U strictly upper triangular, column k is rounded
from W_k + Σ_{i<k} (W_i - Ŵ_i) U_ik. So one Cholesky factorisation is all that is computed of H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.numerics.cholesky import factor, permute
from compress.numerics.grids import QuantizedWeight, Scheme, grid
from compress.numerics.rounding import resolve_group_size

_BLOCK = 64
_RAISE = 10.0
_ATTEMPTS = 8


@dataclass(frozen=True)
class GptqOptions:
    """`dampening_frac` is the share of H's mean diagonal that is added to its diagonal; `reorder` rounds by falling H_jj."""

    dampening_frac: float = 0.01
    reorder: bool = True


@dataclass(frozen=True)
class Feedback:
    """U + I of a damped second moment, by the order in which columns are rounded; all that rounding needs to know of the inputs.

    `order` int64 [in]; `factor` float32 [in, in] holds it turned round, the last column first, on and below its diagonal.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor, settings: GptqOptions) -> Feedback:
        """Factor the second moment `gram` of a linear's input, float32 [in, in], in its own memory, which may be gigabytes.

        The factorisation runs from the last column to the first: H is turned round and factored.

        Raises:
            CheckpointError: `gram` is not the second moment of finite inputs.
        """
        diagonal = gram.diagonal().clone()
        level = float(diagonal.mean())
        if not level < float("inf"):
            raise CheckpointError("the second moment of its inputs is not finite; convert the checkpoint to bfloat16")
        order = torch.arange(len(gram), device=gram.device)
        if settings.reorder:
            order = diagonal.argsort(descending=True, stable=True)
        permute(gram, order.flip(0))
        extra = settings.dampening_frac * (level or 1.0)
        for _ in range(_ATTEMPTS):
            if factor(gram, extra):
                break
            extra *= _RAISE
        else:
            raise CheckpointError(f"the second moment of its inputs cannot be factored, not even with {extra:.3g} on its diagonal")
        gram.div_(gram.diagonal().clone())
        return cls(order, gram)

    def block(self, first: int, last: int, start: int, stop: int) -> Tensor:
        """Return the rows `first` to `last` of the columns `start` to `stop`; what is below the diagonal must not be read."""
        size = len(self.order)
        return self.factor[size - last : size - first, size - stop : size - start].flip(0, 1)


def round_columns(
    weight: Tensor, feedback: Feedback, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0
) -> QuantizedWeight:
    """Round a matrix [out, in], float32, with the feedback of its inputs' second moment.

    Scales are rounded to `dtype` first and belong to the columns' own places whatever order they are rounded in, so the result
    needs no index of groups. `shrink` makes each group's range smaller by a factor (a number, or one per group).
    """
    rows, columns = weight.shape
    scheme = resolve_group_size(scheme, columns)
    scales, zero_points = grid(weight.view(rows, -1, scheme.group_size), scheme, dtype, shrink)
    order = feedback.order
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    group_of = order // scheme.group_size
    errors = torch.empty(columns, rows, device=weight.device)  # transposed, so that a column of the matrix lies in one piece
    steps, zeros, transposed = scales.to(torch.float32).t().contiguous(), zero_points.t().contiguous(), weight.t()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        exact = transposed[order[start:stop]]
        wanted = exact.addmm(feedback.block(0, start, start, stop).t(), errors[:start]) if start else exact.clone()
        within = feedback.block(start, stop, start, stop)
        step, zero = steps[group_of[start:stop]], zeros[group_of[start:stop]]
        levels = torch.empty_like(exact)
        parts = (wanted, exact, step, -zero, scheme.levels - 1 - zero, levels, errors[start:stop], within)
        by_row = enumerate(zip(*map(torch.unbind, parts), strict=True))
        for row, (want, given, size, lowest, highest, level, error, effect) in by_row:
            torch.div(want, size, out=level).round_()
            torch.clamp(level, lowest, highest, out=level)
            torch.addcmul(given, level, size, value=-1, out=error)
            wanted[row + 1 :].addr_(effect[row + 1 :], error)
        codes[start:stop] = levels.add_(zero).to(torch.uint8)
    codes = codes[order.argsort()].t().contiguous()  # putting each block in its place would sort it anew on CUDA
    return QuantizedWeight(codes, scales, zero_points.to(torch.uint8), scheme)
