"""Fake quantization of input activations: linears whose inputs a runtime quantizes get them rounded the same way here.

As in vLLM's kernels, the scale maps the largest magnitude to the largest code (127, or 448 for float8 e4m3fn), codes are rounded to
nearest even and clamped. Products and sums are then computed in the model's dtype, where an integer kernel accumulates exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from compress.checkpoints.checkpoint import Checkpoint
from compress.families import Family
from compress.numerics.scheme import Activations
from compress.runtimes.unpack import open_tensors, settings_of
from compress.untrusted.reading import library_errors

_GROUP = 128
"""Channels per scale of `strategy: group`: vLLM's FP8 block kernels quantize inputs in such groups."""

_FLOAT8_MAX = 448.0
"""The largest float8 e4m3fn."""

# A context variable: hooks cannot be given an argument, and a comparison of weights must not switch off another thread's rounding.
_ENABLED: ContextVar[bool] = ContextVar("rounding", default=True)


def fake_quantize_activations(
    inputs: Tensor,
    kind: Activations,
    type: Literal["int", "float"],  # noqa: A002
    bits: int,
    scale: Tensor | None,
) -> Tensor:
    """Return activations [..., in] quantized and dequantized, in their own dtype.

    `kind` is the strategy: a scale per `token`, per `group` of 128 channels of a token, or the static `scale` [1] of the `tensor`.
    Floats are 8 bits (e4m3fn), integers `bits`.
    """
    # In float32, as the kernels do: a bfloat16 quotient would move codes by its own rounding.
    values = inputs.to(torch.float32)
    max_code = _FLOAT8_MAX if type == "float" else 2.0 ** (bits - 1) - 1
    columns = values.shape[-1]
    if kind == "group":
        # Zeros do not change a group's largest magnitude, so that the last, shorter group gets its own scale.
        values = pad(values, (0, -columns % _GROUP)).view(*values.shape[:-1], -1, _GROUP)
    if kind == "tensor":
        if scale is None:
            raise ValueError("a fixed scale is needed to round a whole tensor")
        scales = scale.to(values)
    else:
        scales = values.abs().amax(dim=-1, keepdim=True) / max_code
        # A token of zeros: 0 / 0 would be NaN.
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = values / scales
    if type == "float":
        # Clamped as vLLM's kernels saturate, whatever torch's cast does beyond 448: e4m3fn has no infinity.
        codes = codes.clamp(-max_code, max_code).to(torch.float8_e4m3fn).to(torch.float32)
    else:
        # -128 is reached with a static scale only; a dynamic scale maps the largest magnitude to 127.
        codes = codes.round().clamp(-max_code - 1, max_code)
    dequantized = codes * scales
    if kind == "group":
        dequantized = dequantized.flatten(-2)[..., :columns]
    return dequantized.to(inputs.dtype)


@contextmanager
def activation_quantization_disabled() -> Generator[None]:
    """Disable fake quantization while the context lasts, to compare the weights alone."""
    token = _ENABLED.set(False)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def fake_quantize_inputs(checkpoint: Checkpoint, family: Family, modules: Mapping[str, nn.Module], device: torch.device) -> int:
    """Fake-quantize the input of every linear with `input_activations` in the artifact's config.json; return their number.

    `modules` are the model's, by their in-memory names.
    """
    quantization: Mapping[str, Any] = checkpoint.config.get("quantization_config") or {}
    if not any(group.get("input_activations") for group in quantization.get("config_groups", {}).values()):
        return 0
    count = 0
    where = f"{checkpoint.folder}/config.json: its input_activations cannot be used"
    with library_errors(where, remedy="export the artifact again"), open_tensors(checkpoint, device) as read:
        for name in checkpoint.tensors:
            owner, _, suffix = name.rpartition(".")
            # Every quantized linear has one `weight_scale`, whatever its format: counted by it, each is hooked once.
            settings = settings_of(quantization, owner)["input_activations"] if suffix == "weight_scale" else None
            if not settings:
                continue
            scale = None if settings["dynamic"] else read(f"{owner}.input_scale").to(torch.float32)
            modules[family.module_name(f"{owner}.weight").removesuffix(".weight")].register_forward_pre_hook(
                _fake_quantize_hook(settings, scale)
            )
            count += 1
    return count


def _fake_quantize_hook(
    settings: Mapping[str, Any], scale: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    kind, type_, bits = settings["strategy"], settings["type"], int(settings["num_bits"])

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        if not _ENABLED.get():
            return arguments
        return (fake_quantize_activations(arguments[0], kind, type_, bits, scale), *arguments[1:])

    return hook
