"""Analysis before quantization: each linear's sensitivity, the weights of the modalities, and the allocation of bits.

Results are committed in the stage's folder, so that a killed stage does not compute them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save
from torch import Tensor

from compress.calibration.batches import Batch, QuestionBatch, WindowBatch
from compress.checkpoints.checkpoint import read_header
from compress.checkpoints.layouts import pack_linear, read_linear
from compress.engine.hessian import HessianRequest
from compress.engine.replay import BlockVisit
from compress.engine.sensitivity import Forward, OutputErrors, Sensitivity, balance, measure_sensitivity, share
from compress.engine.statistics import InputStatistics, observe
from compress.engine.weights import map_tensor
from compress.errors import CheckpointError
from compress.files import write_bytes
from compress.stages.blockwise.block import unscale
from compress.stages.blockwise.run import BlockContext, StageRun
from compress.stages.quantization.method import alternatives, move_scales
from compress.stages.quantization.widths import UNQUANTIZED_WIDTH, MixedPrecision, Widths

if TYPE_CHECKING:
    from compress.numerics.grids import QuantizedWeight
    from compress.stages.quantization.quantizer import Quantizer

SENSITIVITY_TOKENS = 16384
"""Tokens of the calibration samples that sensitivities are measured on: more are more exact, and the walk in reverse is longer."""

_FOLDER = "preparation"
"""The folder of committed results beside the commits of blocks."""

_SMOOTHING, _OUTPUT = "smoothing", "output"
"""The suffixes of the scales that were moved into a linear's input and output channels."""

_OPTIMISM = "optimism"
"""The suffix of the factor from the loss on the calibration samples to that on others."""


@dataclass(frozen=True)
class SensitivityAnalysis:
    """The results; empty where no setting needs them."""

    sensitivities: Mapping[str, Sensitivity] = field(default_factory=lambda: dict[str, Sensitivity]())
    """By the linears' names in the model."""

    widths: Widths | None = None
    """The chosen widths of `bits: auto`."""


def analyze_sensitivity(stage: Quantizer, run: StageRun, mixed_precision: MixedPrecision | None) -> SensitivityAnalysis:
    """Measure what the stage's `balance` and `bits` need.

    Raises:
        CheckpointError: the weights cannot be used, or the budget cannot be met.
        MissingError: the device has too little memory.
    """
    names = _linears_to_measure(stage, run, mixed_precision)
    if not names:
        return SensitivityAnalysis()
    (run.work / _FOLDER).mkdir(parents=True, exist_ok=True)
    allocation = BitAllocation(stage, run, mixed_precision) if mixed_precision is not None else None
    sensitivities = _sensitivities(run, names, allocation)
    return SensitivityAnalysis(sensitivities, allocation.widths(sensitivities) if allocation is not None else None)


def _linears_to_measure(stage: Quantizer, run: StageRun, mixed_precision: MixedPrecision | None) -> list[str]:
    """Return the linears whose sensitivity is needed: those whose width is chosen, and those that see text and vision tokens."""
    names = [linear.name for linear in mixed_precision.linears] if mixed_precision else []
    if stage.balance == "auto" and run.family.head is not None:
        names += [name for name, linear in run.targeted.items() if linear.component in ("decoder", "lm_head")]
    # without repetition, in a fixed order: a set's order changes from process to process
    return list(dict.fromkeys(names))


def _sensitivities(run: StageRun, names: Sequence[str], allocation: BitAllocation | None) -> dict[str, Sensitivity]:
    path = run.work / _FOLDER / "sensitivities.safetensors"
    tensors = _read_tensors(path)
    if tensors is None or (allocation is not None and not allocation.complete):
        batches = run.batches
        measured = subsample(batches, SENSITIVITY_TOKENS)
        forward = Forward(measured=measured)
        if allocation is None:
            # nothing but the sensitivities reads the forward walk
            batches, forward = [batches[index] for index in measured], Forward()
        else:
            forward = Forward(allocation.visit, measured, allocation.reference_error)
        config = replace(run.walk_config, batches=batches)
        # a forward walk and one in reverse
        blocks = 2 * int(run.checkpoint.text_config["num_hidden_layers"])
        with run.context.progress.task(f"{run.stage}: sensitivity", blocks, "blocks") as advance:
            try:
                found = measure_sensitivity(config, names, run.context.seed, advance, forward)
            except torch.OutOfMemoryError as error:
                raise run.out_of_memory("a decoder block in float32, its gradients and its roundings") from error
        # float32 on disk and read back even in this process: a resumed run computes with the same bytes
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in _to_tensors(found).items()}))
        tensors = _read_tensors(path)
        assert tensors is not None
    return {name: _from_tensors(name, tensors) for name in names}


