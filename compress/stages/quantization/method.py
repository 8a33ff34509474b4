"""Quantization of one block: from its weights and the statistics of its input activations to codes, by a method of parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from compress.engine.hessian import DIAGONAL_ONLY, HessianRequest
from compress.engine.statistics import InputStatistics
from compress.families import ScalePair
from compress.numerics.activations import LARGEST_CODE
from compress.numerics.grids import Grid, QuantizedWeight, Scheme
from compress.stages.blockwise.block import BlockWeights, input_max
from compress.stages.quantization.parts import LinearGroup, Rounder, RoundRows, SearchGrid, Transform
from compress.stages.quantization.rounders.float8 import round_floats
from compress.stages.quantization.rounders.nearest import NEAREST

MAX_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""How many weights are rounded at once; on a GPU each step of GPTQ's loop over columns is a kernel launch: more rows are faster."""


@dataclass(frozen=True)
class Method:
    """How a block is quantized: which scales move between its layers, and how weights are rounded."""

    transforms: tuple[Transform, ...] = ()
    """Applied to each pair of layers in this order."""

    rounder: Rounder = NEAREST
    """How integer weights are rounded; 8-bit floats are always rounded to nearest."""

    def hessian_request(self, schemes: Collection[Scheme]) -> HessianRequest | None:
        """Return what it reads of the Hessians of linears with these schemes, for static scales too; None for no statistics."""
        parts = (*self.transforms, self.rounder.grid, self.rounder)
        requests = [request for part in parts if (request := part.request(schemes)) is not None]
        if any(scheme.activations == "tensor" for scheme in schemes):
            requests.append(DIAGONAL_ONLY)
        return reduce(HessianRequest.__or__, requests) if requests else None


def solve(
    block: BlockWeights,
    scale_pairs: Sequence[ScalePair],
    statistics: Mapping[str, InputStatistics],
    schemes: Mapping[str, Scheme],
    method: Method,
) -> dict[str, QuantizedWeight]:
    """Return each linear's quantized weight, with scales in the type that its weight is stored in.

    `block.changed` then has the norms and biases that go with them. Names are relative to the block. Statistics that are
    `may_overwrite` are used up, and the weights with them.

    Raises:
        CheckpointError: a Hessian is not finite, or cannot be factored.
    """
    move_scales(block, scale_pairs, statistics, schemes, method)
    # the order of the module is kept for the result, so that files do not depend on the order of solving
    groups, order = _group_by_input(block, statistics), list(block.weights)
    quantized: dict[str, QuantizedWeight] = {}
    for names in groups:
        inputs = statistics.get(names[0])
        (rounded,) = _round_linears(LinearGroup(block, names, schemes, inputs), [schemes], method.rounder)
        quantized |= rounded
        if inputs is not None and inputs.may_overwrite:
            for name in names:
                del block.weights[name]
    return {name: quantized[name] for name in order}


def move_scales(
    block: BlockWeights,
    scale_pairs: Sequence[ScalePair],
    statistics: Mapping[str, InputStatistics],
    schemes: Mapping[str, Scheme],
    method: Method,
) -> None:
    """Apply a method's transforms to a block, all before any rounding: a linear may be in two pairs, and is rounded once."""
    for pair in scale_pairs:
        for transform in method.transforms:
            transform.apply(block, pair, statistics, schemes)


def alternatives(
    block: BlockWeights, statistics: Mapping[str, InputStatistics], schemes: Sequence[Mapping[str, Scheme]], method: Method
) -> Iterator[Iterator[dict[str, QuantizedWeight]]]:
    """Yield, for linears that share an input, what a method makes of them by each of several schemes, which differ in width alone.

    What it computes of their statistics, GPTQ's factorization above all, is computed once. Nothing is used up.

    Raises:
        CheckpointError: a Hessian is not finite, or cannot be factored.
    """
    for names in _group_by_input(block, statistics):
        yield _round_linears(LinearGroup(block, names, schemes[0], statistics.get(names[0])), schemes, method.rounder)


