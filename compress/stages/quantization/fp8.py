"""8-bit floats (e4m3) for weights and activations (arXiv 2209.05433)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from compress.numerics.scheme import BLOCK, Scheme
from compress.stages.linears import Target
from compress.stages.quantization.quantizer import Component, Quantizer, distinct, schemes_of

if TYPE_CHECKING:
    from compress.stages.quantization.method import Method

Granularity = Literal["channel", "tensor", "block"]

_SCHEMES: Mapping[Granularity, Scheme] = {
    # the pairs that compressed-tensors has presets of: FP8_DYNAMIC, FP8 and FP8_BLOCK, which runtimes have kernels for
    "channel": Scheme(bits=8, group_size=-1, symmetric=True, type="float", activations="token"),
    "tensor": Scheme(bits=8, group_size=-1, symmetric=True, type="float", block_rows=-1, activations="tensor"),
    "block": Scheme(bits=8, group_size=BLOCK, symmetric=True, type="float", block_rows=BLOCK, activations="group"),
}


class Fp8Component(Component):
    """A component with a granularity of its own."""

    granularity: Granularity

    def scheme(self, default: Scheme) -> Scheme:
        """Return the component's scheme."""
        del default
        return _SCHEMES[self.granularity]


class Fp8(Quantizer):
    """Quantize weights and activations to 8-bit floats."""

    revision: ClassVar[int] = 3

    stage: Literal["fp8"]
    granularity: Granularity = "channel"
    """Which weights and activations share a scale.

    `channel`: an output channel; a token (dynamic, no calibration). `tensor`: a matrix; all tokens (static, from calibration).
    `block`: 128 × 128 weights; 128 channels of a token (dynamic).
    """

    targets: Annotated[tuple[Target | Fp8Component, ...], Field(min_length=1), AfterValidator(distinct)] = ("decoder",)

    def component_schemes(self) -> Mapping[Target, Scheme]:
        """Return the scheme of each targeted component's linears."""
        return schemes_of(self.targets, _SCHEMES[self.granularity])

    def uses_statistics(self) -> bool:
        """Return whether it reads statistics of input activations beyond what static scales need."""
        return False

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.stages.quantization.method import Method

        return Method()
