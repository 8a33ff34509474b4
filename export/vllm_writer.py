"""Writing a checkpoint's tensors the way vLLM's kernels read them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.artifact import copy_side_files
from compress.checkpoint import Checkpoint
from compress.engine.weights import ShardWriter, WeightReader
from compress.errors import CheckpointError
from compress.export.format import ExportContext, ExportSpec
from compress.files import telling_where, write_json
from compress.layouts import linear_tensors, read_linear, unquantized_linears
from compress.module_names import all_names, portable_config
from compress.numerics.grids import QuantizedWeight
from compress.numerics.packing import pack_awq, pack_gptq, pack_words
from compress.output_head import written_config

_FLOAT16_MAX = 65504.0

Layout = Literal["awq", "gptq"]
"""How integers that share a scale lie for a kernel: AutoAWQ's order, or GPTQ's."""


@dataclass(frozen=True)
class Reader:
    """What linears are laid out for, and in which layout.

    `takes` says in messages what takes scales and how ("layout awq stores"), `instead` which setting keeps them as they are;
    `task` is what the progress calls the work.
    """

    layout: Layout
    takes: str
    instead: str
    task: str = "export"


@dataclass
class Rounding:
    """What storing scales as float16 changed: in which linears, and by how much of a scale at most."""

    linears: list[str]
    largest: float = 0.0


def gptq_config(spec: ExportSpec) -> dict[str, Any]:
    """Return config.json's `quantization_config` for GPTQ's layout: zero points less one (its first version), no reordering.

    The quantized linears are named, so that vLLM leaves all others alone.
    """
    scheme = next(iter(spec.schemes.values()))
    return {
        "bits": scheme.bits,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "group_size": scheme.group_size,
        "lm_head": _quantizes_head(spec),
        "modules_in_block_to_quantize": all_names(spec.family, sorted(spec.schemes)),
        "quant_method": "gptq",
        "sym": True,
    }


def awq_config(spec: ExportSpec) -> dict[str, Any]:
    """Return config.json's `quantization_config` for AutoAWQ's GEMM layout."""
    scheme = next(iter(spec.schemes.values()))
    family = spec.family
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "lm_head": _quantizes_head(spec),
        "modules_to_not_convert": all_names(family, unquantized_linears(spec.checkpoint, family, spec.schemes)),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def _quantizes_head(spec: ExportSpec) -> bool:
    return spec.family.head in {spec.family.module_name(name) for name in spec.schemes}


def layout_config(spec: ExportSpec, layout: Layout) -> dict[str, Any]:
    """Return config.json's `quantization_config` for a layout."""
    return awq_config(spec) if layout == "awq" else gptq_config(spec)


def write_laid_out(context: ExportContext, spec: ExportSpec, layout: Layout) -> None:
    """Write the checkpoint with its quantized linears as `qweight`, `qzeros` and `scales`, from the same integers.

    Raises:
        CheckpointError: a scale is too large for float16.
        StoreError: the target cannot be written.
    """
    reader = Reader(layout, f"layout {layout} stores", "layout: compressed-tensors")
    write_tensors(context, spec, reader, sorted(spec.checkpoint.tensors))
    _write_rest(context, {**written_config(spec.checkpoint, context.family), "quantization_config": layout_config(spec, layout)})


