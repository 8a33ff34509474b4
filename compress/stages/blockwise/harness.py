"""The harness of blockwise methods: walk the blocks, commit each one when it is done, then write the checkpoint.

A method is what happens to one block; whether it rounds, prunes or both is not known here. What it makes of a block is written
once, where it stays, and put into the running model, so that later blocks see what a runtime will compute.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from compress.checkpoints.artifact import copy_side_files
from compress.engine.hessian import HessianRequest
from compress.engine.planned_shards import PlannedShards
from compress.engine.replay import BlockVisit, Replay
from compress.engine.statistics import InputStatistics, observe
from compress.engine.weights import set_tensor
from compress.errors import CheckpointError
from compress.families import within
from compress.files import write_json
from compress.stages.blockwise.block import BlockWeights
from compress.stages.blockwise.run import BlockContext, StageRun, relative

Result = TypeVar("Result")


class BlockMethod(Protocol[Result]):
    """What happens to one block; `Result` is what a linear becomes. Names of linears are those in the model."""

    def request(self, names: Sequence[str]) -> HessianRequest | None:
        """Return what it reads of the Hessians of a block's linears; None where it reads no statistics of them."""
        ...

    def solve(self, context: BlockContext, block: BlockWeights, statistics: Mapping[str, InputStatistics]) -> dict[str, Result]:
        """Return what a block's linears become; new norms and biases are left in `block.changed`.

        `statistics` are by names in the block, and may be used up.
        """
        ...

    def pack(self, name: str, result: Result) -> dict[str, Tensor]:
        """Return a linear's tensors on disk."""
        ...

    def unpack(self, name: str, read: Callable[[str], Tensor]) -> Result:
        """Return what a linear has become, from its tensors on disk, which `read` returns by name."""
        ...

    def load(self, module: nn.Module, result: Result) -> None:
        """Make a running linear compute as a runtime will."""
        ...

    def observes(self, unit: str) -> bool:
        """Return whether `observe` gives tensors of a unit, even of one without targeted linears."""
        ...

    def observe(self, visit: BlockVisit) -> dict[str, Tensor]:
        """Return further tensors, by names on disk, from running a finished block on the calibration samples."""
        ...


