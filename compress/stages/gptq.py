"""GPTQ (arXiv 2210.17323): integers for weights, each column's error made good by those still to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from compress.stages.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from compress.stages.solvers import Method


class Gptq(IntegerQuantizer):
    """Round weights column by column, each column's error spread over those still to come.

    `actorder` static rounds the columns with the largest activations first; the groups stay those of the columns' places, so that
    a runtime needs no index. `scales: awq` first moves AWQ's scales between layers. `dampening_frac` is the share of the Hessian's
    mean diagonal that is added to its diagonal. `clip` searches each group's range, in `grid` steps, as that of AWQ's scales: it
    fits the samples closer, and what is unlike them less close.
    """

    revision: ClassVar[int] = 3

    stage: Literal["gptq"]
    symmetric: bool = True
    scales: Literal["none", "awq"] = "none"
    actorder: Literal["static", "none"] = "static"
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    clip: bool = False
    grid: PositiveInt = 20

    def observes(self) -> bool:
        """Return whether it reads statistics of the linears' inputs."""
        return True

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.numerics.gptq import GptqOptions
        from compress.stages.solvers import Method

        return Method(
            scales=self.grid if self.scales == "awq" else None,
            clip=self.grid if self.clip else None,
            gptq=GptqOptions(dampening_frac=self.dampening_frac, reorder=self.actorder == "static"),
        )
