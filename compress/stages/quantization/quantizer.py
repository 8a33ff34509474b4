"""Base classes of the methods that quantize linears: targets, schemes, incompatibilities and predicted size."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from compress.checkpoints.spec import CheckpointSpec, caching_attentions, quantized_spec
from compress.families import Family
from compress.numerics.scheme import Scheme
from compress.recipe.schema import Frozen
from compress.stages.linears import Linear, LinearSelection, Target, select
from compress.stages.quantization.widths import FLOATS, UNQUANTIZED_WIDTH, Budget, MixedPrecision, Width
from compress.stages.stage import Stage, StageContext, StagePlan

if TYPE_CHECKING:
    from compress.stages.quantization.method import Method

_FEW_BITS = 4
"""From so many bits down the lack of zero points costs much; at 8 it does not show."""

_COMMON_GROUP_SIZES = (256, 128, 64, 32, 16, 8)
"""Group sizes that a message suggests before unusual ones."""


def _group_size(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("Input should be a positive number of input channels, or -1 for one scale per output channel")
    return value


GroupSize = Annotated[int, AfterValidator(_group_size)]
"""Input channels that share a scale; -1 for one scale per output channel."""

Bits = Literal[2, 3, 4, 8]
"""Widths of integer weights."""

Balance = Literal["tokens", "auto"] | Annotated[float, Field(ge=0, le=1)]
"""How text and vision tokens are weighted in statistics: as they come, by text's share, or by the model's sensitivity."""

Shrinkage = Literal["auto"] | Annotated[float, Field(ge=0, lt=1)]
"""The shrinkage of a Hessian: a share, or one that follows from the number of calibration tokens."""

_ALL_WIDTHS: tuple[Width, ...] = (2, 3, 4, 8, 16)
_TO_BE_CHOSEN = 0
"""The `bits` of a scheme whose width is chosen in the run (`bits: auto`)."""


class Component(Frozen):
    """A targeted component with settings that override those of the stage."""

    component: Target

    @abstractmethod
    def scheme(self, default: Scheme) -> Scheme:
        """Return the component's scheme, given the stage's."""


class IntegerComponent(Component):
    """A component with integers of its own; `activations` quantizes its linears' input activations as well."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    activations: Literal["token", "tensor"] | None = None

    def scheme(self, default: Scheme) -> Scheme:
        """Return the stage's scheme with the component's overrides; symmetric by default where activations are quantized."""
        # kernels for integers on both sides multiply by the scales after the sum, and know no zero points of weights
        default = replace(default, symmetric=True) if self.activations else default
        return replace(default, **self.model_dump(exclude={"component"}, exclude_none=True))


def distinct(targets: tuple[Target | Component, ...]) -> tuple[Target | Component, ...]:
    """Return the targets unchanged.

    Raises:
        ValueError: a component is named twice.
    """
    names = [_component_of(target) for target in targets]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{repeated} is named twice; remove one of the two")
    return targets


