"""What the methods that round a model's linears share: which linears, how each is held, and what stands against it."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from compress.checkpoint import Checkpoint
from compress.families import Family
from compress.layouts import is_quantized, packed_bytes
from compress.numerics.scheme import Scheme
from compress.schema import Frozen
from compress.stages.linears import Linear, LinearSelection, Target, select
from compress.stages.stage import Stage, StageContext
from compress.stages.widths import LEFT, SCALE_BYTES, Budget, Mixture, Width

if TYPE_CHECKING:
    from compress.stages.solvers import Method

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

Balance = Literal["tokens", "auto"] | Annotated[float, Field(ge=0, le=1)]
"""How much text and vision tokens count in statistics."""

_ALL_WIDTHS: tuple[Width, ...] = (2, 3, 4, 8, 16)
_TO_BE_CHOSEN = 0


class Component(Frozen):
    """A component of the model whose linears are quantized; what else it says stands in place of the stage's own settings."""

    component: Target

    @abstractmethod
    def scheme(self, own: Scheme) -> Scheme:
        """Return how the component is held, by the stage's own scheme."""


class IntegerComponent(Component):
    """A component that may be held in other integers than the rest; `activations` round its linears' inputs too."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    activations: Literal["token", "tensor"] | None = None

    def scheme(self, own: Scheme) -> Scheme:
        """Return the stage's scheme with what is said here in its place."""
        return replace(own, **self.model_dump(exclude={"component"}, exclude_none=True))


