"""The run of a stage that quantizes linears: its inputs, its commits of finished blocks, and the context of one block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors.torch import save
from torch import Tensor, nn

from compress.calibration.batches import Batches, load_batches
from compress.checkpoints.checkpoint import Checkpoint, read_header
from compress.checkpoints.spec import CheckpointSpec
from compress.engine.replay import BlockVisit, WalkConfig
from compress.engine.weights import DTYPES, WeightReader, map_tensor
from compress.errors import CheckpointError, MissingError
from compress.families import Family
from compress.files import write_bytes
from compress.stages.blockwise.block import BlockWeights
from compress.stages.linears import Linear, LinearSelection
from compress.stages.stage import StageContext

if TYPE_CHECKING:
    from compress.stages.quantization.quantizer import Quantizer

TOKENS_PER_BATCH = 1024
"""Tokens that go through the model together. More make the walk faster and its activations on the device larger."""

_COMMITS = ".blocks"
"""The folder of committed blocks in the target folder."""


@dataclass(frozen=True)
class BlockContext:
    """A visited block (or another part of the model) with its linears to be quantized."""

    visit: BlockVisit

    local: Mapping[str, str]
    """The linears' names in `visit.module`, by their names in the model."""

    stored: Mapping[str, Tensor]
    """The block's tensors whose type in the checkpoint differs from the one that the model runs in, by names in `visit.module`."""

    heads: int
    """The number of query heads of the decoder's attention."""

    def weights(self) -> BlockWeights:
        """Return the linears' weights, not yet scaled."""
        return BlockWeights.of(self.visit.module, self.local.values(), self.heads, self.stored)


@dataclass(frozen=True)
class StageRun:
    """One application of a stage to a checkpoint."""

    stage: Quantizer
    context: StageContext
    checkpoint: Checkpoint

    before: CheckpointSpec
    """The checkpoint's spec."""

    @property
    def commits(self) -> Path:
        """The folder of finished blocks, until the checkpoint is written."""
        return self.context.target / _COMMITS

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.context.family

    @cached_property
    def targeted(self) -> dict[str, Linear]:
        """The linears that the stage targets, by their names in the model."""
        return {linear.name: linear for linear in self.selection.linears}

    @cached_property
    def selection(self) -> LinearSelection:
        """The linears that the stage targets, in the checkpoint's order."""
        return self.stage.select(self.before)

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

    @property
    def heads(self) -> int:
        """The number of query heads of the decoder's attention."""
        return int(self.checkpoint.text_config["num_attention_heads"])

    def open(self, visit: BlockVisit, names: Iterable[str]) -> BlockContext:
        """Return the context of a visited block; a visited linear is wrapped into a module, so that it has a name."""
        stored = self._stored(visit)
        local = {name: relative(name, visit.name) for name in names}
        if "" in local.values():
            visit = BlockVisit(visit.name, nn.Sequential(OrderedDict(linear=visit.module)), visit.calls, visit.device)
            local = dict.fromkeys(local, "linear")
            stored = {f"linear.{name}": tensor for name, tensor in stored.items()}
        return BlockContext(visit, local, stored, self.heads)

    def _stored(self, visit: BlockVisit) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, running in visit.module.state_dict().items():
            disk_name = self.reader.disk_names[f"{visit.name}.{name}"]
            if DTYPES[self.checkpoint.tensors[disk_name].dtype] != running.dtype:
                stored[name] = self.reader.disk_tensor(disk_name, visit.device)
        return stored

    def out_of_memory(self, name: str) -> MissingError:
        """Return the error of a part of the model that does not fit the device."""
        device = self.context.device
        cuda = torch.device(device).type == "cuda"
        total = torch.cuda.mem_get_info(device)[1] if cuda else psutil.virtual_memory().total
        return MissingError(
            f"{self.stage.stage}: {device} has {total / 2**30:.1f} GiB of memory, too little for {name}. End other programs that "
            "use it, use a larger device, or none (CUDA_VISIBLE_DEVICES=); or give calibration.sets fewer tokens per sample and "
            "smaller images"
        )


def relative(name: str, prefix: str) -> str:
    """Return a name relative to the module `prefix`; empty for the module itself."""
    return "" if name == prefix else name.removeprefix(f"{prefix}.")


def write_commit(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a finished block."""
    write_bytes(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def read_commit(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a finished block, or None where the file is missing or damaged."""
    try:
        return {name: map_tensor(entry) for name, entry in read_header(path).items()}
    except CheckpointError:
        return None
