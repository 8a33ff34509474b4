"""The walk over a model's blocks: each block in turn is visited with the inputs that the model's own forward gives it.

The model is built without weights. For block i the model's forward runs with every earlier block replaced by a stub that returns
the output of its visit, and is stopped at block i, whose arguments are recorded. So whatever the author does between blocks
happens as written. Where a first pass shows that a block's input *is* the previous block's output, and that none of its other
arguments depends on the blocks, the walk feeds it directly and skips the replay.

A unit is what the walk visits: a block, a module of the projector, or the output head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.skeleton import build_skeleton
from compress.engine.host import HostMemory, map_tensors
from compress.engine.products import float32_products
from compress.engine.recorder import Forward, ReachedError, Recorder, hidden_states, insert_previous, replace_forwards
from compress.engine.weights import DTYPES, WeightReader, unload
from compress.errors import CheckpointError
from compress.families import Family, within

HOST_BYTES = 16 << 30
"""The limit of activations in host memory; beyond it they spill to disk, which costs time and changes no result."""


class BatchInputs(Protocol):
    """A batch of calibration samples, built when needed."""

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the model's forward: `input_ids` [samples, tokens], `attention_mask`, image inputs, …"""
        ...


@dataclass(frozen=True)
class Positions:
    """The modality of each row of a linear's input. Padding is neither text nor vision."""

    text: Tensor
    """Mask [rows] of text tokens."""

    vision: Tensor
    """Mask [rows] of vision tokens."""

    images: Tensor | None = None
    """Mask of the images' tiles that any token attends to, in cross-attention; None: all of them."""

    def of_images(self, rows: int) -> Positions | None:
        """Return the positions of image features with so many rows, equally many per tile; None where all of them count."""
        if self.images is None or rows % len(self.images):
            return None
        vision = self.images.repeat_interleave(rows // len(self.images))
        return Positions(torch.zeros_like(vision), vision)


@dataclass(frozen=True)
class Call:
    """One recorded call of a unit, its tensors on the host."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    positions: Positions | None
    """None inside the vision tower where every row counts."""

    batch: int = 0
    """The index of the calibration batch."""


@dataclass
class _Trace:
    """The calls and outputs of one batch's forward."""

    positions: Positions

    order: list[str] = field(default_factory=lambda: list[str]())
    """The units in the order of their calls."""

    read_by_next: frozenset[str] = frozenset()
    """Units whose output only the next unit reads."""

    frontends: dict[str, list[Any]] = field(default_factory=lambda: dict[str, list[Any]]())
    """The outputs of each call of the modules before the blocks (embeddings, vision tower)."""

    calls: dict[str, tuple[Any, Any]] = field(default_factory=lambda: dict[str, tuple[Any, Any]]())
    """The arguments of units that are fed directly and not yet visited."""

    outputs: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    """The outputs of visited units, as far as later replays need them."""


@dataclass(frozen=True)
class WalkConfig:
    """The inputs and limits of a walk."""

    checkpoint: Checkpoint
    family: Family
    batches: Sequence[BatchInputs]
    device: str

    scratch: Path
    """The folder for activations that do not fit in `host_bytes`."""

    host_bytes: int = HOST_BYTES
    trust_remote_code: bool = False


@dataclass(frozen=True)
class BlockVisit:
    """A unit with its weights loaded. Later units see the outputs of the weights as they are when the walk continues."""

    name: str
    module: nn.Module

    calls: Sequence[Call]
    """Empty where no sample reaches the unit."""

    device: str

    cross_attention_linears: tuple[str, ...] = ()
    """Its linears whose input is the image features (cross-attention)."""

    @torch.no_grad()
    def run(self, call: Call) -> Any:
        """Return the module's output for one recorded call."""
        move = _to_device(self.device)
        with float32_products(self.device):
            return self.module(*map_tensors(call.args, move), **map_tensors(call.kwargs, move))


class Replay:
    """Visits the units of a model in the order in which they run; `current` is the name of the unit being visited."""

    def __init__(self, config: WalkConfig) -> None:
        self.config = config
        self.family = config.family
        self.reader = WeightReader(config.checkpoint, config.family)
        self.host = HostMemory(config.scratch, config.host_bytes)
        dtype = _storage_dtype(self.reader, config.family)
        self.model: nn.Module = build_skeleton(
            config.checkpoint.folder, dtype, torch.device(config.device), config.trust_remote_code
        )
        self.reader.quantize_inputs(self.model, config.device)
        self.current = ""
        self._traces: list[_Trace] = []
        self._chain: frozenset[str] = frozenset()

    def vision_units(self) -> list[str]:
        """Return the vision tower's units: its blocks, then the projector's modules where they are part of the tower."""
        blocks = [name for container in self.family.vision_blocks for name in self._blocks(container)]
        return [*blocks, *(name for name in self._projector() if self._inside_vision(name))]

    def decoder_units(self) -> list[str]:
        """Return the decoder's blocks in order, then the projections of their output (as CLIP's text tower has)."""
        return [*self._blocks(self.family.blocks), *self._projections()]

    @torch.no_grad()
    def walk(self, units: Sequence[str]) -> Iterator[BlockVisit]:
        """Visit units of the vision tower, or of the decoder (the output head may follow its blocks), in the order they run.

        To visit both, walk the vision tower first. A unit's outputs are computed when the walk continues to the next. A batch that
        does not reach a unit is skipped for it.

        Raises:
            CheckpointError: weights are missing or not finite.
        """
        self.current = units[0]
        inside_vision = self._inside_vision(units[0])
        # the vision tower cannot be recorded as a whole while its blocks are being visited
        frontends = (self.family.embeddings,) if inside_vision else self.family.frontends
        self._chain = self._chained(units)
        later = self._loaded_later(frontends)
        self._load(name for name in self._tensors_between(units) if not any(within(name, module) for module in later))
        self._first_pass(units, frontends)
        # their outputs are recorded, so that the visits need no weights but those of the visited unit
        for name in (*frontends, *self._chain):
            unload(self.model.get_submodule(name))
        units = self._in_order(units)
        for index, name in enumerate(units):
            yield from self._visit(units, index, frontends)
            unload(self.model.get_submodule(name))
        # the patch embedding and the merger as well: the decoder's walk replays their recorded outputs
        if inside_vision:
            for name in self.family.vision:
                unload(self.model.get_submodule(name))

    def _visit(self, units: Sequence[str], index: int, frontends: Sequence[str]) -> Iterator[BlockVisit]:
        self.current = name = units[index]
        # before the unit is loaded: a replay then never shares the device with the unit's weights
        calls = [self._call(batch, units, index, frontends) for batch in range(len(self._traces))]
        module = self.model.get_submodule(name)
        self.reader.load(module, name, self.config.device)
        readers = self.family.cross_attention_linears if within(name, self.family.blocks) else ()
        visit = BlockVisit(name, module, [call for call in calls if call is not None], self.config.device, readers)
        yield visit
        # nothing reads the last decoder unit's output; the last vision block's feeds the decoder's walk
        if index + 1 == len(units) and not self._inside_vision(name):
            return
        for trace, call in zip(self._traces, calls, strict=True):
            if call is not None:
                trace.outputs[name] = self.host.offload_all(visit.run(call))

    def _call(self, batch: int, units: Sequence[str], index: int, frontends: Sequence[str]) -> Call | None:
        name, trace = units[index], self._traces[batch]
        if name in self._chain and name not in trace.order:
            return None
        if name in trace.calls:
            # taken out, so that the host memory of arguments is free once their unit has been visited
            args, kwargs = trace.calls.pop(name)
            previous = _previous_unit(trace, name)
            output = trace.outputs[previous] if previous else None
            args, kwargs = insert_previous(args, output), insert_previous(kwargs, output)
        else:
            recorded = self._replay(batch, units[index:], frontends)
            if recorded is None:
                return None
            args, kwargs = recorded
        self._release(trace, units, index)
        return Call(args, kwargs, self._input_positions(name, trace, args, kwargs), batch)

    def _release(self, trace: _Trace, units: Sequence[str], index: int) -> None:
        """Free the outputs that this batch's later replays do not need, once the call of `units[index]` is known."""
        previous = _previous_unit(trace, units[index])
        if not self._inside_vision(units[index]) and not self._replays(trace, units[index + 1 :]):
            trace.frontends.clear()
            trace.outputs.clear()
        elif previous in trace.read_by_next:
            # replays still need the shape: a stub returns zeros of it
            trace.outputs[previous] = map_tensors(trace.outputs[previous], _without_data)

    def _replays(self, trace: _Trace, units: Sequence[str]) -> bool:
        """Return whether any of the units needs a replay to determine this batch's arguments for it."""
        return any(name not in trace.calls and (name in trace.order or name not in self._chain) for name in units)

    def _chained(self, units: Sequence[str]) -> frozenset[str]:
        """Return the units that a first pass can run through: all of the vision tower, and the decoder's blocks."""
        inside = self._inside_vision(units[0])
        return frozenset(name for name in units if inside or within(name, self.family.blocks))

    def _in_order(self, units: Sequence[str]) -> list[str]:
        """Return the units in the order of the batch that calls most of them; each other one follows its predecessor in `units`."""
        # a text-only batch skips blocks of cross-attention, so one that calls most units gives the order
        ordered = list(max((trace.order for trace in self._traces), key=len, default=list[str]()))
        for index, name in enumerate(units):
            if name not in ordered:
                ordered.insert(ordered.index(units[index - 1]) + 1 if index else 0, name)
        return ordered

    def _inside_vision(self, name: str) -> bool:
        return self.family.inside_vision(name)

    def _blocks(self, container: str) -> list[str]:
        return [f"{container}.{name}" for name, _ in self.model.get_submodule(container).named_children()]

    def _tensors_between(self, units: Sequence[str]) -> list[str]:
        """Return the tensors that a first pass needs: those of the frontends and of all modules between the units."""
        visited = {name for trace in self._traces for name in trace.outputs}
        stubbed = (name for name in units if name not in self._chain or name not in self.family.projector)
        excluded = (*stubbed, *visited, *self._blocks(self.family.blocks), *self._projections(), *self._heads())
        return [name for name in self.model.state_dict() if not any(within(name, module) for module in excluded)]

    def _load(self, tensors: Iterable[str]) -> None:
        for name in tensors:
            self.reader.load_tensor(self.model, name, name, self.config.device)

    def _loaded_later(self, frontends: Sequence[str]) -> list[str]:
        """Return the modules that are loaded when they are called, as text needs no vision tower.

        Not for a family without a record: Idefics3, for one, asks its first parameter for its device before any call.
        """
        return [] if self.family.derived else [name for name in frontends if name != self.family.embeddings]

    def _loaded_when_called(self, name: str, units: Sequence[str]) -> Forward:
        """Return the forward of a module before the blocks, which loads its tensors first."""
        forward = self.model.get_submodule(name).forward
        # now: which tensors a pass needs depends on what was visited before it
        missing = [tensor for tensor in self._tensors_between(units) if within(tensor, name)]

        def run(*args: Any, **kwargs: Any) -> Any:
            self._load(missing)
            missing.clear()
            return forward(*args, **kwargs)

        return run

    def _first_pass(self, units: Sequence[str], frontends: Sequence[str]) -> None:
        """Run each batch with a recording stub for every unit, to learn their order and which are fed directly."""
        first = not self._traces
        later = self._loaded_later(frontends)
        forwards = {name: self.model.get_submodule(name).forward for name in frontends}
        forwards |= {name: self._loaded_when_called(name, units) for name in later}
        for index, batch in enumerate(self.config.batches):
            inputs = batch.inputs()
            if first:
                self._traces.append(_Trace(self._token_positions(inputs)))
            trace = self._traces[index]
            recorder = Recorder(self.host)
            stubs: dict[str, Forward] = {name: _stub(output, self.config.device) for name, output in trace.outputs.items()}
            stubs |= {name: recorder.stub(name, self._projector_forward(name)) for name in self._chain}
            stubs |= dict.fromkeys(self._units_to_stop_at(units), recorder.stop)
            outputs: dict[str, list[Any]] = {name: [] for name in frontends}
            for name in frontends:
                stubs[name] = _with_recorded_outputs(stubs.get(name, forwards[name]), outputs[name], self.host)
            with recorder:
                self._forward(inputs, stubs)
            recorder.finish()
            trace.outputs.clear()
            trace.calls, trace.read_by_next, trace.order = recorder.calls, recorder.read_by_next, recorder.order
            # where every unit is fed directly, no replay reads the embeddings and image features: not kept
            if self._replays(trace, units):
                trace.frontends = outputs

    def _projector_forward(self, name: str) -> Forward | None:
        """Return the forward of a projector's module, whose output does not have the shape of its input; None for a block."""
        return self.model.get_submodule(name).forward if name in self.family.projector else None

    def _replay(self, batch: int, remaining: Sequence[str], frontends: Sequence[str]) -> tuple[Any, Any] | None:
        """Return the arguments of the unit `remaining[0]`, or None where the model's forward does not call it for this batch."""
        recorded: list[tuple[Any, Any]] = []

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            recorded.append((self.host.offload_all(args), self.host.offload_all(kwargs)))
            raise ReachedError

        stubs = (
            self._output_stubs(batch, frontends) | dict.fromkeys(self._units_to_stop_at(remaining), _stop) | {remaining[0]: stop}
        )
        self._forward(self.config.batches[batch].inputs(), stubs)
        return recorded[0] if recorded else None

    def release(self) -> None:
        """Free what visits still need: none is possible afterwards."""
        self._traces.clear()

    def head_input(self, batch: int, outputs: Mapping[str, Any]) -> Tensor:
        """Return the output head's input for a batch, with gradients, where the blocks return `outputs`.

        Only during the visit of the last block, in a walk that continues to the head; `outputs` must have that block's. Earlier
        blocks return the outputs of their visits.
        """
        assert self.family.head is not None
        recorded: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> NoReturn:
            recorded.append(hidden_states(args, kwargs))
            raise ReachedError

        stubs = self._output_stubs(batch, self.family.frontends) | {self.family.head: stop}
        stubs |= {name: _stub_with_gradients(output) for name, output in outputs.items()}
        # a stage runs under no_grad as a whole
        with torch.enable_grad():
            self._forward(self.config.batches[batch].inputs(), stubs)
        return recorded[0]

    def _output_stubs(self, batch: int, frontends: Sequence[str]) -> dict[str, Forward]:
        """Return stubs for a batch's visited units and its frontends, which return their stored outputs."""
        trace = self._traces[batch]
        stubs: dict[str, Forward] = {name: _stub(output, self.config.device) for name, output in trace.outputs.items()}
        return stubs | {name: _stub_per_call(name, trace.frontends.get(name, []), self.config.device) for name in frontends}

    def _units_to_stop_at(self, units: Sequence[str]) -> list[str]:
        """Return the units at which a forward has to stop: they are not visited yet, and have no weights."""
        later = [name for name in units if name not in self._chain]
        if self._inside_vision(units[0]):
            later.append(self._blocks(self.family.blocks)[0])
        return [*later, *(name for name in (*self._projections(), *self._heads()) if name not in units)]

    def _heads(self) -> list[str]:
        return [] if self.family.head is None else [self.family.head]

    def _projector(self) -> list[str]:
        """Return the projector's modules; of a `ModuleList`, which is never called itself, its children."""
        modules = ((name, self.model.get_submodule(name)) for name in self.family.projector)
        return [unit for name, module in modules for unit in (self._blocks(name) if isinstance(module, nn.ModuleList) else [name])]

    def _projections(self) -> list[str]:
        return [name for name in self._projector() if not self._inside_vision(name)]

    def _forward(self, inputs: Mapping[str, Tensor], stubs: Mapping[str, Forward]) -> None:
        move = _to_device(self.config.device)
        with replace_forwards(self.model, stubs), float32_products(self.config.device):
            try:
                entry = self.model.get_submodule(self.family.entry(inputs))
                # without a cache: stubs would not fill it, and blocks with weights would keep keys and values on the device
                entry(**{name: move(value) for name, value in inputs.items()}, use_cache=False)
            except ReachedError:
                return

    def _token_positions(self, inputs: Mapping[str, Tensor]) -> Positions:
        tokens = inputs["input_ids"]
        # with cross-attention an image token is a token like any other in the decoder: the features enter beside it
        placeholders = () if self.family.cross_attention_linears else self.family.placeholders(self.config.checkpoint.config)
        vision = torch.isin(tokens, torch.tensor(placeholders, dtype=tokens.dtype)).reshape(-1)
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(vision) if mask is None else mask.bool().reshape(-1)
        tiles = _attended_tiles(inputs.get(self.family.image_mask), valid)
        return Positions(text=valid & ~vision, vision=valid & vision, images=tiles)

    def _input_positions(self, name: str, trace: _Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Positions | None:
        """Return the positions of a unit's input."""
        states = hidden_states(args, kwargs)
        rows = states.numel() // states.shape[-1]
        if self._inside_vision(name):
            return _without_padding(trace.positions.of_images(rows), kwargs.get("attention_mask"), rows)
        if rows == len(trace.positions.text):
            return trace.positions
        every = torch.ones(rows, dtype=torch.bool)  # one row per text, such as CLIP's pooled states
        return Positions(text=every, vision=~every)


def _previous_unit(trace: _Trace, name: str) -> str:
    """Return the unit that a batch called before this one, empty for the first."""
    # a unit that is not in the order is the head or a projection: they run after all blocks
    index = trace.order.index(name) if name in trace.order else len(trace.order)
    return trace.order[index - 1] if index else ""


def _attended_tiles(mask: Tensor | None, valid: Tensor) -> Tensor | None:
    """Return which image tiles any valid token attends to, from the cross-attention mask [samples, tokens, images, tiles]."""
    if mask is None:
        return None
    tokens = valid.view(*mask.shape[:2], *[1] * (mask.dim() - 2))
    return (mask.bool() & tokens).any(dim=1).reshape(-1)


def _without_padding(positions: Positions | None, mask: Any, rows: int) -> Positions | None:
    """Return positions without the padding rows of a vision block: those that its attention mask hides even from themselves."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[0] * mask.shape[-1] != rows:
        return positions
    # a token always sees itself, unless it is padding: the diagonal tells them apart, in boolean and additive masks alike
    diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1).reshape(-1)
    vision = diagonal if diagonal.dtype == torch.bool else diagonal == 0
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


def _to_device(device: str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _stub(output: Any, device: str) -> Forward:
    """Return a forward that returns a stored output, with zeros for tensors whose data was freed."""

    def materialize(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return tensor.to(device)

    return lambda *args, **kwargs: map_tensors(output, materialize)


def _stub_with_gradients(output: Any) -> Forward:
    return lambda *args, **kwargs: output


def _stub_per_call(name: str, outputs: list[Any], device: str) -> Forward:
    # by call, since a module may run several times in one forward, as Qwen's tower does for images and for videos
    remaining = iter(outputs)

    def run(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        try:
            return map_tensors(next(remaining), _to_device(device))
        except StopIteration:
            raise CheckpointError(f"{name}: the model calls it another number of times than before; it cannot be walked") from None

    return run


def _with_recorded_outputs(forward: Forward, outputs: list[Any], host: HostMemory) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        outputs.append(host.offload_all(output))
        return output

    return run