@dataclass(frozen=True)
class Blockwise(Generic[Result]):
    """One application of a method to the linears of a checkpoint."""

    run: StageRun
    method: BlockMethod[Result]

    linears: Mapping[str, str]
    """The linears to work on: their names on disk, by their names in the model."""

    shards: PlannedShards
    """The files of the checkpoint that it leaves."""

    def walk(self) -> None:
        """Work on every block that has linears to work on, in the order in which the model runs."""
        replay = Replay(self.run.walk_config)
        walks = self._walks(replay)
        with self.run.context.progress.task(self.run.stage, sum(map(len, walks)), "blocks") as advance:
            try:
                for visit in chain.from_iterable(map(replay.walk, walks)):
                    self._visit(visit)
                    advance(1)
            except torch.OutOfMemoryError as error:
                raise self.run.out_of_memory(replay.current) from error

    def work_on_each(self) -> None:
        """Work on every linear on its own, without calibration samples."""
        with self.run.context.progress.task(self.run.stage, len(self.linears), "layers") as advance:
            for name in self.linears:
                if self.shards.committed(name) is None:
                    self.shards.commit(name, self._solve(self.run.open_alone(name), {}))
                advance(1)

    def _walks(self, replay: Replay) -> list[list[str]]:
        vision, decoder = replay.vision_units(), replay.decoder_units()
        head = self.run.family.head
        if head is not None and head in self.linears:
            # visited after the blocks, whose compressed output it reads
            decoder.append(head)
        # the vision tower first, so that decoder blocks are calibrated on the features that the compressed tower gives
        return [units for units in (vision, decoder) if any(self._names(unit) or self.method.observes(unit) for unit in units)]

    def _names(self, unit: str) -> list[str]:
        return [name for name in self.linears if within(name, unit)]

    def _visit(self, visit: BlockVisit) -> None:
        names, observes = self._names(visit.name), self.method.observes(visit.name)
        if not names and not observes:
            return
        finished = self.shards.committed(visit.name)
        if finished is not None:
            # the walk has to pass through finished blocks too: later ones are calibrated on their outputs
            self._load_committed(visit, names, finished)
            return
        written: list[str] = []
        if names:
            context = self.run.open(visit, names)
            request = self.method.request(names)
            statistics = {} if request is None else observe(context.visit, context.local.values(), request)
            written += self._solve(context, statistics)
        if observes:
            # after the solving, so that what is observed is the quantized block that a runtime runs
            observed = self.method.observe(visit)
            self.shards.write(observed)
            written += observed
        # one commit for all of a block's tensors: a killed run does a block again as a whole, or not at all
        self.shards.commit(visit.name, written)

    def _solve(self, context: BlockContext, statistics: Mapping[str, InputStatistics]) -> list[str]:
        """Work on a block, write what it becomes and load it; return the names of the tensors written."""
        block, visit = context.weights(), context.visit
        try:
            results = self.method.solve(context, block, statistics)
        except CheckpointError as error:
            raise CheckpointError(f"{visit.name}: {error}") from error
        written: list[str] = []
        for name, local in context.local.items():
            # taken out, so that each linear's codes are freed once they are written
            result = results.pop(name)
            tensors = self.method.pack(self.linears[name], result)
            self.shards.write(tensors)
            self.method.load(visit.module.get_submodule(local), result)
            written += tensors
        # norms and biases into which scales were folded: without them the scaled weights would compute another function
        for local, value in block.changed.items():
            disk_name = self.run.reader.disk_names[f"{visit.name}.{local}"]
            self.shards.write({disk_name: value})
            set_tensor(visit.module, local, value.to(visit.device))
            written.append(disk_name)
        return written

    def _load_committed(self, visit: BlockVisit, names: Sequence[str], written: Sequence[str]) -> None:
        """Load what a block has become in an earlier run."""
        for name in names:
            result = self.method.unpack(self.linears[name], self.shards.read)
            self.method.load(visit.module.get_submodule(relative(name, visit.name)), result)
        # unpacked codes are stored as `.weight` too: loaded as a plain weight they would lack their scales
        weights = {f"{self.linears[name]}.weight" for name in names}
        for local in visit.module.state_dict():
            disk_name = self.run.reader.disk_names.get(f"{visit.name}.{local}")  # none for what an earlier stage has packed
            if disk_name is not None and disk_name in written and disk_name not in weights:
                set_tensor(visit.module, local, self.shards.read(disk_name).to(visit.device))

    def write(self, config: Mapping[str, Any], records: Mapping[str, object]) -> None:
        """Complete the checkpoint: tensors that no block has changed from the source, its config and further JSON files."""
        target = self.run.context.target
        missing = self.shards.missing()
        with self.run.context.progress.task(f"{self.run.stage}: write", len(missing), "tensors") as advance:
            for name in missing:
                # a new tensor (codes, scales) has no source to be copied from
                if name not in self.run.checkpoint.tensors:
                    raise CheckpointError(f"{name}: no block gave it; report this, with the model's config.json")
                self.shards.write({name: self.run.reader.disk_tensor(name)})
                advance(1)
        # before the side files: what a killed write has left might belong to an older plan
        self._clear()
        copy_side_files(self.run.context.source, target)
        for name, record in records.items():
            write_json(target / name, record)
        write_json(target / "config.json", dict(config))
        self.shards.publish(target)
        # last: until here a killed run finds its commits
        shutil.rmtree(self.run.work)

    def _clear(self) -> None:
        """Delete the files of a write that was killed, temporary ones included."""
        for path in self.run.context.target.iterdir():
            if path.is_dir() and path != self.run.work:
                shutil.rmtree(path)
            elif path != self.run.work:
                path.unlink()


@contextmanager
def returning_memory(device: str) -> Generator[None]:
    """Release at the end the device memory that torch caches, so that other processes can use it."""
    try:
        yield
    finally:
        if torch.device(device).type == "cuda":
            # frees the tensors that reference cycles hold; the cache can only give back what nothing references
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def deterministic() -> Generator[None]:
    """Use deterministic algorithms where torch has them.

    Torch then also fills new memory with NaN to expose reads of it, which takes half as long as the work itself: switched off.
    """
    # without a fixed workspace cuBLAS may sum in another order from call to call
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings = cast("Any", torch.utils).deterministic
    fill_before = settings.fill_uninitialized_memory
    # models contain operations without a deterministic form: warned of, since refusing them would refuse the models
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill_before
