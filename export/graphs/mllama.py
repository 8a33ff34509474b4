"""Llama 3.2 Vision (arXiv 2407.21783, section 7) as graphs: the vision tower and the decoder.

The keys and values of the decoder's cross-attention blocks depend on the images alone, so the vision encoder gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.export.graphs.decoder import (
    DecoderSize,
    feed_forward,
    head_norm,
    logits,
    rotary_tables,
    self_attention,
    sequence_lengths,
)
from compress.export.graphs.graph import Graph
from compress.export.graphs.layer_builder import LayerBuilder

_TOWER, _PROJECTOR = "model.vision_model", "model.multi_modal_projector"
_MULTIPLE = 8
"""What the number of places of a tile is padded to a multiple of; padding is seen by the patches, as in training. Heads are widened
by as much, since fused kernels want such widths."""

_TOWER_EPSILON = 1e-5
_MARK = 64.0
"""Marks a place of padding in what is multiplied; its square, scaled, is more than any score, and within what float16 holds."""


@dataclass(frozen=True)
class Marks:
    """What stands beside each head's queries, keys and values of the tower, [images, all places, heads, 8]."""

    query: str
    key: str
    value: str


@dataclass(frozen=True)
class Images:
    """What each token reads of images: a bias on the scores [batch, 1, sequence · queries per key head, states]; whether a row
    has an image, [batch, 1, 1]; whether a token sees one, [batch, sequence, 1]; both 1 or 0."""

    bias: str
    rows: str
    tokens: str


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit the tower and what each cross-attention block makes of it.

    `pixel_values` [batch, images, tiles, channels, height, width], `aspect_ratio_ids` [batch, images] and `aspect_ratio_mask`
    [batch, images, tiles] become `past_key_values.{block}.key` and `.value` [batch, key heads, images · tiles · places, width].
    """
    graph, config = builder.graph, builder.source.config
    vision, text = config.vision_config, config.get_text_config()
    tiles, size = int(vision.max_num_tiles), int(vision.image_size)
    size = DecoderSize.of(text)
    pixels = graph.input("pixel_values", graph.dtype, ["batch_size", "images", tiles, int(vision.num_channels), size, size])
    ratios = graph.input("aspect_ratio_ids", np.int64, ["batch_size", "images"])
    mask = graph.input("aspect_ratio_mask", np.int64, ["batch_size", "images", tiles])
    features = _tower(builder, pixels, graph.reshape(ratios, [-1]), graph.reshape(mask, [-1, tiles]))
    states = builder.linear(features, _PROJECTOR)  # [batch · images, tiles · places, hidden]
    rows = graph.op("Concat", graph.extent(pixels, 0), graph.const([-1, size.hidden]), axis=0)
    states = graph.op("Reshape", states, rows)
    for layer in text.cross_attention_layers:
        with graph.scope(f"layers.{layer}"):
            _keys_and_values(builder, states, int(layer), size)


def _keys_and_values(builder: LayerBuilder, states: str, layer: int, size: DecoderSize) -> None:
    """Give out what a cross-attention block reads of the images' states [batch, places, hidden]."""
    graph, name = builder.graph, f"{builder.source.family.blocks}.{layer}.cross_attn"
    epsilon = float(builder.source.config.get_text_config().rms_norm_eps)
    key, value = builder.linears(states, [f"{name}.k_proj", f"{name}.v_proj"])
    split = [graph.reshape(each, [0, 0, size.kv_heads, size.width]) for each in (key, value)]
    split[0] = builder.rms_norm(split[0], f"{name}.k_norm", epsilon)
    for part, each in zip(("key", "value"), split, strict=True):
        extent = _cache_extent(size)
        graph.output(f"past_key_values.{layer}.{part}", graph.transpose(each, [0, 2, 1, 3]), graph.dtype, extent)


def _cache_extent(size: DecoderSize) -> list[int | str]:
    return ["batch_size", size.kv_heads, "image_states", size.width]


