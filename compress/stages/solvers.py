"""From a block's weights and what its linears were given to their codes: how each method moves scales and rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from compress.engine.statistics import Moments
from compress.families import Pair
from compress.numerics.gptq import Feedback, Gptq, round_columns
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

    `block.changed` then holds the norms and biases that go with them. Names are relative to the block. Moments that are
    `disposable` are used up.

    Raises:
        CheckpointError: what a linear was given cannot be worked with.
    """
    for pair in pairs:
        if method.scales is not None:
            fold(block, pair, moments, schemes, method.scales)
        if method.smoothing is not None:
            smooth(block, pair, moments, schemes, method.smoothing)
    shared = list(_by_input(block, moments))
    codes: dict[str, QuantizedWeight] = {}
    for names in shared:
        codes |= round_linears(block, names, moments.get(names[0]), schemes, method)
    return {name: codes[name] for name in block.weights}


def _by_input(block: BlockWeights, moments: Mapping[str, Moments]) -> Iterable[list[str]]:
    """Return the linears by what they are given: one input, scaled alike."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in block.weights:
        own = moments.get(name, name)
        groups.setdefault((id(own), id(block.input_scales.get(name))), []).append(name)
    if len({given for given, _ in groups}) < len(groups):  # of moments that are used twice, none may be used up
        for given in moments.values():
            given.disposable = False
    return groups.values()


def round_linears(
    block: BlockWeights, names: Sequence[str], moments: Moments | None, schemes: Mapping[str, Scheme], method: Method
) -> dict[str, QuantizedWeight]:
    """Return the codes of linears with one input; only a method without statistics can do without `moments`."""
    fixed = moments is not None and any(schemes[name].activations == "tensor" for name in names)
    largest = input_max(block, names[0], moments).max() if fixed and moments is not None else None
    integers = [name for name in names if schemes[name].type == "int"]
    shrinks: dict[str, Tensor | float] = dict.fromkeys(names, 1.0)
    codes: dict[str, QuantizedWeight] = {}
    if moments is not None and integers and (method.clip is not None or method.gptq is not None):
        gram = input_gram(block, names[0], moments, last=True)
        for name in integers if method.clip is not None else ():
            if name.rpartition(".")[2] not in _SCORES:
                dtype = block.precision(f"{name}.weight")
                shrinks[name] = clip(block.weights[name], gram, schemes[name], dtype, cast("int", method.clip))
        if method.gptq is not None:
            feedback = Feedback.of(gram, method.gptq)
            del gram
            for name in integers:
                dtype = block.precision(f"{name}.weight")
                codes[name] = round_columns(block.weights[name], feedback, schemes[name], dtype, shrinks[name])
    for name in names:
        if name not in codes:
            codes[name] = quantize(block.weights[name], schemes[name], block.precision(f"{name}.weight"), shrinks[name])
        scales = codes[name].scales.to(block.current(f"{name}.weight").dtype)
        codes[name] = replace(codes[name], scales=scales, input_scale=_input_scale(schemes[name], largest))
    return codes


def _input_scale(scheme: Scheme, largest: Tensor | None) -> Tensor | None:
    """Return the fixed scale of a linear's input, float32 [1], by the largest magnitude that any of its elements had."""
    if scheme.activations != "tensor":
        return None
    assert largest is not None
    return (largest.clamp(min=torch.finfo(torch.float32).tiny) / _INPUT_LARGEST[scheme.type]).reshape(1)
