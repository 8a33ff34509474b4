"""Llama 3.2 Vision (arXiv 2407.21783, section 7) as graphs: the vision tower and the decoder.

The keys and values of the decoder's cross-attention blocks depend on the images alone, so the vision encoder computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.export.onnx.graphs.decoder import DecoderInputs, DecoderSize, decode, feed_forward, head_norm, self_attention
from compress.export.onnx.graphs.graph import Graph
from compress.export.onnx.graphs.layer_builder import LayerBuilder

_TOWER, _PROJECTOR = "model.vision_model", "model.multi_modal_projector"
_MULTIPLE = 8
"""The multiple to which the tokens of a tile are padded; patches attend to padding, as in training. Also the number of mark
channels per head, as fused kernels need head sizes of such multiples."""

_TOWER_EPSILON = 1e-5
"""The epsilon of the norms: torch's default for LayerNorm, which the model's code leaves."""

_MARK = 64.0
"""The mark of a padding token; its square, scaled, exceeds any attention score, and is within float16."""


@dataclass(frozen=True)
class Marks:
    """The channels appended to each head's queries, keys and values in the tower, [images, all tokens, heads, 8]."""

    query: str
    key: str
    value: str


@dataclass(frozen=True)
class CrossMask:
    """The mask of cross-attention."""

    bias: str
    """Added to the scores [batch, 1, sequence · queries per key head, states]."""

    rows: str
    """Whether a row has an image, 1 or 0 [batch, 1, 1]."""

    tokens: str
    """Whether a token attends to an image, 1 or 0 [batch, sequence, 1]."""


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit the tower and the keys and values of each cross-attention block.

    `pixel_values` [batch, images, tiles, channels, height, width], `aspect_ratio_ids` [batch, images] and `aspect_ratio_mask`
    [batch, images, tiles] become `past_key_values.{block}.key` and `.value` [batch, key heads, images · tiles · tokens, width].
    """
    graph, config = builder.graph, builder.source.config
    vision, text = config.vision_config, config.get_text_config()
    tiles, side = int(vision.max_num_tiles), int(vision.image_size)
    size = DecoderSize.of(text)
    pixels = graph.input("pixel_values", graph.dtype, ["batch_size", "images", tiles, int(vision.num_channels), side, side])
    ratios = graph.input("aspect_ratio_ids", np.int64, ["batch_size", "images"])
    mask = graph.input("aspect_ratio_mask", np.int64, ["batch_size", "images", tiles])
    features = _tower(builder, pixels, graph.reshape(ratios, [-1]), graph.reshape(mask, [-1, tiles]))
    states = builder.linear(features, _PROJECTOR)  # [batch · images, tiles · tokens, hidden]
    rows = graph.op("Concat", graph.extent(pixels, 0), graph.const([-1, size.hidden]), axis=0)
    states = graph.op("Reshape", states, rows)
    for layer in text.cross_attention_layers:
        with graph.scope(f"layers.{layer}"):
            _keys_and_values(builder, states, int(layer), size)


def _keys_and_values(builder: LayerBuilder, states: str, layer: int, size: DecoderSize) -> None:
    """Declare the outputs of a cross-attention block's keys and values from the images' states [batch, tokens, hidden]."""
    graph, name = builder.graph, f"{builder.source.family.blocks}.{layer}.cross_attn"
    epsilon = float(builder.source.config.get_text_config().rms_norm_eps)
    key, value = builder.linears(states, [f"{name}.k_proj", f"{name}.v_proj"])
    split = [graph.reshape(states, [0, 0, size.kv_heads, size.width]) for states in (key, value)]
    split[0] = builder.rms_norm(split[0], f"{name}.k_norm", epsilon)
    for kind, states in zip(("key", "value"), split, strict=True):
        extent = _cache_extent(size)
        graph.output(f"past_key_values.{layer}.{kind}", graph.transpose(states, [0, 2, 1, 3]), graph.dtype, extent)


def _cache_extent(size: DecoderSize) -> list[int | str]:
    return ["batch_size", size.kv_heads, "image_states", size.width]


def _tower(builder: LayerBuilder, pixels: str, ratios: str, mask: str) -> str:
    """Return the tower's last and intermediate hidden states, concatenated, [images, tiles · tokens, features].

    `pixels` [batch, images, tiles, channels, height, width]; `ratios` [all images]; `mask` [all images, tiles].
    """
    graph, config = builder.graph, builder.source.config.vision_config
    width, tiles = int(config.hidden_size), int(config.max_num_tiles)
    tokens = (int(config.image_size) // int(config.patch_size)) ** 2 + 1
    padding = -tokens % _MULTIPLE
    padded = [-1, tiles, tokens + padding, width]
    # The padding below comes after this norm, so that padded rows are exactly 0 as in transformers.
    value = builder.layer_norm(_patches(builder, pixels, ratios, config), f"{_TOWER}.layernorm_pre", _TOWER_EPSILON)
    value = graph.op("Pad", value, graph.const([0, 0, 0, 0, 0, 0, padding, 0]), graph.const(0.0))
    value = graph.reshape(value, [-1, tiles * (tokens + padding), width])
    marks = _marks(builder, mask, tokens, padding)

    inner: list[str] = []
    for layer in range(int(config.num_hidden_layers)):
        with graph.scope(f"layers.{layer}"):
            value = _block(builder, value, f"{_TOWER}.transformer.layers.{layer}", marks, config)
        inner.append(value)
    value = builder.layer_norm(value, f"{_TOWER}.layernorm_post", _TOWER_EPSILON)
    value = _tile_positions(builder, graph.reshape(value, padded), "post_tile_positional_embedding", ratios, config)
    value = graph.reshape(value, [-1, tiles * (tokens + padding), width])
    for layer in range(int(config.num_global_layers)):
        with graph.scope(f"global_layers.{layer}"):
            value = _block(builder, value, f"{_TOWER}.global_transformer.layers.{layer}", marks, config, gated=True)

    chosen = [graph.reshape(inner[int(index)], [*padded, 1]) for index in config.intermediate_layers_indices]
    # Stacked on a new last axis: transformers interleaves the layers channel by channel, and the projector's columns expect that.
    intermediate = graph.reshape(graph.op("Concat", *chosen, axis=-1), [*padded[:3], width * len(chosen)])
    # Padding is cut after the last block, not before: patches attend to it.
    features = graph.slice(graph.op("Concat", graph.reshape(value, padded), intermediate, axis=-1), 0, tokens, 2)
    return graph.reshape(features, [-1, tiles * tokens, width * (1 + len(chosen))])


def _patches(builder: LayerBuilder, pixels: str, ratios: str, config: Any) -> str:
    """Return the embeddings of each tile's class token and patches, with positions, [images, tiles, tokens, hidden]."""
    graph, width, tiles = builder.graph, int(config.hidden_size), int(config.max_num_tiles)
    side, size = int(config.patch_size), int(config.image_size)
    tokens = (size // side) ** 2
    flat = graph.reshape(pixels, [-1, int(config.num_channels), size, size])
    kernel = builder.tensor(f"{_TOWER}.patch_embedding.weight")
    grid = graph.op("Conv", flat, kernel, kernel_shape=[side, side], strides=[side, side])
    value = graph.transpose(graph.reshape(grid, [-1, tiles, width, tokens]), [0, 1, 3, 2])
    value = _tile_positions(builder, value, "pre_tile_positional_embedding", ratios, config)
    token = builder.tensor(f"{_TOWER}.class_embedding", lambda row: row.view(1, 1, 1, -1), "_row")
    first = graph.op("Expand", token, graph.op("Concat", graph.extent(ratios, 0), graph.const([tiles, 1, 1]), axis=0))
    value = graph.op("Concat", first, value, axis=2)

    name = f"{_TOWER}.gated_positional_embedding"
    gate = graph.op("Tanh", builder.tensor(f"{name}.gate"))
    shared = graph.op("Mul", builder.tensor(f"{name}.embedding"), graph.op("Sub", graph.const(1.0), gate))
    by_ratio = graph.op("Gather", builder.tensor(f"{name}.tile_embedding.weight"), ratios, axis=0)
    per_tile = graph.op("Mul", graph.reshape(by_ratio, [-1, tiles, tokens + 1, width]), gate)
    return graph.op("Add", graph.op("Add", value, shared), per_tile)


def _tile_positions(builder: LayerBuilder, value: str, name: str, ratios: str, config: Any) -> str:
    """Return a value [images, tiles, tokens, hidden] with gated tile position embeddings."""
    graph = builder.graph
    table = builder.tensor(f"{_TOWER}.{name}.embedding.weight")
    shape = [-1, int(config.max_num_tiles), 1, int(config.hidden_size)]
    embeds = graph.reshape(graph.op("Gather", table, ratios, axis=0), shape)
    return graph.op("Add", value, graph.op("Mul", embeds, graph.op("Tanh", builder.tensor(f"{_TOWER}.{name}.gate"))))


def _marks(builder: LayerBuilder, mask: str, tokens: int, padding: int) -> Marks:
    """Return the marks that mask padding from padding.

    Only that is masked, as in training. A large negative product does it without a bias, which would be as large as the scores, and
    need all of them in memory at once.
    """
    graph, heads = builder.graph, int(builder.source.config.vision_config.attention_heads)
    real = np.concatenate([np.ones(tokens), np.zeros(padding)])
    is_token = graph.op("And", graph.cast(graph.op("Unsqueeze", mask, graph.const([-1])), np.bool_), graph.const(real, np.bool_))
    empty = graph.reshape(graph.cast(graph.op("Not", is_token), graph.dtype), [0, -1, 1, 1])
    row = np.zeros((1, 1, heads, _MULTIPLE))
    # One channel carries the mark, seven are 0: they only fill the head size to a multiple of eight.
    row[..., 0] = _MARK
    query, key, states = (graph.op("Mul", empty, graph.const(mark)) for mark in (row, -row, 0 * row))
    return Marks(query, key, states)


def _bias(graph: Graph, hidden: str) -> str:
    return graph.op("Where", hidden, graph.const(float(np.finfo(graph.dtype).min)), graph.const(0.0))


def _block(builder: LayerBuilder, value: str, name: str, marks: Marks, config: Any, *, gated: bool = False) -> str:
    """Return a pre-norm block of the tower of a value [images, all tokens, hidden]."""
    graph, epsilon = builder.graph, float(config.norm_eps)
    normed = builder.layer_norm(value, f"{name}.input_layernorm", epsilon)
    attended = _tower_attention(builder, normed, f"{name}.self_attn", marks, int(config.attention_heads))
    value = graph.op("Add", value, _gate(builder, attended, f"{name}.gate_attn") if gated else attended)
    normed = builder.layer_norm(value, f"{name}.post_attention_layernorm", epsilon)
    mlp_output = builder.mlp(normed, f"{name}.mlp.fc1", f"{name}.mlp.fc2", str(config.hidden_act))
    return graph.op("Add", value, _gate(builder, mlp_output, f"{name}.gate_ffn") if gated else mlp_output)


def _tower_attention(builder: LayerBuilder, value: str, name: str, marks: Marks, heads: int) -> str:
    """Return self-attention `name` of a value [images, all tokens, hidden]."""
    graph, width = builder.graph, int(builder.source.config.vision_config.hidden_size) // heads
    qkv = builder.linears(value, [f"{name}.{kind}_proj" for kind in "qkv"])
    query, key, content = (
        graph.reshape(graph.op("Concat", graph.reshape(states, [0, 0, heads, width]), mark, axis=-1), [0, 0, -1])
        for states, mark in zip(qkv, (marks.query, marks.key, marks.value), strict=True)
    )
    # By the head size without marks: with the marks' channels the operator would scale by another root.
    attended = builder.attention(query, key, content, heads, scale=width**-0.5)
    attended = graph.slice(graph.reshape(attended, [0, 0, heads, width + _MULTIPLE]), 0, width, 3)
    return builder.linear(graph.reshape(attended, [0, 0, heads * width]), f"{name}.o_proj")


def _gate(builder: LayerBuilder, value: str, name: str) -> str:
    return builder.graph.op("Mul", value, builder.graph.op("Tanh", builder.tensor(name)))


def decoder(builder: LayerBuilder) -> None:
    """Emit the decoder with its KV cache: see `docs/formats/onnx.md` for inputs and outputs.

    A row of zeros in `cross_attention_mask` [batch, sequence, images · tiles] is a prompt without images: cross-attention blocks do
    not change it, and the keys may be of any length. A token of zeros in a row with images, which precedes the first image, attends
    to all of the row's states, and skips the block's feed-forward, as in transformers.

    Raises:
        CheckpointError: its RoPE type is not supported.
    """
    graph, text = builder.graph, builder.source.config.get_text_config()
    cross_layers, blocks = frozenset(int(layer) for layer in text.cross_attention_layers), builder.source.family.blocks
    hidden = graph.input("inputs_embeds", graph.dtype, ["batch_size", "sequence_length", int(text.hidden_size)])
    inputs = DecoderInputs.of(builder)
    mask = graph.input("cross_attention_mask", np.int64, ["batch_size", "sequence_length", "image_tiles"])
    cross_mask: CrossMask | None = None

    def attend(value: str, layer: int) -> str:
        nonlocal cross_mask
        if layer not in cross_layers:
            return self_attention(builder, value, layer, inputs)
        size, tiles = inputs.size, int(builder.source.config.vision_config.max_num_tiles)
        past = [graph.input(f"past_key_values.{layer}.{kind}", graph.dtype, _cache_extent(size)) for kind in ("key", "value")]
        # Built in the first cross-attention layer, as its extents follow from that layer's keys; the others reuse it.
        cross_mask = cross_mask or _cross_mask(graph, mask, past[0], size.heads // size.kv_heads, tiles)
        attended = _cross_attention(builder, value, f"{blocks}.{layer}.cross_attn", past, size, cross_mask)
        return _gate(builder, graph.op("Mul", attended, cross_mask.rows), f"{blocks}.{layer}.cross_attn_attn_gate")

    def feed(value: str, layer: int) -> str:
        output = feed_forward(builder, value, f"{blocks}.{layer}.mlp", str(text.hidden_act))
        if layer not in cross_layers or cross_mask is None:
            return output
        return _gate(builder, graph.op("Mul", output, cross_mask.tokens), f"{blocks}.{layer}.cross_attn_mlp_gate")

    decode(builder, hidden, attend, feed)


def _cross_mask(graph: Graph, mask: str, keys: str, group: int, tiles: int) -> CrossMask:
    """Return the mask [batch, sequence, images · tiles] for keys [batch, heads, states, width], shared by `group` query heads."""
    allowed, zero, one = graph.cast(mask, np.bool_), graph.const(0), graph.const([1])
    tokens, rows, tile = (
        graph.op("Greater", graph.op("ReduceSum", mask, graph.const(axes), keepdims=1), zero) for axes in ([2], [1, 2], [1])
    )
    # Images behind a row's last one are padding of the batch: an image is real if it, or one after it, has a tile.
    first = graph.op("Mul", graph.op("Div", graph.arange(graph.extent(mask, 2)), graph.const(tiles)), graph.const(tiles))
    later = graph.op("CumSum", graph.cast(tile, np.int64), graph.const(2), reverse=1)
    real = graph.op("Or", graph.op("Greater", graph.op("Gather", later, first, axis=2), zero), graph.op("Not", rows))
    visible = graph.op("Or", allowed, graph.op("And", graph.op("Not", tokens), real))
    bias = graph.op("Unsqueeze", _bias(graph, graph.op("Not", visible)), one)
    queries = graph.arange(graph.op("Mul", graph.extent(mask, 1), graph.const([group])))
    bias = graph.op("Gather", bias, graph.op("Div", queries, graph.const(group)), axis=2)
    states = graph.extent(keys, 2)
    # At least 1: a prompt without images may give keys of length 0, and nothing may divide by zero.
    states_per_tile = graph.op("Max", graph.op("Div", states, graph.op("Max", graph.extent(mask, 2), one)), one)
    bias = graph.op("Gather", bias, graph.op("Div", graph.arange(states), states_per_tile), axis=3)
    return CrossMask(bias, graph.cast(rows, graph.dtype), graph.cast(tokens, graph.dtype))


def _cross_attention(builder: LayerBuilder, value: str, name: str, past: list[str], size: DecoderSize, mask: CrossMask) -> str:
    """Return attention `name` of a value [batch, sequence, hidden] over the images' keys and values.

    The query heads that share a key head are laid out as further tokens, so that no key is copied.
    """
    graph, group = builder.graph, size.heads // size.kv_heads
    epsilon = float(builder.source.config.get_text_config().rms_norm_eps)
    query = head_norm(builder, builder.linear(value, f"{name}.q_proj"), f"{name}.q_norm", epsilon, size.width)
    query = graph.transpose(graph.reshape(query, [0, 0, size.kv_heads, group, size.width]), [0, 1, 3, 2, 4])
    query = graph.reshape(query, [0, -1, size.kv_heads * size.width])
    # No GroupQueryAttention: it is causal, and these keys are an image's, all of which every token may see.
    attended = builder.attention(query, past[0], past[1], size.kv_heads, mask.bias)
    attended = graph.transpose(graph.reshape(attended, [0, -1, group, size.kv_heads, size.width]), [0, 1, 3, 2, 4])
    return builder.linear(graph.reshape(attended, [0, 0, size.heads * size.width]), f"{name}.o_proj")