def subsample(batches: Sequence[Batch], tokens: int) -> list[int]:
    """Return the indices of evenly spaced batches of about so many tokens: the same share of text windows and of image questions.

    At least one batch of each kind is chosen where there is any.
    """
    total = sum(batch.tokens for batch in batches)
    chosen: list[int] = []
    for kind in (WindowBatch, QuestionBatch):
        members = [index for index, batch in enumerate(batches) if isinstance(batch, kind)]
        count = min(len(members), max(1, round(len(members) * tokens / total)))
        # questions are sorted by length: the middles of equal parts represent short and long ones
        chosen += [members[(2 * index + 1) * len(members) // (2 * count)] for index in range(count)]
    return chosen


def _to_tensors(sensitivities: Mapping[str, Sensitivity]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, sensitivity in sensitivities.items():
        tensors[f"{name}.per_token"] = torch.tensor(sensitivity.per_token, dtype=torch.float64)
        if sensitivity.reference is not None:
            tensors[f"{name}.reference"] = torch.tensor(sensitivity.reference, dtype=torch.float64)
        for kind, values in (("text", sensitivity.text), ("vision", sensitivity.vision)):
            if values is not None:
                tensors[f"{name}.{kind}"] = values
    return tensors


def _from_tensors(name: str, tensors: Mapping[str, Tensor]) -> Sensitivity:
    text, vision = cast("list[float]", tensors[f"{name}.per_token"].tolist())
    reference = None
    if f"{name}.reference" in tensors:
        of_text, of_vision = cast("list[float]", tensors[f"{name}.reference"].tolist())
        reference = (of_text, of_vision)
    return Sensitivity(tensors.get(f"{name}.text"), tensors.get(f"{name}.vision"), (text, vision), reference)


def set_modality_weights(
    statistics: Mapping[str, InputStatistics], setting: float | str, sensitivities: Mapping[str, Sensitivity | None]
) -> None:
    """Set the weights of text and vision tokens by a stage's `balance`; linears that share an input share them.

    Linears whose sensitivity is None do not count.
    """
    if setting == "tokens":
        return
    # by identity: linears that share an input share one Hessian, which can have one weighting only
    by_input: dict[int, tuple[InputStatistics, list[Sensitivity]]] = {}
    for name, inputs in statistics.items():
        _, of_readers = by_input.setdefault(id(inputs), (inputs, []))
        sensitivity = sensitivities[name]
        of_readers += [] if sensitivity is None else [sensitivity]
    for inputs, of_readers in by_input.values():
        inputs.weights = balance(inputs, of_readers) if isinstance(setting, str) else share(inputs, setting)


@dataclass(frozen=True)
class BitAllocation:
    """Chooses widths by the predicted loss of each layer at each width, from the method's own rounding of the original weights.

    While the model is walked forward, each block is rounded at every width, with scales moved as for the width that is nearest to
    the budget, the reference. Of each rounding its output errors are kept, and of the reference its codes: what they cost is
    measured token by token in the walk in reverse.
    """

    stage: Quantizer
    run: StageRun
    mixed_precision: MixedPrecision

    @cached_property
    def complete(self) -> bool:
        """Whether the errors of all layers are committed."""
        return all(_read_tensors(self._path(unit)) is not None for unit in self._units)

    @cached_property
    def _units(self) -> dict[str, list[str]]:
        """The linears whose width is chosen by the block, or head, that they are in; both by their names in the model."""
        units: dict[str, list[str]] = {}
        # sorted, because the order of linears is that of rounding in batches
        for name in sorted(linear.name for linear in self.mixed_precision.linears):
            units.setdefault(self._unit(name), []).append(name)
        return units

    def visit(self, visit: BlockVisit) -> None:
        """Round a block's linears at every width, and commit their errors at its outputs."""
        names = self._units.get(visit.name, [])
        if names and _read_tensors(self._path(visit.name)) is None:
            try:
                errors = self._errors(self.run.open(visit, names))
            except CheckpointError as error:
                raise CheckpointError(f"{visit.name}: {error}") from error
            write_bytes(self._path(visit.name), save(errors))

    def _errors(self, context: BlockContext) -> dict[str, Tensor]:
        """Return the errors, and the reference's codes and scales."""
        method, widths = self.stage.method(), self.mixed_precision.quantized_widths
        reference = self.mixed_precision.reference_width
        schemes = [
            {local: self.mixed_precision.scheme(self.run.targeted[name], width) for name, local in context.local.items()}
            for width in widths
        ]
        request = HessianRequest(full=False, sketch=True)
        of_method = method.hessian_request([scheme for of_width in schemes for scheme in of_width.values()])
        statistics = observe(context.visit, context.local.values(), request if of_method is None else request | of_method)
        # sensitivities are not known yet: with `balance: auto` every token counts the same here
        set_modality_weights(statistics, self.stage.balance, dict.fromkeys(context.local.values()))
        block = context.weights()
        move_scales(block, context.scale_pairs, statistics, schemes[widths.index(reference)], method)
        names = {local: name for name, local in context.local.items()}
        tensors: dict[str, Tensor] = {}
        for rounded_by_width in alternatives(block, statistics, schemes, method):
            for width, rounded in zip(widths, rounded_by_width, strict=True):
                for local, quantized in rounded.items():
                    name, inputs = names[local], statistics[local]
                    scales = (block.smoothing_scales.get(local), block.output_scales.get(local))
                    errors = OutputErrors.of(_error(quantized, block.weights[local], *scales), inputs)
                    for kind, values in (("text", errors.text), ("vision", errors.vision)):
                        if values is not None:
                            tensors[f"{name}.{width}.{kind}"] = values
                    if width == reference:
                        tensors |= pack_linear(name, quantized)
        for local, name in names.items():
            optimism = method.rounder.optimism(block.weights[local].shape[1], statistics[local].tokens)
            tensors[f"{name}.{_OPTIMISM}"] = torch.tensor(optimism, dtype=torch.float64)
        for kind, scales in ((_SMOOTHING, block.smoothing_scales), (_OUTPUT, block.output_scales)):
            tensors |= {f"{names[local]}.{kind}": scale for local, scale in scales.items() if local in names}
        # copies: tensors that share memory cannot be saved
        return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}

    def reference_error(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the reference error ΔW of a linear, float32 [out, in], from its name in the model and its original weight.

        None for a linear with a width of its own, whose sensitivity is measured for `balance: auto`.
        """
        if name not in self._units.get(self._unit(name), ()):
            return None
        tensors = self._committed(self._unit(name))
        scales = (tensors.get(f"{name}.{kind}") for kind in (_SMOOTHING, _OUTPUT))
        scheme = self.mixed_precision.scheme(self.run.targeted[name], self.mixed_precision.reference_width)
        quantized = read_linear(name, scheme, lambda tensor: tensors[tensor].to(weight.device))
        return _error(quantized, weight, *(None if scale is None else scale.to(weight.device) for scale in scales))

    def widths(self, sensitivities: Mapping[str, Sensitivity]) -> Widths:
        """Return the widths of the smallest predicted loss."""
        losses: dict[str, dict[int, float]] = {}
        for unit, names in self._units.items():
            tensors = self._committed(unit)
            for name in names:
                errors = {
                    width: OutputErrors(*(tensors.get(f"{name}.{width}.{kind}") for kind in ("text", "vision")))
                    for width in self.mixed_precision.quantized_widths
                }
                reference = errors[self.mixed_precision.reference_width]
                optimism = float(tensors[f"{name}.{_OPTIMISM}"])
                of_linear = {
                    width: optimism * sensitivities[name].predicted_loss(error, reference) for width, error in errors.items()
                }
                if UNQUANTIZED_WIDTH in self.mixed_precision.widths:
                    of_linear[UNQUANTIZED_WIDTH] = 0.0
                losses[self.run.targeted[name].disk_name] = of_linear
        return self.mixed_precision.choose(losses)

    def _unit(self, name: str) -> str:
        blocks = f"{self.run.family.blocks}."
        # what is outside of the blocks, the head, is visited alone
        return blocks + name.removeprefix(blocks).partition(".")[0] if name.startswith(blocks) else name

    def _committed(self, unit: str) -> dict[str, Tensor]:
        tensors = _read_tensors(self._path(unit))
        assert tensors is not None  # read once every unit has been visited
        return tensors

    def _path(self, unit: str) -> Path:
        return self.run.work / _FOLDER / f"{unit}.safetensors"


def _error(quantized: QuantizedWeight, weight: Tensor, smoothing: Tensor | None, output: Tensor | None) -> Tensor:
    """Return by how much a quantized weight, its scales taken back, differs from the original one: float32 [out, in]."""
    # rounded to the stored type, as a runtime's weight is
    rounded = quantized.dequantize(quantized.scales.dtype).to(torch.float32)
    return unscale(rounded, smoothing, output).sub_(weight)


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return committed tensors; None where they are missing or damaged."""
    with suppress(CheckpointError):
        return {name: map_tensor(entry) for name, entry in read_header(path).items()}
    return None
