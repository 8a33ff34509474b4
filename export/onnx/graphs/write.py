"""Write the graphs of a checkpoint to an artifact's folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from compress.export.onnx.graphs import GRAPHS
from compress.export.onnx.graphs.graph import Float, Graph, Stored
from compress.export.onnx.graphs.layer_builder import LayerBuilder, Source
from compress.progress import Progress


@dataclass(frozen=True)
class Precision:
    """The precision of an artifact's graphs; see `LayerBuilder`."""

    float_type: Float
    accuracy_level: int = 4
    head_bits: int | None = None
    embedding_bits: int | None = None


def write_graphs(source: Source, precision: Precision, target: Path, progress: Progress) -> list[Path]:
    """Write every graph of the checkpoint to `target`, with its external data, and return the graphs' paths.

    Raises:
        CheckpointError: the checkpoint is not supported.
        StoreError: the folder cannot be written.
    """
    # One table for all graphs of the folder: a tied head in the decoder finds the embeddings' bytes in embed_tokens.onnx_data.
    stored: dict[str, Stored] = {}
    written: list[Path] = []
    graphs: Mapping[str, str] = GRAPHS[source.family.name]
    with _leave_core_for_writer(), progress.task("export", len(graphs), "graphs") as advance:
        for name, row in graphs.items():
            emit = emitter(row)
            builder = LayerBuilder(
                Graph(name, precision.float_type), source, precision.accuracy_level, precision.head_bits, precision.embedding_bits
            )
            emit(builder)
            written.append(builder.graph.save(target, stored))
            advance(1)
    return written


@contextmanager
def _leave_core_for_writer() -> Generator[None]:
    """Let torch use all cores but one, which is for the thread that writes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def emitter(row: str) -> Callable[[LayerBuilder], None]:
    """Import the function that emits a graph, by its row in `GRAPHS`."""
    module, _, function = row.partition(":")
    return cast("Callable[[LayerBuilder], None]", getattr(importlib.import_module(module), function))


def embed_tokens(builder: LayerBuilder) -> None:
    """Emit the embeddings: `input_ids` [batch, sequence] to `inputs_embeds` [batch, sequence, hidden]."""
    graph, name = builder.graph, builder.source.family.embeddings
    ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    width = builder.shape(f"{name}.weight")[1]
    graph.output("inputs_embeds", builder.embed(ids, name), graph.dtype, ["batch_size", "sequence_length", width])
