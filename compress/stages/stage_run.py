"""Where a stage that rounds linears works: what it reads, where it commits what is done, and a part of the model laid open."""

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
from compress.checkpoint import Checkpoint, read_header
from compress.engine.replay import BlockVisit, WalkConfig
from compress.engine.weights import DTYPES, WeightReader, map_tensor
from compress.errors import CheckpointError, MissingError
from compress.families import Family
from compress.files import write_bytes
from compress.stages.block import BlockWeights
from compress.stages.linears import Linear
from compress.stages.stage import StageContext

if TYPE_CHECKING:
    from compress.stages.quantizer import Quantizer

TOKENS_PER_BATCH = 1024
_COMMITS = ".blocks"


@dataclass(frozen=True)
class BlockContext:
    """A part of the model with its linears to be worked on: `local` are their names in `visit.module` by those in the model.

    `stored` is what the checkpoint holds of the part in another type than the model runs in.
    """

    visit: BlockVisit
    local: Mapping[str, str]
    stored: Mapping[str, Tensor]
    heads: int

    def weights(self) -> BlockWeights:
        """Take the linears' weights."""
        return BlockWeights.of(self.visit.module, self.local.values(), self.heads, self.stored)


@dataclass(frozen=True)
class StageRun:
    """One application of a stage to a checkpoint."""

    stage: Quantizer
    context: StageContext
    checkpoint: Checkpoint

    @property
    def commits(self) -> Path:
        """Where finished parts are kept until the checkpoint is written."""
        return self.context.target / _COMMITS

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.context.family

    @cached_property
    def targeted(self) -> dict[str, Linear]:
        """The linears the stage was told to work on, by their names in the model."""
        return {linear.name: linear for linear in self.stage.select(self.checkpoint, self.family).linears}

    @cached_property
    def reader(self) -> WeightReader:
        """The checkpoint's weights."""
        return WeightReader(self.checkpoint, self.family)

    @cached_property
    def batches(self) -> Batches:
        """The calibration samples."""
        assert self.context.calibration is not None
        return load_batches(self.context.calibration, self.context.source, TOKENS_PER_BATCH, self.context.trust_remote_code)

    @property
    def walk_config(self) -> WalkConfig:
        """What a walk over all calibration samples needs."""
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
        """How many heads the decoder's attention has."""
        return int(self.checkpoint.text_config["num_attention_heads"])

    def open(self, visit: BlockVisit, names: Iterable[str]) -> BlockContext:
        """Lay open a visited part; one that is a linear itself is put into a module of its own."""
        stored = self._stored(visit)
        local = {name: relative(name, visit.name) for name in names}
        if "" in local.values():
            visit = BlockVisit(visit.name, nn.Sequential(OrderedDict(linear=visit.module)), visit.calls, visit.device)
            local = dict.fromkeys(local, "linear")
            stored = {f"linear.{name}": tensor for name, tensor in stored.items()}
        return BlockContext(visit, local, stored, self.heads)

    def _stored(self, visit: BlockVisit) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, running in visit.module.state_dict().items():
            disk_name = self.reader.disk_names[f"{visit.name}.{name}"]
            if DTYPES[self.checkpoint.tensors[disk_name].dtype] != running.dtype:
                found[name] = self.reader.disk_tensor(disk_name, visit.device)
        return found

    def out_of_memory(self, part: str) -> MissingError:
        """Return the error to raise when a part of the model does not fit the device."""
        device = self.context.device
        cuda = torch.device(device).type == "cuda"
        total = torch.cuda.mem_get_info(device)[1] if cuda else psutil.virtual_memory().total
        return MissingError(
            f"{self.stage.stage}: {device} has {total / 2**30:.1f} GiB of memory, too little for {part}. End other programs that "
            "use it, use a larger device, or none (CUDA_VISIBLE_DEVICES=); or give calibration.sets fewer tokens per sample and "
            "smaller images"
        )


def relative(name: str, prefix: str) -> str:
    """Return a name within the part of the model called `prefix`; empty for the part itself."""
    return "" if name == prefix else name.removeprefix(f"{prefix}.")


def write_commit(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep what is finished."""
    write_bytes(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def read_commit(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a finished part, or None where it is not there or damaged."""
    try:
        return {name: map_tensor(entry) for name, entry in read_header(path).items()}
    except CheckpointError:
        return None
