"""CLIP (arXiv 2103.00020) as two independent graphs, one for images and one for texts.

An image-text logit is the cosine of the two outputs times `logit_scale`, which is in the metadata of both files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.export.onnx.graphs.clip_tower import PooledPositions, clip_blocks, clip_embeddings
from compress.export.onnx.graphs.layer_builder import LayerBuilder

_OLD_EOS = 2
"""`eos_token_id` in uncorrected old configs: the end-of-text token is then the one with the highest id."""


def vision_model(builder: LayerBuilder) -> None:
    """Emit the image tower: `pixel_values` [batch, channels, size, size] to `image_embeds` [batch, projection], not normalised."""
    graph, config = builder.graph, builder.source.config.vision_config
    size = int(config.image_size)
    pixels = graph.input("pixel_values", graph.dtype, ["batch_size", int(config.num_channels), size, size])
    value = clip_embeddings(builder, pixels, "vision_model", config, quantized=builder.embedding_bits is not None)
    # CLIP's image embedding reads the class token alone, so the last block is computed for that token.
    first = PooledPositions(lambda value: graph.slice(value, 0, 1, 1))
    value = clip_blocks(builder, value, "vision_model.encoder.layers", config, range(config.num_hidden_layers), pooled=first)
    _project(builder, value, "vision_model.post_layernorm", config, "visual_projection", "image_embeds")


def text_model(builder: LayerBuilder) -> None:
    """Emit the text tower: `input_ids`, `attention_mask` [batch, length] to `text_embeds` [batch, projection], not normalised.

    The pooled output is that of the end-of-text token; attention is causal.
    """
    graph, config = builder.graph, builder.source.config.text_config
    ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", np.int64, ["batch_size", "sequence_length"])
    indices = graph.arange(graph.extent(ids, 1))
    positions = graph.op("Gather", builder.tensor("text_model.embeddings.position_embedding.weight"), indices, axis=0)
    value = graph.op("Add", builder.embed(ids, "text_model.embeddings.token_embedding"), positions)
    # Text needs the mask that images are spared: it is causal and padded, and 77 tokens make small score matrices.
    present = graph.op("Unsqueeze", graph.cast(mask, np.bool_), graph.const([1, 2]))  # [batch, 1, 1, length]
    end = _end(builder, ids, int(config.eos_token_id))  # [batch, 1]
    last = PooledPositions(
        lambda value: graph.op("Unsqueeze", graph.op("GatherND", value, end, batch_dims=1), graph.const([1])), ""
    )
    rows = graph.op("Unsqueeze", indices, graph.const([1]))
    value = clip_blocks(
        builder,
        value,
        "text_model.encoder.layers",
        config,
        range(config.num_hidden_layers),
        bias=_bias(builder, present, indices, rows),
        pooled=PooledPositions(last.select, _bias(builder, present, indices, graph.op("Unsqueeze", end, graph.const([1, 2])))),
    )
    _project(builder, value, "text_model.final_layer_norm", config, "text_projection", "text_embeds")


def _end(builder: LayerBuilder, ids: str, token: int) -> str:
    """Return the index of each text's end-of-text token, int64 [batch, 1]."""
    graph = builder.graph
    if token == _OLD_EOS:
        # As transformers does for these configs: the end-of-text token has the highest id of CLIP's vocabulary.
        return graph.op("ArgMax", graph.cast(ids, np.int32), axis=1)
    # The first of several: CLIP pads with the end-of-text token itself, and ArgMax takes the first maximum.
    return graph.op("ArgMax", graph.cast(graph.op("Equal", ids, graph.const(token)), np.int32), axis=1)


def _bias(builder: LayerBuilder, present: str, indices: str, rows: str) -> str:
    """Return the bias that masks later tokens and padding for each of `rows`, [batch, 1, rows, length]."""
    graph = builder.graph
    visible = graph.op("And", present, graph.op("LessOrEqual", indices, rows))
    # The type's minimum, not -inf: a row that is masked as a whole would give NaN in softmax.
    return graph.op("Where", visible, graph.const(0.0), graph.const(float(np.finfo(graph.dtype).min)))


def _project(builder: LayerBuilder, value: str, norm: str, config: Any, projection: str, name: str) -> None:
    """Norm and project the pooled position [batch, 1, hidden], and declare it as output."""
    graph = builder.graph
    normed = builder.layer_norm(graph.op("Squeeze", value, graph.const([1])), norm, float(config.layer_norm_eps))
    # In metadata, as neither tower needs it alone: `repr` keeps every digit of the float.
    graph.metadata["logit_scale"] = repr(float(builder.source.reader.tensor("logit_scale").float().exp()))
    width = int(builder.source.config.projection_dim)
    graph.output(name, builder.linear(normed, projection), graph.dtype, ["batch_size", width])
