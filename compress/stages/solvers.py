"""From a block's weights and what its linears were given to their codes: how each method moves scales and rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from compress.engine.second_moment import HessianRequest
from compress.engine.statistics import Moments
from compress.families import ScalePair
from compress.numerics.gptq import Feedback, GptqOptions, round_columns
from compress.numerics.grids import QuantizedWeight, Scheme
from compress.numerics.rounding import clip, quantize, resolve_group_size
from compress.stages.awq_solver import fold
from compress.stages.block import BlockWeights, input_blocks, input_max, take_hessian
from compress.stages.smooth_solver import Smoothing, smooth
from compress.stages.widths import JOINED

_SCORES = frozenset({"q_proj", "k_proj", "qkv", "qkv_proj", "query", "key", "query_key_value", "Wqkv", "c_attn", "in_proj"})
"""Layers whose outputs meet in attention's scores. Their ranges stay whole, as in AWQ's own code: what clipping them loses on
average is little, but it changes which tokens are seen."""

ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""How many weights are rounded at once; on a GPU every step of a loop over columns costs a launch, so that more rows are better."""

_WIDEST_BLOCK = 1024
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
    gptq: GptqOptions | None = None

    def hessian_request(self, schemes: Iterable[Scheme]) -> HessianRequest:
        """Return what it reads of the second moments of what linears held by `schemes` are given."""
        sizes = {scheme.group_size for scheme in schemes if scheme.type == "int"} if self.clip is not None else set[int]()
        block = math.lcm(*(size for size in sizes if size > 0))
        whole = self.gptq is not None or -1 in sizes or block > _WIDEST_BLOCK
        return HessianRequest(whole=whole, sketch=self.scales is not None, block=1 if whole else block)


def solve(
    block: BlockWeights,
    scale_pairs: Sequence[ScalePair],
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
    for pair in scale_pairs:
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
    codes: dict[str, QuantizedWeight] = {}
    integers = [name for name in names if schemes[name].type == "int"]
    if integers:
        steps = _Rows(
            block, _clips(block, integers, moments, schemes, method), method.clip or 0, _feedback(block, names, moments, method)
        )
        for together in _alike(block, integers, schemes):
            codes |= steps.round(together, schemes[together[0]])
    for together in _held_as_one([name for name in names if name not in codes], schemes):
        codes |= _floats(block, together, schemes[together[0]])
    for name in names:
        scales = codes[name].scales.to(block.current(f"{name}.weight").dtype)
        codes[name] = replace(codes[name], scales=scales, input_scale=_input_scale(schemes[name], largest))
    return codes


def _clips(
    block: BlockWeights, names: Sequence[str], moments: Moments | None, schemes: Mapping[str, Scheme], method: Method
) -> dict[str, Tensor]:
    """Return the second moments of each group's inputs for the linears whose ranges are searched."""
    if moments is None or method.clip is None:
        return {}
    columns = block.weights[names[0]].shape[1]
    searched = [name for name in names if name.rpartition(".")[2] not in _SCORES]
    sizes = {resolve_group_size(schemes[name], columns).group_size for name in searched}
    blocks = {size: input_blocks(block, names[0], moments, size) for size in sizes}
    return {name: blocks[resolve_group_size(schemes[name], columns).group_size] for name in searched}


def _feedback(block: BlockWeights, names: Sequence[str], moments: Moments | None, method: Method) -> Feedback | None:
    if moments is None or method.gptq is None:
        return None
    return Feedback.of(take_hessian(block, names[0], moments), method.gptq)


def _alike(block: BlockWeights, names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterable[list[str]]:
    """Return linears by how they are held: those held alike can be rounded as one matrix, their columns in fewer, larger steps."""
    groups: dict[tuple[Scheme, torch.dtype], list[str]] = {}
    for name in names:
        groups.setdefault((schemes[name], block.precision(f"{name}.weight")), []).append(name)
    return groups.values()


@dataclass(frozen=True)
class _Rows:
    """Rounds the rows of integer linears with one input, each row for itself, so many at a time that their copies stay small.

    `clips` holds the second moments of each group's inputs for the linears whose ranges are searched, in `steps` steps.
    """

    block: BlockWeights
    clips: Mapping[str, Tensor]
    steps: int
    feedback: Feedback | None

    def round(self, names: Sequence[str], scheme: Scheme) -> dict[str, QuantizedWeight]:
        """Return the codes of linears that are held alike."""
        dtype = self.block.precision(f"{names[0]}.weight")
        done: dict[str, list[QuantizedWeight]] = {name: [] for name in names}
        for piece in self._pieces(names):
            weights = [self.block.weight(name, rows) for name, rows in piece]
            shrink = torch.cat(
                [self._shrink(name, weight, scheme, dtype) for (name, _), weight in zip(piece, weights, strict=True)]
            )
            together = weights[0] if len(weights) == 1 else torch.cat(weights)
            counts = [len(weight) for weight in weights]
            del weights
            if self.feedback is None:
                whole = quantize(together, scheme, dtype, shrink)
            else:
                whole = round_columns(together, self.feedback, scheme, dtype, shrink)
            for (name, _), part in zip(piece, _split(whole, counts), strict=True):
                done[name].append(part)
        return {name: _joined(parts) for name, parts in done.items()}

    def _pieces(self, names: Sequence[str]) -> Iterator[list[tuple[str, slice]]]:
        """Yield which rows of which linears are rounded at once."""
        weight = self.block.weights[names[0]]
        room = limit = max(1, ELEMENTS["cuda" if weight.is_cuda else "cpu"] // weight.shape[1])
        piece: list[tuple[str, slice]] = []
        for name in names:
            start, rows = 0, len(self.block.weights[name])
            while start < rows:
                stop = min(rows, start + room)
                piece.append((name, slice(start, stop)))
                room -= stop - start
                start = stop
                if not room:
                    yield piece
                    piece, room = [], limit
        if piece:
            yield piece

    def _shrink(self, name: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
        if name in self.clips:
            return clip(weight, self.clips[name], scheme, dtype, self.steps)
        return weight.new_ones(len(weight), scheme.groups(weight.shape[1]))


def _split(whole: QuantizedWeight, counts: Sequence[int]) -> Iterator[QuantizedWeight]:
    assert whole.zero_points is not None
    for codes, scales, zero_points in zip(
        *(torch.split(part, list(counts)) for part in (whole.codes, whole.scales, whole.zero_points)), strict=True
    ):
        yield replace(whole, codes=codes, scales=scales, zero_points=zero_points)


def _joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return rows that were rounded one after the other as one matrix, in memory of its own."""
    codes, scales, zero_points = (
        torch.cat(pieces)
        for pieces in zip(*((part.codes, part.scales, cast("Tensor", part.zero_points)) for part in parts), strict=True)
    )
    return replace(parts[0], codes=codes, scales=scales, zero_points=zero_points)


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


def _floats(block: BlockWeights, names: Sequence[str], scheme: Scheme) -> dict[str, QuantizedWeight]:
    """Return the nearest codes of a linear of floats, or of several that have one scale."""
    dtype = block.precision(f"{names[0]}.weight")
    if len(names) == 1:
        return {names[0]: quantize(block.weight(names[0]), scheme, dtype)}
    whole = quantize(torch.cat([block.weight(name) for name in names]), scheme, dtype)
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
