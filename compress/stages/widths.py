"""A width for each group of layers within a budget: what a recipe says of it, what it costs, and what came out; free of torch.

The layers that a runtime joins into one (q/k/v, gate/up) have one width. What a layer costs are all of its tensors as they lie in a
checkpoint: codes, scales and zero points. The width 16 leaves a layer as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from compress.errors import CheckpointError
from compress.layouts import packed_bytes
from compress.numerics.allocation import BudgetError, WidthOption, allocate
from compress.numerics.scheme import Scheme
from compress.schema import Frozen
from compress.stages.linears import Linear, Target

WIDTHS = "widths.json"
"""The file in a stage's output that tells which widths were chosen, and why."""

LEFT = 16
"""The width of a layer that is left as it is."""

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that runtimes join into one, which must be held alike."""

SCALE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}

Width = Literal[2, 3, 4, 8, 16]


class Budget(Frozen):
    """How much the layers may take: bits for each of their weights, or bytes for all tensors of the checkpoint together."""

    bits_per_weight: Annotated[float, Field(gt=0, le=16)] | None = None
    bytes: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.bits_per_weight is None) == (self.bytes is None):
            raise ValueError("give bits_per_weight or bytes, and not both")
        return self


class GroupWidth(Frozen):
    """Layers of one width, by their names on disk.

    `losses` are what each width would lose, in nats per predicted token; `predicted_loss` is that of the chosen one.
    """

    layers: tuple[str, ...]
    width: int
    weights: int
    bytes: int
    predicted_loss: float
    losses: Mapping[int, float]


class Widths(Frozen):
    """The chosen widths; `bits_per_weight` counts scales and zero points, `predicted_loss` is the sum over all groups."""

    bits_per_weight: float
    predicted_loss: float
    groups: tuple[GroupWidth, ...]

    @property
    def by_layer(self) -> dict[str, int]:
        """Each layer's width, by its name on disk."""
        return {layer: group.width for group in self.groups for layer in group.layers}


def read_widths(folder: Path) -> Widths | None:
    """Return what a stage wrote of the widths it chose; None where it chose none or the file is damaged."""
    try:
        return Widths.model_validate_json((folder / WIDTHS).read_bytes())
    except (OSError, ValidationError):
        return None


@dataclass(frozen=True)
class Mixture:
    """Layers that share a budget: each of `linears` is to be given one of `widths`.

    `schemes` says how those of a component are held but for the width; `elsewhere` is what all other tensors of the checkpoint
    will take, in bytes.
    """

    linears: Sequence[Linear]
    widths: Sequence[int]
    schemes: Mapping[Target, Scheme]
    budget: Budget
    elsewhere: int

    @property
    def rounded(self) -> list[int]:
        """The widths that change a layer."""
        return [width for width in self.widths if width != LEFT]

    def scheme(self, linear: Linear, width: int) -> Scheme:
        """Return how a layer is held at a width other than 16."""
        return replace(self.schemes[linear.part], bits=width)

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(linear.rows * linear.columns for linear in self.linears)

    @property
    def limit(self) -> int:
        """How many bytes the layers may take together."""
        if self.budget.bytes is not None:
            return self.budget.bytes - self.elsewhere
        assert self.budget.bits_per_weight is not None
        return int(self.budget.bits_per_weight * self.weights / 8)

    @property
    def most(self) -> int:
        """How many bytes all tensors of the checkpoint take together when the layers take all they may."""
        widest = sum(self.cost(linear, max(self.widths)) for linear in self.linears)
        return self.elsewhere + min(self.limit, widest)

    def cost(self, linear: Linear, width: int) -> int:
        """Return the bytes a layer takes at a width."""
        scale_bytes = SCALE_BYTES.get(linear.dtype, 2)
        shape = (linear.rows, linear.columns)
        if width == LEFT:
            return linear.rows * linear.columns * scale_bytes
        return packed_bytes(shape, self.scheme(linear, width), scale_bytes)

    def groups(self) -> dict[str, list[Linear]]:
        """Return the layers by what they share a width with."""
        found: dict[str, list[Linear]] = {}
        for linear in self.linears:
            parent, _, own = linear.disk_name.rpartition(".")
            joined = next((parts for parts in JOINED if own in parts), (own,))
            members = found.setdefault(f"{parent}.{'/'.join(joined)}", [])
            members.append(linear)
            members.sort(key=lambda linear: joined.index(linear.disk_name.rpartition(".")[2]))
        return found

    def fault(self) -> str | None:
        """Return why no choice of widths fits the budget, with what would; None where one does."""
        smallest = sum(self.cost(linear, min(self.widths)) for linear in self.linears)
        if smallest <= self.limit:
            return None
        if self.budget.bytes is not None:
            least = f"{smallest + self.elsewhere} bytes, all other tensors counted"
        else:
            least = f"{-(-smallest * 800 // self.weights) / 100:g} bits per weight, scales and zero points counted"
        given = self.budget.bytes if self.budget.bytes is not None else self.budget.bits_per_weight
        return (
            f"budget: {given} is too little; the smallest possible with widths {', '.join(map(str, self.widths))} is {least}. "
            "Raise it, give a smaller width or a larger group_size, or target fewer layers"
        )

    def choose(self, losses: Mapping[str, Mapping[int, float]]) -> Widths:
        """Return the widths of the smallest predicted loss; `losses` are those of each layer (its name on disk) at each width.

        Raises:
            CheckpointError: the budget is too small, or so large that nothing would be quantized.
        """
        groups = self.groups()
        totals = {
            name: {width: sum(losses[linear.disk_name][width] for linear in members) for width in losses[members[0].disk_name]}
            for name, members in groups.items()
        }
        choices = {
            name: [
                WidthOption(width, sum(self.cost(linear, width) for linear in members), loss)
                for width, loss in totals[name].items()
            ]
            for name, members in groups.items()
        }
        try:
            chosen = allocate(choices, self.limit)
        except BudgetError as error:
            raise CheckpointError(f"budget: {error}; raise it") from error
        if all(choice.width == LEFT for choice in chosen.values()):
            raise CheckpointError("budget: leaves every layer as it is; lower it, or remove the stage")
        return Widths(
            bits_per_weight=sum(choice.cost for choice in chosen.values()) * 8 / self.weights,
            predicted_loss=sum(choice.loss for choice in chosen.values()),
            groups=tuple(
                GroupWidth(
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
