"""GPTQ: rounding a weight column by column, each column's error compensated in the columns not yet rounded (arXiv 2210.17323).

With the Hessian H, the mean of xᵀx over the input activations x, the output error tr(ΔW H ΔWᵀ) is minimized greedily. Written as
in arXiv 2307.13304 (theorem 6), which shows that no inverse is needed: with H = (U + I) D (U + I)ᵀ, U strictly upper triangular,
column k is rounded from W_k + Σ_{i<k} (W_i - Ŵ_i) U_ik. So one Cholesky factorization of H is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.numerics.cholesky import factor, permute
from compress.numerics.grids import Grid, QuantizedWeight

_BLOCK = 64
"""Columns whose errors are compensated one by one; those of earlier columns are, in one matrix product per block.

At another size only the order of float32 sums changes; the paper takes 128.
"""

_DAMPING_GROWTH = 10.0
"""How much more is added to the diagonal of a Hessian that could not be factored."""

_SHRINKAGE_PER_RATIO = 0.5
"""Shrinkage for as many channels as tokens.

Measured: at 0.14 to 0.38 channels per token (SmolLM2-135M) the KL is the same from 0.1 to 0.3 and larger without any; at 0.01 to
0.02 (the demo model) it is smaller without any than at 0.1.
"""

_MOST_SHRUNK = 0.3
"""The most, for fewer tokens than channels."""

_MOST_FITTED = 0.9
"""The largest ratio of channels to tokens of which `optimism` is told; with as many channels as tokens the fit is perfect."""

_ATTEMPTS = 8
"""How often: from the default of 0.01 up to 10^5 times the mean diagonal."""


@dataclass(frozen=True)
class GptqOptions:
    """Settings of GPTQ; all but `shrinkage` as in llm-compressor."""

    dampening_frac: float = 0.01
    """The share of the Hessian's mean diagonal that is added to its diagonal."""

    actorder: bool = True
    """Whether columns are rounded by falling H_jj, those with the largest activations first; their groups stay the same."""

    shrinkage: float | None = 0.0
    """By what share the Hessian's elements beside its diagonal are made smaller; None: by its tokens, as `shrinkage` says."""

    def of(self, channels: int, tokens: float) -> GptqOptions:
        """Return the options for a Hessian of so many tokens."""
        return self if self.shrinkage is not None else replace(self, shrinkage=shrinkage(channels, tokens))


@dataclass(frozen=True)
class Feedback:
    """U + I of a damped Hessian, permuted to the order in which columns are rounded."""

    order: Tensor
    """The index of the column that is rounded first, second, …: int64 [in]."""

    factor: Tensor
    """(U + I)ᵀ with rows and columns reversed, the last column first, on and below the diagonal: float32 [in, in]."""

    @classmethod
    def of(cls, hessian: Tensor, options: GptqOptions) -> Feedback:
        """Factor a Hessian, float32 [in, in], in its own memory, which may be gigabytes.

        The factorization runs from the last column to the first: the Hessian is reversed and factored.

        Raises:
            CheckpointError: the Hessian is not finite, or cannot be factored at any damping.
        """
        # a copy: `diagonal()` is a view, and the Hessian is permuted and factored in place below
        diagonal = hessian.diagonal().clone()
        mean_diagonal = float(diagonal.mean())
        # written as a negation because NaN compares False with everything
        if not mean_diagonal < float("inf"):
            raise CheckpointError("the second moment of its inputs is not finite; convert the checkpoint to bfloat16")
        assert options.shrinkage is not None  # `GptqOptions.of` sets it
        if options.shrinkage:
            hessian.mul_(1 - options.shrinkage)
            hessian.diagonal().copy_(diagonal)
        order = torch.arange(len(hessian), device=hessian.device)
        if options.actorder:
            # stable: channels of equal diagonal (dead ones are all 0) keep their order, on every device
            order = diagonal.argsort(descending=True, stable=True)
        # the Cholesky factor is lower triangular; of the reversed matrix it is the upper factor that the order of rounding needs
        permute(hessian, order.flip(0))
        # an input that is always zero has no diagonal to take a share of; any positive damping makes this rounding to nearest
        damping = options.dampening_frac * (mean_diagonal or 1.0)
        # with fewer tokens than channels H is singular, and in float32 perhaps slightly indefinite: retried with more damping
        for _ in range(_ATTEMPTS):
            if factor(hessian, damping):
                break
            damping *= _DAMPING_GROWTH
        else:
            raise CheckpointError(
                f"the second moment of its inputs cannot be factored, not even with {damping:.3g} on its diagonal"
            )
        # D drops out of the feedback, only the unit factor is needed; cloned because the view would change under the division
        hessian.div_(hessian.diagonal().clone())
        return cls(order, hessian)

    def block(self, first: int, last: int, start: int, stop: int) -> Tensor:
        """Return rows `first` to `last` of columns `start` to `stop` of U + I; elements below its diagonal are undefined."""
        size = len(self.order)
        return self.factor[size - last : size - first, size - stop : size - start].flip(0, 1)


