"""Quantized checkpoints for tests: linears of a tiny model rounded to nearest, in the layout between stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import pack_linear, quantization_config, unquantized_linears
from compress.engine.weights import ShardWriter, WeightReader
from compress.families import within
from compress.families.resolve import family_of
from compress.files import write_json
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme

INPUT_SCALE = 0.05
"""The scale of a linear's input where it is fixed: what a calibrating stage would measure."""


def round_checkpoint(
    source: Path,
    target: Path,
    scheme: Scheme | Callable[[str], Scheme | None],
    limit: int = 10**9,
    vision: Callable[[str], Scheme | None] = lambda name: None,
) -> dict[str, Scheme]:
    """Write `source` with its decoder's linears rounded; return the scheme of each by its name on disk.

    `scheme` may choose by the linear's name, None leaving it as it is, and so does `vision` for the linears that see images;
    `limit` is the size of a shard in bytes.
    """
    decoder = scheme if callable(scheme) else _always(scheme)
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.config, checkpoint=checkpoint)
    reader = WeightReader(checkpoint, family)
    schemes: dict[str, Scheme] = {}
    target.mkdir()
    with ShardWriter(target, limit) as writer:
        for name in sorted(checkpoint.tensors):
            tensor = reader.disk_tensor(name)
            owner = name.removesuffix(".weight")
            module = family.module_name(name)
            chosen = None
            if tensor.dim() == 2 and name.endswith(".weight") and "embed" not in module:
                chosen = decoder(owner) if within(module, family.blocks) else None
                chosen = vision(owner) if family.inside_vision(module) else chosen
            if chosen is None:
                writer.add(name, tensor)
                continue
            schemes[owner] = chosen
            weight = quantize(tensor, chosen, tensor.dtype)
            if chosen.activations == "tensor":
                weight = replace(weight, input_scale=torch.tensor([INPUT_SCALE]))
            for part, packed in pack_linear(owner, weight).items():
                writer.add(part, packed)
    ignore = unquantized_linears(checkpoint, family, schemes)
    write_json(target / "config.json", {**checkpoint.config, "quantization_config": quantization_config(schemes, ignore)})
    copy_side_files(source, target)
    return schemes


def _always(scheme: Scheme) -> Callable[[str], Scheme]:
    def choose(name: str) -> Scheme:
        del name
        return scheme

    return choose


def scheme(bits: int = 4, group_size: int = 32, symmetric: bool = False) -> Scheme:
    """Return a scheme, the usual one where nothing is said."""
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def exact_weights(source: Path, schemes: dict[str, Scheme]) -> dict[str, torch.Tensor]:
    """Return what the rounded linears of `source` stand for, float32, by their names on disk."""
    checkpoint = open_checkpoint(source)
    reader = WeightReader(checkpoint, family_of(checkpoint.config, checkpoint=checkpoint))
    weights = {name: reader.disk_tensor(f"{name}.weight") for name in schemes}
    return {name: quantize(weight, schemes[name], weight.dtype).dequantize() for name, weight in weights.items()}
