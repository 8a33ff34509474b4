"""The walk over a model's blocks: each block meets, one after the other, the inputs that the model's own forward gives it.

The model is built without weights. For block i its own forward runs with every earlier block replaced by a stub that returns
what the block returned when it was visited, and is stopped at block i, whose arguments are recorded. So whatever the author
does between blocks happens as written. Where a first pass shows that a block's input *is* the block before's output, and that
nothing else it is given depends on the blocks, the walk feeds it directly and skips the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.engine.host import Host, map_tensors
from compress.engine.recorder import Forward, ReachedError, Recorder, fill, hidden_states, replaced
from compress.engine.weights import DTYPES, WeightReader, unload
from compress.errors import CheckpointError
from compress.families import Family, within
from compress.skeleton import build_skeleton

HOST_BYTES = 16 << 30
"""How much host memory activations may take before they spill to disk."""


class BatchInputs(Protocol):
    """Calibration samples that go through the model together; made when asked for."""

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the model's forward: `input_ids` [samples, tokens], `attention_mask`, image inputs, …"""
        ...


@dataclass(frozen=True)
class Positions:
    """Which rows of a linear's input count: masks [rows] over text and vision, padding in neither.

    `images` [parts] says which parts of the images' states, of equally many rows each, any token may read; None: all of them.
    """

    text: Tensor
    vision: Tensor
    images: Tensor | None = None

    def of_images(self, rows: int) -> Positions | None:
        """Return what counts of so many rows of the images' states; None where all of them do."""
        if self.images is None or rows % len(self.images):
            return None
        vision = self.images.repeat_interleave(rows // len(self.images))
        return Positions(torch.zeros_like(vision), vision)


@dataclass(frozen=True)
class Call:
    """One call of a part, its tensors on the host, for the calibration batch of that number.

    `positions` is None inside the vision tower where every row counts.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positions: Positions | None
    batch: int = 0


@dataclass
class _Trace:
    """One batch's way through the model: what its parts returned, how they were called, and in which `order`.

    What a part in `idle` returned is read by nothing but the next one.
    """

    positions: Positions
    order: list[str] = field(default_factory=lambda: list[str]())
    idle: frozenset[str] = frozenset()
    frontends: dict[str, list[Any]] = field(default_factory=lambda: dict[str, list[Any]]())
    calls: dict[str, tuple[Any, Any]] = field(default_factory=lambda: dict[str, tuple[Any, Any]]())
    outputs: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())


@dataclass(frozen=True)
class WalkConfig:
    """What a walk needs: the checkpoint, its family, the calibration batches, the device, where activations may spill."""

    checkpoint: Checkpoint
    family: Family
    batches: Sequence[BatchInputs]
    device: str
    scratch: Path
    host_bytes: int = HOST_BYTES
    trust_remote_code: bool = False


@dataclass(frozen=True)
class BlockVisit:
    """A part of the model with its weights in place; changes made to them before the walk goes on are what later parts see.

    `calls` is empty where no sample reaches the part. `vision_readers` are its linears whose input is the images' states.
    """

    name: str
    module: nn.Module
    calls: Sequence[Call]
    device: str
    vision_readers: tuple[str, ...] = ()

    @torch.no_grad()
    def run(self, call: Call) -> Any:
        """Return what the module returns for one recorded call."""
        move = _mover(self.device)
        return self.module(*map_tensors(call.args, move), **map_tensors(call.kwargs, move))


class Replay:
    """Visits the parts of a model in the order in which they run; `at` is the part it is at."""

    def __init__(self, plan: WalkConfig) -> None:
        self.plan = plan
        self.family = plan.family
        self.reader = WeightReader(plan.checkpoint, plan.family)
        self.host = Host(plan.scratch, plan.host_bytes)
        dtype = _storage_dtype(self.reader, plan.family)
        self.model: nn.Module = build_skeleton(plan.checkpoint.folder, dtype, torch.device(plan.device), plan.trust_remote_code)
        self.at = ""
        self._traces: list[_Trace] = []
        self._chain: frozenset[str] = frozenset()

    def vision_units(self) -> list[str]:
        """The vision tower's parts: its blocks, then what leads to the decoder."""
        blocks = [name for container in self.family.vision_blocks for name in self._blocks(container)]
        return [*blocks, *(name for name in self._projector() if self._inside_vision(name))]

    def decoder_units(self) -> list[str]:
        """The decoder's blocks in order, and what projects their result (CLIP's text tower has such a part)."""
        return [*self._blocks(self.family.blocks), *self._projections()]

    @torch.no_grad()
    def walk(self, units: Sequence[str]) -> Iterator[BlockVisit]:
        """Visit parts of the vision tower, or of the decoder (the output head may follow its blocks), in the order they run.

        To have both, walk the vision tower first. A part's outputs are computed when the walk goes on to the next. A part that a
        batch does not reach is passed over for it.

        Raises:
            CheckpointError: weights are missing or not finite.
        """
        self.at = units[0]
        inside_vision = self._inside_vision(units[0])
        frontends = (self.family.embeddings,) if inside_vision else self.family.frontends
        self._chain = self._chained(units)
        for name in self._surroundings(units):
            self.reader.put(self.model, name, name, self.plan.device)
        self._first_pass(units, frontends)
        for name in (*frontends, *self._chain):
            unload(self.model.get_submodule(name))
        units = self._in_order(units)
        for index, name in enumerate(units):
            yield from self._visit(units, index, frontends)
            unload(self.model.get_submodule(name))
        if inside_vision:
            for name in self.family.vision:
                unload(self.model.get_submodule(name))

    def _visit(self, units: Sequence[str], index: int, frontends: Sequence[str]) -> Iterator[BlockVisit]:
        self.at = name = units[index]
        calls = [self._call(number, units, index, frontends) for number in range(len(self._traces))]
        module = self.model.get_submodule(name)
        self.reader.load(module, name, self.plan.device)
        readers = self.family.vision_readers if within(name, self.family.blocks) else ()
        visit = BlockVisit(name, module, [call for call in calls if call is not None], self.plan.device, readers)
        yield visit
        if index + 1 == len(units) and not self._inside_vision(name):
            return
        for trace, call in zip(self._traces, calls, strict=True):
            if call is not None:
                trace.outputs[name] = self.host.keep_all(visit.run(call))

    def _call(self, number: int, units: Sequence[str], index: int, frontends: Sequence[str]) -> Call | None:
        name, trace = units[index], self._traces[number]
        if name in self._chain and name not in trace.order:
            return None
        if name in trace.calls:
            args, kwargs = trace.calls.pop(name)
            before = _before(trace, name)
            previous = trace.outputs[before] if before else None
            args, kwargs = fill(args, previous), fill(kwargs, previous)
        else:
            recorded = self._replay(number, units[index:], frontends)
            if recorded is None:
                return None
            args, kwargs = recorded
        self._release(trace, units, index)
        return Call(args, kwargs, self._rows(name, trace, args, kwargs), number)

    def _release(self, trace: _Trace, units: Sequence[str], index: int) -> None:
        """Let go of what is of no use to this batch's later replays, once the call of `units[index]` is there."""
        before = _before(trace, units[index])
        if not self._inside_vision(units[index]) and not self._replays(trace, units[index + 1 :]):
            trace.frontends.clear()
            trace.outputs.clear()
        elif before in trace.idle:
            trace.outputs[before] = map_tensors(trace.outputs[before], _hollow)

    def _replays(self, trace: _Trace, units: Sequence[str]) -> bool:
        """Return whether any of the parts needs a forward of its own to find out how this batch calls it."""
        return any(name not in trace.calls and (name in trace.order or name not in self._chain) for name in units)

    def _chained(self, units: Sequence[str]) -> frozenset[str]:
        """Return the parts that a first pass can follow through: all of the vision tower, of the decoder its blocks."""
        inside = self._inside_vision(units[0])
        return frozenset(name for name in units if inside or within(name, self.family.blocks))

    def _in_order(self, units: Sequence[str]) -> list[str]:
        """Return the parts as the batch that calls most of them does; each of the others stays behind the one given before it."""
        ordered = list(max((trace.order for trace in self._traces), key=len, default=list[str]()))
        for index, name in enumerate(units):
            if name not in ordered:
                ordered.insert(ordered.index(units[index - 1]) + 1 if index else 0, name)
        return ordered

    def _inside_vision(self, name: str) -> bool:
        return self.family.inside_vision(name)

    def _blocks(self, container: str) -> list[str]:
        return [f"{container}.{name}" for name, _ in self.model.get_submodule(container).named_children()]

    def _surroundings(self, units: Sequence[str]) -> list[str]:
        """Return the tensors a first pass needs: of the frontends, and of all that lies between the units."""
        visited = {name for trace in self._traces for name in trace.outputs}
        hidden = (name for name in units if name not in self._chain or name not in self.family.projector)
        apart = (*hidden, *visited, *self._blocks(self.family.blocks), *self._projections(), *self._heads())
        return [name for name in self.model.state_dict() if not any(within(name, part) for part in apart)]

    def _first_pass(self, units: Sequence[str], frontends: Sequence[str]) -> None:
        """Run each batch with a recording stub in every part's place, to learn their order and which are fed directly."""
        first = not self._traces
        for number, batch in enumerate(self.plan.batches):
            inputs = batch.inputs()
            if first:
                self._traces.append(_Trace(self._positions(inputs)))
            trace = self._traces[number]
            recorder = Recorder(self.host)
            stubs: dict[str, Forward] = {name: _returning(output, self.plan.device) for name, output in trace.outputs.items()}
            stubs |= {name: recorder.stub(name, self._own_forward(name)) for name in self._chain}
            stubs |= dict.fromkeys(self._stops(units), recorder.stop)
            outputs: dict[str, list[Any]] = {name: [] for name in frontends}
            for name in frontends:
                forward = stubs.get(name, self.model.get_submodule(name).forward)
                stubs[name] = _recording(forward, outputs[name], self.host)
            with recorder:
                self._forward(inputs, stubs)
            recorder.finish()
            trace.outputs.clear()
            trace.calls, trace.idle, trace.order = recorder.calls, recorder.idle, recorder.order
            if self._replays(trace, units):
                trace.frontends = outputs

    def _own_forward(self, name: str) -> Forward | None:
        """Return what a part runs in a first pass, for one that does not return states such as it is given."""
        return self.model.get_submodule(name).forward if name in self.family.projector else None

    def _replay(self, number: int, ahead: Sequence[str], frontends: Sequence[str]) -> tuple[Any, Any] | None:
        """Return the arguments of the part `ahead[0]`, or None where the model's forward does not call it for this batch."""
        found: list[tuple[Any, Any]] = []

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            found.append((self.host.keep_all(args), self.host.keep_all(kwargs)))
            raise ReachedError

        stubs = self._known(number, frontends) | dict.fromkeys(self._stops(ahead), _stop) | {ahead[0]: stop}
        self._forward(self.plan.batches[number].inputs(), stubs)
        return found[0] if found else None

    def head_input(self, number: int, outputs: Mapping[str, Any]) -> Tensor:
        """Return what a batch's forward gives the output head, gradients included, where the blocks return `outputs`.

        For the time of the visit to the last of the blocks, in a walk that goes on to the head; `outputs` has to have
        that block's. Earlier blocks return what they did when they were visited.
        """
        assert self.family.head is not None
        found: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            found.append(hidden_states(args, kwargs))
            raise ReachedError

        stubs = self._known(number, self.family.frontends) | {self.family.head: stop}
        stubs |= {name: _giving(output) for name, output in outputs.items()}
        with torch.enable_grad():
            self._forward(self.plan.batches[number].inputs(), stubs)
        return found[0]

    def _known(self, number: int, frontends: Sequence[str]) -> dict[str, Forward]:
        """Return stubs that return what a batch's parts returned before."""
        trace = self._traces[number]
        stubs: dict[str, Forward] = {name: _returning(output, self.plan.device) for name, output in trace.outputs.items()}
        return stubs | {name: _returning_each(name, trace.frontends.get(name, []), self.plan.device) for name in frontends}

    def _stops(self, units: Sequence[str]) -> list[str]:
        """Return the parts before which a forward has to end: they are yet to come, and have no weights."""
        later = [name for name in units if name not in self._chain]
        if self._inside_vision(units[0]):
            later.append(self._blocks(self.family.blocks)[0])
        return [*later, *(name for name in (*self._projections(), *self._heads()) if name not in units)]

    def _heads(self) -> list[str]:
        return [] if self.family.head is None else [self.family.head]

    def _projector(self) -> list[str]:
        """Return the projector's parts; of a list of modules each is one, as it is the modules that are called."""
        parts = ((name, self.model.get_submodule(name)) for name in self.family.projector)
        return [part for name, module in parts for part in (self._blocks(name) if isinstance(module, nn.ModuleList) else [name])]

    def _projections(self) -> list[str]:
        return [name for name in self._projector() if not self._inside_vision(name)]

    def _forward(self, inputs: Mapping[str, Tensor], stubs: Mapping[str, Forward]) -> None:
        move = _mover(self.plan.device)
        with replaced(self.model, stubs):
            try:
                entry = self.model.get_submodule(self.family.entry(inputs))
                entry(**{name: move(value) for name, value in inputs.items()}, use_cache=False)
            except ReachedError:
                return

    def _positions(self, inputs: Mapping[str, Tensor]) -> Positions:
        tokens = inputs["input_ids"]
        images = () if self.family.vision_readers else self.family.placeholders(self.plan.checkpoint.config)
        vision = torch.isin(tokens, torch.tensor(images, dtype=tokens.dtype)).reshape(-1)
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(vision) if mask is None else mask.bool().reshape(-1)
        parts = _read_parts(inputs.get(self.family.image_mask), valid)
        return Positions(text=valid & ~vision, vision=valid & vision, images=parts)

    def _rows(self, name: str, trace: _Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Positions | None:
        """Return which rows of a part's input count."""
        states = hidden_states(args, kwargs)
        rows = states.numel() // states.shape[-1]
        if self._inside_vision(name):
            return _without_padding(trace.positions.of_images(rows), kwargs.get("attention_mask"), rows)
        if rows == len(trace.positions.text):
            return trace.positions
        every = torch.ones(rows, dtype=torch.bool)  # one row for each text, as of CLIP's pooled states
        return Positions(text=every, vision=~every)


def _before(trace: _Trace, name: str) -> str:
    """Return the part that a batch called last before this one, empty where it is the first."""
    index = trace.order.index(name) if name in trace.order else len(trace.order)
    return trace.order[index - 1] if index else ""


def _read_parts(seen: Tensor | None, valid: Tensor) -> Tensor | None:
    """Return which parts of the images' states any token reads; `seen` says it of each, [samples, tokens, images, tiles]."""
    if seen is None:
        return None
    tokens = valid.view(*seen.shape[:2], *[1] * (seen.dim() - 2))
    return (seen.bool() & tokens).any(dim=1).reshape(-1)


def _without_padding(positions: Positions | None, mask: Any, rows: int) -> Positions | None:
    """Take out the rows of a tower's block that are padding: those that the mask of its attention hides even from themselves."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[0] * mask.shape[-1] != rows:
        return positions
    own = mask[:, 0].diagonal(dim1=-2, dim2=-1).reshape(-1)
    vision = own if own.dtype == torch.bool else own == 0
    if positions is not None:
        vision = vision & positions.vision
    return Positions(torch.zeros_like(vision), vision)


def _storage_dtype(reader: WeightReader, family: Family) -> torch.dtype:
    name = f"{family.embeddings}.weight"
    if name not in reader.disk_names:
        raise CheckpointError(f"{reader.checkpoint.folder}: holds no {name}; fetch the checkpoint again")
    return DTYPES[reader.checkpoint.tensors[reader.disk_names[name]].dtype]


def _stop(*args: Any, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise ReachedError


def _mover(device: str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device)


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _returning(output: Any, device: str) -> Forward:
    """Return what gives a kept output again, zeros where it was not kept."""

    def real(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return tensor.to(device)

    return lambda *args, **kwargs: map_tensors(output, real)


def _giving(output: Any) -> Forward:
    return lambda *args, **kwargs: output


def _returning_each(name: str, outputs: list[Any], device: str) -> Forward:
    left = iter(outputs)

    def run(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        try:
            return map_tensors(next(left), _mover(device))
        except StopIteration:
            raise CheckpointError(f"{name}: the model calls it another number of times than before; it cannot be walked") from None

    return run


def _recording(forward: Forward, outputs: list[Any], host: Host) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        outputs.append(host.keep_all(output))
        return output

    return run
