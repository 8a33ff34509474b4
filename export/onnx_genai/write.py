"""Write a folder for onnxruntime-genai."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from compress.checkpoints.artifact import copy_side_files
from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.output_head import written_config
from compress.checkpoints.spec import spec_of
from compress.data.prompts import load_processor
from compress.export.format import ExportContext
from compress.export.onnx.graphs import GRAPHS
from compress.export.onnx.graphs.graph import Stored
from compress.export.onnx.graphs.layer_builder import LayerBuilder, Source
from compress.export.onnx.graphs.write import emitter
from compress.export.onnx_genai.builder import build_decoder
from compress.export.onnx_genai.config import (
    DECODER,
    DECODER_OF_BUILDER,
    EMBEDDING,
    PROCESSOR,
    VISION,
    genai_config,
    processor_config,
)
from compress.export.onnx_genai.graphs import GenaiGraph, embedding
from compress.files import disk_errors, write_json

if TYPE_CHECKING:
    from compress.export.onnx_genai.format import OnnxGenai

# Below the target, on its file system: gigabytes are then moved by renaming.
_WORK = ".onnxruntime-genai"


def write_folder(export: OnnxGenai, context: ExportContext, checkpoint: Checkpoint) -> None:
    """Write the artifact of a supported checkpoint; see `OnnxGenai.apply`."""
    source = Source.of(checkpoint, context.family)
    config = source.model.config
    levels = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    hidden = int(config.get_text_config().hidden_size)
    rows = GRAPHS[context.family.name]
    emitters: dict[str, Callable[[LayerBuilder], None]] = {
        VISION: emitter(rows[VISION]),
        EMBEDDING: embedding(int(config.image_token_id)),
    }
    if export.decoder == "own":
        emitters[DECODER] = emitter(rows[DECODER])
    stored: dict[str, Stored] = {}
    with context.progress.task("export", len(emitters), "graphs") as advance:
        for name, emit in emitters.items():
            graph = GenaiGraph(name, export.dtype, levels=levels, hidden=hidden)
            builder = LayerBuilder(graph, source, export.accuracy_level, export.head_bits, export.embedding_bits)
            emit(builder)
            builder.graph.save(context.target, stored)
            advance(1)
    if export.decoder == "builder":
        spec = spec_of(checkpoint, context.family)
        work = context.target / _WORK
        with disk_errors(context.target):
            # Left by a run that was killed here: the builder must not find its own old files.
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            build_decoder(export, context, spec, work, levels)
            shutil.rmtree(work)
    decoder = DECODER_OF_BUILDER if export.decoder == "builder" else f"{DECODER}.onnx"
    processor = load_processor(context.source).image_processor
    dense_config = {key: value for key, value in written_config(checkpoint, context.family).items() if key != "quantization_config"}
    with disk_errors(context.target):
        write_json(context.target / "config.json", dense_config)
        copy_side_files(context.source, context.target)
        write_json(context.target / PROCESSOR, processor_config(processor, context.source))
        write_json(context.target / "genai_config.json", genai_config(export, context, config, decoder, (1 + levels) * hidden))
