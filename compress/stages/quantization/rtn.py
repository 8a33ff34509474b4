"""Round to nearest: no calibration; the baseline that every other method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compress.stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from compress.stages.quantization.method import Method


class Rtn(IntegerQuantizer):
    """Round each weight to the nearest code of its group's full range."""

    revision: ClassVar[int] = 2

    stage: Literal["rtn"]
    symmetric: bool = False

    def uses_statistics(self) -> bool:
        """Return whether it reads statistics of input activations."""
        return False

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.stages.quantization.method import Method

        return Method()
