"""Blockwise quantization of a checkpoint: walk the blocks, commit each one when it is done, then write the checkpoint."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.checkpoint import TensorEntry, open_checkpoint, read_header
from compress.checkpoints.layouts import (
    kv_cache_tensors,
    linear_tensors,
    pack_linear,
    read_linear,
)
from compress.checkpoints.spec import quantized_spec, spec_of
from compress.engine.attention import observe_cache_ranges
from compress.engine.replay import BlockVisit, Replay
from compress.engine.statistics import observe
from compress.engine.weights import ShardWriter, WeightReader, map_tensor, set_tensor
from compress.errors import CheckpointError, DataError
from compress.families import Family, ScalePair, within
from compress.files import telling_where, write_json
from compress.numerics.activations import fake_quantize_activations
from compress.stages.blockwise.block import BlockWeights
from compress.stages.linears import Linear
from compress.stages.quantization.method import solve
from compress.stages.quantization.sensitivity_analysis import SensitivityAnalysis, analyze_sensitivity, set_modality_weights
from compress.stages.quantization.stage_run import StageRun, read_commit, relative, write_commit
from compress.stages.quantization.widths import UNQUANTIZED_WIDTH, WIDTHS
from compress.stages.stage import StageContext

if TYPE_CHECKING:
    from compress.numerics.grids import QuantizedWeight
    from compress.numerics.scheme import Scheme
    from compress.stages.quantization.quantizer import Quantizer

_CACHE_SCALES = (".k_scale", ".v_scale")
_FLOAT8_MAX = 448.0
"""The largest float8 e4m3fn number, which the largest key and value are mapped to."""


def apply(stage: Quantizer, context: StageContext) -> None:
    """Quantize a checkpoint; see `Quantizer.apply`."""
    checkpoint = open_checkpoint(context.source)
    if stage.calibrated and context.calibration is None:
        raise DataError(f"{stage.stage}: needs calibration samples; add calibration.sets to the recipe")
    before = spec_of(checkpoint, context.family)
    if faults := stage.plan(before).faults:
        raise CheckpointError("\n".join(faults))
    with telling_where(context.target), returning_memory(context.device), deterministic(), torch.no_grad():
        run = StageRun(stage, context, checkpoint, before)
        run.commits.mkdir(parents=True, exist_ok=True)
        quantization = BlockwiseQuantization(run, analyze_sensitivity(run))
        if stage.calibrated:
            quantization.walk()
        else:
            quantization.round_each()
        quantization.write()
        shutil.rmtree(run.commits)


@contextmanager
def returning_memory(device: str) -> Generator[None]:
    """Release at the end the device memory that torch caches, so that other processes can use it."""
    try:
        yield
    finally:
        if torch.device(device).type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def deterministic() -> Generator[None]:
    """Use deterministic algorithms where torch has them.

    Torch then also fills new memory with NaN to expose reads of it, which takes half as long as the work itself: switched off.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings = cast("Any", torch.utils).deterministic
    fill_before = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill_before


