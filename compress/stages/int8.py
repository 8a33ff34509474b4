"""8-bit integers for weights and activations (W8A8) with SmoothQuant (arXiv 2211.10438), or for weights alone (W8A16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveInt

from compress.numerics.scheme import Scheme
from compress.stages.linears import Target
from compress.stages.quantizer import Component, Quantizer, distinct, schemes_of

if TYPE_CHECKING:
    from compress.stages.solvers import Method

_SCHEME = Scheme(bits=8, group_size=-1, symmetric=True)

Inputs = Literal["none", "token", "tensor"]


def _rounding(activations: Inputs) -> Scheme:
    return replace(_SCHEME, activations=None if activations == "none" else activations)


class Int8Component(Component):
    """A component whose inputs may be rounded in another way than the rest's."""

    activations: Inputs

    def scheme(self, own: Scheme) -> Scheme:
        """Return how the component is held."""
        del own
        return _rounding(self.activations)


class Int8(Quantizer):
    """Round weights per output channel, and what comes into them: by a scale per token as it comes, or by one fixed for all.

    `activations` none keeps them as they are (W8A16). `smoothing` moves outliers from the inputs into the weights, with a
    strength from 0 to 1 or, with auto, one that is searched for each pair of layers. `rounding` is GPTQ's, or to the nearest.
    """

    revision: ClassVar[int] = 3

    stage: Literal["int8"]
    activations: Inputs = "token"
    smoothing: Literal["auto", "none"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    rounding: Literal["gptq", "nearest"] = "gptq"
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    grid: PositiveInt = 20
    targets: Annotated[tuple[Target | Int8Component, ...], Field(min_length=1), AfterValidator(distinct)] = ("decoder",)

    def parts(self) -> Mapping[Target, Scheme]:
        """Return how the linears of each targeted component are held."""
        return schemes_of(self.targets, _rounding(self.activations))

    def observes(self) -> bool:
        """Return whether it reads statistics of the linears' inputs."""
        return self.rounding == "gptq" or self.smoothing != "none"

    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""
        from compress.numerics.gptq import GptqOptions
        from compress.stages.smooth_solver import Smoothing
        from compress.stages.solvers import Method

        strength = self.smoothing if isinstance(self.smoothing, float) else None
        return Method(
            smoothing=None if self.smoothing == "none" else Smoothing(strength, self.grid),
            gptq=GptqOptions(dampening_frac=self.dampening_frac) if self.rounding == "gptq" else None,
        )
