"""The graphs of a checkpoint, written to an artifact's folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from compress.export.graphs import GRAPHS
from compress.export.graphs.graph import Float, Graph, Stored
from compress.export.graphs.parts import Parts, Source
from compress.progress import Progress


@dataclass(frozen=True)
class Precision:
    """How a folder's graphs compute and hold what the checkpoint leaves open; see `Parts`."""

    float_type: Float
    accuracy_level: int = 4
    head_bits: int | None = None
    embedding_bits: int | None = None


def write_graphs(source: Source, precision: Precision, target: Path, progress: Progress) -> list[Path]:
    """Write every graph of the checkpoint to `target`, its weights beside it, and return the graphs' paths.

    Raises:
        CheckpointError: the checkpoint holds something that no graph here can.
        StoreError: the folder cannot be written.
    """
    stored: dict[str, Stored] = {}
    written: list[Path] = []
    graphs: Mapping[str, str] = GRAPHS[source.family.name]
    with _sparing_a_core(), progress.task("export", len(graphs), "graphs") as advance:
        for name, row in graphs.items():
            emit = emitter(row)
            parts = Parts(
                Graph(name, precision.float_type), source, precision.accuracy_level, precision.head_bits, precision.embedding_bits
            )
            emit(parts)
            written.append(parts.graph.save(target, stored))
            advance(1)
    return written


@contextmanager
def _sparing_a_core() -> Generator[None]:
    """Let torch compute on all cores but one, which writes what is made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def emitter(row: str) -> Callable[[Parts], None]:
    """Import what emits a graph, by its row in the table of graphs."""
    module, _, function = row.partition(":")
    return cast("Callable[[Parts], None]", getattr(importlib.import_module(module), function))


def embed_tokens(parts: Parts) -> None:
    """Emit the embeddings: `input_ids` [batch, sequence] to `inputs_embeds` [batch, sequence, hidden]."""
    graph, name = parts.graph, parts.source.family.embeddings
    ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    width = parts.shape(f"{name}.weight")[1]
    graph.output("inputs_embeds", parts.embed(ids, name), graph.dtype, ["batch_size", "sequence_length", width])