def shrinkage(channels: int, tokens: float) -> float:
    """Return by what share a Hessian's elements beside its diagonal are made smaller.

    A covariance that is estimated from few samples has too large ones, and error feedback that follows them fits the calibration
    samples alone. The best share falls with the number of samples (J. Schäfer and K. Strimmer 2005, doi 10.2202/1544-6115.1175,
    target D: the elements' variance over their squares, which for d channels grows like d / n).
    """
    return min(_SHRINKAGE_PER_RATIO * channels / max(tokens, 1.0), _MOST_SHRUNK)


def optimism(channels: int, tokens: float) -> float:
    """Return by what factor the output error of GPTQ on other tokens exceeds that on the tokens of its Hessian.

    The error of a column is fitted by the p columns after it, by least squares on n tokens: of independent normal inputs the
    residual is (1 - p/n) of its expectation on those tokens, and 1 / (1 - p/n) of it on others (Hastie, Tibshirani and Friedman,
    The Elements of Statistical Learning, 2nd edition, section 7.4, on the optimism of the training error). Both are averaged over
    p from 0 to the number of channels.
    """
    share = min(channels / max(tokens, 1.0), _MOST_FITTED)
    return -math.log1p(-share) / share / (1 - share / 2)


def round_columns(weight: Tensor, feedback: Feedback, grid: Grid, kept: Tensor | None = None) -> QuantizedWeight:
    """Round a weight [out, in], float32, to a grid with the error feedback of its Hessian.

    Groups are neighbouring columns whatever the order of rounding (static actorder), so the result needs no `g_idx`. Where `kept`
    [out, in] is False the result is zero, and what the weight was there is an error like any other, compensated in later columns:
    pruning and rounding in one pass, as in SparseGPT (arXiv 2301.00774, section 3.5).
    """
    rows, columns = weight.shape
    scheme = grid.scheme
    order = feedback.order
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    group_of = order // scheme.group_size
    errors = torch.empty(columns, rows, device=weight.device)  # transposed, so that a column of the matrix lies in one piece
    step_sizes, zeros, transposed = grid.scales.to(torch.float32).t().contiguous(), grid.zero_points.t().contiguous(), weight.t()
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        # `original` is kept beside `compensated`: without the inverse Hessian, errors are measured against the original weight
        original = transposed[order[start:stop]]
        # errors of all earlier blocks enter in one product here, so that the loop below only updates its own block
        compensated = original.addmm(feedback.block(0, start, start, stop).t(), errors[:start]) if start else original.clone()
        within = feedback.block(start, stop, start, stop)
        step, zero = step_sizes[group_of[start:stop]], zeros[group_of[start:stop]]
        levels = torch.empty_like(original)
        kept_columns = None if kept is None else kept.t()[order[start:stop]].to(original)
        # levels count from the zero point, so that dequantizing inside the loop is one multiplication
        columns_of_block = (compensated, original, step, -zero, scheme.levels - 1 - zero, levels, errors[start:stop], within)
        # unbound once: indexing eight tensors at every column costs twice as much on a CPU
        by_column = enumerate(zip(*map(torch.unbind, columns_of_block), strict=True))
        for index, (target, weights, size, lowest, highest, level, error, effect) in by_column:
            torch.div(target, size, out=level).round_()
            torch.clamp(level, lowest, highest, out=level)
            # before the error is taken, so that a pruned weight's whole value is fed back
            if kept_columns is not None:
                level.mul_(kept_columns[index])
            torch.addcmul(weights, level, size, value=-1, out=error)
            compensated[index + 1 :].addr_(effect[index + 1 :], error)
        codes[start:stop] = levels.add_(zero).to(torch.uint8)
    codes = codes[order.argsort()].t().contiguous()  # one gather; scattering each block would sort indices on CUDA each time
    return grid.quantized(codes)
