"""BLIP-2's way from an image to the decoder (arXiv 2301.12597) as a graph: a ViT, the Q-Former, a projection."""

from __future__ import annotations

from typing import Any

from compress.export.graphs.parts import Parts

_TOWER, _QFORMER = "vision_model", "qformer"


def vision_encoder(parts: Parts) -> None:
    """Emit `pixel_values` [images, channels, height, width] to `image_features` [images, query tokens, hidden]."""
    graph, config = parts.graph, parts.source.config
    vision, size = config.vision_config, int(config.vision_config.image_size)
    pixels = graph.input("pixel_values", graph.dtype, ["images", 3, size, size])
    value = _patches(parts, pixels, vision)
    for layer in range(int(vision.num_hidden_layers)):
        with graph.scope(f"layers.{layer}"):
            value = _tower_block(parts, value, f"{_TOWER}.encoder.layers.{layer}", vision)
    states = parts.layer_norm(value, f"{_TOWER}.post_layernorm", float(vision.layer_norm_eps))
    features = parts.linear(_query_states(parts, states, config.qformer_config), "language_projection")
    extent = ["images", int(config.num_query_tokens), int(config.text_config.hidden_size)]
    graph.output("image_features", features, graph.dtype, extent)


def _patches(parts: Parts, pixels: str, config: Any) -> str:
    """Return the class token and the patches of images with their positions, [images, places, hidden]."""
    graph, name = parts.graph, f"{_TOWER}.embeddings"
    kernel, bias = (parts.tensor(f"{name}.patch_embedding.{part}") for part in ("weight", "bias"))
    side = int(config.patch_size)
    grid = graph.op("Conv", pixels, kernel, bias, kernel_shape=[side, side], strides=[side, side])
    patches = graph.transpose(graph.reshape(grid, [0, int(config.hidden_size), -1]), [0, 2, 1])
    first = _for_each(parts, parts.tensor(f"{name}.class_embedding"), pixels)
    return graph.op("Add", graph.op("Concat", first, patches, axis=1), parts.tensor(f"{name}.position_embedding"))


def _for_each(parts: Parts, value: str, images: str) -> str:
    """Return a value [1, length, hidden] once for every image."""
    graph = parts.graph
    return graph.op("Expand", value, graph.op("Concat", graph.extent(images, 0), graph.const([1, 1]), axis=0))


def _tower_block(parts: Parts, value: str, name: str, config: Any) -> str:
    """Return what a block of the ViT makes of a value, its queries, keys and values from one linear."""
    graph, epsilon, width = parts.graph, float(config.layer_norm_eps), int(config.hidden_size)
    mixed = parts.linear(parts.layer_norm(value, f"{name}.layer_norm1", epsilon), f"{name}.self_attn.qkv")
    query, key, states = graph.split(mixed, [width] * 3)
    seen = parts.attention(query, key, states, int(config.num_attention_heads))
    value = graph.op("Add", parts.linear(seen, f"{name}.self_attn.projection"), value)
    normed = parts.layer_norm(value, f"{name}.layer_norm2", epsilon)
    grown = parts.linear(normed, f"{name}.mlp.fc1", str(config.hidden_act))
    return graph.op("Add", parts.linear(grown, f"{name}.mlp.fc2"), value)


def _query_states(parts: Parts, states: str, config: Any) -> str:
    """Return what the query tokens read from each image's states, [images, query tokens, hidden]."""
    graph = parts.graph
    queries = parts.layer_norm(parts.tensor("query_tokens"), f"{_QFORMER}.layernorm", float(config.layer_norm_eps))
    value = _for_each(parts, queries, states)
    for layer in range(int(config.num_hidden_layers)):
        name = f"{_QFORMER}.encoder.layer.{layer}"
        with graph.scope(f"qformer.{layer}"):
            value = _attention(parts, value, value, f"{name}.attention", config)
            if layer % int(config.cross_attention_frequency) == 0:
                value = _attention(parts, value, states, f"{name}.crossattention", config)
            grown = parts.linear(value, f"{name}.intermediate_query.dense", str(config.hidden_act))
            value = _output(parts, grown, value, f"{name}.output_query", config)
    return value


def _attention(parts: Parts, value: str, seen: str, name: str, config: Any) -> str:
    """Return attention of a value over what it sees, itself or an image's states; added, then normed."""
    names = [f"{name}.attention.{part}" for part in ("query", "key", "value")]
    if seen == value:
        query, key, found = parts.linears(value, names)
    else:
        query, (key, found) = parts.linear(value, names[0]), parts.linears(seen, names[1:])
    mixed = parts.attention(query, key, found, int(config.num_attention_heads))
    return _output(parts, mixed, value, f"{name}.output", config)


def _output(parts: Parts, value: str, residual: str, name: str, config: Any) -> str:
    total = parts.graph.op("Add", parts.linear(value, f"{name}.dense"), residual)
    return parts.layer_norm(total, f"{name}.LayerNorm", float(config.layer_norm_eps))
