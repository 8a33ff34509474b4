"""INT8 weights and activations (W8A8) with SmoothQuant (arXiv 2211.10438), or INT8 weights alone (W8A16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveInt

from compress.numerics.scheme import Scheme
from compress.stages.linears import Target
from compress.stages.quantization.quantizer import Component, Quantizer, Shrinkage, distinct, schemes_of

if TYPE_CHECKING:
    from compress.stages.quantization.method import Method

# per output channel: such a scale factors out of the int32 sum over the inputs, which one per group of inputs would not
_SCHEME = Scheme(bits=8, group_size=-1, symmetric=True)

ActivationStrategy = Literal["none", "token", "tensor"]
"""Input activations that share a scale: a token (dynamic), or all (static); none where they are not quantized."""


def _scheme(activations: ActivationStrategy) -> Scheme:
    return replace(_SCHEME, activations=None if activations == "none" else activations)


class Int8Component(Component):
    """A component with an activation strategy of its own."""

    activations: ActivationStrategy

    def scheme(self, default: Scheme) -> Scheme:
        """Return the component's scheme."""
        del default
        return _scheme(self.activations)


class Int8(Quantizer):
    """Quantize weights per output channel, and activations per token (dynamic) or per tensor (static)."""

    revision: ClassVar[int] = 5

    stage: Literal["int8"]
    activations: ActivationStrategy = "token"
    """How activations are quantized; none is W8A16."""

    smoothing: Literal["auto", "none"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """SmoothQuant's migration strength; `auto` searches it for each pair of layers."""

    rounding: Literal["gptq", "nearest"] = "gptq"

    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    """The share of the Hessian's mean diagonal that is added to its diagonal."""

    shrinkage: Shrinkage = "auto"
    """By what share the Hessian's elements beside its diagonal are made smaller, as for `gptq`."""

    grid: PositiveInt = 20
    """Grid steps of the search of the migration strength."""

    targets: Annotated[tuple[Target | Int8Component, ...], Field(min_length=1), AfterValidator(distinct)] = ("decoder",)

    def component_schemes(self) -> Mapping[Target, Scheme]:
        """Return the scheme of each targeted component's linears."""
        return schemes_of(self.targets, _scheme(self.activations))

    def uses_statistics(self) -> bool:
        """Return whether it reads statistics of input activations."""
        return self.rounding == "gptq" or self.smoothing != "none"

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.numerics.gptq import GptqOptions
        from compress.stages.quantization.method import Method
        from compress.stages.quantization.rounders.gptq import GptqRounder
        from compress.stages.quantization.rounders.nearest import NEAREST
        from compress.stages.quantization.transforms.smoothquant import SmoothQuant

        shrinkage = None if self.shrinkage == "auto" else self.shrinkage
        strength = self.smoothing if isinstance(self.smoothing, float) else None
        return Method(
            () if self.smoothing == "none" else (SmoothQuant(strength, self.grid),),
            GptqRounder(GptqOptions(self.dampening_frac, shrinkage=shrinkage)) if self.rounding == "gptq" else NEAREST,
        )
