"""Quantization as a blockwise method: what it asks for, what a block becomes, and the scales of cached keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import TensorSpec, open_checkpoint
from compress.checkpoints.layouts import kv_cache_tensors, linear_tensors, pack_linear, read_linear
from compress.checkpoints.spec import CheckpointSpec, quantized_spec, spec_of
from compress.engine.attention import observe_cache_ranges
from compress.engine.hessian import HessianRequest
from compress.engine.planned_shards import PlannedShards
from compress.engine.replay import BlockVisit
from compress.engine.statistics import InputStatistics
from compress.engine.weights import WeightReader, quantize_inputs, set_tensor
from compress.errors import CheckpointError, DataError
from compress.families import Family, within
from compress.files import disk_errors
from compress.numerics.floats import FLOAT8_MAX
from compress.stages.blockwise.block import BlockWeights
from compress.stages.blockwise.harness import Blockwise, deterministic, returning_memory
from compress.stages.blockwise.run import BlockContext, StageRun
from compress.stages.quantization.method import Method, solve
from compress.stages.quantization.sensitivity_analysis import SensitivityAnalysis, analyze_sensitivity, set_modality_weights
from compress.stages.quantization.widths import UNQUANTIZED_WIDTH, WIDTHS
from compress.stages.stage import StageContext

if TYPE_CHECKING:
    from compress.numerics.grids import QuantizedWeight
    from compress.numerics.scheme import Scheme
    from compress.stages.quantization.quantizer import Quantizer


def quantize_linears(stage: Quantizer, context: StageContext, sparse: frozenset[str] = frozenset()) -> None:
    """Quantize a checkpoint; see `Quantizer.apply`. `sparse` are the linears, by names in the model, whose zeros have to stay."""
    checkpoint = open_checkpoint(context.source)
    if stage.calibrated and context.calibration is None:
        raise DataError(f"{stage.stage}: needs calibration samples; add calibration.sets to the recipe")
    before = spec_of(checkpoint, context.family)
    # again: the plan may have been made before an earlier stage wrote this checkpoint
    if faults := stage.plan(before).faults:
        raise CheckpointError("\n".join(faults))
    selection = stage.select(before)
    with disk_errors(context.target), returning_memory(context.device), deterministic(), torch.no_grad():
        run = StageRun(stage.stage, context, checkpoint, {linear.name: linear for linear in selection.linears}, sparse)
        run.work.mkdir(parents=True, exist_ok=True)
        # before the files are laid out: the chosen widths decide their sizes
        analysis = analyze_sensitivity(stage, run, stage.mixed_precision(before, selection))
        schemes = _schemes(stage, run, analysis)
        linears = {name: run.targeted[name].disk_name for name in schemes}
        after = quantized_spec(before, {linears[name]: scheme for name, scheme in schemes.items()}, stage.kv_cache is not None)
        shards = PlannedShards.lay_out(run.work, _in_order(before, after))
        shards.create(context.target)
        method = BlockQuantization(stage, stage.method(), schemes, analysis, run.family, run.reader)
        blockwise = Blockwise(run, method, linears, shards)
        if stage.calibrated:
            blockwise.walk()
        else:
            blockwise.work_on_each()
        blockwise.write(after.config, {WIDTHS: analysis.widths.model_dump(mode="json")} if analysis.widths else {})


def _schemes(stage: Quantizer, run: StageRun, analysis: SensitivityAnalysis) -> dict[str, Scheme]:
    """Return the scheme of each linear that is quantized, by its name in the model."""
    by_component = stage.component_schemes()
    widths = analysis.widths.by_layer if analysis.widths else {}
    schemes = {
        name: replace(by_component[linear.component], bits=widths.get(linear.disk_name, by_component[linear.component].bits))
        for name, linear in run.targeted.items()
    }
    # a layer at 16 bits is copied byte for byte, and stays in `ignore`
    return {name: scheme for name, scheme in schemes.items() if scheme.bits != UNQUANTIZED_WIDTH}


def _in_order(before: CheckpointSpec, after: CheckpointSpec) -> dict[str, TensorSpec]:
    """Return the tensors of a quantized checkpoint in the order of the source's, a linear's where its weight was, then new ones."""
    order: dict[str, None] = {}
    for name in before.tensors:
        linear = name.removesuffix(".weight")
        # where its weight was, so that a block's tensors stay in few files: a commit syncs each of them
        order |= dict.fromkeys(linear_tensors(linear) if linear in after.quantized else (name,))
    return {name: after.tensors[name] for name in (*order, *sorted(after.tensors)) if name in after.tensors}


@dataclass(frozen=True)
class BlockQuantization:
    """Quantizes the linears of a block."""

    stage: Quantizer
    method: Method

    schemes: Mapping[str, Scheme]
    """The scheme of each linear that is quantized, by its name in the model."""

    analysis: SensitivityAnalysis
    family: Family
    reader: WeightReader

    def request(self, names: Sequence[str]) -> HessianRequest | None:
        """Return what the method reads, or static scales of activations need; None for neither."""
        return self.method.hessian_request([self.schemes[name] for name in names])

    def solve(
        self, context: BlockContext, block: BlockWeights, statistics: Mapping[str, InputStatistics]
    ) -> dict[str, QuantizedWeight]:
        """Return the linears' quantized weights."""
        schemes = {local: self.schemes[name] for name, local in context.local.items()}
        sensitivities = {local: self.analysis.sensitivities.get(name) for name, local in context.local.items()}
        # before the merge, which needs the weights and ends the separation of text and vision
        set_modality_weights(statistics, self.stage.balance, sensitivities)
        for inputs in statistics.values():
            # halves the memory of Hessians; of an input that linears share, the second call finds nothing left to merge
            inputs.merge()
            inputs.may_overwrite = True
        quantized = solve(block, context.scale_pairs, statistics, schemes, self.method)
        return {name: quantized[local] for name, local in context.local.items()}

    def pack(self, name: str, result: QuantizedWeight) -> dict[str, Tensor]:
        """Return a linear's tensors in compressed-tensors' layout."""
        return pack_linear(name, result)

    def unpack(self, name: str, read: Callable[[str], Tensor]) -> QuantizedWeight:
        """Return a linear's quantized weight from its tensors."""
        return read_linear(name, self.schemes[self.family.module_name(f"{name}.weight").removesuffix(".weight")], read)

    def load(self, module: nn.Module, result: QuantizedWeight) -> None:
        """Give a running linear the rounded weight, and make it quantize its input activations."""
        device = cast("Tensor", module.weight).device
        # rounded to the scales' type, in which runtimes dequantize: later blocks see their values bit for bit
        set_tensor(module, "weight", result.dequantize(result.scales.dtype).to(device))
        if result.scheme.activations is not None:
            quantize_inputs(module, result.scheme, None if result.input_scale is None else result.input_scale.to(device))

    def observes(self, unit: str) -> bool:
        """Return whether a unit is a block whose keys and values a runtime caches as 8-bit floats."""
        # only the decoder's blocks: a vision tower runs once per image and caches nothing
        return self.stage.kv_cache is not None and within(unit, self.family.blocks)

    def observe(self, visit: BlockVisit) -> dict[str, Tensor]:
        """Return the scales of a decoder block's keys and values, computed by the quantized block."""
        with observe_cache_ranges(visit.module) as ranges:
            for call in visit.calls:
                visit.run(call)
        if not visit.calls:
            raise CheckpointError(
                f"{visit.name}: no calibration sample reaches it, so its keys and values have no scales; add samples that do"
            )
        if not ranges:
            raise CheckpointError(f"{visit.name}: what its attention caches cannot be seen; set kv_cache to null")
        tensors: dict[str, Tensor] = {}
        for name, cache_range in ranges.items():
            # the scales have no counterpart in the source: the disk name of any parameter beside them gives their prefix
            leaf = next(leaf for leaf, _ in visit.module.get_submodule(name).named_parameters())
            attention = self.reader.disk_names[f"{visit.name}.{name}.{leaf}"].removesuffix(f".{leaf}")
            # the full range is mapped to e4m3's largest number: beyond it a cached value would saturate
            tensors |= kv_cache_tensors(attention, cache_range.keys / FLOAT8_MAX, cache_range.values / FLOAT8_MAX)
        return tensors
