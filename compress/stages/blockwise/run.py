"""The run of a blockwise stage: its inputs, and the context of one block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from compress.calibration.batches import Batches, load_batches
from compress.checkpoints.checkpoint import Checkpoint
from compress.engine.replay import BlockVisit, WalkConfig
from compress.engine.weights import DTYPES, WeightReader
from compress.errors import MissingError
from compress.families import Family, ScalePair, within
from compress.stages.blockwise.block import BlockWeights
from compress.stages.linears import Linear
from compress.stages.stage import StageContext

TOKENS_PER_BATCH = 1024
"""Tokens that go through the model together. More make the walk faster and its activations on the device larger."""

_WORK = ".blocks"
"""The folder of a run's files and commits in the target folder, until the checkpoint is whole."""


@dataclass(frozen=True)
class BlockContext:
    """A visited block (or another part of the model) with the linears that a method works on."""

    visit: BlockVisit

    local: Mapping[str, str]
    """The linears' names in `visit.module`, by their names in the model."""

    stored: Mapping[str, Tensor]
    """The block's tensors whose type in the checkpoint differs from the one that the model runs in, by names in `visit.module`."""

    heads: int
    """The number of query heads of the decoder's attention."""

    scale_pairs: tuple[ScalePair, ...]
    """The pairs of layers that a scale can move between."""

    sparse: frozenset[str]
    """The linears, by names in `visit.module`, whose zeros are a pattern that has to stay."""

    def weights(self) -> BlockWeights:
        """Return the linears' weights, not yet scaled, with the masks of those that are sparse."""
        block = BlockWeights.of(self.visit.module, self.local.values(), self.heads, self.stored)
        # the zeros on disk are the mask: a checkpoint has no other record of its sparsity pattern
        block.masks = {name: block.weights[name] != 0 for name in block.weights if name in self.sparse}
        return block


@dataclass(frozen=True)
class StageRun:
    """One application of a stage to a checkpoint."""

    stage: str
    """The stage's name, for messages."""

    context: StageContext
    checkpoint: Checkpoint

    targeted: Mapping[str, Linear]
    """The linears that the stage targets, by their names in the model."""

    sparse: frozenset[str] = frozenset()
    """Those whose zeros are a pattern that has to stay, by their names in the model."""

    @property
    def work(self) -> Path:
        """The folder of unfinished files and commits, until the checkpoint is written."""
        return self.context.target / _WORK

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.context.family

    @cached_property
    def reader(self) -> WeightReader:
        """The reader of the checkpoint's weights."""
        return WeightReader(self.checkpoint, self.family)

    @cached_property
    def batches(self) -> Batches:
        """The calibration samples."""
        assert self.context.calibration is not None
        return load_batches(self.context.calibration, self.context.source, TOKENS_PER_BATCH, self.context.trust_remote_code)

    @property
    def walk_config(self) -> WalkConfig:
        """The settings of a walk over all calibration samples."""
        return WalkConfig(
            self.checkpoint,
            self.family,
            self.batches,
            self.context.device,
            scratch=self.context.target,
            trust_remote_code=self.context.trust_remote_code,
        )

    def open(self, visit: BlockVisit, names: Iterable[str]) -> BlockContext:
        """Return the context of a visited block; a visited linear is wrapped into a module, so that it has a name."""
        stored = self._stored(visit)
        local = {name: relative(name, visit.name) for name in names}
        # the output head is visited as a linear itself, and methods name linears by their place within a module
        if "" in local.values():
            visit = BlockVisit(visit.name, nn.Sequential(OrderedDict(linear=visit.module)), visit.calls, visit.device)
            local = dict.fromkeys(local, "linear")
            stored = {f"linear.{name}": tensor for name, tensor in stored.items()}
        sparse = frozenset(local[name] for name in local if name in self.sparse)
        heads = int(self.checkpoint.text_config["num_attention_heads"])
        return BlockContext(visit, local, stored, heads, self._scale_pairs(visit.name), sparse)

    def open_alone(self, name: str) -> BlockContext:
        """Return the context of a linear without calibration samples, its weight in the type it is stored in."""
        # a place for the weight alone: nothing runs it, so the model is never built
        linear = nn.Linear(1, 1, bias=False, device="meta")
        weight = self.reader.disk_tensor(f"{self.targeted[name].disk_name}.weight", self.context.device)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return self.open(BlockVisit(name, linear, (), self.context.device), [name])

    def _stored(self, visit: BlockVisit) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, running in visit.module.state_dict().items():
            full = f"{visit.name}.{name}"
            if full.removesuffix(".weight") in self.reader.quantized:
                continue  # it stays as the earlier stage left it
            disk_name = self.reader.disk_names[full]
            if DTYPES[self.checkpoint.tensors[disk_name].dtype] != running.dtype:
                # the running copy has been rounded to the model's type: writing that back would lose bits of a float32 norm
                stored[name] = self.reader.disk_tensor(disk_name, visit.device)
        return stored

    def _scale_pairs(self, unit: str) -> tuple[ScalePair, ...]:
        """Return the pairs of a block, without those in which a layer was quantized before: its codes are not scaled again."""
        vision = any(within(unit, blocks) for blocks in self.family.vision_blocks)
        pairs = self.family.vision_scale_pairs if vision else ()
        if within(unit, self.family.blocks):
            pairs = self.family.scale_pairs
        quantized = {relative(name, unit) for name in self.reader.quantized if within(name, unit)}
        return tuple(pair for pair in pairs if quantized.isdisjoint((pair.smooth_layer, *pair.balance_layers)))

    def out_of_memory(self, name: str) -> MissingError:
        """Return the error of a part of the model that does not fit the device."""
        device = self.context.device
        cuda = torch.device(device).type == "cuda"
        total = torch.cuda.mem_get_info(device)[1] if cuda else psutil.virtual_memory().total
        return MissingError(
            f"{self.stage}: {device} has {total / 2**30:.1f} GiB of memory, too little for {name}. End other programs that "
            "use it, use a larger device, or none (CUDA_VISIBLE_DEVICES=); or give calibration.sets fewer tokens per sample and "
            "smaller images"
        )


def relative(name: str, prefix: str) -> str:
    """Return a name relative to the module `prefix`; empty for the module itself."""
    return "" if name == prefix else name.removeprefix(f"{prefix}.")