def write_tensors(context: ExportContext, spec: ExportSpec, reader: Reader, names: Sequence[str]) -> None:
    """Write the checkpoint's tensors `names`, the quantized linears laid out; warns where scales lose by it.

    Raises:
        CheckpointError: a scale is too large for float16.
        StoreError: the target cannot be written.
    """
    weights = WeightReader(spec.checkpoint, context.family)
    owners = {part: name for name in spec.schemes for part in linear_tensors(name)}
    rounding = Rounding([])
    lay_out = awq_linear if reader.layout == "awq" else gptq_linear
    with ShardWriter(context.target) as writer, context.progress.task(reader.task, len(names), "tensors") as advance:
        for name in names:
            owner = owners.get(name)
            if owner is None:
                writer.add(name, weights.disk_tensor(name))
            elif name == f"{owner}.weight_packed":
                weight = read_linear(owner, spec.schemes[owner], weights.disk_tensor)
                scales = float16_scales(owner, weight, reader, rounding)
                for part, tensor in {**lay_out(owner, weight), f"{owner}.scales": scales}.items():
                    writer.add(part, tensor)
            advance(1)
    if rounding.linears:
        context.progress.warn(
            f"{reader.takes} scales as float16: those of {len(rounding.linears)} linears ({rounding.linears[0]} first) are no "
            f"float16 numbers and were rounded, by {rounding.largest:.2g} of a scale at most; {reader.instead} keeps them"
        )


def awq_linear(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the codes and zero points of one linear for AutoAWQ's GEMM kernel."""
    assert weight.zero_points is not None, "only integers are laid out this way"
    return {f"{name}.qweight": pack_awq(weight.codes), f"{name}.qzeros": pack_awq(weight.zero_points)}


def gptq_linear(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the codes, zero points and groups of one linear in GPTQ's layout: input channel i is in group i // group_size."""
    assert weight.zero_points is not None, "only integers are laid out this way"
    bits, columns = weight.scheme.bits, weight.codes.shape[1]
    return {
        f"{name}.qweight": pack_gptq(weight.codes, bits),
        f"{name}.qzeros": pack_words((weight.zero_points - 1).t(), bits),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // weight.scheme.group_size,
    }


def float16_scales(name: str, weight: QuantizedWeight, reader: Reader, rounding: Rounding) -> Tensor:
    """Return the scales of one linear, float16 [groups, out]; what they lose by that is noted in `rounding`.

    Raises:
        CheckpointError: a scale is too large for float16.
    """
    exact = weight.scales.to(torch.float32)
    if bool((exact.abs() > _FLOAT16_MAX).any()):
        raise CheckpointError(
            f"{name}: has scales up to {float(exact.abs().max()):.4g}, and {reader.takes} them as float16, which ends at "
            f"{_FLOAT16_MAX:.0f}; set {reader.instead}"
        )
    scales = exact.to(torch.float16)
    change = (scales.to(torch.float32) - exact).abs()
    if bool(change.any()):
        rounding.linears.append(name)
        rounding.largest = max(rounding.largest, float((change / exact.abs().clamp_min(torch.finfo(torch.float32).tiny)).max()))
    return scales.t().contiguous()


def link_packed(context: ExportContext, checkpoint: Checkpoint, ignored: list[str]) -> None:
    """Give the target the source's own weight files, as links where the disk allows it, and its config and side files.

    Raises:
        CheckpointError: config.json leaves a linear that is not quantized to vLLM as if it were.
        StoreError: the target cannot be written.
    """
    config = written_config(checkpoint, context.family)
    if quantization := config.get("quantization_config"):
        missing = sorted(set(ignored) - set(quantization.get("ignore", [])))
        if missing and any("Linear" in group["targets"] for group in quantization["config_groups"].values()):
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: quantization_config.ignore leaves out {', '.join(missing[:3])}"
                f"{' and others' if len(missing) > 3 else ''}, which are not quantized; write the checkpoint again"
            )
        linears = [name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith((".weight", ".weight_packed"))]
        config["quantization_config"] = portable_config(quantization, context.family, [*linears, context.family.head or ""])
    files = checkpoint.weight_files
    with context.progress.task("export", len(files), "files") as advance, telling_where(context.target):
        for file in files:
            _link(file, context.target / file.name)
            advance(1)
    _write_rest(context, config)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(source, target)


def _write_rest(context: ExportContext, config: Mapping[str, Any]) -> None:
    with telling_where(context.target):
        write_json(context.target / "config.json", config)
        copy_side_files(context.source, context.target)
