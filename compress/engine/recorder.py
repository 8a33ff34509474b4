"""Stubs that replace modules for one forward and record their calls, the order of the calls, and which outputs are read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.engine.host import HostMemory, map_tensors

Forward = Callable[..., Any]
"""A module's forward, or a replacement of it."""


class ReachedError(Exception):
    """Ends a forward once the module of interest is reached."""


class _Previous:
    """Placeholder, in recorded arguments, for the output of the unit called before."""


_PREVIOUS = _Previous()


class Recorder(TorchDispatchMode):
    """Replaces units (blocks and other modules) for one forward and records the calls of those that are fed directly.

    A unit is fed directly where its input is the previous unit's output, and nothing else of it depends on the units. `order` lists
    the units in the order of their calls. As an active context it sees every operation, and so which outputs are read outside of
    the next unit; the outputs of those in `read_by_next`, known once the forward has ended, are not.
    """

    def __init__(self, host: HostMemory) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, Any]] = {}
        self.order: list[str] = []
        self.read_by_next: frozenset[str] = frozenset()
        self._finished = False
        self._host = host
        self._tracking = True
        self._previous: Tensor | None = None
        self._returned: dict[str, list[ref[Tensor]]] = {}
        self._owners: dict[int, tuple[str, ref[Tensor]]] = {}
        self._read: set[str] = set()
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def stub(self, name: str, forward: Forward | None = None) -> Forward:
        """Return a replacement for the forward of unit `name`: zeros like the hidden states, or what `forward` returns."""

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = (args, kwargs)
            # the next unit is expected to read this output; only a read by anything else forbids feeding it directly
            map_tensors(arguments, lambda tensor: None if tensor is self._previous else self._mark_read(tensor))
            # the first unit has nothing before it: its arguments never depend on the units
            if not self.order or self._fed_directly(arguments):
                self.calls[name] = map_tensors(arguments, self._store)
            self.order.append(name)
            # zeros suffice: this pass learns which units read which outputs, not their values
            output = self._run_untracked(forward, arguments) if forward else _zeros_like(hidden_states(args, kwargs))
            returned: list[Tensor] = []
            map_tensors(output, returned.append)
            self._previous = output if isinstance(output, Tensor) else None
            # weak references: a tensor that is still alive at the end may be read later (deepstack, skip connections)
            self._returned[name] = [ref(tensor) for tensor in returned]
            self._owners |= {id(tensor): (name, ref(tensor)) for tensor in returned}
            return output

        return run

    def stop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """End the forward after the units that were called; outputs that are still referenced may be read by later modules."""
        map_tensors((args, kwargs), self._mark_read)
        self.finish()
        raise ReachedError

    def finish(self) -> None:
        """Determine which outputs only the next unit has read, after the last unit's call; later calls do nothing."""
        if self._finished:
            return
        self._finished = True
        referenced = {name for name, tensors in self._returned.items() if any(tensor() is not None for tensor in tensors)}
        self.read_by_next = frozenset(self._returned.keys() - self._read - referenced)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operation after marking the outputs that it reads."""
        del types
        if self._tracking:
            map_tensors((args, kwargs), self._mark_read)
        return func(*args, **(kwargs or {}))

    def _run_untracked(self, forward: Forward, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        self._tracking = False  # a unit reads nothing but its arguments, which were marked
        try:
            return forward(*arguments[0], **arguments[1])
        finally:
            self._tracking = True

    def _mark_read(self, tensor: Tensor) -> None:
        # an id may belong to a later tensor by now, so the reference is compared as well
        name, returned = self._owners.get(id(tensor), ("", None))
        if returned is not None and returned() is tensor:
            self._read.add(name)

    def _fed_directly(self, arguments: Any) -> bool:
        tensors: list[Tensor] = []
        map_tensors(arguments, tensors.append)
        reads_previous = any(tensor is self._previous for tensor in tensors)
        return reads_previous and all(tensor is self._previous or id(tensor) in self._seen for tensor in tensors)

    def _store(self, tensor: Tensor) -> Any:
        # not stored: the real output is only known when the previous unit is visited with its compressed weights
        if tensor is self._previous:
            return _PREVIOUS
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = (tensor, self._host.offload(tensor))  # a reference, so that its id is not reused
        return self._seen[id(tensor)][1]


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return a unit's input hidden states: the argument of that name, or else the first tensor."""
    named = kwargs.get("hidden_states")
    if isinstance(named, Tensor):
        return named
    tensors: list[Tensor] = []
    map_tensors((args, dict(kwargs)), tensors.append)
    return tensors[0]


def insert_previous(tree: Any, previous: Any) -> Any:
    """Return recorded arguments with the previous unit's output in place of its placeholder."""
    if isinstance(tree, _Previous):
        return previous
    if isinstance(tree, dict):
        return {key: insert_previous(value, previous) for key, value in cast("dict[str, Any]", tree).items()}
    if type(tree) is tuple:
        return tuple(insert_previous(value, previous) for value in cast("tuple[Any, ...]", tree))
    return tree


@contextmanager
def replace_forwards(model: nn.Module, stubs: Mapping[str, Forward]) -> Generator[None]:
    """Replace the forwards of modules, by name, inside the context."""
    modules = {model.get_submodule(name): stub for name, stub in stubs.items()}
    for module, stub in modules.items():
        # an instance attribute hides the class's forward from `__call__`, whose hooks still run; deleting it restores the forward
        module.forward = stub
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