def distinct(targets: tuple[Target | Component, ...]) -> tuple[Target | Component, ...]:
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

    `ignore` are shell patterns on layer names. `kv_cache` adds the scales with which a runtime can keep keys and values as
    8-bit floats. `balance` is how text and vision tokens are weighed where a layer sees both: `tokens`, each as it comes; a
    number from 0 to 1, text's share of the second moment; or `auto`, for each layer by how much the model's predictions depend on
    what it makes of either (as MBQ does, arXiv 2412.19509). Layers of the vision tower and the projector see vision alone, so that
    all three are the same to them.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")

    ignore: tuple[str, ...] = ()
    balance: Balance = "tokens"
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

    def reads_images(self, family: Family) -> bool:
        """Return whether something that it observes is only reached by images: of the vision side, or a reader of its states."""
        parts = self.parts()
        observed = [part for part, scheme in parts.items() if self.observes() or scheme.activations == "tensor"]
        decoder = "decoder" in observed or self.kv_cache is not None
        return any(part in ("vision", "projector") for part in observed) or (decoder and bool(family.vision_readers))

    def select(self, checkpoint: Checkpoint, family: Family) -> LinearSelection:
        """Return the linears to be quantized."""
        return select(checkpoint, family, tuple(self.parts()), self.ignore)

    def check(self, checkpoint: Checkpoint, family: Family) -> list[str]:
        """Return what stands against it: weights quantized already, layers a group does not divide, patterns that match nothing."""
        if is_quantized(checkpoint.config):
            return [f"{checkpoint.folder}: its weights are quantized already; start from the model's original"]
        selection, parts = self.select(checkpoint, family), self.parts()
        faults = list(selection.faults)
        indivisible: dict[tuple[int, int], list[Linear]] = {}
        for linear in selection.linears:
            scheme = parts[linear.part]
            if linear.dtype not in SCALE_BYTES:
                faults.append(f"{linear.name}: its weights are {linear.dtype}; convert the checkpoint to BF16, F16 or F32 first")
            elif scheme.type == "int" and scheme.group_size != -1 and linear.columns % scheme.group_size:
                indivisible.setdefault((linear.columns, scheme.group_size), []).append(linear)
        if self.kv_cache and family.head is None:
            faults.append("kv_cache: this model generates nothing and keeps no keys and values; leave it away")
        if self.balance != "tokens" and not self.observes():
            faults.append(f"balance: {self.stage} reads no statistics of what layers are given; remove it")
        return faults + [_indivisible(linears, size, selection.linears) for (_, size), linears in indivisible.items()]

    def mixture(self, checkpoint: Checkpoint, family: Family) -> Mixture | None:
        """Return the layers whose width is yet to be chosen; None where there are none."""
        del checkpoint, family
        return None

    def schemes(self, checkpoint: Checkpoint, family: Family) -> dict[str, Scheme] | None:
        """Return the scheme for each linear that will be quantized, by its name on disk; None where widths are to be chosen."""
        parts = self.parts()
        return {linear.disk_name: parts[linear.part] for linear in self.select(checkpoint, family).linears}

    def predict_bytes(self, checkpoint: Checkpoint, family: Family) -> int:
        """Return the size of all tensors it writes; exact."""
        total, parts = checkpoint.weight_bytes, self.parts()
        for linear in self.select(checkpoint, family).linears:
            total -= checkpoint.tensors[f"{linear.disk_name}.weight"].bytes
            total += packed_bytes((linear.rows, linear.columns), parts[linear.part], SCALE_BYTES.get(linear.dtype, 2))
        return total + self._kv_bytes(checkpoint)

    def _kv_bytes(self, checkpoint: Checkpoint) -> int:
        return 2 * _KV_SCALE_BYTES * int(checkpoint.text_config["num_hidden_layers"]) if self.kv_cache else 0

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

    Each group of `group_size` input channels of an output channel has its own grid (-1: the whole row). With `bits` auto each layer
    of the decoder (and the head) is given one of `widths`, such that the predicted loss is smallest within `budget`; q/k/v
    and gate/up share theirs, 16 leaves a layer as it is.
    """

    bits: Literal[2, 3, 4, 8, "auto"]
    group_size: GroupSize
    symmetric: bool
    budget: Budget | None = None
    widths: Annotated[tuple[Width, ...], Field(min_length=1)] = _ALL_WIDTHS
    targets: Annotated[tuple[Target | IntegerComponent, ...], Field(min_length=1), AfterValidator(distinct)] = ("decoder",)

    @model_validator(mode="after")
    def _budgeted(self) -> Self:
        if self.bits == "auto" and self.budget is None:
            raise ValueError("bits: auto needs a budget, such as {bits_per_weight: 4.25}")
        if self.bits != "auto" and (self.budget is not None or self.widths != _ALL_WIDTHS):
            raise ValueError(f"budget and widths go with bits: auto, not {self.bits}; remove them")
        if set(self.widths) == {LEFT}:
            raise ValueError("widths: 16 alone leaves every layer as it is; add smaller ones")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the stage reads calibration samples."""
        return super().calibrated or self.bits == "auto"

    def versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that shape the result; the solver's where widths are chosen."""
        solver = {"scipy": version("scipy")} if self.bits == "auto" else {}
        return super().versions() | solver

    def parts(self) -> Mapping[Target, Scheme]:
        """Return how the linears of each targeted component are held; 0 bits stand for a width yet to be chosen."""
        bits = _TO_BE_CHOSEN if self.bits == "auto" else self.bits
        return schemes_of(self.targets, Scheme(bits=bits, group_size=self.group_size, symmetric=self.symmetric))

    def check(self, checkpoint: Checkpoint, family: Family) -> list[str]:
        """Return what stands against it, a budget that nothing fits included."""
        faults = super().check(checkpoint, family)
        mixture = None if faults else self.mixture(checkpoint, family)
        if mixture is None:
            idle = self.bits == "auto" and not faults
            return (
                ["targets: each has bits of its own, so that bits: auto has nothing to choose; remove one of the two"]
                if idle
                else faults
            )
        if family.head is None:
            return ["bits: auto weighs layers by the model's predictions, and this model makes none; give a number"]
        for part, scheme in mixture.schemes.items():
            if part not in ("decoder", "lm_head"):
                faults.append(
                    f"targets: bits: auto is for the decoder and lm_head; give bits to {part} ({{component: {part}, bits: 8}})"
                )
            elif scheme.activations is not None:
                faults.append(f"targets: with activations {part} has to have 8 bits, not auto; give them ({{…, bits: 8}})")
        fault = mixture.fault()
        return faults or ([fault] if fault else [])

    def schemes(self, checkpoint: Checkpoint, family: Family) -> dict[str, Scheme] | None:
        """Return the scheme for each linear that will be quantized, by its name on disk; None where widths are to be chosen."""
        return None if self.mixture(checkpoint, family) else super().schemes(checkpoint, family)

    def possible_schemes(self, checkpoint: Checkpoint, family: Family) -> list[dict[str, Scheme]]:
        """Return how the linears would be held if all had the same width, for each width."""
        mixture = self.mixture(checkpoint, family)
        if mixture is None:
            return super().possible_schemes(checkpoint, family)
        parts = self.parts()
        linears = self.select(checkpoint, family).linears
        return [
            {linear.disk_name: _chosen(parts[linear.part], width) for linear in linears}
            for width in sorted(set(self.widths) - {LEFT})
        ]

    def mixture(self, checkpoint: Checkpoint, family: Family) -> Mixture | None:
        """Return the layers whose width is yet to be chosen; None where there are none."""
        schemes: dict[Target, Scheme] = {part: scheme for part, scheme in self.parts().items() if scheme.bits == _TO_BE_CHOSEN}
        linears = self.select(checkpoint, family).linears
        auto = tuple(linear for linear in linears if linear.part in schemes)
        if not auto or self.budget is None:
            return None
        elsewhere = checkpoint.weight_bytes + self._kv_bytes(checkpoint)
        for linear in linears:
            elsewhere -= checkpoint.tensors[f"{linear.disk_name}.weight"].bytes
            if linear.part not in schemes:
                scale_bytes = SCALE_BYTES.get(linear.dtype, 2)
                elsewhere += packed_bytes((linear.rows, linear.columns), self.parts()[linear.part], scale_bytes)
        return Mixture(auto, sorted(set(self.widths)), schemes, self.budget, elsewhere)

    def predict_bytes(self, checkpoint: Checkpoint, family: Family) -> int:
        """Return the size of all tensors it writes: exact, or what the budget allows."""
        mixture = self.mixture(checkpoint, family)
        return super().predict_bytes(checkpoint, family) if mixture is None else mixture.most


