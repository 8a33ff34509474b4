"""AWQ from checkpoint to checkpoint: walk the blocks, commit each when it is done, then write the whole checkpoint."""

from __future__ import annotations

import gc
import os
import shutil
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors.torch import save
from torch import Tensor, nn

from compress.artifact import copy_side_files
from compress.calibration.load import load_batches
from compress.checkpoint import Checkpoint, TensorEntry, open_checkpoint, read_header
from compress.engine.replay import Replay, Visit, Walkthrough
from compress.engine.statistics import observe
from compress.engine.weights import DTYPES, ShardWriter, WeightReader, map_tensor, place
from compress.errors import CheckpointError, DataError, MissingError
from compress.families import Family, Pair, within
from compress.files import telling_where, write_bytes, write_json
from compress.layouts import pack_linear, quantization_config, read_linear, unquantized_linears
from compress.stages.awq_solver import BlockWeights, Method, solve
from compress.stages.linears import Linear
from compress.stages.stage import StageContext

if TYPE_CHECKING:
    from compress.stages.awq import Awq

TOKENS_PER_BATCH = 4096
_COMMITS = ".blocks"


def apply(stage: Awq, context: StageContext) -> None:
    """Do what `Awq.apply` says."""
    checkpoint = open_checkpoint(context.source)
    if context.calibration is None:
        raise DataError("awq: needs calibration samples; add calibration.sets to the recipe")
    if faults := stage.check(checkpoint, context.family):
        raise CheckpointError("\n".join(faults))
    with telling_where(context.target), returning_memory(context.device), deterministic(), torch.no_grad():
        work = _Work(stage, context, checkpoint)
        work.walk()
        work.write()
        shutil.rmtree(work.commits)


