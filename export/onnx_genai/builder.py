"""Build the decoder with onnxruntime-genai's model builder, run in its own environment, and adapt its graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.spec import CheckpointSpec
from compress.errors import CheckpointError, CompressError, ServerError, StoreError
from compress.export.format import ExportContext
from compress.export.onnx_genai.config import DECODER_OF_BUILDER
from compress.export.onnx_genai.limits import decoder_schemes, layout_of
from compress.export.vllm.writer import LayoutTarget, layout_config, write_tensors
from compress.files import write_json
from compress.workers.environment import require
from compress.workers.worker import Worker, python_command, run_worker, variables_with

if TYPE_CHECKING:
    from compress.export.onnx_genai.format import OnnxGenai

_ENVIRONMENT = "onnxruntime-genai"
_MODULE = "onnxruntime_genai.models.builder"
# The builder's name of the head's node, by which its `nodes_to_exclude` leaves it in floats.
_HEAD = "/lm_head/MatMul"
_BUILDER_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The builder computes on the CPU, and takes no memory of a GPU that another process uses.
    "CUDA_VISIBLE_DEVICES": "",
}
_EMBEDDINGS = "inputs_embeds"
# A full disk and a lack of memory are the machine's faults: they must not be reported as the checkpoint's.
_DISK_FULL, _KILLED = "No space left on device", "(SIGKILL)"


def build_decoder(export: OnnxGenai, context: ExportContext, spec: CheckpointSpec, work: Path, levels: int) -> None:
    """Write the builder's decoder to the target; `work` is an empty folder for intermediate files.

    `levels` is the number of first blocks that take DeepStack features, which the builder omits.

    Raises:
        CheckpointError: the builder failed, or its graph has an unknown structure.
        MissingError: its environment is not installed.
    """
    require(_ENVIRONMENT)  # before its input is written
    schemes = decoder_schemes(spec)
    source = context.source.absolute()
    # Unquantized checkpoints are read where they are: only a quantized one needs a copy in a layout that the builder knows.
    if schemes:
        source = (work / "quantized").absolute()
        source.mkdir()
        # Without the vision tower's schemes: the builder reads one `quantization_config` for the whole decoder.
        write_builder_input(context, replace(spec, quantized={name: spec.quantized[name] for name in schemes}), source)
    built = (work / "built").absolute()
    # Absolute, as the builder's process does not run in this folder; its cache lies in the work folder, not in the user's home.
    paths = ("-i", str(source), "-o", str(built), "-c", str((work / "cache").absolute()))
    command = python_command(_ENVIRONMENT, "-m", _MODULE, *paths)
    _run([*command, *arguments(export, spec)], context, work)
    path = built / DECODER_OF_BUILDER
    model = onnx.load_model(str(path), load_external_data=False)
    fix_cache(model, json.loads((built / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["head_size"])
    if levels:
        add_levels(model, levels)
    onnx.save_model(model, str(path))
    # The data before the graph, so that a graph in the target never lacks its weights.
    for file in (path.with_name(f"{path.name}.data"), path):
        file.replace(context.target / file.name)


def arguments(export: OnnxGenai, spec: CheckpointSpec) -> list[str]:
    """Return the builder's precision arguments: unquantized linears stay floats, the output head follows `head_bits`."""
    schemes = decoder_schemes(spec)
    bits = next(iter(schemes.values())).bits if schemes else None
    precision = f"int{bits}" if bits else {"float32": "fp32", "float16": "fp16"}[export.dtype]
    # Images enter as embeddings, so the decoder must take these; sharing a tied matrix needs the embeddings that are excluded.
    options = ["exclude_embeds=true", f"accuracy_level={export.accuracy_level}", "shared_embeddings=false"]
    # With `-p int4` the builder quantizes the head too, by its own round-to-nearest.
    if bits and export.head_bits is None:
        options.append(f"nodes_to_exclude={_HEAD}")
    elif bits and export.head_bits != bits:
        options.append(f"matmul_mixed_precision=last_matmul:int{export.head_bits}")
    # The builder takes the float type of quantized decoders from the provider: float32 for cpu, float16 for cuda.
    provider = "cpu" if export.dtype == "float32" else "cuda"
    return ["-p", precision, "-e", provider, "--extra_options", *options]


