"""From a block's weights and what its linears were given to their codes: how each method moves scales and rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from compress.engine.statistics import Moments
from compress.families import Pair
from compress.numerics.gptq import Gptq, round_columns
from compress.numerics.grids import QuantizedWeight, Scheme
from compress.numerics.rounding import clip, quantize
from compress.stages.awq_solver import fold
from compress.stages.block import BlockWeights, input_gram, input_max
from compress.stages.smooth_solver import Smoothing, smooth

_SCORES = frozenset({"q_proj", "k_proj", "qkv", "qkv_proj", "query", "key", "query_key_value", "Wqkv", "c_attn", "in_proj"})
"""Layers whose outputs meet in attention's scores. Their ranges stay whole, as in AWQ's own code: what clipping them loses on
average is little, but it changes which tokens are seen."""

_INPUT_LARGEST = {"int": 127.0, "float": 448.0}


@dataclass(frozen=True)
class Method:
    """How a block is quantized.

    `scales` is into how many steps the search of AWQ's scales is divided, None for no scales; `smoothing` likewise for
    SmoothQuant's; `clip` is into how many steps the search of each group's range is divided, None for the whole range; `gptq` says
    how columns make up for each other's errors, None for each weight's nearest code.
    """

    scales: int | None = None
    smoothing: Smoothing | None = None
    clip: int | None = None
    gptq: Gptq | None = None


def solve(
    block: BlockWeights,
    pairs: Sequence[Pair],
    moments: Mapping[str, Moments],
    schemes: Mapping[str, Scheme],
    method: Method,
) -> dict[str, QuantizedWeight]:
    """Return each linear's codes, their scales in the type its weight is stored in.

    `block.changed` then holds the norms and biases that go with them. Names are relative to the block.

    Raises:
        CheckpointError: what a linear was given cannot be worked with.
    """
    for pair in pairs:
        if method.scales is not None:
            fold(block, pair, moments, schemes, method.scales)
        if method.smoothing is not None:
            smooth(block, pair, moments, schemes, method.smoothing)
    return {name: round_linear(block, name, moments.get(name), schemes[name], method) for name in block.weights}


def round_linear(block: BlockWeights, name: str, moments: Moments | None, scheme: Scheme, method: Method) -> QuantizedWeight:
    """Return one linear's codes; only a method without statistics can do without `moments`."""
    weight, dtype = block.weights[name], block.precision(f"{name}.weight")
    shrink = 1.0
    if scheme.type == "int" and moments is not None and (method.clip is not None or method.gptq is not None):
        gram = input_gram(block, name, moments)
        if method.clip is not None and name.rpartition(".")[2] not in _SCORES:
            shrink = clip(weight, gram, scheme, dtype, method.clip)
        if method.gptq is not None:
            rounded = round_columns(weight, gram, scheme, dtype, method.gptq, shrink)
        else:
            rounded = quantize(weight, scheme, dtype, shrink)
        del gram
    else:
        rounded = quantize(weight, scheme, dtype, shrink)
    rounded = replace(rounded, scales=rounded.scales.to(block.current(f"{name}.weight").dtype))
    if scheme.activations != "tensor":
        return rounded
    assert moments is not None
    largest = input_max(block, name, moments).max().clamp(min=torch.finfo(torch.float32).tiny)
    return replace(rounded, input_scale=(largest / _INPUT_LARGEST[scheme.type]).reshape(1))
