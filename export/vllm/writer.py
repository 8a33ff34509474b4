"""Write a checkpoint's tensors in the layouts that vLLM's kernels read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.layouts import linear_tensors, read_linear, unquantized_linears
from compress.checkpoints.module_names import all_names, portable_config
from compress.checkpoints.output_head import written_config
from compress.checkpoints.spec import CheckpointSpec
from compress.engine.weights import ShardWriter, WeightReader
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.files import disk_errors, write_json
from compress.numerics.grids import QuantizedWeight
from compress.numerics.packing import pack_awq, pack_gptq, pack_words

_FLOAT16_MAX = 65504.0
"""The largest float16."""

Layout = Literal["awq", "gptq"]
"""The packing of quantized integers: AutoAWQ's or GPTQ's."""


@dataclass(frozen=True)
class LayoutTarget:
    """A layout and who reads it, for messages."""

    layout: Layout
    reader: str
    """What stores scales as float16: subject and verb, such as "layout awq stores"."""

    alternative: str
    """The setting that keeps scales exact."""

    task: str = "export"
    """The name of the progress bar."""


@dataclass
class ScaleError:
    """The error of storing scales as float16."""

    linears: list[str]
    """The linears with a scale that changed."""

    largest: float = 0.0
    """The largest relative error of a scale."""


def gptq_config(spec: CheckpointSpec) -> dict[str, Any]:
    """Return config.json's `quantization_config` for GPTQ's layout: zero points minus one (its first version), no `desc_act`.

    The quantized linears are listed, so that vLLM loads all others as dense.
    """
    scheme = next(iter(spec.schemes.values()))
    return {
        "bits": scheme.bits,
        "checkpoint_format": "gptq",
        # Groups are neighbouring columns whatever order a stage rounded in; vLLM refuses `desc_act` with groups.
        "desc_act": False,
        "group_size": scheme.group_size,
        "lm_head": _quantizes_head(spec),
        # Under every name that a reader may match: vLLM maps names on disk, transformers its own in memory.
        "modules_in_block_to_quantize": all_names(spec.family, sorted(spec.schemes)),
        "quant_method": "gptq",
        "sym": True,
    }


def awq_config(spec: CheckpointSpec) -> dict[str, Any]:
    """Return config.json's `quantization_config` for AutoAWQ's GEMM layout."""
    scheme = next(iter(spec.schemes.values()))
    family = spec.family
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "lm_head": _quantizes_head(spec),
        "modules_to_not_convert": all_names(family, unquantized_linears(spec, family, spec.schemes)),
        "quant_method": "awq",
        "version": "gemm",
        # One flag for all linears, some of which may be asymmetric: zero points are always stored, 8 where a grid is symmetric.
        "zero_point": True,
    }


def _quantizes_head(spec: CheckpointSpec) -> bool:
    return spec.family.head in {spec.family.module_name(name) for name in spec.schemes}


def layout_config(spec: CheckpointSpec, layout: Layout) -> dict[str, Any]:
    """Return config.json's `quantization_config` for a layout."""
    return awq_config(spec) if layout == "awq" else gptq_config(spec)


def write_laid_out(context: ExportContext, spec: CheckpointSpec, layout: Layout) -> None:
    """Write the checkpoint with its quantized linears as `qweight`, `qzeros` and `scales`, with the same integers.

    Raises:
        CheckpointError: a scale is too large for float16.
        StoreError: the target cannot be written.
    """
    target = LayoutTarget(layout, f"layout {layout} stores", "layout: compressed-tensors")
    write_tensors(context, spec, target, sorted(spec.tensors))
    _write_rest(context, {**spec.config_with_stated_tie, "quantization_config": layout_config(spec, layout)})


