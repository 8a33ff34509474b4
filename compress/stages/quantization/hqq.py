"""Half-quadratic quantization (HQQ, Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/): integer weights, no calibration.

A grid's parameters minimize Σ |W - Ŵ|^p with p < 1, which leaves outliers aside that a square would chase. The problem is split by
E ≈ W - Ŵ and solved in turns: E = sign(R)·max(|R| - |R|^(p-1)/β, 0) for the residual R = W - Ŵ, then the grid by least squares
against W - E. The published solver moves the zero point, which it stores as a float. The layouts that runtimes read have integer
zero points; rounded to one, the result was no better than rounding to nearest. So the scale is moved in its place, with the zero
point of the full range kept: s = Σ (W - E)·d / Σ d² for the codes' distances d from the zero point. On the demo's weights, in
groups of 64, the mean |W - Ŵ| is 0.74, 0.90 and 0.96 of rounding to nearest at 2, 3 and 4 bits; the published solver, with its
float zero points, reaches 0.93, 0.94 and 0.95.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from compress.stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compress.numerics.grids import Grid
    from compress.numerics.scheme import Scheme
    from compress.stages.quantization.method import Method
    from compress.stages.quantization.parts import LinearGroup, SearchGrid


@dataclass(frozen=True)
class HalfQuadratic:
    """The search for each group's scale."""

    lp_norm: float
    beta: float
    kappa: float
    iters: int

    def request(self, schemes: Collection[Scheme]) -> None:
        """Return that it reads nothing."""
        del schemes

    def prepare(self, group: LinearGroup) -> SearchGrid:
        """Return the search."""
        del group
        return lambda name, weight, scheme, dtype: self.search(weight, scheme, dtype)

    def search(self, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
        """Return the grid of a weight [out, in], float32, with scales in `dtype`.

        Each group stops at its first turn without a gain, so that its grid does not depend on the other rows.
        """
        from compress.numerics.grids import full_range
        from compress.numerics.rounding import round_to

        grid = full_range(weight, scheme, dtype)
        groups, zeros = weight.view(len(weight), -1, grid.scheme.group_size), grid.zero_points.unsqueeze(-1)
        scales, best, beta = grid.scales, grid.scales, self.beta
        least = scales.new_full(scales.shape, float("inf"), dtype=weight.dtype)
        for _ in range(self.iters):
            distances = round_to(groups, scales, grid.zero_points, grid.scheme).sub_(zeros)
            residual = groups - distances * scales.float().unsqueeze(-1)
            error = residual.abs().mean(dim=-1)
            # by the mean |W - Ŵ|, as the published solver measures its progress
            gains = error < least
            if not gains.any():
                break
            # -inf for a group without a gain: nothing is less, so it never moves again
            least, best = error.where(gains, float("-inf")), scales.where(gains, best)
            target = groups - self._shrink(residual, beta)
            # distances are integers: the sum of squares is 0 or at least 1, and 0 only for a group of zero points
            fitted = (target * distances).sum(dim=-1) / distances.square().sum(dim=-1).clamp_(min=1)
            # least squares may give a scale that is negative or underflows: such a group keeps the one it has
            scales = fitted.to(dtype).where(fitted.to(dtype) > 0, scales)
            beta *= self.kappa
        return replace(grid, scales=best)

    def _shrink(self, residual: Tensor, beta: float) -> Tensor:
        """Return the proximal operator of |x|^p: what of the residual is taken for outliers."""
        size = residual.abs()
        return residual.sign() * (size - size.pow(self.lp_norm - 1) / beta).clamp_(min=0)


class Hqq(IntegerQuantizer):
    """Round to nearest on grids that are fitted to the weights without their outliers; no sample is read."""

    revision: ClassVar[int] = 2

    stage: Literal["hqq"]
    symmetric: bool = False

    lp_norm: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """The exponent p of the error that is minimized; it and the three below are the published solver's defaults."""

    beta: PositiveFloat = 10.0
    """The weight of the split at the start: how closely E has to follow the residual."""

    kappa: Annotated[float, Field(ge=1)] = 1.01
    """The factor of `beta` after each turn."""

    iters: PositiveInt = 20
    """The most turns."""

    def uses_statistics(self) -> bool:
        """Return whether it reads statistics of input activations."""
        return False

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.stages.quantization.method import Method
        from compress.stages.quantization.rounders.nearest import Nearest

        return Method(rounder=Nearest(HalfQuadratic(self.lp_norm, self.beta, self.kappa, self.iters)))