@contextmanager
def returning_memory(device: str) -> Generator[None]:
    """Give back at the end the device memory that torch would keep, so that another process on it finds it free."""
    try:
        yield
    finally:
        if torch.device(device).type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def deterministic() -> Generator[None]:
    """Let torch choose algorithms that give the same result each time, where it has them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@dataclass(frozen=True)
class _Work:
    """One application of the stage. A part of the model that is done is committed as one file, named after the part."""

    stage: Awq
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
    def linears(self) -> dict[str, Linear]:
        """The linears to be quantized, by their names in the model."""
        return {linear.name: linear for linear in self.stage.select(self.checkpoint, self.family).linears}

    @cached_property
    def reader(self) -> WeightReader:
        """The checkpoint's weights."""
        return WeightReader(self.checkpoint, self.family)

    def walk(self) -> None:
        """Quantize every part that holds a targeted linear, in the order in which the model runs."""
        assert self.context.calibration is not None
        self.commits.mkdir(parents=True, exist_ok=True)
        remote_code = self.context.trust_remote_code
        batches = load_batches(self.context.calibration, self.context.source, TOKENS_PER_BATCH, remote_code)
        plan = Walkthrough(
            self.checkpoint,
            self.family,
            batches,
            self.context.device,
            scratch=self.context.target,
            trust_remote_code=remote_code,
        )
        replay = Replay(plan)
        walks = self._walks(replay)
        with self.context.progress.task("awq", sum(map(len, walks)), "blocks") as advance:
            try:
                for visit in chain.from_iterable(map(replay.walk, walks)):
                    self._visit(visit)
                    advance(1)
            except torch.OutOfMemoryError as error:
                raise _out_of_memory(self.context.device, replay.at) from error

    def _walks(self, replay: Replay) -> list[list[str]]:
        vision, decoder = replay.vision_units(), replay.decoder_units()
        if self.family.head is not None and self.family.head in self.linears:
            decoder.append(self.family.head)
        return [units for units in (vision, decoder) if any(within(name, unit) for unit in units for name in self.linears)]

    def _visit(self, visit: Visit) -> None:
        names = [name for name in self.linears if within(name, visit.name)]
        if not names:
            return
        path = self.commits / f"{visit.name}.safetensors"
        tensors = _read_commit(path)
        if tensors is None:
            tensors = self._solve(visit, names)
            write_bytes(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
        self._adopt(visit, names, tensors)

    def _solve(self, visit: Visit, names: list[str]) -> dict[str, Tensor]:
        """Return what is to be stored for a part of the model, by names on disk."""
        stored = self._stored(visit)
        local = {name: _relative(name, visit.name) for name in names}
        if "" in local.values():  # the part is a linear itself
            visit = Visit(visit.name, nn.Sequential(OrderedDict(linear=visit.module)), visit.calls, visit.device)
            local = dict.fromkeys(local, "linear")
            stored = {f"linear.{name}": tensor for name, tensor in stored.items()}
        moments = observe(visit, local.values())
        block = BlockWeights.of(visit.module, local.values(), self._heads(), stored)
        method = Method(scheme=self.stage.scheme, clip=self.stage.clip, grid=self.stage.grid)
        codes = solve(block, self._pairs(visit.name), moments, method)
        tensors: dict[str, Tensor] = {}
        for name, relative in local.items():
            tensors |= pack_linear(self.linears[name].disk_name, codes[relative])
        for relative, value in block.changed.items():
            tensors[self.reader.disk_names[f"{visit.name}.{relative}"]] = value
        return tensors

    def _stored(self, visit: Visit) -> dict[str, Tensor]:
        """Return what the checkpoint holds of a part in another type than the model runs in."""
        found: dict[str, Tensor] = {}
        for name, running in visit.module.state_dict().items():
            disk_name = self.reader.disk_names[f"{visit.name}.{name}"]
            if DTYPES[self.checkpoint.tensors[disk_name].dtype] != running.dtype:
                found[name] = self.reader.disk_tensor(disk_name, visit.device)
        return found

    def _adopt(self, visit: Visit, names: list[str], tensors: Mapping[str, Tensor]) -> None:
        """Put stored values into the running module, so that what comes after sees them as a runtime will compute them."""
        for name in names:
            linear = self.linears[name]
            stored = read_linear(linear.disk_name, self.stage.scheme, lambda key: tensors[key])
            weight = stored.dequantize().to(stored.scales.dtype).to(visit.device)
            place(visit.module, f"{_relative(name, visit.name)}.weight".lstrip("."), weight)
        for relative in visit.module.state_dict():
            disk_name = self.reader.disk_names[f"{visit.name}.{relative}"]
            if disk_name in tensors:
                place(visit.module, relative, tensors[disk_name].to(visit.device))

    def _pairs(self, unit: str) -> tuple[Pair, ...]:
        if within(unit, self.family.blocks):
            return self.family.pairs
        return self.family.vision_pairs if any(within(unit, blocks) for blocks in self.family.vision_blocks) else ()

    def _heads(self) -> int:
        return int(self.checkpoint.text_config["num_attention_heads"])

    def write(self) -> None:
        """Write the checkpoint: quantized linears and changed tensors from the commits, all else as it is in the source."""
        self._clear()
        places = self._committed()
        changed = {f"{linear.disk_name}.weight" for linear in self.linears.values()}
        target = self.context.target
        with (
            ShardWriter(target) as writer,
            self.context.progress.task("awq: write", len(self.checkpoint.tensors), "tensors") as advance,
        ):
            for name in self.checkpoint.tensors:
                if name in changed:
                    prefix = name.removesuffix("weight")
                    for stored in [key for key in places if key.startswith(f"{prefix}weight_")]:
                        writer.add(stored, map_tensor(places[stored]))
                elif name in places:
                    writer.add(name, map_tensor(places[name]))
                else:
                    writer.add(name, self.reader.disk_tensor(name))
                advance(1)
        quantized = self.stage.schemes(self.checkpoint, self.family)
        ignore = unquantized_linears(self.checkpoint, self.family, quantized)
        copy_side_files(self.context.source, target)
        write_json(
            target / "config.json", {**self.checkpoint.config, "quantization_config": quantization_config(quantized, ignore)}
        )

    def _clear(self) -> None:
        """Delete what a write that was killed has left, its temporary files above all."""
        for path in self.context.target.iterdir():
            if path.is_dir() and path != self.commits:
                shutil.rmtree(path)
            elif path != self.commits:
                path.unlink()

    def _committed(self) -> dict[str, TensorEntry]:
        return {
            name: entry for path in sorted(self.commits.glob("*.safetensors")) for name, entry in sorted(read_header(path).items())
        }


def _out_of_memory(device: str, part: str) -> MissingError:
    cuda = torch.device(device).type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if cuda else psutil.virtual_memory().total
    return MissingError(
        f"awq: {device} has {total / 2**30:.1f} GiB of memory, too little for {part}. End other programs that use it, use a larger "
        "device, or none (CUDA_VISIBLE_DEVICES=); or give calibration.sets fewer tokens per sample and smaller images"
    )


def _read_commit(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a finished part, or None where it is not there or damaged."""
    try:
        return {name: map_tensor(entry) for name, entry in read_header(path).items()}
    except CheckpointError:
        return None


def _relative(name: str, prefix: str) -> str:
    return "" if name == prefix else name.removeprefix(f"{prefix}.")
