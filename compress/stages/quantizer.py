"""What the methods that round a model's linears share: which linears, how each is held, and what stands against it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from compress.checkpoint import Checkpoint
from compress.families import Family
from compress.layouts import is_quantized, packed_bytes
from compress.numerics.scheme import Scheme
from compress.schema import Frozen
from compress.stages.linears import Linear, Selection, Target, select
from compress.stages.stage import Stage, StageContext

if TYPE_CHECKING:
    from compress.stages.solvers import Method

_SCALE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_USUAL_GROUPS = (256, 128, 64, 32, 16, 8)
_KV_SCALE_BYTES = 4


def _group_size(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("Input should be a positive number of input channels, or -1 for one scale per output channel")
    return value


GroupSize = Annotated[int, AfterValidator(_group_size)]
"""Input channels that share a scale; -1 for all of a row."""

Bits = Literal[2, 3, 4, 8]
"""The widths of integers."""


class Part(Frozen):
    """A component of the model whose linears are quantized; what else it says stands in place of the stage's own settings."""

    component: Target

    @abstractmethod
    def scheme(self, own: Scheme) -> Scheme:
        """Return how the component is held, by the stage's own scheme."""


class IntegerPart(Part):
    """A component that may be held in other integers than the rest; `activations` round its linears' inputs too."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    activations: Literal["token", "tensor"] | None = None

    def scheme(self, own: Scheme) -> Scheme:
        """Return the stage's scheme with what is said here in its place."""
        return replace(own, **self.model_dump(exclude={"component"}, exclude_none=True))


def distinct(targets: tuple[Target | Part, ...]) -> tuple[Target | Part, ...]:
    """Return targets as they are.

    Raises:
        ValueError: a component is named twice.
    """
    names = [_component(target) for target in targets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is named twice; remove one of the two")
    return targets


class Quantizer(Stage):
    """A method that rounds linears, and what all of them can be told.

    `leave_out` are shell patterns on layer names. `kv_cache` adds the scales with which a runtime can keep keys and values as
    8-bit floats.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")

    leave_out: tuple[str, ...] = ()
    kv_cache: Literal["fp8"] | None = None

    @abstractmethod
    def parts(self) -> Mapping[Target, Scheme]:
        """Return how the linears of each targeted component are held."""

    @abstractmethod
    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""

    @abstractmethod
    def observes(self) -> bool:
        """Return whether the method itself reads statistics of the linears' inputs."""

    @property
    def calibrated(self) -> bool:
        """Whether the stage reads calibration samples."""
        return (
            self.observes() or self.kv_cache is not None or any(scheme.activations == "tensor" for scheme in self.parts().values())
        )

    def select(self, checkpoint: Checkpoint, family: Family) -> Selection:
        """Return the linears to be quantized."""
        return select(checkpoint, family, tuple(self.parts()), self.leave_out)

    def check(self, checkpoint: Checkpoint, family: Family) -> list[str]:
        """Return what stands against it: weights quantized already, layers a group does not divide, patterns that match nothing."""
        if is_quantized(checkpoint.config):
            return [f"{checkpoint.folder}: its weights are quantized already; start from the model's original"]
        selection, parts = self.select(checkpoint, family), self.parts()
        faults = list(selection.faults)
        indivisible: dict[tuple[int, int], list[Linear]] = {}
        for linear in selection.linears:
            scheme = parts[linear.part]
            if linear.dtype not in _SCALE_BYTES:
                faults.append(f"{linear.name}: its weights are {linear.dtype}; convert the checkpoint to BF16, F16 or F32 first")
            elif scheme.type == "int" and scheme.group_size != -1 and linear.columns % scheme.group_size:
                indivisible.setdefault((linear.columns, scheme.group_size), []).append(linear)
        if self.kv_cache and family.head is None:
            faults.append("kv_cache: this model generates nothing and keeps no keys and values; leave it away")
        return faults + [_indivisible(linears, size) for (_, size), linears in indivisible.items()]

    def schemes(self, checkpoint: Checkpoint, family: Family) -> dict[str, Scheme]:
        """Return the scheme for each linear that will be quantized, by its name on disk."""
        parts = self.parts()
        return {linear.disk_name: parts[linear.part] for linear in self.select(checkpoint, family).linears}

    def predict_bytes(self, checkpoint: Checkpoint, family: Family) -> int:
        """Return the size of all tensors it writes; exact."""
        total, parts = checkpoint.weight_bytes, self.parts()
        for linear in self.select(checkpoint, family).linears:
            total -= checkpoint.tensors[f"{linear.disk_name}.weight"].bytes
            total += packed_bytes((linear.rows, linear.columns), parts[linear.part], _SCALE_BYTES.get(linear.dtype, 2))
        if self.kv_cache:
            total += 2 * _KV_SCALE_BYTES * int(checkpoint.text_config["num_hidden_layers"])
        return total

    def apply(self, context: StageContext) -> None:
        """Quantize block by block; a call that was killed goes on at the block it was in when it is given the same folder again.

        Raises:
            CheckpointError: the weights cannot be used, NaN or infinite ones included.
            MissingError: the device has too little memory.
            StoreError: the disk is full.
        """
        from compress.stages.quantize import apply

        apply(self, context)


class IntegerQuantizer(Quantizer):
    """A method that rounds weights to integers; activations stay as they are unless a target says otherwise.

    Each group of `group_size` input channels of an output channel has its own grid (-1: the whole row).
    """

    bits: Bits
    group_size: GroupSize
    symmetric: bool
    targets: Annotated[tuple[Target | IntegerPart, ...], Field(min_length=1), AfterValidator(distinct)] = ("decoder",)

    def parts(self) -> Mapping[Target, Scheme]:
        """Return how the linears of each targeted component are held."""
        return schemes_of(self.targets, Scheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric))


def schemes_of(targets: tuple[Target | Part, ...], scheme: Scheme) -> dict[Target, Scheme]:
    """Return each target's scheme: its own by what it says, or the stage's."""
    return {_component(target): target.scheme(scheme) if isinstance(target, Part) else scheme for target in targets}


def _component(target: Target | Part) -> Target:
    return target.component if isinstance(target, Part) else target


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
