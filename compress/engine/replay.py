"""The walk over a model's blocks: each block meets, one after the other, the inputs that the model's own forward gives it.

The model is built without weights. For block i its own forward runs with every earlier block replaced by a stub that returns
what the block returned when it was visited, and is stopped at block i, whose arguments are recorded. So whatever the author
does between blocks happens as written. Where a first pass shows that a block's input *is* the block before's output, and that
nothing else it is given depends on the blocks, the walk feeds it directly and skips the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.checkpoint import Checkpoint
from compress.engine.host import Host, map_tensors
from compress.engine.weights import DTYPES, WeightReader, unload
from compress.errors import CheckpointError
from compress.families import Family, within
from compress.skeleton import build_skeleton

HOST_BYTES = 16 << 30
"""How much host memory activations may take before they spill to disk."""

Forward = Callable[..., Any]


class Batch(Protocol):
    """Calibration samples that go through the model together; made when asked for."""

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the model's forward: `input_ids` [samples, tokens], `attention_mask`, image inputs, …"""
        ...


@dataclass(frozen=True)
class Positions:
    """Which rows of a linear's input count: masks [samples · tokens] over text and vision tokens, padding in neither."""

    text: Tensor
    vision: Tensor


@dataclass(frozen=True)
class Call:
    """One call of a block, its tensors on the host; `positions` is None inside the vision tower, where every row is vision."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positions: Positions | None


class _Previous:
    """Stands in recorded arguments for what the block before returned."""


_PREVIOUS = _Previous()


class ReachedError(Exception):
    """Unwinds a forward once what was wanted of it is there."""


@dataclass
class _Trace:
    """One batch's way through the model: what its parts returned, and how its blocks were called.

    What a block in `idle` returned is read by nothing but the next block.
    """

    positions: Positions
    reached: bool = True
    idle: frozenset[str] = frozenset()
    frontends: dict[str, list[Any]] = field(default_factory=lambda: dict[str, list[Any]]())
    calls: dict[str, tuple[Any, Any]] = field(default_factory=lambda: dict[str, tuple[Any, Any]]())
    outputs: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())


@dataclass(frozen=True)
class Walkthrough:
    """What a walk needs: the checkpoint, its family, the calibration batches, the device, where activations may spill."""

    checkpoint: Checkpoint
    family: Family
    batches: Sequence[Batch]
    device: str
    scratch: Path
    host_bytes: int = HOST_BYTES
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Visit:
    """A part of the model with its weights in place; changes made to them before the walk goes on are what later parts see."""

    name: str
    module: nn.Module
    calls: Sequence[Call]
    device: str

    @torch.no_grad()
    def run(self, call: Call) -> Any:
        """Return what the module returns for one recorded call."""
        move = _mover(self.device)
        return self.module(*map_tensors(call.args, move), **map_tensors(call.kwargs, move))


class Replay:
    """Visits the parts of a model in the order in which they run; `at` is the part it is at."""

    def __init__(self, plan: Walkthrough) -> None:
        self.plan = plan
        self.family = plan.family
        self.reader = WeightReader(plan.checkpoint, plan.family)
        self.host = Host(plan.scratch, plan.host_bytes)
        dtype = _storage_dtype(self.reader, plan.family)
        self.model: nn.Module = build_skeleton(plan.checkpoint.folder, dtype, torch.device(plan.device), plan.trust_remote_code)
        self.at = ""
        self._traces: list[_Trace] = []

    def vision_units(self) -> list[str]:
        """The vision tower's parts in order: its blocks, then the projector."""
        blocks = [name for container in self.family.vision_blocks for name in self._blocks(container)]
        return [*blocks, *self.family.projector]

    def decoder_units(self) -> list[str]:
        """The decoder's blocks in order."""
        return self._blocks(self.family.blocks)

    @torch.no_grad()
    def walk(self, units: Sequence[str]) -> Iterator[Visit]:
        """Visit parts of the vision tower, or of the decoder (the output head may follow its blocks), in order.

        To have both, walk the vision tower first. A part's outputs are computed when the walk goes on to the next.

        Raises:
            CheckpointError: weights are missing or not finite, or a part of the model is never reached.
        """
        self.at = units[0]
        inside_vision = self._inside_vision(units[0])
        frontends = (self.family.embeddings,) if inside_vision else self.family.frontends
        surroundings = self._surroundings(units)
        for name in surroundings:
            self.reader.put(self.model, name, name, self.plan.device)
        self._first_pass(units, frontends)
        for name in frontends:
            unload(self.model.get_submodule(name))
        for index, name in enumerate(units):
            yield from self._visit(units, index, frontends)
            unload(self.model.get_submodule(name))
        if inside_vision:
            for name in self.family.vision:
                unload(self.model.get_submodule(name))

    def _visit(self, units: Sequence[str], index: int, frontends: Sequence[str]) -> Iterator[Visit]:
        self.at = name = units[index]
        calls = [self._call(number, units, index, frontends) for number in range(len(self._traces))]
        module = self.model.get_submodule(name)
        self.reader.load(module, name, self.plan.device)
        visit = Visit(name, module, [call for call in calls if call is not None], self.plan.device)
        if not visit.calls:
            raise CheckpointError(f"{name}: no calibration sample reaches it; add samples that do, images for the vision tower")
        yield visit
        if index + 1 == len(units) and not self._inside_vision(name):
            return
        for trace, call in zip(self._traces, calls, strict=True):
            if call is not None:
                trace.outputs[name] = self.host.keep_all(visit.run(call))

    def _call(self, number: int, units: Sequence[str], index: int, frontends: Sequence[str]) -> Call | None:
        name, trace = units[index], self._traces[number]
        if not trace.reached:
            return None
        if name in trace.calls:
            args, kwargs = trace.calls.pop(name)
            previous = trace.outputs[units[index - 1]] if index else None
            args, kwargs = _fill(args, previous), _fill(kwargs, previous)
        else:
            recorded = self._replay(number, units[index:], frontends)
            if recorded is None:
                return None
            args, kwargs = recorded
        self._release(trace, units, index)
        return Call(args, kwargs, None if self._inside_vision(name) else trace.positions)

    def _release(self, trace: _Trace, units: Sequence[str], index: int) -> None:
        """Let go of what is of no use to this batch's later replays, once the call of `units[index]` is there."""
        if not self._inside_vision(units[index]) and all(name in trace.calls for name in units[index + 1 :]):
            trace.frontends.clear()
            trace.outputs.clear()
        elif index and units[index - 1] in trace.idle:
            trace.outputs[units[index - 1]] = map_tensors(trace.outputs[units[index - 1]], _hollow)

    def _inside_vision(self, name: str) -> bool:
        return self.family.inside_vision(name)

    def _blocks(self, container: str) -> list[str]:
        return [f"{container}.{name}" for name, _ in self.model.get_submodule(container).named_children()]

    def _surroundings(self, units: Sequence[str]) -> list[str]:
        """Return the tensors a first pass needs: of the frontends, and of all that lies between the units."""
        visited = {name for trace in self._traces for name in trace.outputs}
        apart = (*units, *visited, *self._blocks(self.family.blocks), *self._heads())
        needed = [name for name in self.model.state_dict() if not any(within(name, part) for part in apart)]
        if self._inside_vision(units[0]):
            needed = [name for name in needed if self._inside_vision(name) or within(name, self.family.embeddings)]
        return needed

    def _first_pass(self, units: Sequence[str], frontends: Sequence[str]) -> None:
        """Run each batch with a recording stub in every block's place, to learn which blocks are fed directly."""
        container = units[0].rpartition(".")[0]
        chain = [name for name in units if name.rpartition(".")[0] == container]
        first = not self._traces
        for number, batch in enumerate(self.plan.batches):
            inputs = batch.inputs()
            if first:
                self._traces.append(_Trace(self._positions(inputs)))
            trace = self._traces[number]
            recorder = _Recorder(self.host)
            stubs: dict[str, Forward] = {name: _returning(output, self.plan.device) for name, output in trace.outputs.items()}
            stubs |= {name: recorder.stub(name) for name in chain}
            stubs |= dict.fromkeys(self._stops(units), recorder.stop)
            outputs: dict[str, list[Any]] = {name: [] for name in frontends}
            for name in frontends:
                stubs[name] = _recording(self.model.get_submodule(name).forward, outputs[name], self.host)
            with recorder:
                self._forward(inputs, stubs)
            trace.outputs.clear()
            trace.calls, trace.idle = recorder.calls, recorder.idle
            trace.reached = bool(recorder.calls)
            if trace.reached and any(name not in trace.calls for name in units):
                trace.frontends = outputs

    def _replay(self, number: int, ahead: Sequence[str], frontends: Sequence[str]) -> tuple[Any, Any] | None:
        """Return the arguments of the part `ahead[0]`, or None where the model's forward does not call it for this batch."""
        trace = self._traces[number]
        found: list[tuple[Any, Any]] = []

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            found.append((self.host.keep_all(args), self.host.keep_all(kwargs)))
            raise ReachedError

        stubs: dict[str, Forward] = {name: _returning(output, self.plan.device) for name, output in trace.outputs.items()}
        for name in frontends:
            stubs[name] = _returning_each(name, trace.frontends.get(name, []), self.plan.device)
        stubs |= dict.fromkeys(self._stops(ahead), _stop)
        stubs[ahead[0]] = stop
        self._forward(self.plan.batches[number].inputs(), stubs)
        return found[0] if found else None

    def _stops(self, units: Sequence[str]) -> list[str]:
        """Return the parts before which a forward has to end: they are yet to come, and have no weights."""
        container = units[0].rpartition(".")[0]
        later = [name for name in units if name.rpartition(".")[0] != container]
        if self._inside_vision(units[0]):
            later.append(self._blocks(self.family.blocks)[0])
        return [*later, *(name for name in self._heads() if name not in units)]

    def _heads(self) -> list[str]:
        return [] if self.family.head is None else [self.family.head]

    def _forward(self, inputs: Mapping[str, Tensor], stubs: Mapping[str, Forward]) -> None:
        move = _mover(self.plan.device)
        with replaced(self.model, stubs):
            try:
                self.model(**{name: move(value) for name, value in inputs.items()}, use_cache=False)
            except ReachedError:
                return

    def _positions(self, inputs: Mapping[str, Tensor]) -> Positions:
        tokens = inputs["input_ids"]
        images = self.family.placeholders(self.plan.checkpoint.config)
        vision = torch.isin(tokens, torch.tensor(images, dtype=tokens.dtype)).reshape(-1)
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(vision) if mask is None else mask.bool().reshape(-1)
        return Positions(text=valid & ~vision, vision=valid & vision)