def _chosen(scheme: Scheme, width: int) -> Scheme:
    return replace(scheme, bits=width) if scheme.bits == _TO_BE_CHOSEN else scheme


def schemes_of(targets: tuple[Target | Component, ...], scheme: Scheme) -> dict[Target, Scheme]:
    """Return each target's scheme: its own by what it says, or the stage's."""
    return {_component(target): target.scheme(scheme) if isinstance(target, Component) else scheme for target in targets}


def _component(target: Target | Component) -> Target:
    return target.component if isinstance(target, Component) else target


def _indivisible(linears: list[Linear], group_size: int, selected: tuple[Linear, ...]) -> str:
    """Say of layers of one input width, among all those selected, what would do instead of `group_size`."""
    first, columns = linears[0], linears[0].columns
    divisors = [size for size in range(1, columns + 1) if columns % size == 0]
    below = max((size for size in divisors if size < group_size), default=1)
    above = min((size for size in divisors if size > group_size), default=columns)
    usual = next((size for size in _USUAL_GROUPS if size < group_size and columns % size == 0), None)
    choices = sorted({below, above} | ({usual} if usual else set()))
    others = f" (and {len(linears) - 1} more layers as wide)" if len(linears) > 1 else ""
    alike = {linear.name for linear in linears}
    kept = [linear.name for linear in selected if linear.name not in alike]
    named = {first.name} if len(linears) == 1 else {_pattern(linear, kept) for linear in linears}
    patterns = ", ".join(map(repr, sorted(named)))
    return (
        f"{first.name}{others}: its input width {columns} does not divide by group_size {group_size}; "
        f"use group_size {', '.join(map(str, choices))} or -1, or add {patterns} to ignore"
    )


def _pattern(linear: Linear, others: list[str]) -> str:
    """Return a pattern for `ignore` that matches a layer and those of its name in other blocks, and none of `others`."""
    short = f"*.{linear.name.rpartition('.')[2]}"
    return re.sub(r"\.\d+(?=\.)", ".*", linear.name) if any(fnmatchcase(name, short) for name in others) else short