def _tower(builder: LayerBuilder, pixels: str, ratios: str, mask: str) -> str:
    """Return the last and the inner states of the tower side by side, [images, tiles · places, features].

    `pixels` [batch, images, tiles, channels, height, width]; `ratios` [all images]; `mask` [all images, tiles].
    """
    graph, config = builder.graph, builder.source.config.vision_config
    width, tiles = int(config.hidden_size), int(config.max_num_tiles)
    places = (int(config.image_size) // int(config.patch_size)) ** 2 + 1
    padding = -places % _MULTIPLE
    padded = [-1, tiles, places + padding, width]
    value = builder.layer_norm(_patches(builder, pixels, ratios, config), f"{_TOWER}.layernorm_pre", _TOWER_EPSILON)
    value = graph.op("Pad", value, graph.const([0, 0, 0, 0, 0, 0, padding, 0]), graph.const(0.0))
    value = graph.reshape(value, [-1, tiles * (places + padding), width])
    marks = _marks(builder, mask, places, padding)

    inner: list[str] = []
    for layer in range(int(config.num_hidden_layers)):
        with graph.scope(f"layers.{layer}"):
            value = _block(builder, value, f"{_TOWER}.transformer.layers.{layer}", marks, config)
        inner.append(value)
    value = builder.layer_norm(value, f"{_TOWER}.layernorm_post", _TOWER_EPSILON)
    value = _tile_positions(builder, graph.reshape(value, padded), "post_tile_positional_embedding", ratios, config)
    value = graph.reshape(value, [-1, tiles * (places + padding), width])
    for layer in range(int(config.num_global_layers)):
        with graph.scope(f"global_layers.{layer}"):
            value = _block(builder, value, f"{_TOWER}.global_transformer.layers.{layer}", marks, config, gated=True)

    chosen = [graph.reshape(inner[int(index)], [*padded, 1]) for index in config.intermediate_layers_indices]
    mixed = graph.reshape(graph.op("Concat", *chosen, axis=-1), [*padded[:3], width * len(chosen)])
    features = graph.slice(graph.op("Concat", graph.reshape(value, padded), mixed, axis=-1), 0, places, 2)
    return graph.reshape(features, [-1, tiles * places, width * (1 + len(chosen))])


def _patches(builder: LayerBuilder, pixels: str, ratios: str, config: Any) -> str:
    """Return each tile's class token and patches with their positions, [images, tiles, places, hidden]."""
    graph, width, tiles = builder.graph, int(config.hidden_size), int(config.max_num_tiles)
    side, size = int(config.patch_size), int(config.image_size)
    places = (size // side) ** 2
    flat = graph.reshape(pixels, [-1, int(config.num_channels), size, size])
    kernel = builder.tensor(f"{_TOWER}.patch_embedding.weight")
    grid = graph.op("Conv", flat, kernel, kernel_shape=[side, side], strides=[side, side])
    value = graph.transpose(graph.reshape(grid, [-1, tiles, width, places]), [0, 1, 3, 2])
    value = _tile_positions(builder, value, "pre_tile_positional_embedding", ratios, config)
    token = builder.tensor(f"{_TOWER}.class_embedding", lambda found: found.view(1, 1, 1, -1), "_row")
    first = graph.op("Expand", token, graph.op("Concat", graph.extent(ratios, 0), graph.const([tiles, 1, 1]), axis=0))
    value = graph.op("Concat", first, value, axis=2)

    name = f"{_TOWER}.gated_positional_embedding"
    gate = graph.op("Tanh", builder.tensor(f"{name}.gate"))
    alike = graph.op("Mul", builder.tensor(f"{name}.embedding"), graph.op("Sub", graph.const(1.0), gate))
    found = graph.op("Gather", builder.tensor(f"{name}.tile_embedding.weight"), ratios, axis=0)
    own = graph.op("Mul", graph.reshape(found, [-1, tiles, places + 1, width]), gate)
    return graph.op("Add", graph.op("Add", value, alike), own)


def _tile_positions(builder: LayerBuilder, value: str, name: str, ratios: str, config: Any) -> str:
    """Return a value [images, tiles, places, hidden] with what tells the tiles of an image apart."""
    graph = builder.graph
    table = builder.tensor(f"{_TOWER}.{name}.embedding.weight")
    size = [-1, int(config.max_num_tiles), 1, int(config.hidden_size)]
    found = graph.reshape(graph.op("Gather", table, ratios, axis=0), size)
    return graph.op("Add", value, graph.op("Mul", found, graph.op("Tanh", builder.tensor(f"{_TOWER}.{name}.gate"))))


def _marks(builder: LayerBuilder, mask: str, places: int, padding: int) -> Marks:
    """Return what is put beside queries, keys and values of every place of images, so that padding is not seen from padding.

    That alone is hidden, as in training. A large negative product does it without a bias, which would be as large as the scores,
    and need them all in memory at once.
    """
    graph, heads = builder.graph, int(builder.source.config.vision_config.attention_heads)
    real = np.concatenate([np.ones(places), np.zeros(padding)])
    seen = graph.op("And", graph.cast(graph.op("Unsqueeze", mask, graph.const([-1])), np.bool_), graph.const(real, np.bool_))
    empty = graph.reshape(graph.cast(graph.op("Not", seen), graph.dtype), [0, -1, 1, 1])
    row = np.zeros((1, 1, heads, _MULTIPLE))
    row[..., 0] = _MARK
    query, key, states = (graph.op("Mul", empty, graph.const(each)) for each in (row, -row, 0 * row))
    return Marks(query, key, states)


def _bias(graph: Graph, hidden: str) -> str:
    return graph.op("Where", hidden, graph.const(float(np.finfo(graph.dtype).min)), graph.const(0.0))


def _block(builder: LayerBuilder, value: str, name: str, marks: Marks, config: Any, *, gated: bool = False) -> str:
    """Return what a block of the tower makes of a value [images, all places, hidden]."""
    graph, epsilon = builder.graph, float(config.norm_eps)
    normed = builder.layer_norm(value, f"{name}.input_layernorm", epsilon)
    mixed = _tower_attention(builder, normed, f"{name}.self_attn", marks, int(config.attention_heads))
    value = graph.op("Add", value, _gate(builder, mixed, f"{name}.gate_attn") if gated else mixed)
    normed = builder.layer_norm(value, f"{name}.post_attention_layernorm", epsilon)
    grown = builder.linear(builder.linear(normed, f"{name}.mlp.fc1", str(config.hidden_act)), f"{name}.mlp.fc2")
    return graph.op("Add", value, _gate(builder, grown, f"{name}.gate_ffn") if gated else grown)


def _tower_attention(builder: LayerBuilder, value: str, name: str, marks: Marks, heads: int) -> str:
    """Return attention `name` of a value [images, all places, hidden] over itself."""
    graph, width = builder.graph, int(builder.source.config.vision_config.hidden_size) // heads
    found = builder.linears(value, [f"{name}.{part}_proj" for part in "qkv"])
    query, key, states = (
        graph.reshape(graph.op("Concat", graph.reshape(each, [0, 0, heads, width]), mark, axis=-1), [0, 0, -1])
        for each, mark in zip(found, (marks.query, marks.key, marks.value), strict=True)
    )
    mixed = builder.attention(query, key, states, heads, scale=width**-0.5)
    mixed = graph.slice(graph.reshape(mixed, [0, 0, heads, width + _MULTIPLE]), 0, width, 3)
    return builder.linear(graph.reshape(mixed, [0, 0, heads * width]), f"{name}.o_proj")


def _gate(builder: LayerBuilder, value: str, name: str) -> str:
    return builder.graph.op("Mul", value, builder.graph.op("Tanh", builder.tensor(name)))


def decoder(builder: LayerBuilder) -> None:
    """Emit the decoder, with its cache: see `docs/formats/onnx.md` for inputs and outputs.

    A row of `cross_attention_mask` [batch, sequence, images · tiles] without a one is a prompt without images: no block of
    cross-attention changes it, and the keys may be of any length. A token without a one in a row with images, one that stands
    before the first, reads all that the row has, and the block's feed-forward leaves it: transformers computes it so.

    Raises:
        CheckpointError: its positions are rotated in a way that depends on the length.
    """
    graph, text = builder.graph, builder.source.config.get_text_config()
    size, epsilon = DecoderSize.of(text), float(text.rms_norm_eps)
    crossed = frozenset(int(layer) for layer in text.cross_attention_layers)
    hidden = graph.input("inputs_embeds", graph.dtype, ["batch_size", "sequence_length", size.hidden])
    lengths = sequence_lengths(graph)
    tables = rotary_tables(builder, text)
    mask = graph.input("cross_attention_mask", np.int64, ["batch_size", "sequence_length", "image_tiles"])
    images: Images | None = None
    blocks = builder.source.family.blocks
    with graph.scope("layers.0"):
        normed = builder.rms_norm(hidden, f"{blocks}.0.input_layernorm", epsilon)
    for layer in range(size.layers):
        block = f"{blocks}.{layer}"
        following = f"{blocks}.{layer + 1}.input_layernorm" if layer + 1 < size.layers else f"{blocks.rpartition('.')[0]}.norm"
        with graph.scope(f"layers.{layer}"):
            if layer in crossed:
                past = [
                    graph.input(f"past_key_values.{layer}.{part}", graph.dtype, _cache_extent(size)) for part in ("key", "value")
                ]
                tiles = int(builder.source.config.vision_config.max_num_tiles)
                images = images or _images(graph, mask, past[0], size.heads // size.kv_heads, tiles)
                mixed = _cross_attention(builder, normed, f"{block}.cross_attn", past, size, images)
                mixed = _gate(builder, graph.op("Mul", mixed, images.rows), f"{block}.cross_attn_attn_gate")
            else:
                mixed = self_attention(builder, normed, f"{block}.self_attn", layer, size, tables, lengths)
            normed, hidden = builder.add_rms_norm(hidden, mixed, f"{block}.post_attention_layernorm", epsilon, size.hidden)
            grown = feed_forward(builder, normed, f"{block}.mlp", str(text.hidden_act))
            if layer in crossed and images is not None:
                grown = _gate(builder, graph.op("Mul", grown, images.tokens), f"{block}.cross_attn_mlp_gate")
            normed, hidden = builder.add_rms_norm(hidden, grown, following, epsilon, size.hidden)
    logits(builder, normed)


def _images(graph: Graph, mask: str, keys: str, group: int, tiles: int) -> Images:
    """Return what a mask [batch, sequence, images · tiles] says of keys [batch, heads, states, width], each for `group` queries."""
    own, none, one = graph.cast(mask, np.bool_), graph.const(0), graph.const([1])
    tokens, rows, tile = (
        graph.op("Greater", graph.op("ReduceSum", mask, graph.const(axes), keepdims=1), none) for axes in ([2], [1, 2], [1])
    )
    first = graph.op("Mul", graph.op("Div", graph.arange(graph.extent(mask, 2)), graph.const(tiles)), graph.const(tiles))
    later = graph.op("CumSum", graph.cast(tile, np.int64), graph.const(2), reverse=1)
    real = graph.op("Or", graph.op("Greater", graph.op("Gather", later, first, axis=2), none), graph.op("Not", rows))
    seen = graph.op("Or", own, graph.op("And", graph.op("Not", tokens), real))
    bias = graph.op("Unsqueeze", _bias(graph, graph.op("Not", seen)), one)
    queries = graph.arange(graph.op("Mul", graph.extent(mask, 1), graph.const([group])))
    bias = graph.op("Gather", bias, graph.op("Div", queries, graph.const(group)), axis=2)
    states = graph.extent(keys, 2)
    each = graph.op("Max", graph.op("Div", states, graph.op("Max", graph.extent(mask, 2), one)), one)
    bias = graph.op("Gather", bias, graph.op("Div", graph.arange(states), each), axis=3)
    return Images(bias, graph.cast(rows, graph.dtype), graph.cast(tokens, graph.dtype))


def _cross_attention(builder: LayerBuilder, value: str, name: str, past: list[str], size: DecoderSize, images: Images) -> str:
    """Return attention `name` of a value [batch, sequence, hidden] over the images' keys and values.

    The queries that share a head of these stand in a row, as if they were so many more tokens: no key is copied.
    """
    graph, group = builder.graph, size.heads // size.kv_heads
    epsilon = float(builder.source.config.get_text_config().rms_norm_eps)
    query = head_norm(builder, builder.linear(value, f"{name}.q_proj"), f"{name}.q_norm", epsilon, size.width)
    query = graph.transpose(graph.reshape(query, [0, 0, size.kv_heads, group, size.width]), [0, 1, 3, 2, 4])
    query = graph.reshape(query, [0, -1, size.kv_heads * size.width])
    mixed = builder.attention(query, past[0], past[1], size.kv_heads, images.bias)
    mixed = graph.transpose(graph.reshape(mixed, [0, -1, group, size.kv_heads, size.width]), [0, 1, 3, 2, 4])
    return builder.linear(graph.reshape(mixed, [0, 0, size.heads * size.width]), f"{name}.o_proj")
