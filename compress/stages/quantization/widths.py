"""Mixed precision: a width for each group of layers within a budget; settings, costs and the file of results; free of torch.

The layers that a runtime fuses (q/k/v, gate/up) share a width. A layer's cost is the size of all its tensors in the
checkpoint: codes, scales and zero points. The width 16 leaves a layer unquantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from compress.checkpoints.checkpoint import TensorSpec
from compress.checkpoints.layouts import packed_bytes
from compress.errors import CheckpointError
from compress.numerics.allocation import BudgetError, WidthOption, allocate
from compress.numerics.scheme import Scheme
from compress.recipe.schema import Frozen
from compress.stages.linears import Linear, Target

WIDTHS = "widths.json"
"""The file in a stage's output with the chosen widths and their predicted losses."""

UNQUANTIZED_WIDTH = 16
"""The width of a layer that is not quantized."""

FUSED_LINEARS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that runtimes fuse into one, which need one scheme."""

_NO_GAIN = 0.05
"""A smaller predicted gain over one width for all is none.

Measured one by one, the logarithm of what layers lose over what is predicted has a standard deviation of 0.24 (GPTQ at 3 bits,
SmolLM2-135M) to 0.56 (rounding to nearest, the demo model, benchmarks/results/sensitivity.json): over a hundred groups of layers
an error of two to six percent in a sum.
"""

FLOATS = ("F16", "BF16", "F32")
"""The types of weights that can be quantized; scales are stored in the same type."""

Width = Literal[2, 3, 4, 8, 16]


class Budget(Frozen):
    """The size limit: mean bits per weight of the layers, or bytes of all tensors of the checkpoint."""

    bits_per_weight: Annotated[float, Field(gt=0, le=16)] | None = None
    bytes: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.bits_per_weight is None) == (self.bytes is None):
            raise ValueError("give bits_per_weight or bytes, and not both")
        return self


class FusedLayers(Frozen):
    """Layers that share a width."""

    layers: tuple[str, ...]
    """Their names on disk."""

    width: int
    """The chosen width, in bits."""

    weights: int
    """How many weights they have."""

    bytes: int
    """The size of all their tensors."""

    predicted_loss: float
    """The predicted loss at the chosen width, in nats per predicted token."""

    losses: Mapping[int, float]
    """The predicted loss at each width."""


class Widths(Frozen):
    """The chosen widths."""

    bits_per_weight: float
    """The mean over all layers, scales and zero points included."""

    predicted_loss: float
    """The sum over all groups, in nats per predicted token."""

    groups: tuple[FusedLayers, ...]

    @property
    def by_layer(self) -> dict[str, int]:
        """Each layer's width, by its name on disk."""
        return {layer: group.width for group in self.groups for layer in group.layers}


def read_widths(folder: Path) -> Widths | None:
    """Return the widths that a stage chose; None where it chose none or the file is damaged."""
    try:
        return Widths.model_validate_json((folder / WIDTHS).read_bytes())
    except (OSError, ValidationError):
        return None


def _worth_it(chosen: dict[str, WidthOption], options: Mapping[str, Sequence[WidthOption]], limit: int) -> dict[str, WidthOption]:
    """Return the chosen widths, or one width for all that fits the limit and is predicted to lose hardly more."""
    loss = sum(choice.loss for choice in chosen.values())
    for width in sorted({option.width for of_group in options.values() for option in of_group}):
        uniform = {name: option for name, of_group in options.items() for option in of_group if option.width == width}
        fits = sum(option.cost for option in uniform.values()) <= limit
        if fits and sum(option.loss for option in uniform.values()) <= loss * (1 + _NO_GAIN):
            return uniform
    return chosen


