"""GPTQ (arXiv 2210.17323): integer weights, each column's rounding error compensated in the columns not yet rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from compress.stages.quantization.quantizer import IntegerQuantizer, Shrinkage

if TYPE_CHECKING:
    from compress.stages.quantization.method import Method


class Gptq(IntegerQuantizer):
    """Round weights column by column; each column's error is compensated in the columns not yet rounded."""

    revision: ClassVar[int] = 5

    stage: Literal["gptq"]
    symmetric: bool = False

    scales: Literal["none", "awq"] = "awq"
    """Whether AWQ's scales are moved between layers before rounding."""

    actorder: Literal["static", "none"] = "static"
    """`static` rounds columns with the largest activations first; groups stay neighbouring columns, so no `g_idx` is needed."""

    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    """The share of the Hessian's mean diagonal that is added to its diagonal."""

    shrinkage: Shrinkage = "auto"
    """By what share the Hessian's elements beside its diagonal are made smaller: few samples make them too large.

    `auto`: half the ratio of channels to tokens, at most 0.3.
    """

    clip: bool = False
    """Whether each group's clipping range is searched: a closer fit to the calibration samples, and a worse one to unlike data."""

    grid: PositiveInt = 20
    """Grid steps of the searches of scales and clipping ranges."""

    def uses_statistics(self) -> bool:
        """Return whether it reads statistics of input activations."""
        return True

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.numerics.gptq import GptqOptions
        from compress.stages.quantization.method import Method
        from compress.stages.quantization.parts import FULL_RANGE
        from compress.stages.quantization.rounders.clip import ClipSearch
        from compress.stages.quantization.rounders.gptq import GptqRounder
        from compress.stages.quantization.transforms.awq import AwqScaling

        options = GptqOptions(self.dampening_frac, self.actorder == "static", None if self.shrinkage == "auto" else self.shrinkage)
        transforms = (AwqScaling(self.grid),) if self.scales == "awq" else ()
        return Method(transforms, GptqRounder(options, ClipSearch(self.grid) if self.clip else FULL_RANGE))