class _Recorder(TorchDispatchMode):
    """Takes the place of a chain of blocks for one forward and records the calls of those that are fed directly.

    Active as a context, it sees every operation, and so which outputs of the chain are read elsewhere than in the next block.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, Any]] = {}
        self.idle: frozenset[str] = frozenset()
        self._host = host
        self._previous: Tensor | None = None
        self._returned: dict[str, ref[Tensor]] = {}
        self._owners: dict[int, str] = {}
        self._read: set[str] = set()
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def stub(self, name: str) -> Forward:
        """Return what runs in place of the block `name`."""

        def run(*args: Any, **kwargs: Any) -> Tensor:
            given = (args, kwargs)
            map_tensors(given, lambda tensor: None if tensor is self._previous else self._note(tensor))
            if self._previous is None or self._direct(given):
                self.calls[name] = map_tensors(given, self._keep)
            like = kwargs["hidden_states"] if "hidden_states" in kwargs else _first_tensor(args)
            self._previous = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            self._returned[name] = ref(self._previous)
            self._owners[id(self._previous)] = name
            return self._previous

        return run

    def stop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """End the forward behind the chain; what is still held by then may be read by what comes after."""
        map_tensors((args, kwargs), self._note)
        held = {name for name, tensor in self._returned.items() if tensor() is not None}
        self.idle = frozenset(self._returned.keys() - self._read - held)
        raise ReachedError

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Let an operation happen, having noted what it reads."""
        del types
        map_tensors((args, kwargs), self._note)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor) -> None:
        name = self._owners.get(id(tensor))
        if name is not None and self._returned[name]() is tensor:
            self._read.add(name)

    def _direct(self, given: Any) -> bool:
        tensors: list[Tensor] = []
        map_tensors(given, tensors.append)
        fed = any(tensor is self._previous for tensor in tensors)
        return fed and all(tensor is self._previous or id(tensor) in self._seen for tensor in tensors)

    def _keep(self, tensor: Tensor) -> Any:
        if tensor is self._previous:
            return _PREVIOUS
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = (tensor, self._host.keep(tensor))  # holding the tensor keeps its id its own
        return self._seen[id(tensor)][1]


@contextmanager
def replaced(model: nn.Module, stubs: Mapping[str, Forward]) -> Generator[None]:
    """Let modules, by name, run something else than their own forward for a while."""
    modules = {model.get_submodule(name): stub for name, stub in stubs.items()}
    for module, stub in modules.items():
        module.forward = stub
    try:
        yield
    finally:
        for module in modules:
            del module.forward


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


def _fill(tree: Any, previous: Any) -> Any:
    """Put the previous block's output into recorded arguments."""
    if isinstance(tree, _Previous):
        return previous
    if isinstance(tree, dict):
        return {key: _fill(value, previous) for key, value in cast("dict[str, Any]", tree).items()}
    if type(tree) is tuple:
        return tuple(_fill(value, previous) for value in cast("tuple[Any, ...]", tree))
    return tree


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _returning(output: Any, device: str) -> Forward:
    """Return what gives a kept output again, zeros where it was not kept."""

    def real(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return tensor.to(device)

    return lambda *args, **kwargs: map_tensors(output, real)


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


def _first_tensor(tree: Any) -> Tensor:
    tensors: list[Tensor] = []
    map_tensors(tree, tensors.append)
    return tensors[0]