class Quantizer(Stage):
    """A method that quantizes linears; its fields are the settings that all such methods share."""

    # the tokenizer and the image libraries as well: they decide what the calibration samples are
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")

    ignore: tuple[str, ...] = ()
    """Shell patterns of the names of layers that are not quantized."""

    balance: Balance = "tokens"
    """The weights of text and vision tokens in the statistics of a layer that sees both.

    `tokens`: each token counts once. A number from 0 to 1: text's share of the Hessian. `auto`: for each layer by the sensitivity
    of the model's predictions to its outputs for either modality (as in MBQ, arXiv 2412.19509).
    """

    kv_cache: Literal["fp8"] | None = None
    """Whether to add the scales with which a runtime caches keys and values as 8-bit floats."""

    @abstractmethod
    def component_schemes(self) -> Mapping[Target, Scheme]:
        """Return the scheme of each targeted component's linears."""

    @abstractmethod
    def method(self) -> Method:
        """Return how a block is quantized; imports torch."""

    @abstractmethod
    def uses_statistics(self) -> bool:
        """Return whether the parts of `method()` request statistics of input activations, for plans, which cannot import torch.

        What a run observes is what the parts request; static activation scales need their own statistics.
        """

    @property
    def calibrated(self) -> bool:
        """Whether the stage reads calibration samples."""
        return (
            self.uses_statistics()
            or self.kv_cache is not None
            or any(scheme.activations == "tensor" for scheme in self.component_schemes().values())
        )

    def _reads_images(self, family: Family) -> bool:
        """Return whether it observes linears that only images reach: in the vision tower, the projector or cross-attention."""
        schemes = self.component_schemes()
        observed = [component for component, scheme in schemes.items() if self.uses_statistics() or scheme.activations == "tensor"]
        decoder = "decoder" in observed or self.kv_cache is not None
        return any(component in ("vision", "projector") for component in observed) or (
            decoder and bool(family.cross_attention_linears)
        )

    def select(self, before: CheckpointSpec) -> LinearSelection:
        """Return the linears to be quantized."""
        return select(before, tuple(self.component_schemes()), self.ignore)

    def plan(self, before: CheckpointSpec) -> StagePlan:
        """Return the checkpoint with its targeted linears quantized, and the incompatibilities.

        These are: linears that are quantized already, input widths that the group size does not divide, unmatched patterns.
        """
        if before.unreadable:
            return StagePlan((f"{before.source}: its weights are quantized already; start from the model's original",))
        selection = self.select(before)
        if faults := self._faults(before, selection):
            return StagePlan(tuple(faults))
        after = tuple(quantized_spec(before, schemes, self.kv_cache is not None) for schemes in self._schemes(selection))
        mixed_precision = self.mixed_precision(before, selection)
        return StagePlan(
            after=after,
            exact=mixed_precision is None,
            max_bytes=after[0].weight_bytes if mixed_precision is None else mixed_precision.max_bytes,
            reads_images=self._reads_images(before.family),
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        """Return what a user should know of the settings."""
        return ()

    def _faults(self, before: CheckpointSpec, selection: LinearSelection) -> list[str]:
        schemes = self.component_schemes()
        faults = list(selection.faults)
        indivisible: dict[tuple[int, int], list[Linear]] = {}
        # first and alone: of a layer without a plain weight no other check makes sense
        if quantized := [linear.name for linear in selection.linears if linear.disk_name in before.quantized]:
            others = f" (and {len(quantized) - 1} more)" if len(quantized) > 1 else ""
            remedy = "start from the model's original, target other components, or remove one of the two stages"
            return [*faults, f"{quantized[0]}{others}: quantized already; {remedy}"]
        for linear in selection.linears:
            scheme = schemes[linear.component]
            if linear.dtype not in FLOATS:
                faults.append(f"{linear.name}: its weights are {linear.dtype}; convert the checkpoint to BF16, F16 or F32 first")
            # FP8 blocks may be partial at the edges; integer layouts store whole groups only
            elif scheme.type == "int" and scheme.group_size != -1 and linear.columns % scheme.group_size:
                # one message per width and group size: a model has hundreds of such layers
                indivisible.setdefault((linear.columns, scheme.group_size), []).append(linear)
        # an embedding model runs each text once and caches nothing
        if self.kv_cache and before.family.head is None:
            faults.append("kv_cache: this model generates nothing and keeps no keys and values; remove the key")
        elif self.kv_cache and not caching_attentions(before):
            faults.append("kv_cache: this model's attentions are none whose keys and values are known; remove the key")
        if self.kv_cache and before.has_kv_scales:
            faults.append(
                "kv_cache: the checkpoint has scales of keys and values already; remove the key from one of the two stages"
            )
        if self.balance != "tokens" and not self.uses_statistics():
            faults.append(f"balance: {self.stage} reads no statistics of what layers are given; remove it")
        return faults + [_indivisible(linears, size, selection.linears) for (_, size), linears in indivisible.items()]

    def mixed_precision(self, before: CheckpointSpec, selection: LinearSelection) -> MixedPrecision | None:
        """Return the layers whose width the run chooses; None where there are none."""
        del before, selection
        return None

    def _schemes(self, selection: LinearSelection) -> list[dict[str, Scheme]]:
        """Return the scheme of each linear that will be quantized, by its name on disk; several where the run chooses widths."""
        schemes = self.component_schemes()
        return [{linear.disk_name: schemes[linear.component] for linear in selection.linears}]

    def apply(self, context: StageContext) -> None:
        """Quantize block by block; after a kill, a call with the same target folder resumes at the first unfinished block.

        Raises:
            CheckpointError: the weights cannot be used, NaN or infinite ones included.
            MissingError: the device has too little memory.
            StoreError: the disk is full.
        """
        from compress.stages.quantization.quantize import quantize_linears

        quantize_linears(self, context)


class IntegerQuantizer(Quantizer):
    """A method that quantizes weights to integers, and activations only where a target says so."""

    bits: Literal[2, 3, 4, 8, "auto"]
    """The width; `auto` chooses one of `widths` per layer of the decoder (and head): the least predicted loss within `budget`."""

    group_size: GroupSize

    symmetric: bool

    budget: Budget | None = None
    """The size that the layers may take with `bits: auto`."""

    widths: Annotated[tuple[Width, ...], Field(min_length=1)] = _ALL_WIDTHS
    """The candidate widths of `bits: auto`; 16 leaves a layer unquantized."""

    targets: Annotated[tuple[Target | IntegerComponent, ...], Field(min_length=1), AfterValidator(distinct)] = ("decoder",)

    @model_validator(mode="after")
    def _budgeted(self) -> Self:
        if self.bits == "auto" and self.budget is None:
            raise ValueError("bits: auto needs a budget, such as {bits_per_weight: 4.25}")
        if self.bits != "auto" and (self.budget is not None or self.widths != _ALL_WIDTHS):
            raise ValueError(f"budget and widths go with bits: auto, not {self.bits}; remove them")
        if set(self.widths) == {UNQUANTIZED_WIDTH}:
            raise ValueError("widths: 16 alone leaves every layer as it is; add smaller ones")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the stage reads calibration samples."""
        return super().calibrated or self.bits == "auto"

    def versions(self) -> dict[str, str]:
        """Return the versions of the distributions that shape the result, with the solver's where the run chooses widths."""
        # its solver decides between allocations of equal loss, so another version may choose other widths
        solver = {"scipy": version("scipy")} if self.bits == "auto" else {}
        return super().versions() | solver

    def component_schemes(self) -> Mapping[Target, Scheme]:
        """Return the scheme of each targeted component's linears, with 0 bits where the run chooses the width."""
        bits = _TO_BE_CHOSEN if self.bits == "auto" else self.bits
        return schemes_of(self.targets, Scheme(bits=bits, group_size=self.group_size, symmetric=self.symmetric))

    def _faults(self, before: CheckpointSpec, selection: LinearSelection) -> list[str]:
        """Return the incompatibilities, a budget that is too small included."""
        # the budget is only checked for a selection that can be quantized: costs are those of whole groups
        faults = super()._faults(before, selection)
        if faults or self.bits != "auto":
            return faults
        mixed_precision = self.mixed_precision(before, selection)
        if mixed_precision is None:
            return ["targets: each has bits of its own, so that bits: auto has nothing to choose; remove one of the two"]
        if before.family.head is None:
            return ["bits: auto weighs layers by the model's predictions, and this model makes none; give a number"]
        for component, scheme in mixed_precision.schemes.items():
            if component not in ("decoder", "lm_head"):
                faults.append(
                    f"targets: bits: auto is for the decoder and lm_head; give bits to {component} "
                    f"({{component: {component}, bits: 8}})"
                )
            elif scheme.activations is not None:
                faults.append(f"targets: with activations {component} has to have 8 bits, not auto; give them ({{…, bits: 8}})")
        fault = mixed_precision.fault()
        return faults or ([fault] if fault else [])

    def _notes(self) -> tuple[str, ...]:
        """Return what symmetric grids cost where they have few codes."""
        if not any(scheme.symmetric and scheme.bits <= _FEW_BITS for scheme in self.component_schemes().values()):
            return ()
        return (
            f"{self.stage}: symmetric grids of 4 bits or fewer; with zero points (symmetric: false) the KL from the original was "
            "about half as large on the models measured, for 0.03 bits per weight at groups of 128. Layout gptq has no zero "
            "points; compressed-tensors, awq and onnx do",
        )

    def _schemes(self, selection: LinearSelection) -> list[dict[str, Scheme]]:
        """Return the schemes of the linears; with `bits: auto` those that they would have if all had the same width, per width."""
        (schemes,) = super()._schemes(selection)
        if not any(scheme.bits == _TO_BE_CHOSEN for scheme in schemes.values()):
            return [schemes]
        # examples for the exports' checks: a format that takes every width alone takes any mixture of them
        widths = sorted(set(self.widths) - {UNQUANTIZED_WIDTH})
        return [{name: _with_width(scheme, width) for name, scheme in schemes.items()} for width in widths]

    def mixed_precision(self, before: CheckpointSpec, selection: LinearSelection) -> MixedPrecision | None:
        """Return the layers whose width the run chooses; None where there are none."""
        all_schemes = self.component_schemes()
        schemes: dict[Target, Scheme] = {name: scheme for name, scheme in all_schemes.items() if scheme.bits == _TO_BE_CHOSEN}
        auto = tuple(linear for linear in selection.linears if linear.component in schemes)
        if not auto or self.budget is None:
            return None
        fixed = {linear.disk_name: all_schemes[linear.component] for linear in selection.linears if linear.component not in schemes}
        rest = quantized_spec(before, fixed, self.kv_cache is not None)
        # `rest` still has the plain weights of the layers whose width is open
        other_bytes = rest.weight_bytes - sum(before.tensors[f"{linear.disk_name}.weight"].bytes for linear in auto)
        return MixedPrecision(auto, sorted(set(self.widths)), schemes, self.budget, other_bytes)


def _with_width(scheme: Scheme, width: int) -> Scheme:
    return replace(scheme, bits=width) if scheme.bits == _TO_BE_CHOSEN else scheme


def schemes_of(targets: tuple[Target | Component, ...], scheme: Scheme) -> dict[Target, Scheme]:
    """Return each targeted component's scheme: the stage's, or with the component's overrides."""
    return {_component_of(target): target.scheme(scheme) if isinstance(target, Component) else scheme for target in targets}


def _component_of(target: Target | Component) -> Target:
    return target.component if isinstance(target, Component) else target


def _indivisible(linears: list[Linear], group_size: int, selected: tuple[Linear, ...]) -> str:
    """Return the fault of layers with one input width, with group sizes that divide it and patterns that ignore the layers."""
    first, columns = linears[0], linears[0].columns
    divisors = [size for size in range(1, columns + 1) if columns % size == 0]
    below = max((size for size in divisors if size < group_size), default=1)
    above = min((size for size in divisors if size > group_size), default=columns)
    # kernels exist for few sizes: a common one is suggested beside the nearest divisors
    common = next((size for size in _COMMON_GROUP_SIZES if size < group_size and columns % size == 0), None)
    choices = sorted({below, above} | ({common} if common else set()))
    others = f" (and {len(linears) - 1} more layers as wide)" if len(linears) > 1 else ""
    indivisible = {linear.name for linear in linears}
    others_selected = [linear.name for linear in selected if linear.name not in indivisible]
    to_ignore = {first.name} if len(linears) == 1 else {_pattern(linear, others_selected) for linear in linears}
    patterns = ", ".join(map(repr, sorted(to_ignore)))
    return (
        f"{first.name}{others}: its input width {columns} does not divide by group_size {group_size}; "
        f"use group_size {', '.join(map(str, choices))} or -1, or add {patterns} to ignore"
    )


def _pattern(linear: Linear, others: list[str]) -> str:
    """Return a pattern for `ignore` that matches a layer and its counterparts in other blocks, and none of `others`."""
    short = f"*.{linear.name.rpartition('.')[2]}"
    return re.sub(r"\.\d+(?=\.)", ".*", linear.name) if any(fnmatchcase(name, short) for name in others) else short
