"""Rounding to the nearest 8-bit floats, with scales that linears which a runtime fuses have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from compress.numerics.grids import QuantizedWeight, Scheme
from compress.numerics.rounding import quantize
from compress.stages.blockwise.block import BlockWeights
from compress.stages.quantization.widths import FUSED_LINEARS


def round_floats(block: BlockWeights, names: Sequence[str], schemes: Mapping[str, Scheme]) -> dict[str, QuantizedWeight]:
    """Return the float8 weights of linears; a pruned weight is zero, as zero is a float8 number."""
    quantized: dict[str, QuantizedWeight] = {}
    for group in _group_by_scale(names, schemes):
        quantized |= _round_group(block, group, schemes[group[0]])
    return quantized


def _group_by_scale(names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterable[list[str]]:
    """Return linears grouped by shared scale: with per-tensor scales, those that a runtime fuses share one.

    The runtime would otherwise take the largest of their scales and round the weights a second time.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((linears for linears in FUSED_LINEARS if leaf in linears), None)
        shares_scale = fused is not None and schemes[name].strategy == "tensor"
        # keyed by the module that contains them: another attention's q_proj is not fused with this one's
        groups.setdefault((parent, *fused) if fused and shares_scale else (name,), []).append(name)
    return groups.values()


def _round_group(block: BlockWeights, names: Sequence[str], scheme: Scheme) -> dict[str, QuantizedWeight]:
    dtype = block.precision(f"{names[0]}.weight")
    if len(names) == 1:
        return {names[0]: quantize(block.weight(names[0]), scheme, dtype)}
    stacked = quantize(torch.cat([block.weight(name) for name in names]), scheme, dtype)
    codes = torch.split(stacked.codes, [len(block.weights[name]) for name in names])
    # in memory of their own: each view would keep all rows alive
    return {
        name: replace(stacked, codes=rows.clone(), scales=stacked.scales.clone()) for name, rows in zip(names, codes, strict=True)
    }
