"""OPT's decoder (arXiv 2205.01068) as a graph: pre-LayerNorm blocks, learned positions, a feed-forward with ReLU."""

from __future__ import annotations

import numpy as np

from compress.export.onnx.graphs.decoder import DecoderInputs, logits, self_attention
from compress.export.onnx.graphs.layer_builder import LayerBuilder

_FIRST_POSITION = 2
"""The row of the position embeddings for a text's first token: transformers' OPT adds this offset to every position."""

_EPSILON = 1e-5
"""The epsilon of the norms: torch's default for LayerNorm, which the model's code leaves."""


def decoder(builder: LayerBuilder) -> None:
    """Emit the decoder with its KV cache: see `docs/formats/onnx.md` for inputs and outputs."""
    graph, text, family = builder.graph, builder.source.config.get_text_config(), builder.source.family
    owner = family.blocks.rpartition(".")[0]
    width = builder.shape(f"{family.embeddings}.weight")[1]
    value = graph.input("inputs_embeds", graph.dtype, ["batch_size", "sequence_length", width])
    positions = graph.input("position_ids", np.int64, ["batch_size", "sequence_length"])
    inputs = DecoderInputs.of(builder, rotary=False)
    # OPT-350m embeds in 512 dimensions and computes in 1,024; the other sizes have no such projections.
    if builder.has_linear(f"{owner}.project_in"):
        value = builder.linear(value, f"{owner}.project_in")
    # Cut at export: positions then start at 0 as in every other decoder, without an Add in the graph.
    table = builder.tensor(f"{owner}.embed_positions.weight", lambda rows: rows[_FIRST_POSITION:], "_of_texts")
    value = graph.op("Add", value, graph.op("Gather", table, positions, axis=0))
    # The norm comes first: the family takes no checkpoint with `do_layer_norm_before: false`, as OPT-350m's is.
    for layer in range(inputs.size.layers):
        block = f"{family.blocks}.{layer}"
        with graph.scope(f"layers.{layer}"):
            normed = builder.layer_norm(value, f"{block}.self_attn_layer_norm", _EPSILON)
            value = graph.op("Add", value, self_attention(builder, normed, layer, inputs))
            normed = builder.layer_norm(value, f"{block}.final_layer_norm", _EPSILON)
            value = graph.op("Add", value, builder.mlp(normed, f"{block}.fc1", f"{block}.fc2", str(text.activation_function)))
    # Checkpoints with `_remove_final_layer_norm` in their config have none.
    if builder.has(f"{owner}.final_layer_norm.weight"):
        value = builder.layer_norm(value, f"{owner}.final_layer_norm", _EPSILON)
    if builder.has_linear(f"{owner}.project_out"):
        value = builder.linear(value, f"{owner}.project_out")
    logits(builder, value)