def write_tensors(context: ExportContext, spec: CheckpointSpec, target: LayoutTarget, names: Sequence[str]) -> None:
    """Write the checkpoint's tensors `names`, quantized linears in the target's layout; warns if float16 changes scales.

    Raises:
        CheckpointError: a scale is too large for float16.
        StoreError: the target cannot be written.
    """
    weights = WeightReader(open_checkpoint(context.source), context.family)
    owners = {tensor: name for name in spec.schemes for tensor in linear_tensors(name)}
    scale_error = ScaleError([])
    pack = awq_linear if target.layout == "awq" else gptq_linear
    with ShardWriter(context.target) as writer, context.progress.task(target.task, len(names), "tensors") as advance:
        for name in names:
            owner = owners.get(name)
            if owner is None:
                writer.add(name, weights.disk_tensor(name))
            # Once per linear, at its codes: scales, zero points and shape are read with them.
            elif name == f"{owner}.weight_packed":
                weight = read_linear(owner, spec.schemes[owner], weights.disk_tensor)
                scales = float16_scales(owner, weight, target, scale_error)
                for key, tensor in {**pack(owner, weight), f"{owner}.scales": scales}.items():
                    writer.add(key, tensor)
            advance(1)
    if scale_error.linears:
        context.progress.warn(
            f"{target.reader} scales as float16: those of {len(scale_error.linears)} linears ({scale_error.linears[0]} first) are "
            f"no float16 numbers and were rounded, by {scale_error.largest:.2g} of a scale at most; {target.alternative} keeps them"
        )


def awq_linear(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a linear's codes and zero points in AutoAWQ's GEMM layout."""
    assert weight.zero_points is not None, "only integers are laid out this way"
    return {f"{name}.qweight": pack_awq(weight.codes), f"{name}.qzeros": pack_awq(weight.zero_points)}


def gptq_linear(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a linear's codes, zero points and group indices in GPTQ's layout: input i is in group i // group_size."""
    assert weight.zero_points is not None, "only integers are laid out this way"
    bits, columns = weight.scheme.bits, weight.codes.shape[1]
    return {
        f"{name}.qweight": pack_gptq(weight.codes, bits),
        # The first version of GPTQ's format stores zero points minus one, which readers add again: 8 is the nibble 7.
        f"{name}.qzeros": pack_words((weight.zero_points - 1).t(), bits),
        # vLLM does not need it without `desc_act`; other GPTQ loaders index scales by it.
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // weight.scheme.group_size,
    }


def float16_scales(name: str, weight: QuantizedWeight, target: LayoutTarget, scale_error: ScaleError) -> Tensor:
    """Return a linear's scales as float16 [groups, out]; their error is added to `scale_error`.

    Raises:
        CheckpointError: a scale is too large for float16.
    """
    exact = weight.scales.to(torch.float32)
    # Checked, as the cast would store infinity without an error, and the layer would return NaN.
    if bool((exact.abs() > _FLOAT16_MAX).any()):
        raise CheckpointError(
            f"{name}: has scales up to {float(exact.abs().max()):.4g}, and {target.reader} them as float16, which ends at "
            f"{_FLOAT16_MAX:.0f}; set {target.alternative}"
        )
    scales = exact.to(torch.float16)
    error = (scales.to(torch.float32) - exact).abs()
    if bool(error.any()):
        scale_error.linears.append(name)
        scale_error.largest = max(
            scale_error.largest, float((error / exact.abs().clamp_min(torch.finfo(torch.float32).tiny)).max())
        )
    return scales.t().contiguous()


def link_packed(context: ExportContext, checkpoint: Checkpoint, ignored: list[str]) -> None:
    """Hard-link the source's weight files into the target, or copy them, and write its config and side files.

    Raises:
        CheckpointError: config.json does not list a dense linear under `ignore`, so that vLLM would load it as quantized.
        StoreError: the target cannot be written.
    """
    config = written_config(checkpoint, context.family)
    if quantization := config.get("quantization_config"):
        # With `targets: Linear` vLLM takes every linear that `ignore` does not list as quantized, and misses a dense one's codes.
        missing = sorted(set(ignored) - set(quantization.get("ignore", [])))
        if missing and any("Linear" in group["targets"] for group in quantization["config_groups"].values()):
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: quantization_config.ignore leaves out {', '.join(missing[:3])}"
                f"{' and others' if len(missing) > 3 else ''}, which are not quantized; write the checkpoint again"
            )
        linears = [name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith((".weight", ".weight_packed"))]
        config["quantization_config"] = portable_config(quantization, context.family, [*linears, context.family.head or ""])
    files = checkpoint.weight_files
    with context.progress.task("export", len(files), "files") as advance, disk_errors(context.target):
        for file in files:
            _link(file, context.target / file.name)
            advance(1)
    _write_rest(context, config)


def _link(source: Path, target: Path) -> None:
    try:
        # A link costs neither disk nor time, and the bytes are the same. `resolve`: a hub's snapshot holds symbolic links to blobs.
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _write_rest(context: ExportContext, config: Mapping[str, Any]) -> None:
    with disk_errors(context.target):
        write_json(context.target / "config.json", config)
        copy_side_files(context.source, context.target)
