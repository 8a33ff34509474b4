"""Quantization of one block: from its weights and the statistics of its input activations to codes, by each method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from compress.engine.hessian import HessianRequest
from compress.engine.statistics import InputStatistics
from compress.families import ScalePair
from compress.numerics.gptq import Feedback, GptqOptions, round_columns
from compress.numerics.grids import QuantizedWeight, Scheme
from compress.numerics.rounding import clip, quantize, resolve_group_size
from compress.stages.quantization.awq_solver import fold
from compress.stages.quantization.block import BlockWeights, input_blocks, input_max, take_hessian
from compress.stages.quantization.smooth_solver import Smoothing, smooth
from compress.stages.quantization.widths import FUSED_LINEARS

_ATTENTION_SCORE_LINEARS = frozenset(
    {"q_proj", "k_proj", "qkv", "qkv_proj", "query", "key", "query_key_value", "Wqkv", "c_attn", "in_proj"}
)
"""Layers whose outputs are multiplied in attention scores. Their ranges are not clipped, as in AWQ's own code: the average error
of clipping them is small, but it changes which tokens are attended to."""

MAX_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""How many weights are rounded at once; on a GPU each step of GPTQ's loop over columns is a kernel launch: more rows are faster."""

_MAX_BLOCK = 1024
"""The largest group whose blocks of the Hessian are accumulated alone; for larger ones the full Hessian is."""

_LARGEST_CODE = {"int": 127.0, "float": 448.0}
"""The code that the largest activation is mapped to: the largest of int8, and of float8 e4m3fn."""


@dataclass(frozen=True)
class Method:
    """How a block is quantized: which scales move between its layers, and how weights are rounded."""

    awq_steps: int | None = None
    """Grid steps of the search of AWQ's scales; None for no such scales."""

    smoothing: Smoothing | None = None
    """SmoothQuant's settings; None for no such scales."""

    clip_steps: int | None = None
    """Grid steps of the search of each group's clipping range; None for the full range."""

    gptq: GptqOptions | None = None
    """GPTQ's settings; None for rounding to nearest."""

    def hessian_request(self, schemes: Iterable[Scheme]) -> HessianRequest:
        """Return what it reads of the Hessians of linears with these schemes."""
        sizes = {scheme.group_size for scheme in schemes if scheme.type == "int"} if self.clip_steps is not None else set[int]()
        block = math.lcm(*(size for size in sizes if size > 0))
        full = self.gptq is not None or -1 in sizes or block > _MAX_BLOCK
        return HessianRequest(full=full, sketch=self.awq_steps is not None, block=1 if full else block)


def solve(
    block: BlockWeights,
    scale_pairs: Sequence[ScalePair],
    statistics: Mapping[str, InputStatistics],
    schemes: Mapping[str, Scheme],
    method: Method,
) -> dict[str, QuantizedWeight]:
    """Return each linear's quantized weight, with scales in the type that its weight is stored in.

    `block.changed` then has the norms and biases that go with them. Names are relative to the block. Statistics that are
    `disposable` are used up, and the weights with them.

    Raises:
        CheckpointError: a Hessian is not finite, or cannot be factored.
    """
    for pair in scale_pairs:
        if method.awq_steps is not None:
            fold(block, pair, statistics, schemes, method.awq_steps)
        if method.smoothing is not None:
            smooth(block, pair, statistics, schemes, method.smoothing)
    groups, order = _group_by_input(block, statistics), list(block.weights)
    quantized: dict[str, QuantizedWeight] = {}
    for names in groups:
        inputs = statistics.get(names[0])
        quantized |= round_linears(block, names, inputs, schemes, method)
        if inputs is not None and inputs.disposable:
            for name in names:
                del block.weights[name]
    return {name: quantized[name] for name in order}


