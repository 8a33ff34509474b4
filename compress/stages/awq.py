"""Activation-aware weight quantization (AWQ, arXiv 2306.00978): integers for weights, floats for activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from compress.stages.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from compress.stages.solvers import Method


class Awq(IntegerQuantizer):
    """Round weights to integers, with more of the grid for the input channels that matter by their activations.

    `grid` is into how many steps the search of the scales is divided, and that of each group's range where `clip` is on.
    """

    revision: ClassVar[int] = 6

    stage: Literal["awq"]
    symmetric: bool = False
    clip: bool = True
    grid: PositiveInt = 20

    def observes(self) -> bool:
        """Return whether it reads statistics of the linears' inputs."""
        return True

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.stages.solvers import Method

        return Method(scales=self.grid, clip=self.grid if self.clip else None)
