"""OPT's decoder (arXiv 2205.01068) as a graph: LayerNorm before each part, learned positions, a ReLU between two linears."""

from __future__ import annotations

import numpy as np

from compress.export.graphs.decoder import Shape, logits, row_extents, self_attention
from compress.export.graphs.parts import Parts

_FIRST_POSITION = 2
"""The row of the position embeddings that belongs to a text's first token."""

_EPSILON = 1e-5


def decoder(parts: Parts) -> None:
    """Emit the decoder, with its cache: see `docs/formats/onnx.md` for inputs and outputs."""
    graph, text, family = parts.graph, parts.source.config.get_text_config(), parts.source.family
    shape, owner = Shape.of(text), family.blocks.rpartition(".")[0]
    width = parts.shape(f"{family.embeddings}.weight")[1]
    value = graph.input("inputs_embeds", graph.dtype, ["batch_size", "sequence_length", width])
    places = graph.input("position_ids", np.int64, ["batch_size", "sequence_length"])
    extents = row_extents(graph)
    if parts.has_linear(f"{owner}.project_in"):
        value = parts.linear(value, f"{owner}.project_in")
    table = parts.tensor(f"{owner}.embed_positions.weight", lambda rows: rows[_FIRST_POSITION:], "_of_texts")
    value = graph.op("Add", value, graph.op("Gather", table, places, axis=0))
    for layer in range(shape.layers):
        block = f"{family.blocks}.{layer}"
        with graph.scope(f"layers.{layer}"):
            normed = parts.layer_norm(value, f"{block}.self_attn_layer_norm", _EPSILON)
            mixed = self_attention(parts, normed, f"{block}.self_attn", layer, shape, None, extents)
            value = graph.op("Add", value, mixed)
            normed = parts.layer_norm(value, f"{block}.final_layer_norm", _EPSILON)
            grown = parts.linear(normed, f"{block}.fc1", str(text.activation_function))
            value = graph.op("Add", value, parts.linear(grown, f"{block}.fc2"))
    if parts.has(f"{owner}.final_layer_norm.weight"):
        value = parts.layer_norm(value, f"{owner}.final_layer_norm", _EPSILON)
    if parts.has_linear(f"{owner}.project_out"):
        value = parts.linear(value, f"{owner}.project_out")
    logits(parts, value)
