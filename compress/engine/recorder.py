"""What takes the place of a model's parts for one forward, and learns how they are called and in which order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.engine.host import Host, map_tensors

Forward = Callable[..., Any]


class ReachedError(Exception):
    """Unwinds a forward once what was wanted of it is there."""


class _Previous:
    """Stands in recorded arguments for what the part called before returned."""


_PREVIOUS = _Previous()


class Recorder(TorchDispatchMode):
    """Takes the place of parts of a model for one forward and records the calls of those that are fed directly.

    `order` has the parts in the order of their calls. Active as a context, it sees every operation, and so which outputs are read
    elsewhere than in the next part; those that are not are `idle` once the forward has ended.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, Any]] = {}
        self.order: list[str] = []
        self.idle: frozenset[str] = frozenset()
        self._finished = False
        self._host = host
        self._listening = True
        self._previous: Tensor | None = None
        self._returned: dict[str, list[ref[Tensor]]] = {}
        self._owners: dict[int, tuple[str, ref[Tensor]]] = {}
        self._read: set[str] = set()
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def stub(self, name: str, forward: Forward | None = None) -> Forward:
        """Return what runs in place of the part `name`: zeros of the shape of the hidden states, or what `forward` gives."""

        def run(*args: Any, **kwargs: Any) -> Any:
            given = (args, kwargs)
            map_tensors(given, lambda tensor: None if tensor is self._previous else self._note(tensor))
            if not self.order or self._direct(given):
                self.calls[name] = map_tensors(given, self._keep)
            self.order.append(name)
            output = self._unheard(forward, given) if forward else _zeros_like(hidden_states(args, kwargs))
            returned: list[Tensor] = []
            map_tensors(output, returned.append)
            self._previous = output if isinstance(output, Tensor) else None
            self._returned[name] = [ref(tensor) for tensor in returned]
            self._owners |= {id(tensor): (name, ref(tensor)) for tensor in returned}
            return output

        return run

    def stop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """End the forward behind the parts that were called; what is still held by then may be read by what comes after."""
        map_tensors((args, kwargs), self._note)
        self.finish()
        raise ReachedError

    def finish(self) -> None:
        """Say which outputs only the next part has read, once no part is called any more; counts the first time alone."""
        if self._finished:
            return
        self._finished = True
        held = {name for name, tensors in self._returned.items() if any(tensor() is not None for tensor in tensors)}
        self.idle = frozenset(self._returned.keys() - self._read - held)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Let an operation happen, having noted what it reads."""
        del types
        if self._listening:
            map_tensors((args, kwargs), self._note)
        return func(*args, **(kwargs or {}))

    def _unheard(self, forward: Forward, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        self._listening = False  # what a part reads, it is given
        try:
            return forward(*given[0], **given[1])
        finally:
            self._listening = True

    def _note(self, tensor: Tensor) -> None:
        name, returned = self._owners.get(id(tensor), ("", None))
        if returned is not None and returned() is tensor:
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


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the states that a part is given: the argument of that name, or the first tensor there is."""
    named = kwargs.get("hidden_states")
    if isinstance(named, Tensor):
        return named
    tensors: list[Tensor] = []
    map_tensors((args, dict(kwargs)), tensors.append)
    return tensors[0]


def fill(tree: Any, previous: Any) -> Any:
    """Put what the part called before returned into recorded arguments."""
    if isinstance(tree, _Previous):
        return previous
    if isinstance(tree, dict):
        return {key: fill(value, previous) for key, value in cast("dict[str, Any]", tree).items()}
    if type(tree) is tuple:
        return tuple(fill(value, previous) for value in cast("tuple[Any, ...]", tree))
    return tree


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


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
