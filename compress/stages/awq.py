"""Activation-aware weight quantization (AWQ, arXiv 2306.00978): integers for weights, floats for activations."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveInt

from compress.checkpoint import Checkpoint
from compress.families import Family
from compress.layouts import is_quantized, packed_bytes
from compress.numerics.scheme import Scheme
from compress.stages.linears import Linear, Selection, Target, select
from compress.stages.stage import Stage, StageContext

_SCALE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_USUAL_GROUPS = (256, 128, 64, 32, 16, 8)


def _group_size(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("Input should be a positive number of input channels, or -1 for one scale per output channel")
    return value


class Awq(Stage):
    """Round weights to integers, with more of the grid for the input channels that matter by their activations.

    Each group of `group_size` input channels of an output channel has its own grid (-1: the whole row). `grid` is into how many
    steps the search of the scales is divided, and that of each group's range where `clip` is on. `leave_out` are shell
    patterns on layer names.
    """

    revision: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")

    stage: Literal["awq"]
    bits: Literal[2, 3, 4, 8]
    group_size: Annotated[int, AfterValidator(_group_size)]
    symmetric: bool = False
    clip: bool = True
    grid: PositiveInt = 20
    leave_out: tuple[str, ...] = ()
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("decoder",)

    @property
    def scheme(self) -> Scheme:
        """How each matrix is held."""
        return Scheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def select(self, checkpoint: Checkpoint, family: Family) -> Selection:
        """Return the linears to be quantized."""
        return select(checkpoint, family, self.targets, self.leave_out)

    def check(self, checkpoint: Checkpoint, family: Family) -> list[str]:
        """Return what stands against it: weights quantized already, layers a group does not divide, patterns that match nothing."""
        if is_quantized(checkpoint.config):
            return [f"{checkpoint.folder}: its weights are quantized already; start from the model's original"]
        selection = self.select(checkpoint, family)
        faults = list(selection.faults)
        indivisible: dict[int, list[Linear]] = {}
        for linear in selection.linears:
            if linear.dtype not in _SCALE_BYTES:
                faults.append(f"{linear.name}: its weights are {linear.dtype}; convert the checkpoint to BF16, F16 or F32 first")
            elif self.group_size != -1 and linear.columns % self.group_size:
                indivisible.setdefault(linear.columns, []).append(linear)
        return faults + [_indivisible(linears, self.group_size) for linears in indivisible.values()]

    def schemes(self, checkpoint: Checkpoint, family: Family) -> dict[str, Scheme]:
        """Return the scheme for each linear that will be quantized, by its name on disk."""
        return {linear.disk_name: self.scheme for linear in self.select(checkpoint, family).linears}

    def predict_bytes(self, checkpoint: Checkpoint, family: Family) -> int:
        """Return the size of all tensors it writes; exact."""
        total = checkpoint.weight_bytes
        for linear in self.select(checkpoint, family).linears:
            total -= checkpoint.tensors[f"{linear.disk_name}.weight"].bytes
            total += packed_bytes((linear.rows, linear.columns), self.scheme, _SCALE_BYTES.get(linear.dtype, 2))
        return total

    def apply(self, context: StageContext) -> None:
        """Quantize block by block; a call that was killed goes on at the block it was in when it is given the same folder again.

        Raises:
            CheckpointError: the weights cannot be used, NaN or infinite ones included.
            MissingError: the device has too little memory.
            StoreError: the disk is full.
        """
        from compress.stages.awq_apply import apply

        apply(self, context)


def _indivisible(linears: list[Linear], group_size: int) -> str:
    """Say of layers of one input width what would do instead of `group_size`."""
    first, columns = linears[0], linears[0].columns
    divisors = [size for size in range(1, columns + 1) if columns % size == 0]
    below = max((size for size in divisors if size < group_size), default=1)
    above = min((size for size in divisors if size > group_size), default=columns)
    usual = next((size for size in _USUAL_GROUPS if size < group_size and columns % size == 0), None)
    choices = sorted({below, above} | ({usual} if usual else set()))
    others = f" (and {len(linears) - 1} more layers as wide)" if len(linears) > 1 else ""
    endings = {linear.name.rpartition(".")[2] for linear in linears}
    patterns = ", ".join(repr(first.name if len(linears) == 1 else f"*.{ending}") for ending in sorted(endings))
    return (
        f"{first.name}{others}: its input width {columns} does not divide by group_size {group_size}; "
        f"use group_size {', '.join(map(str, choices))} or -1, or add {patterns} to leave_out"
    )
