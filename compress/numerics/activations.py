"""A linear's input rounded to 8 bits and back, as a stage that quantizes lets the running model compute on.

A runtime rounds by a scale that brings the largest value to the largest code (127, or 448 for float8 e4m3fn), to the nearest code,
ties to even. Reading an artifact does the same by code of its own (`compress/runtimes/activations.py`), so that neither is held
against itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from compress.numerics.scheme import BLOCK, Scheme

_LARGEST = {"int": 127.0, "float": 448.0}


def fake_quantize_activations(inputs: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Tensor:
    """Return inputs [..., in] as a runtime that quantizes them by a linear's scheme computes with them, in their own type.

    `scale` [1] is that of the whole input where it is fixed (`activations: tensor`).

    Raises:
        ValueError: the scheme's inputs have a fixed scale, and none is given.
    """
    exact = inputs.float()
    if scheme.activations == "tensor":
        if scale is None:
            raise ValueError("inputs of a fixed scale cannot be rounded without it")
        return _round(exact, scale.float(), scheme).to(inputs.dtype)
    width = BLOCK if scheme.activations == "group" else exact.shape[-1]
    split = cast("Sequence[Tensor]", exact.split(width, dim=-1))
    parts = [_round(part, _dynamic_scale(part, scheme), scheme) for part in split]
    return torch.cat(parts, dim=-1).to(inputs.dtype)


def _dynamic_scale(values: Tensor, scheme: Scheme) -> Tensor:
    """Return the scale of each row [..., 1]; 1 where all of it is zero."""
    scale = values.abs().max(dim=-1, keepdim=True).values / _LARGEST[scheme.type]
    return scale.masked_fill(scale == 0, 1.0)


def _round(values: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    codes = values.div(scale)
    if scheme.type == "float":
        largest = _LARGEST["float"]
        return codes.clamp(-largest, largest).to(torch.float8_e4m3fn).to(torch.float32).mul(scale)
    return codes.round().clamp(-_LARGEST["int"] - 1, _LARGEST["int"]).mul(scale)