def _group_by_input(block: BlockWeights, statistics: Mapping[str, InputStatistics]) -> list[list[str]]:
    """Return the linears grouped by input and input scale; the widest input first, so that its Hessian is freed soon."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in block.weights:
        inputs = statistics.get(name, name)
        groups.setdefault((id(inputs), id(block.input_scales.get(name))), []).append(name)
    if len({inputs for inputs, _ in groups}) < len(groups):  # several groups read the same statistics, which must not be used up
        for shared in statistics.values():
            shared.disposable = False
    return sorted(groups.values(), key=lambda names: -block.weights[names[0]].shape[1])


def round_linears(
    block: BlockWeights, names: Sequence[str], statistics: InputStatistics | None, schemes: Mapping[str, Scheme], method: Method
) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of linears that share an input; only a method that reads no statistics takes None for them."""
    static = statistics is not None and any(schemes[name].activations == "tensor" for name in names)
    activation_max = input_max(block, names[0], statistics).max() if static and statistics is not None else None
    quantized: dict[str, QuantizedWeight] = {}
    integers = [name for name in names if schemes[name].type == "int"]
    if integers:
        rounder = _IntegerRounder(
            block,
            _group_hessians(block, integers, statistics, schemes, method),
            method.clip_steps or 0,
            _feedback(block, names, statistics, method),
        )
        for group in _group_by_scheme(block, integers, schemes):
            quantized |= rounder.round(group, schemes[group[0]])
    for group in _group_by_scale([name for name in names if name not in quantized], schemes):
        quantized |= _round_floats(block, group, schemes[group[0]])
    for name in names:
        scales = quantized[name].scales.to(block.current(f"{name}.weight").dtype)
        quantized[name] = replace(quantized[name], scales=scales, input_scale=_input_scale(schemes[name], activation_max))
    return quantized


def _group_hessians(
    block: BlockWeights, names: Sequence[str], statistics: InputStatistics | None, schemes: Mapping[str, Scheme], method: Method
) -> dict[str, Tensor]:
    """Return the Hessian's blocks along the diagonal, one per group, for the linears whose clipping ranges are searched."""
    if statistics is None or method.clip_steps is None:
        return {}
    columns = block.weights[names[0]].shape[1]
    searched = [name for name in names if name.rpartition(".")[2] not in _ATTENTION_SCORE_LINEARS]
    sizes = {resolve_group_size(schemes[name], columns).group_size for name in searched}
    blocks = {size: input_blocks(block, names[0], statistics, size) for size in sizes}
    return {name: blocks[resolve_group_size(schemes[name], columns).group_size] for name in searched}


def _feedback(block: BlockWeights, names: Sequence[str], statistics: InputStatistics | None, method: Method) -> Feedback | None:
    if statistics is None or method.gptq is None:
        return None
    return Feedback.of(take_hessian(block, names[0], statistics), method.gptq)