@dataclass(frozen=True)
class MixedPrecision:
    """Layers that share a budget, each to get one of several widths."""

    linears: Sequence[Linear]

    widths: Sequence[int]
    """The candidate widths, in bits."""

    schemes: Mapping[Target, Scheme]
    """Each component's scheme, without the width."""

    budget: Budget

    other_bytes: int
    """The size that all other tensors of the checkpoint will have."""

    @property
    def quantized_widths(self) -> list[int]:
        """The widths at which a layer is quantized."""
        return [width for width in self.widths if width != UNQUANTIZED_WIDTH]

    @property
    def reference_width(self) -> int:
        """The width at which a layer is quantized that would come nearest to the budget if all layers had it."""
        sizes = {width: sum(self.cost(linear, width) for linear in self.linears) for width in self.quantized_widths}
        return min(sizes, key=lambda width: abs(sizes[width] - self.limit))

    def scheme(self, linear: Linear, width: int) -> Scheme:
        """Return a layer's scheme at a width other than 16."""
        return replace(self.schemes[linear.component], bits=width)

    @property
    def weights(self) -> int:
        """The number of weights of all layers."""
        return sum(linear.rows * linear.columns for linear in self.linears)

    @property
    def limit(self) -> int:
        """The budget of all layers, in bytes."""
        if self.budget.bytes is not None:
            return self.budget.bytes - self.other_bytes
        assert self.budget.bits_per_weight is not None
        # rounded down: a budget is a limit
        return int(self.budget.bits_per_weight * self.weights / 8)

    @property
    def max_bytes(self) -> int:
        """The largest size of all tensors of the checkpoint that the budget allows."""
        widest = sum(self.cost(linear, max(self.widths)) for linear in self.linears)
        return self.other_bytes + min(self.limit, widest)

    def cost(self, linear: Linear, width: int) -> int:
        """Return the bytes of a layer's tensors at a width."""
        shape = (linear.rows, linear.columns)
        if width == UNQUANTIZED_WIDTH:
            return TensorSpec(linear.dtype, shape).bytes
        return packed_bytes(shape, self.scheme(linear, width), linear.dtype)

    def groups(self) -> dict[str, list[Linear]]:
        """Return the groups of layers that share a width, by name."""
        groups: dict[str, list[Linear]] = {}
        for linear in self.linears:
            parent, _, leaf = linear.disk_name.rpartition(".")
            fused = next((names for names in FUSED_LINEARS if leaf in names), (leaf,))
            members = groups.setdefault(f"{parent}.{'/'.join(fused)}", [])
            members.append(linear)
            # in the order of the fused matrix, whatever the order on disk, so that files and messages do not depend on it
            members.sort(key=lambda linear: fused.index(linear.disk_name.rpartition(".")[2]))
        return groups

    def fault(self) -> str | None:
        """Return a message with the smallest possible budget where no choice of widths fits; None where one does."""
        smallest = sum(self.cost(linear, min(self.widths)) for linear in self.linears)
        if smallest <= self.limit:
            return None
        if self.budget.bytes is not None:
            minimum = f"{smallest + self.other_bytes} bytes, all other tensors counted"
        else:
            # rounded up to two digits, so that the number in the message is enough
            minimum = f"{-(-smallest * 800 // self.weights) / 100:g} bits per weight, scales and zero points counted"
        budget = self.budget.bytes if self.budget.bytes is not None else self.budget.bits_per_weight
        return (
            f"budget: {budget} is too little; the smallest possible with widths {', '.join(map(str, self.widths))} is {minimum}. "
            "Raise it, give a smaller width or a larger group_size, or target fewer layers"
        )

    def choose(self, losses: Mapping[str, Mapping[int, float]]) -> Widths:
        """Return the widths of the smallest predicted loss, from the losses of each layer (by its name on disk) at each width.

        One width for all is kept where its predicted loss is nearly as small: `_NO_GAIN`.

        Raises:
            CheckpointError: the budget is too small, or so large that nothing would be quantized.
        """
        groups = self.groups()
        # fused layers share a width, so their losses are summed
        totals = {
            name: {width: sum(losses[linear.disk_name][width] for linear in members) for width in losses[members[0].disk_name]}
            for name, members in groups.items()
        }
        options = {
            name: [
                WidthOption(width, sum(self.cost(linear, width) for linear in members), loss)
                for width, loss in totals[name].items()
            ]
            for name, members in groups.items()
        }
        try:
            chosen = _worth_it(allocate(options, self.limit), options, self.limit)
        except BudgetError as error:
            raise CheckpointError(f"budget: {error}; raise it") from error
        # a stage that changes nothing is an error
        if all(choice.width == UNQUANTIZED_WIDTH for choice in chosen.values()):
            raise CheckpointError("budget: leaves every layer as it is; lower it, or remove the stage")
        return Widths(
            bits_per_weight=sum(choice.cost for choice in chosen.values()) * 8 / self.weights,
            predicted_loss=sum(choice.loss for choice in chosen.values()),
            groups=tuple(
                FusedLayers(
                    layers=tuple(linear.disk_name for linear in groups[name]),
                    width=choice.width,
                    weights=sum(linear.rows * linear.columns for linear in groups[name]),
                    bytes=choice.cost,
                    predicted_loss=choice.loss,
                    losses=totals[name],
                )
                for name, choice in chosen.items()
            ),
        )
