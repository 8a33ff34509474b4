"""Which of a model's modules feed which, seen by following every tensor through one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from compress.engine.host import map_tensors

_RESHAPED = {"view", "_unsafe_view", "reshape"}
_SAME_CHANNELS = {"transpose", "permute", "t", "expand", "clone", "unsqueeze", "squeeze", "alias", "detach"}
"""Operations that put a tensor's numbers elsewhere and change none."""


@dataclass(frozen=True)
class Operation:
    """One operation: what it was given and gave back, and the module that was running, empty for the code between modules."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: str


@dataclass
class Called:
    """What a module was given and returned, at each of its calls."""

    inputs: list[Tensor] = field(default_factory=lambda: list[Tensor]())
    outputs: list[Tensor] = field(default_factory=lambda: list[Tensor]())


class Flow(TorchDispatchMode):
    """Records, while active, every operation and every call of the given modules (by name); they must not contain each other."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.called: dict[str, Called] = {}
        self._readers: dict[int, list[Operation]] = {}
        self._modules = modules
        self._running = ""
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Flow:
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after(name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Let an operation happen and note it."""
        del types
        output = func(*args, **(kwargs or {}))
        step = Operation(func.overloadpacket.__name__, func, args, kwargs or {}, tuple(_tensors(output)), self._running)
        for tensor in _tensors((args, kwargs or {})):
            self._readers.setdefault(id(tensor), []).append(step)  # the step holds the tensor, so its id stays its own
        return output

    def readers(self, tensor: Tensor) -> Sequence[Operation]:
        """Return the operations that were given a tensor."""
        return self._readers.get(id(tensor), ())

    def fed(self, tensor: Tensor) -> tuple[str, ...]:
        """Return the modules whose input a tensor is, in the order they run; empty where anything else reads it too."""
        found = [name for name, called in self.called.items() if any(given is tensor for given in called.inputs)]
        return tuple(found) if all(step.module in found for step in self.readers(tensor)) else ()

    def multiplied(self, tensor: Tensor) -> Tensor | None:
        """Return the product of a tensor and another of its shape, None where anything else is done with it."""
        readers = self.readers(tensor)
        if len(readers) != 1 or readers[0].name != "mul" or readers[0].module:
            return None
        product = readers[0].outputs[0]
        factors = list(_tensors(readers[0].args))
        return product if len(factors) == 2 and all(factor.shape == tensor.shape for factor in factors) else None

    def through_attention(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Follow values through attention to the one module they reach.

        Returns its name and, for each of its input channels, which channel of `tensor` it carries [in]; None where something else
        happens on the way.
        """
        numbers = torch.arange(tensor.shape[-1], dtype=torch.float32).expand(tensor.shape).clone()
        carried: list[tuple[Tensor, Tensor]] = [(tensor, numbers)]
        reached: dict[str, Tensor] = {}
        while carried:
            values, channels = carried.pop()
            ends = self.fed(values)
            if ends:
                reached |= {name: channels.reshape(-1, channels.shape[-1])[0] for name in ends}
                continue
            following = [_carry(step, values, channels) for step in self.readers(values)]
            if not following or any(pair is None for pair in following):
                return None
            carried += [pair for pair in following if pair is not None]
        return next(iter(reached.items())) if len(reached) == 1 else None

    def _before(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            self._running = name
            self.called.setdefault(name, Called()).inputs.extend(list(_tensors((args, kwargs)))[:1])

        return note

    def _after(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del module, args
            self._running = ""
            self.called[name].outputs.extend(list(_tensors(output))[:1])

        return note


def _carry(step: Operation, values: Tensor, channels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what an operation makes of values whose channels are numbered, None where it does not keep them apart."""
    if step.module:
        return None
    if step.name in _RESHAPED:
        return step.outputs[0], channels.reshape(step.args[1])
    if step.name in _SAME_CHANNELS:
        return step.outputs[0], step.function(channels, *step.args[1:], **step.kwargs)
    if "scaled_dot_product" in step.name and len(step.args) > 2 and step.args[2] is values:
        heads = step.outputs[0].shape[1] // channels.shape[1]
        return step.outputs[0], channels.repeat_interleave(heads, dim=1)
    if step.name in ("bmm", "matmul") and [argument is values for argument in step.args] == [False, True]:
        return step.outputs[0], channels
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return iter(found)


def divides(norm: nn.Module) -> bool:
    """Return whether dividing a norm's weight and bias by a scale divides its output by it, tried on numbers.

    It does not where the weight's distance from one is what is stored (Gemma).
    """
    shapes = {name: parameter.shape for name, parameter in norm.named_parameters()}
    if "weight" not in shapes or any(len(shape) != 1 or name not in ("weight", "bias") for name, shape in shapes.items()):
        return False
    generator = torch.Generator().manual_seed(0)
    width = shapes["weight"][0]
    copy = deepcopy(norm).to_empty(device="cpu").to(torch.float32)
    values = {name: torch.rand(width, generator=generator) + 0.5 for name in shapes}
    scale = torch.rand(width, generator=generator) + 0.5
    states = torch.randn(4, width, generator=generator)
    with torch.no_grad():
        outputs: list[Tensor] = []
        for divisor in (torch.ones(width), scale):
            for name, value in values.items():
                cast("Tensor", copy.get_parameter(name)).copy_(value / divisor)
            outputs.append(cast("Tensor", copy(states)))
    return bool(torch.allclose(outputs[0] / scale, outputs[1], rtol=1e-4, atol=1e-5))