def _group_by_scheme(block: BlockWeights, names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterable[list[str]]:
    """Return linears grouped by scheme and type: a group is rounded as one matrix, its columns in fewer, larger steps."""
    groups: dict[tuple[Scheme, torch.dtype], list[str]] = {}
    for name in names:
        groups.setdefault((schemes[name], block.precision(f"{name}.weight")), []).append(name)
    return groups.values()


@dataclass(frozen=True)
class _IntegerRounder:
    """Rounds integer linears that share an input. Rows are independent: they are rounded in batches, so that copies stay small."""

    block: BlockWeights

    hessian_blocks: Mapping[str, Tensor]
    """The Hessian's blocks, one per group, for the linears whose clipping ranges are searched."""

    clip_steps: int
    """Grid steps of that search."""

    feedback: Feedback | None
    """GPTQ's error feedback; None for rounding to nearest."""

    def round(self, names: Sequence[str], scheme: Scheme) -> dict[str, QuantizedWeight]:
        """Return the quantized weights of linears with one scheme and type."""
        dtype = self.block.precision(f"{names[0]}.weight")
        chunks: dict[str, list[QuantizedWeight]] = {name: [] for name in names}
        for rows_of_linears in self._batches(names):
            weights = [self.block.weight(name, rows) for name, rows in rows_of_linears]
            shrink = torch.cat(
                [self._shrink(name, weight, scheme, dtype) for (name, _), weight in zip(rows_of_linears, weights, strict=True)]
            )
            stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
            counts = [len(weight) for weight in weights]
            del weights
            if self.feedback is None:
                quantized = quantize(stacked, scheme, dtype, shrink)
            else:
                quantized = round_columns(stacked, self.feedback, scheme, dtype, shrink)
            for (name, _), chunk in zip(rows_of_linears, _split(quantized, counts), strict=True):
                chunks[name].append(chunk)
        return {name: _concatenate(parts) for name, parts in chunks.items()}

    def _batches(self, names: Sequence[str]) -> Iterator[list[tuple[str, slice]]]:
        """Yield the rows of linears that are rounded at once."""
        weight = self.block.weights[names[0]]
        remaining = limit = max(1, MAX_ELEMENTS["cuda" if weight.is_cuda else "cpu"] // weight.shape[1])
        batch: list[tuple[str, slice]] = []
        for name in names:
            start, rows = 0, len(self.block.weights[name])
            while start < rows:
                stop = min(rows, start + remaining)
                batch.append((name, slice(start, stop)))
                remaining -= stop - start
                start = stop
                if not remaining:
                    yield batch
                    batch, remaining = [], limit
        if batch:
            yield batch

    def _shrink(self, name: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        if name in self.hessian_blocks:
            return clip(weight, self.hessian_blocks[name], scheme, dtype, self.clip_steps)
        return weight.new_ones(len(weight), scheme.groups(weight.shape[1]))


def _split(quantized: QuantizedWeight, counts: Sequence[int]) -> Iterator[QuantizedWeight]:
    assert quantized.zero_points is not None
    for codes, scales, zero_points in zip(
        *(torch.split(tensor, list(counts)) for tensor in (quantized.codes, quantized.scales, quantized.zero_points)), strict=True
    ):
        yield replace(quantized, codes=codes, scales=scales, zero_points=zero_points)


def _concatenate(chunks: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return the rows of several quantized weights as one, in memory of its own."""
    codes, scales, zero_points = (
        torch.cat(tensors)
        for tensors in zip(*((chunk.codes, chunk.scales, cast("Tensor", chunk.zero_points)) for chunk in chunks), strict=True)
    )
    return replace(chunks[0], codes=codes, scales=scales, zero_points=zero_points)


def _group_by_scale(names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterable[list[str]]:
    """Return linears grouped by shared scale: with per-tensor scales, those that a runtime fuses share one.

    The runtime would otherwise take the largest of their scales and round the weights a second time.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((linears for linears in FUSED_LINEARS if leaf in linears), None)
        shares_scale = fused is not None and schemes[name].strategy == "tensor"
        groups.setdefault((parent, *fused) if fused and shares_scale else (name,), []).append(name)
    return groups.values()


def _round_floats(block: BlockWeights, names: Sequence[str], scheme: Scheme) -> dict[str, QuantizedWeight]:
    """Round a linear, or several that share a scale, to the nearest float8 codes."""
    dtype = block.precision(f"{names[0]}.weight")
    if len(names) == 1:
        return {names[0]: quantize(block.weight(names[0]), scheme, dtype)}
    stacked = quantize(torch.cat([block.weight(name) for name in names]), scheme, dtype)
    codes = torch.split(stacked.codes, [len(block.weights[name]) for name in names])
    return {
        name: replace(stacked, codes=rows.clone(), scales=stacked.scales.clone()) for name, rows in zip(names, codes, strict=True)
    }


def _input_scale(scheme: Scheme, activation_max: Tensor | None) -> Tensor | None:
    """Return the static scale of a linear's input activations, float32 [1], from their largest magnitude."""
    if scheme.activations != "tensor":
        return None
    assert activation_max is not None
    scale = activation_max / _LARGEST_CODE[scheme.type]
    usable = scale >= torch.finfo(torch.float32).tiny  # kernels multiply by the inverse, which overflows for subnormals
    return torch.where(usable, scale, 1.0).reshape(1)
