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
from compress.stages.widths import JOINED

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
    `disposable` are used up, and the weights with them.

    Raises:
        CheckpointError: what a linear was given cannot be worked with.
    """
    for pair in pairs:
        if method.scales is not None:
            fold(block, pair, moments, schemes, method.scales)
        if method.smoothing is not None:
            smooth(block, pair, moments, schemes, method.smoothing)
    shared, order = _by_input(block, moments), list(block.weights)
    codes: dict[str, QuantizedWeight] = {}
    for names in shared:
        given = moments.get(names[0])
        codes |= round_linears(block, names, given, schemes, method)
        if given is not None and given.disposable:
            for name in names:
                del block.weights[name]
    return {name: codes[name] for name in order}


def _by_input(block: BlockWeights, moments: Mapping[str, Moments]) -> list[list[str]]:
    """Return the linears by what they are given: one input, scaled alike; the widest first, so that its sums are gone soon."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in block.weights:
        own = moments.get(name, name)
        groups.setdefault((id(own), id(block.input_scales.get(name))), []).append(name)
    if len({given for given, _ in groups}) < len(groups):  # of moments that are used twice, none may be used up
        for given in moments.values():
            given.disposable = False
    return sorted(groups.values(), key=lambda names: -block.weights[names[0]].shape[1])


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
            for together in _alike(block, integers, schemes):
                codes |= _with_feedback(block, together, feedback, schemes[together[0]], shrinks)
    for together in _held_as_one([name for name in names if name not in codes], schemes):
        codes |= _nearest(block, together, schemes[together[0]], shrinks[together[0]])
    for name in names:
        scales = codes[name].scales.to(block.current(f"{name}.weight").dtype)
        codes[name] = replace(codes[name], scales=scales, input_scale=_input_scale(schemes[name], largest))
    return codes


def _alike(block: BlockWeights, names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterable[list[str]]:
    """Return linears by how they are held: those held alike can be rounded as one matrix, their columns in fewer, larger steps."""
    groups: dict[tuple[Scheme, torch.dtype], list[str]] = {}
    for name in names:
        groups.setdefault((schemes[name], block.precision(f"{name}.weight")), []).append(name)
    return groups.values()


def _with_feedback(
    block: BlockWeights, names: Sequence[str], feedback: Feedback, scheme: Scheme, shrinks: Mapping[str, Tensor | float]
) -> dict[str, QuantizedWeight]:
    """Return the codes by GPTQ of linears that are held alike and have one input."""
    dtype, weights = block.precision(f"{names[0]}.weight"), [block.weights[name] for name in names]
    if len(names) == 1:
        return {names[0]: round_columns(weights[0].to(torch.float32), feedback, scheme, dtype, shrinks[names[0]])}
    groups = scheme.groups(weights[0].shape[1])
    ones = [weight.new_ones(len(weight), groups) for weight in weights]
    shrink = torch.cat([one * shrinks[name] for one, name in zip(ones, names, strict=True)])
    whole = round_columns(torch.cat(weights).to(torch.float32), feedback, scheme, dtype, shrink)
    assert whole.zero_points is not None
    counts = [len(weight) for weight in weights]
    pieces = zip(*(torch.split(part, counts) for part in (whole.codes, whole.scales, whole.zero_points)), strict=True)
    return {
        name: QuantizedWeight(codes.clone(), scales.clone(), zero_points.clone(), whole.scheme)
        for name, (codes, scales, zero_points) in zip(names, pieces, strict=True)
    }


def _held_as_one(names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterable[list[str]]:
    """Return linears by what has one scale: where it is that of a whole matrix, those that a runtime joins have it in common.

    It would otherwise give all of them the largest and round them a second time.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        joined = next((parts for parts in JOINED if own in parts), None)
        alike = joined is not None and schemes[name].block_rows == -1
        groups.setdefault((parent, *joined) if joined and alike else (name,), []).append(name)
    return groups.values()


def _nearest(block: BlockWeights, names: Sequence[str], scheme: Scheme, shrink: Tensor | float) -> dict[str, QuantizedWeight]:
    """Return the nearest codes of a linear, or of several that have one scale."""
    dtype = block.precision(f"{names[0]}.weight")
    if len(names) == 1:
        return {names[0]: quantize(block.weights[names[0]], scheme, dtype, shrink)}
    whole = quantize(torch.cat([block.weights[name] for name in names]), scheme, dtype, shrink)
    pieces = torch.split(whole.codes, [len(block.weights[name]) for name in names])
    return {
        name: replace(whole, codes=piece.clone(), scales=whole.scales.clone()) for name, piece in zip(names, pieces, strict=True)
    }


def _input_scale(scheme: Scheme, largest: Tensor | None) -> Tensor | None:
    """Return the fixed scale of a linear's input, float32 [1], by the largest magnitude that any of its elements had."""
    if scheme.activations != "tensor":
        return None
    assert largest is not None
    scale = largest / _INPUT_LARGEST[scheme.type]
    usable = scale >= torch.finfo(torch.float32).tiny  # kernels multiply by the inverse, which of less is infinite
    return torch.where(usable, scale, 1.0).reshape(1)
