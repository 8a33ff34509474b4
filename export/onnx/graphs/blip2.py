"""BLIP-2's vision encoder (arXiv 2301.12597) as a graph: a ViT, the Q-Former, a projection."""

from __future__ import annotations

from typing import Any

from compress.export.onnx.graphs.layer_builder import LayerBuilder

_TOWER, _QFORMER = "vision_model", "qformer"


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit `pixel_values` [images, channels, height, width] to `image_features` [images, query tokens, hidden]."""
    graph, config = builder.graph, builder.source.config
    vision, size = config.vision_config, int(config.vision_config.image_size)
    pixels = graph.input("pixel_values", graph.dtype, ["images", 3, size, size])
    value = _patches(builder, pixels)
    for layer in range(int(vision.num_hidden_layers)):
        with graph.scope(f"layers.{layer}"):
            value = _tower_block(builder, value, f"{_TOWER}.encoder.layers.{layer}", vision)
    states = builder.layer_norm(value, f"{_TOWER}.post_layernorm", float(vision.layer_norm_eps))
    features = builder.linear(_query_states(builder, states, config.qformer_config), "language_projection")
    extent = ["images", int(config.num_query_tokens), int(config.text_config.hidden_size)]
    graph.output("image_features", features, graph.dtype, extent)


def _patches(builder: LayerBuilder, pixels: str) -> str:
    """Return the embeddings of the class token and the patches, with positions, [images, tokens, hidden]."""
    graph, name = builder.graph, f"{_TOWER}.embeddings"
    patches = builder.patches(pixels, f"{name}.patch_embedding")
    first = builder.per_image(builder.tensor(f"{name}.class_embedding"), pixels)
    return graph.op("Add", graph.op("Concat", first, patches, axis=1), builder.tensor(f"{name}.position_embedding"))


def _tower_block(builder: LayerBuilder, value: str, name: str, config: Any) -> str:
    """Return a pre-norm block of the ViT, with a fused QKV linear."""
    graph, epsilon, width = builder.graph, float(config.layer_norm_eps), int(config.hidden_size)
    qkv = builder.linear(builder.layer_norm(value, f"{name}.layer_norm1", epsilon), f"{name}.self_attn.qkv")
    query, key, states = graph.split(qkv, [width] * 3)
    attended = builder.attention(query, key, states, int(config.num_attention_heads))
    value = graph.op("Add", builder.linear(attended, f"{name}.self_attn.projection"), value)
    normed = builder.layer_norm(value, f"{name}.layer_norm2", epsilon)
    return graph.op("Add", builder.mlp(normed, f"{name}.mlp.fc1", f"{name}.mlp.fc2", str(config.hidden_act)), value)


def _query_states(builder: LayerBuilder, states: str, config: Any) -> str:
    """Return the Q-Former's output for each image's states, [images, query tokens, hidden]."""
    # Normed once, before they are repeated per image: the queries are the same for all.
    queries = builder.layer_norm(builder.tensor("query_tokens"), f"{_QFORMER}.layernorm", float(config.layer_norm_eps))
    value = builder.per_image(queries, states)
    for layer in range(int(config.num_hidden_layers)):
        name = f"{_QFORMER}.encoder.layer.{layer}"
        with builder.graph.scope(f"qformer.{layer}"):
            value = _attention(builder, value, value, f"{name}.attention", config)
            if layer % int(config.cross_attention_frequency) == 0:
                value = _attention(builder, value, states, f"{name}.crossattention", config)
            hidden = builder.linear(value, f"{name}.intermediate_query.dense", str(config.hidden_act))
            value = _output(builder, hidden, value, f"{name}.output_query", config)
    return value


def _attention(builder: LayerBuilder, value: str, context: str, name: str, config: Any) -> str:
    """Return post-norm attention of a value over `context`: itself, or an image's states."""
    names = [f"{name}.attention.{kind}" for kind in ("query", "key", "value")]
    if context == value:
        query, key, content = builder.linears(value, names)
    else:
        # In cross-attention only keys and values have a common input, and may be fused.
        query, (key, content) = builder.linear(value, names[0]), builder.linears(context, names[1:])
    attended = builder.attention(query, key, content, int(config.num_attention_heads))
    return _output(builder, attended, value, f"{name}.output", config)


def _output(builder: LayerBuilder, value: str, residual: str, name: str, config: Any) -> str:
    total = builder.graph.op("Add", builder.linear(value, f"{name}.dense"), residual)
    return builder.layer_norm(total, f"{name}.LayerNorm", float(config.layer_norm_eps))
