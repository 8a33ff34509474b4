"""Rounded activations in process: linears whose inputs a runtime rounds to 8 bits get them rounded the same way here.

As vLLM's kernels do it: a scale brings the largest value to the largest code (127, or 448 for float8 e4m3fn), codes are rounded to
the nearest, ties to even, and what lies beyond the range becomes its end. Products and sums are then those of the model's type,
where a kernel for integers sums exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from compress.checkpoint import Checkpoint
from compress.families import Family
from compress.numerics.scheme import Activations
from compress.runtimes.unpack import open_tensors, settings_of
from compress.untrusted import foreign

_GROUP = 128
_FLOAT8_MAX = 448.0
_ROUNDING: ContextVar[bool] = ContextVar("rounding", default=True)


def fake_quantize_activations(
    inputs: Tensor,
    kind: Activations,
    type: Literal["int", "float"],  # noqa: A002
    bits: int,
    scale: Tensor | None,
) -> Tensor:
    """Return inputs [..., in] as they are after rounding to codes and back, in their own type.

    `kind` says what has a scale of its own: each `token`, each `group` of 128 channels of a token, or the whole `tensor`, which
    then has the given `scale` [1]. Floats are always 8 bits (e4m3fn), integers `bits`.
    """
    values = inputs.to(torch.float32)
    largest = _FLOAT8_MAX if type == "float" else 2.0 ** (bits - 1) - 1
    columns = values.shape[-1]
    if kind == "group":
        values = pad(values, (0, -columns % _GROUP)).view(*values.shape[:-1], -1, _GROUP)
    if kind == "tensor":
        if scale is None:
            raise ValueError("a fixed scale is needed to round a whole tensor")
        steps = scale.to(values)
    else:
        steps = values.abs().amax(dim=-1, keepdim=True) / largest
        steps = torch.where(steps == 0, torch.ones_like(steps), steps)
    codes = values / steps
    if type == "float":
        codes = codes.clamp(-largest, largest).to(torch.float8_e4m3fn).to(torch.float32)
    else:
        codes = codes.round().clamp(-largest - 1, largest)
    rounded = codes * steps
    if kind == "group":
        rounded = rounded.flatten(-2)[..., :columns]
    return rounded.to(inputs.dtype)


@contextmanager
def activation_quantization_disabled() -> Generator[None]:
    """Have no linear round its input while the block runs: what the weights alone make of it is left."""
    token = _ROUNDING.set(False)
    try:
        yield
    finally:
        _ROUNDING.reset(token)


def round_inputs(checkpoint: Checkpoint, family: Family, modules: Mapping[str, nn.Module], device: torch.device) -> int:
    """Have every linear round its input which an artifact's config.json gives `input_activations`; return how many they are.

    `modules` are a model's by their names in memory.
    """
    quantization: Mapping[str, Any] = checkpoint.config.get("quantization_config") or {}
    if not any(group.get("input_activations") for group in quantization.get("config_groups", {}).values()):
        return 0
    count = 0
    where = f"{checkpoint.folder}/config.json: its input_activations cannot be used"
    with foreign(where, remedy="export the artifact again"), open_tensors(checkpoint, device) as read:
        for name in checkpoint.tensors:
            owner, _, part = name.rpartition(".")
            settings = settings_of(quantization, owner)["input_activations"] if part == "weight_scale" else None
            if not settings:
                continue
            scale = None if settings["dynamic"] else read(f"{owner}.input_scale").to(torch.float32)
            modules[family.module_name(f"{owner}.weight").removesuffix(".weight")].register_forward_pre_hook(
                _rounder(settings, scale)
            )
            count += 1
    return count


def _rounder(settings: Mapping[str, Any], scale: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    kind, sort, bits = settings["strategy"], settings["type"], int(settings["num_bits"])

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        if not _ROUNDING.get():
            return arguments
        return (fake_quantize_activations(arguments[0], kind, sort, bits, scale), *arguments[1:])

    return hook
