"""Activation-aware weight quantization (AWQ, arXiv 2306.00978): integer weights, activations in floating point."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from compress.stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from compress.stages.quantization.method import Method


class Awq(IntegerQuantizer):
    """Quantize weights to integers after scaling up the input channels with large activations, whose errors matter most."""

    revision: ClassVar[int] = 8

    stage: Literal["awq"]
    symmetric: bool = False  # AWQ's layout stores zero points in any case

    clip: bool = True
    """Whether each group's clipping range is searched."""

    grid: PositiveInt = 20
    """Grid steps of the searches of scales and clipping ranges."""

    def uses_statistics(self) -> bool:
        """Return whether it reads statistics of input activations."""
        return True

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.stages.quantization.method import Method
        from compress.stages.quantization.parts import FULL_RANGE
        from compress.stages.quantization.rounders.clip import ClipSearch
        from compress.stages.quantization.rounders.nearest import Nearest
        from compress.stages.quantization.transforms.awq import AwqScaling

        return Method((AwqScaling(self.grid),), Nearest(ClipSearch(self.grid) if self.clip else FULL_RANGE))