@dataclass(frozen=True)
class BlockwiseQuantization:
    """One run of a quantizer. Each finished block is committed as one file, named after the block."""

    run: StageRun
    analysis: SensitivityAnalysis

    @property
    def stage(self) -> Quantizer:
        """The stage's settings."""
        return self.run.stage

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.run.family

    @property
    def reader(self) -> WeightReader:
        """The reader of the checkpoint's weights."""
        return self.run.reader

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of each linear that is quantized, by its name in the model."""
        by_component = self.stage.component_schemes()
        widths = self.analysis.widths.by_layer if self.analysis.widths else {}
        schemes = {
            name: replace(by_component[linear.component], bits=widths.get(linear.disk_name, by_component[linear.component].bits))
            for name, linear in self.run.targeted.items()
        }
        return {name: scheme for name, scheme in schemes.items() if scheme.bits != UNQUANTIZED_WIDTH}

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """The linears to be quantized, by their names in the model."""
        return {name: self.run.targeted[name] for name in self.schemes}

    def walk(self) -> None:
        """Quantize every block that has targeted linears, in the order in which the model runs."""
        replay = Replay(self.run.walk_config)
        walks = self._walks(replay)
        with self.run.context.progress.task(self.stage.stage, sum(map(len, walks)), "blocks") as advance:
            try:
                for visit in chain.from_iterable(map(replay.walk, walks)):
                    self._visit(visit)
                    advance(1)
            except torch.OutOfMemoryError as error:
                raise self.run.out_of_memory(replay.current) from error

    def round_each(self) -> None:
        """Quantize every targeted linear on its own, without calibration samples."""
        method = self.stage.method()
        with self.run.context.progress.task(self.stage.stage, len(self.linears), "layers") as advance:
            for name, linear in self.linears.items():
                path = self.run.commits / f"{name}.safetensors"
                if read_commit(path) is None:
                    module = nn.Module()
                    weight = self.reader.disk_tensor(f"{linear.disk_name}.weight", self.run.context.device)
                    module.linear = nn.Linear(1, 1, bias=False, device="meta")
                    module.linear.weight = nn.Parameter(weight, requires_grad=False)
                    block = BlockWeights.of(module, ["linear"], self.run.heads)
                    quantized = solve(block, (), {}, {"linear": self.schemes[name]}, method)["linear"]
                    write_commit(path, pack_linear(linear.disk_name, quantized))
                advance(1)

    def _walks(self, replay: Replay) -> list[list[str]]:
        vision, decoder = replay.vision_units(), replay.decoder_units()
        if self.family.head is not None and self.family.head in self.linears:
            decoder.append(self.family.head)
        targeted = [units for units in (vision, decoder) if any(within(name, unit) for unit in units for name in self.linears)]
        return [*targeted, decoder] if self.stage.kv_cache and decoder not in targeted else targeted

    def _visit(self, visit: BlockVisit) -> None:
        names = [name for name in self.linears if within(name, visit.name)]
        has_kv_cache = self.stage.kv_cache is not None and within(visit.name, self.family.blocks)
        if not names and not has_kv_cache:
            return
        path = self.run.commits / f"{visit.name}.safetensors"
        tensors = read_commit(path)
        if tensors is None:
            tensors = self._solve(visit, names) if names else {}
            self._load_quantized(visit, names, tensors)
            if has_kv_cache:
                tensors |= self._cache_scales(visit)
            write_commit(path, tensors)
        else:
            self._load_quantized(visit, names, tensors)

    def _solve(self, visit: BlockVisit, names: list[str]) -> dict[str, Tensor]:
        """Return the tensors to store for a block, by names on disk."""
        context = self.run.open(visit, names)
        observed = self.stage.uses_statistics() or any(self.schemes[name].activations == "tensor" for name in names)
        schemes = {local: self.schemes[name] for name, local in context.local.items()}
        method = self.stage.method()
        statistics = observe(context.visit, schemes, method.hessian_request(schemes.values())) if observed else {}
        set_modality_weights(
            statistics, self.stage.balance, {local: self.analysis.sensitivities.get(name) for name, local in context.local.items()}
        )
        block = context.weights()
        for inputs in statistics.values():
            inputs.merge()
            inputs.disposable = True
        try:
            quantized = solve(block, self._scale_pairs(visit.name), statistics, schemes, method)
        except CheckpointError as error:
            raise CheckpointError(f"{visit.name}: {error}") from error
        tensors: dict[str, Tensor] = {}
        for name, local in context.local.items():
            tensors |= pack_linear(self.linears[name].disk_name, quantized[local])
        for local, value in block.changed.items():
            tensors[self.reader.disk_names[f"{visit.name}.{local}"]] = value
        return tensors

    def _cache_scales(self, visit: BlockVisit) -> dict[str, Tensor]:
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
            leaf = next(leaf for leaf, _ in visit.module.get_submodule(name).named_parameters())
            attention = self.reader.disk_names[f"{visit.name}.{name}.{leaf}"].removesuffix(f".{leaf}")
            tensors |= kv_cache_tensors(attention, cache_range.keys / _FLOAT8_MAX, cache_range.values / _FLOAT8_MAX)
        return tensors

    def _load_quantized(self, visit: BlockVisit, names: list[str], tensors: Mapping[str, Tensor]) -> None:
        """Load the stored tensors into the running module, so that later blocks see its outputs as a runtime will compute them."""
        for name in names:
            linear = self.linears[name]
            stored = read_linear(linear.disk_name, self.schemes[name], lambda key: tensors[key])
            weight = stored.dequantize(stored.scales.dtype).to(visit.device)
            local = relative(name, visit.name)
            set_tensor(visit.module, f"{local}.weight".lstrip("."), weight)
            if stored.scheme.activations is not None:
                _quantize_inputs(visit.module.get_submodule(local), stored)
        quantized = {f"{self.linears[name].disk_name}.weight" for name in names}
        for local in visit.module.state_dict():
            disk_name = self.reader.disk_names[f"{visit.name}.{local}"]
            if disk_name in tensors and disk_name not in quantized:
                set_tensor(visit.module, local, tensors[disk_name].to(visit.device))

    def _scale_pairs(self, unit: str) -> tuple[ScalePair, ...]:
        if within(unit, self.family.blocks):
            return self.family.scale_pairs
        return self.family.vision_scale_pairs if any(within(unit, blocks) for blocks in self.family.vision_blocks) else ()

    def write(self) -> None:
        """Write the checkpoint: quantized linears and changed tensors from the commits, all others from the source."""
        self._clear()
        committed = self._committed()
        quantized_weights = {f"{linear.disk_name}.weight": linear.disk_name for linear in self.linears.values()}
        attentions = {name.rpartition(".")[0] for name in committed if name.endswith(_CACHE_SCALES)}
        target = self.run.context.target
        with (
            ShardWriter(target) as writer,
            self.run.context.progress.task(f"{self.stage.stage}: write", len(self.run.checkpoint.tensors), "tensors") as advance,
        ):
            for name in self.run.checkpoint.tensors:
                if name in quantized_weights:
                    for stored in [key for key in linear_tensors(quantized_weights[name]) if key in committed]:
                        writer.add(stored, map_tensor(committed[stored]))
                elif name in committed:
                    writer.add(name, map_tensor(committed[name]))
                else:
                    writer.add(name, self.reader.disk_tensor(name))
                advance(1)
            for attention in sorted(attentions):
                for suffix in _CACHE_SCALES:
                    writer.add(f"{attention}{suffix}", map_tensor(committed[f"{attention}{suffix}"]))
        schemes = {linear.disk_name: self.schemes[name] for name, linear in self.linears.items()}
        copy_side_files(self.run.context.source, target)
        if self.analysis.widths:
            write_json(target / WIDTHS, self.analysis.widths.model_dump(mode="json"))
        write_json(target / "config.json", dict(quantized_spec(self.run.before, schemes, bool(attentions)).config))

    def _clear(self) -> None:
        """Delete the files of a write that was killed, temporary ones included."""
        for path in self.run.context.target.iterdir():
            if path.is_dir() and path != self.run.commits:
                shutil.rmtree(path)
            elif path != self.run.commits:
                path.unlink()

    def _committed(self) -> dict[str, TensorEntry]:
        return {
            name: entry
            for path in sorted(self.run.commits.glob("*.safetensors"))
            for name, entry in sorted(read_header(path).items())
        }


def _quantize_inputs(linear: nn.Module, stored: QuantizedWeight) -> None:
    """Make a linear of the running model quantize its input activations, as a runtime will."""
    scheme = stored.scheme
    scale = None if stored.input_scale is None else stored.input_scale.to(cast("Tensor", linear.weight).device)

    def quantize_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (fake_quantize_activations(args[0], scheme, scale), *args[1:])

    linear.register_forward_pre_hook(quantize_input)
