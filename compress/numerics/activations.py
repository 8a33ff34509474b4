"""Fake quantization of input activations to 8 bits, applied to the running model while later blocks are calibrated.

A scale maps the largest magnitude to the largest code (127, or 448 for float8 e4m3fn); rounding is to nearest, ties to even. The
runtime that evaluates artifacts has an implementation of its own (`compress/runtimes/activations.py`), so that a mistake here
does not hide itself there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from compress.numerics.scheme import BLOCK, Scheme

LARGEST_CODE = {"int": 127.0, "float": 448.0}
"""The code that the largest magnitude is mapped to: the largest of int8, and of float8 e4m3fn."""


def fake_quantize_activations(inputs: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Tensor:
    """Return activations [..., in], quantized by a linear's scheme and dequantized, in their own type.

    `scale` [1] is the static scale of a scheme with `activations: tensor`.

    Raises:
        ValueError: the scheme needs a static scale, and `scale` is None.
    """
    # a quotient in bfloat16 has 8 significant bits: near 127 it is rounded to half steps first, so that codes are rounded twice
    values = inputs.float()
    if scheme.activations == "tensor":
        if scale is None:
            raise ValueError("activations with a static scale cannot be quantized without it")
        return _round(values, scale.float(), scheme).to(inputs.dtype)
    width = BLOCK if scheme.activations == "group" else values.shape[-1]
    groups = cast("Sequence[Tensor]", values.split(width, dim=-1))
    rounded = [_round(group, _dynamic_scale(group, scheme), scheme) for group in groups]
    return torch.cat(rounded, dim=-1).to(inputs.dtype)


def _dynamic_scale(values: Tensor, scheme: Scheme) -> Tensor:
    """Return the dynamic scale of each row [..., 1]; 1 for a row of zeros."""
    scale = values.abs().max(dim=-1, keepdim=True).values / LARGEST_CODE[scheme.type]
    # a row of zeros would give 0 / 0, and attention carries a NaN to other tokens
    return scale.masked_fill(scale == 0, 1.0)


def _round(values: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    codes = values.div(scale)
    if scheme.type == "float":
        largest = LARGEST_CODE["float"]
        # clamped before the cast: beyond 448 torch's cast is NaN in some supported versions
        return codes.clamp(-largest, largest).to(torch.float8_e4m3fn).to(torch.float32).mul(scale)
    # a static scale meets larger values than those of calibration: kernels saturate at -128, a code that calibration never gives
    return codes.round().clamp(-LARGEST_CODE["int"] - 1, LARGEST_CODE["int"]).mul(scale)