def write_builder_input(context: ExportContext, spec: CheckpointSpec, target: Path) -> None:
    """Write a quantized checkpoint's decoder for the builder, in AWQ's or GPTQ's layout, with the same integers.

    Raises:
        CheckpointError: a scale is too large for float16.
        StoreError: the target cannot be written.
    """
    family = context.family
    layout = layout_of(next(iter(spec.schemes.values())))
    # The builder makes text decoders only, and reads no vision weights.
    names = [name for name in sorted(spec.tensors) if not family.inside_vision(family.module_name(name))]
    layout_target = LayoutTarget(layout, f"{_ENVIRONMENT}'s builder reads", "decoder: own", "export: lay out for the builder")
    write_tensors(replace(context, target=target), spec, layout_target, names)
    write_json(target / "config.json", {**spec.config_with_stated_tie, "quantization_config": layout_config(spec, layout)})
    copy_side_files(context.source, target)


def _run(command: Sequence[str], context: ExportContext, work: Path) -> None:
    """Run the builder and wait for it.

    Raises:
        CheckpointError: it failed.
        StoreError: the disk is full.
        ServerError: it was killed.
    """
    with (
        context.progress.task("export: onnxruntime-genai's builder", 1, "decoders") as advance,
        run_worker(_ENVIRONMENT, command, variables_with(_BUILDER_VARIABLES), work.absolute() / "builder.log") as server,
    ):
        server.process.wait()
        if not (work / "built" / "genai_config.json").is_file():  # written after the graph and its data
            raise _failure(context, server)
        advance(1)


def _failure(context: ExportContext, server: Worker) -> CompressError:
    """Return the error for a builder that exited early."""
    reason = server.exit_reason()
    if _DISK_FULL in reason:
        return StoreError(f"{context.target}: the disk is full; free space, and run again.\n{reason}")
    if _KILLED in reason:
        return ServerError(
            f"{context.source}: onnxruntime-genai's model builder was killed; the machine may have run out of memory: it loads the "
            f"whole model. Set decoder: own, which does not.\n{reason}"
        )
    return CheckpointError(
        f"{context.source}: onnxruntime-genai's model builder failed on it; set decoder: own, or mend what it says.\n{reason}"
    )


def fix_cache(model: ModelProto, width: int) -> None:
    """Declare the head size of the decoder's keys and values, which the builder leaves dynamic; in place."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = width


def add_levels(model: ModelProto, levels: int) -> None:
    """Make the builder's decoder take embeddings with DeepStack columns, and add these after its first blocks; in place.

    Raises:
        CheckpointError: the graph has an unknown structure.
    """
    graph = model.graph
    entry = next((value for value in graph.input if value.name == _EMBEDDINGS), None)
    norms = [_norm_after(graph.node, layer) for layer in range(levels)]
    if entry is None or None in norms:
        raise CheckpointError(
            "onnxruntime-genai's model builder made a decoder of another form than is known here; set decoder: own"
        )
    width = entry.type.tensor_type.shape.dim[2]
    hidden, width.dim_value = width.dim_value, width.dim_value * (1 + levels)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == _EMBEDDINGS:
                node.input[index] = _column(0)
    slices = [_slice(graph, hidden, level) for level in range(levels + 1)]
    producers = {name: node for node in graph.node for name in node.output}
    for level, norm in enumerate(norms, start=1):
        assert norm is not None, "checked above"
        node, index = norm, 1
        # In float16 the builder casts around its norms: the sum is added before the cast, in the decoder's own type.
        while (producer := producers.get(node.input[index])) is not None and producer.op_type == "Cast":
            node, index = producer, 0
        total = f"/levels.{level}/Add"
        add = helper.make_node("Add", [node.input[index], _column(level)], [total], name=total)
        node.input[index] = total
        graph.node.insert(list(graph.node).index(node), add)
    # In front, as nodes of an ONNX graph must be in topological order.
    for node in reversed(slices):
        graph.node.insert(0, node)


def _norm_after(nodes: Sequence[NodeProto], layer: int) -> NodeProto | None:
    """Return the fused norm that adds a block's output to the residual: the next block's first, or the final one."""
    names = [f"/model/layers.{layer + 1}/{norm}/SkipLayerNorm" for norm in ("input_layernorm", "final_norm_layernorm")]
    return next((node for node in nodes if node.name in names and "SkipSimplified" in node.op_type), None)


def _slice(graph: onnx.GraphProto, hidden: int, level: int) -> NodeProto:
    """Return the node that slices a level's columns from the embeddings; its constants are added to the graph."""
    names = [f"{_column(level)}/{name}" for name in ("first", "last", "axis")]
    for name, value in zip(names, (hidden * level, hidden * (level + 1), 2), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
    return helper.make_node("Slice", [_EMBEDDINGS, *names], [_column(level)], name=_column(level))


def _column(level: int) -> str:
    return f"/levels.{level}/Slice"