def _group_by_input(block: BlockWeights, statistics: Mapping[str, InputStatistics]) -> list[list[str]]:
    """Return the linears grouped by input and input scale; the widest input first, so that its Hessian is freed soon."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in block.weights:
        # without statistics each linear is a group of its own
        inputs = statistics.get(name, name)
        # linears of one pair have the same scale object: one Hessian, scaled once, serves them all
        groups.setdefault((id(inputs), id(block.smoothing_scales.get(name))), []).append(name)
    if len({inputs for inputs, _ in groups}) < len(groups):  # several groups read the same statistics, which must not be used up
        for shared in statistics.values():
            shared.may_overwrite = False
    return sorted(groups.values(), key=lambda names: -block.weights[names[0]].shape[1])


def _round_linears(
    group: LinearGroup, alternative_schemes: Sequence[Mapping[str, Scheme]], rounder: Rounder
) -> Iterator[dict[str, QuantizedWeight]]:
    """Yield the quantized weights of linears that share an input, by each of several schemes of one type and group size."""
    block, statistics, schemes = group.block, group.statistics, group.schemes
    static = statistics is not None and any(schemes[name].activations == "tensor" for name in group.names)
    activation_max = input_max(block, group.names[0], statistics).max() if static and statistics is not None else None
    batches: _RowBatches | None = None
    if integers := [name for name in group.names if schemes[name].type == "int"]:
        group_of_integers = replace(group, names=integers)
        search = rounder.grid.prepare(group_of_integers)  # before the rounder, which may use up the Hessian
        batches = _RowBatches(block, search, rounder.prepare(group_of_integers))
    for chosen in alternative_schemes:
        quantized: dict[str, QuantizedWeight] = {}
        for alike in _group_by_scheme(block, integers, chosen):
            assert batches is not None  # made for any integers
            quantized |= batches.round(alike, chosen[alike[0]])
        quantized |= round_floats(block, [name for name in group.names if name not in quantized], chosen)
        for name in group.names:
            # exact: they were rounded to a narrower or the same type before the codes were chosen
            scales = quantized[name].scales.to(block.current(f"{name}.weight").dtype)
            quantized[name] = replace(quantized[name], scales=scales, input_scale=_input_scale(chosen[name], activation_max))
        # one after another: the codes of all widths of a large head would not fit beside each other
        yield quantized


def _group_by_scheme(block: BlockWeights, names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterable[list[str]]:
    """Return linears grouped by scheme and type: a group is rounded as one matrix, its columns in fewer, larger steps."""
    groups: dict[tuple[Scheme, torch.dtype], list[str]] = {}
    for name in names:
        # the type belongs to it, because scales are rounded to it before the codes are chosen
        groups.setdefault((schemes[name], block.precision(f"{name}.weight")), []).append(name)
    return groups.values()


@dataclass(frozen=True)
class _RowBatches:
    """Rounds integer linears that share an input. Rows are independent: they are rounded in batches, so that copies stay small."""

    block: BlockWeights
    search_grid: SearchGrid
    round_rows: RoundRows

    def round(self, names: Sequence[str], scheme: Scheme) -> dict[str, QuantizedWeight]:
        """Return the quantized weights of linears with one scheme and type."""
        dtype = self.block.precision(f"{names[0]}.weight")
        chunks: dict[str, list[QuantizedWeight]] = {name: [] for name in names}
        masked = any(name in self.block.masks for name in names)
        for rows_of_linears in self._batches(names):
            # with pruned values: error feedback compensates what they would have contributed
            weights = [self.block.unmasked_weight(name, rows) for name, rows in rows_of_linears]
            masks = [self.block.mask(name, rows) for name, rows in rows_of_linears] if masked else []
            # a grid is searched for what stays: pruned outliers must not widen its range
            remaining = [weight * mask for weight, mask in zip(weights, masks, strict=True)] if masked else weights
            grids = [
                self.search_grid(name, weight, scheme, dtype) for (name, _), weight in zip(rows_of_linears, remaining, strict=True)
            ]
            del remaining  # float32 copies of the rows: a whole batch of them at a time
            stacked, counts = _stack(weights), [len(weight) for weight in weights]
            del weights
            quantized = self.round_rows(stacked, _stack_grids(grids), _stack(masks) if masked else None)
            del stacked, masks  # before the next batch's copies are made
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


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _stack_grids(grids: Sequence[Grid]) -> Grid:
    scales, zero_points = (_stack(tensors) for tensors in zip(*((grid.scales, grid.zero_points) for grid in grids), strict=True))
    return replace(grids[0], scales=scales, zero_points=zero_points)


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


def _input_scale(scheme: Scheme, activation_max: Tensor | None) -> Tensor | None:
    """Return the static scale of a linear's input activations, float32 [1], from their largest magnitude."""
    if scheme.activations != "tensor":
        return None
    assert activation_max is not None  # `_round_linears` computes it wherever a scheme is static
    # of the largest value that any token had: kernels saturate what lies beyond
    scale = activation_max / LARGEST_CODE[scheme.type]
    usable = scale >= torch.finfo(torch.float32).tiny  # kernels multiply by the inverse, which overflows for subnormals
    return torch.where(usable, scale, 1.0).reshape(1)
