"""8-bit floats (e4m3) for weights and activations (arXiv 2209.05433)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from compress.numerics.scheme import BLOCK, Scheme
from compress.stages.linears import Target
from compress.stages.quantizer import Component, Quantizer, distinct, schemes_of

if TYPE_CHECKING:
    from compress.stages.solvers import Method

Granularity = Literal["channel", "tensor", "block"]

_SCHEMES: Mapping[Granularity, Scheme] = {
    "channel": Scheme(bits=8, group_size=-1, symmetric=True, type="float", activations="token"),
    "tensor": Scheme(bits=8, group_size=-1, symmetric=True, type="float", block_rows=-1, activations="tensor"),
    "block": Scheme(bits=8, group_size=BLOCK, symmetric=True, type="float", block_rows=BLOCK, activations="group"),
}


class Fp8Component(Component):
    """A component with scales of another kind than the rest's."""

    granularity: Granularity

    def scheme(self, own: Scheme) -> Scheme:
        """Return how the component is held."""
        del own
        return _SCHEMES[self.granularity]


class Fp8(Quantizer):
    """Round weights and inputs to 8-bit floats.

    `granularity` channel has a scale for each output channel, and for each token as it comes (no calibration); tensor one for each
    matrix, and one for all inputs, found in calibration; block one for each 128 × 128 weights, and for 128 channels of a token.
    """

    revision: ClassVar[int] = 2

    stage: Literal["fp8"]
    granularity: Granularity = "channel"
    targets: Annotated[tuple[Target | Fp8Component, ...], Field(min_length=1), AfterValidator(distinct)] = ("decoder",)

    def parts(self) -> Mapping[Target, Scheme]:
        """Return how the linears of each targeted component are held."""
        return schemes_of(self.targets, _SCHEMES[self.granularity])

    def observes(self) -> bool:
        """Return whether it reads statistics of the linears' inputs beyond what fixed scales need."""
        return False

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.stages.solvers import Method

        return Method()
