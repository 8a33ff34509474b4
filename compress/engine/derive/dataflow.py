"""Data flow between a model's modules, recorded by following every tensor through one forward."""

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
"""Operations that change a tensor's shape and keep the order of its elements."""

_SAME_CHANNELS = {"transpose", "permute", "t", "expand", "clone", "unsqueeze", "squeeze", "alias", "detach"}
"""Operations that move a tensor's elements without changing them."""


@dataclass(frozen=True)
class Operation:
    """One operation with its arguments and outputs; `module` is the running module, empty for code between modules."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: str


@dataclass
class ModuleCalls:
    """The inputs and outputs of a module, by call."""

    inputs: list[Tensor] = field(default_factory=lambda: list[Tensor]())
    outputs: list[Tensor] = field(default_factory=lambda: list[Tensor]())


class DataFlow(TorchDispatchMode):
    """Records, while active, every operation and every call of some modules (by name), which must not contain each other."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.called: dict[str, ModuleCalls] = {}
        self._readers: dict[int, list[Operation]] = {}
        self._modules = modules
        self._running = ""
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> DataFlow:
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
        """Run and record an operation."""
        del types
        output = func(*args, **(kwargs or {}))
        operation = Operation(func.overloadpacket.__name__, func, args, kwargs or {}, tuple(_tensors(output)), self._running)
        for tensor in _tensors((args, kwargs or {})):
            self._readers.setdefault(id(tensor), []).append(operation)  # which references the tensor, so that its id is not reused
        return output

    def readers(self, tensor: Tensor) -> Sequence[Operation]:
        """Return the operations that read a tensor."""
        return self._readers.get(id(tensor), ())

    def fed(self, tensor: Tensor) -> tuple[str, ...]:
        """Return the modules whose input a tensor is, in the order they run; empty where other operations read it too."""
        modules = [name for name, calls in self.called.items() if any(argument is tensor for argument in calls.inputs)]
        return tuple(modules) if all(operation.module in modules for operation in self.readers(tensor)) else ()

    def multiplied(self, tensor: Tensor) -> Tensor | None:
        """Return the product of a tensor and another of its shape; None where it is used in another way."""
        readers = self.readers(tensor)
        if len(readers) != 1 or readers[0].name != "mul" or readers[0].module:
            return None
        product = readers[0].outputs[0]
        factors = list(_tensors(readers[0].args))
        return product if len(factors) == 2 and all(factor.shape == tensor.shape for factor in factors) else None

    def through_attention(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Follow attention's values to the one module that they reach.

        Returns its name and, for each of its input channels [in], the channel of `tensor` that it contains; None where other
        operations are applied on the way.
        """
        # the attention's own reshapes are repeated on channel numbers, which float32 holds exactly up to 2^24
        numbers = torch.arange(tensor.shape[-1], dtype=torch.float32).expand(tensor.shape).clone()
        pending: list[tuple[Tensor, Tensor]] = [(tensor, numbers)]
        reached: dict[str, Tensor] = {}
        while pending:
            values, channels = pending.pop()
            fed = self.fed(values)
            if fed:
                reached |= {name: channels.reshape(-1, channels.shape[-1])[0] for name in fed}
                continue
            following = [_apply(operation, values, channels) for operation in self.readers(values)]
            # one unknown reader is enough: a scale would change what it computes
            if not following or any(pair is None for pair in following):
                return None
            pending += [pair for pair in following if pair is not None]
        return next(iter(reached.items())) if len(reached) == 1 else None

    def _before(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            self._running = name
            self.called.setdefault(name, ModuleCalls()).inputs.extend(list(_tensors((args, kwargs)))[:1])

        return note

    def _after(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del module, args
            self._running = ""
            self.called[name].outputs.extend(list(_tensors(output))[:1])

        return note


def _apply(operation: Operation, values: Tensor, channels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return an operation's output and its channel numbers, for values with numbered channels; None where it mixes channels."""
    if operation.module:
        return None
    if operation.name in _RESHAPED:
        return operation.outputs[0], channels.reshape(operation.args[1])
    if operation.name in _SAME_CHANNELS:
        return operation.outputs[0], operation.function(channels, *operation.args[1:], **operation.kwargs)
    if "scaled_dot_product" in operation.name and len(operation.args) > 2 and operation.args[2] is values:
        # grouped-query attention may be inside the kernel (enable_gqa): the output has more heads than the values
        heads = operation.outputs[0].shape[1] // channels.shape[1]
        return operation.outputs[0], channels.repeat_interleave(heads, dim=1)
    # eager attention: probabilities times values; as the right factor the values keep their channels
    if operation.name in ("bmm", "matmul") and [argument is values for argument in operation.args] == [False, True]:
        return operation.outputs[0], channels
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    tensors: list[Tensor] = []
    map_tensors(tree, tensors.append)
    return iter(tensors)


def divides(norm: nn.Module) -> bool:
    """Return whether dividing a norm's weight and bias by a scale divides its output by it, tested numerically.

    It does not where the norm multiplies by 1 + weight (Gemma).
    """
    shapes = {name: parameter.shape for name, parameter in norm.named_parameters()}
    if "weight" not in shapes or any(len(shape) != 1 or name not in ("weight", "bias") for name, shape in shapes.items()):
        return False
    generator = torch.Generator().manual_seed(0)
    width = shapes["weight"][0]
    # the model's norm is on the meta device and computes nothing
    copy = deepcopy(norm).to_empty(device="cpu").to(torch.float32)
    # away from zero, so that a relative tolerance is meaningful for every channel
    values = {name: torch.rand(width, generator=generator) + 0.5 for name in shapes}
    scale = torch.rand(width, generator=generator) + 0.5
    states = torch.randn(4, width, generator=generator)
    with torch.no_grad():
        outputs: list[Tensor] = []
        for divisor in (torch.ones(width), scale):
            for name, value in values.items():
                cast("Tensor", copy.get_parameter(name)).copy_(value / divisor)
            outputs.append(cast("Tensor", copy(states)))
    # wide enough for float32 rounding, far below the difference of a norm that multiplies by 1 + weight
    return bool(torch.allclose(outputs[0] / scale, outputs[1], rtol=1e-4, atol=1e-5))
