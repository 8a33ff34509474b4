"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL (arXiv 2409.12191, 2502.13923, 2511.21631) as one graph.

The patches of any number of images of any sizes are one sequence. Attention groups, rotary angles and position embeddings are
computed in the graph from the images' grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.export.onnx.graphs.decoder import feed_forward
from compress.export.onnx.graphs.layer_builder import LayerBuilder, RotaryTables
from compress.export.onnx.graphs.patch_grid import CODES, Groups, PatchGrid

_EPSILON = 1e-6
"""The epsilon of the norms: a constant in transformers' code."""

_MASKED = -15000.0
"""The score of a masked pair: low enough to vanish in softmax, and within float16."""

_MARKS = 8
"""Channels that are appended to queries and keys: two per bit of a code. Eight keep the head size one that GPU kernels support."""


@dataclass(frozen=True)
class Tower:
    """A vision tower's dimensions."""

    name: str
    """The tower's module."""

    hidden: int
    heads: int
    blocks: int
    merge: int
    """The side, in patches, of the square that becomes one token."""

    features: int
    """The width of the output."""

    activation: str
    window: int
    """The side of an attention window in patches; 0 where all blocks have full attention."""

    full_attention: tuple[int, ...]
    """The blocks with full attention over a frame."""

    levels: tuple[int, ...]
    """The blocks with DeepStack outputs."""

    @property
    def width(self) -> int:
        """The head size."""
        return self.hidden // self.heads

    @staticmethod
    def of(builder: LayerBuilder) -> Tower:
        """Return the dimensions in a checkpoint's config."""
        config = builder.source.config.vision_config
        blocks, merge = int(config.depth), int(config.spatial_merge_size)
        # `window_size` is in pixels. Windows hold whole squares of `merge`, as transformers divides by the merged patch's side.
        window = int(getattr(config, "window_size", 0)) // merge // int(config.patch_size) * merge
        # Qwen2-VL's config calls the width `embed_dim` and the output's `hidden_size`; later: `hidden_size`, `out_hidden_size`.
        features = getattr(config, "out_hidden_size", None)
        return Tower(
            name=builder.source.family.vision[0],
            hidden=int(config.hidden_size if features else config.embed_dim),
            heads=int(config.num_heads),
            blocks=blocks,
            merge=merge,
            features=int(features or config.hidden_size),
            activation=str(config.hidden_act),
            window=window,
            full_attention=tuple(config.fullatt_block_indexes) if window else tuple(range(blocks)),
            levels=tuple(getattr(config, "deepstack_visual_indexes", None) or ()),
        )


@dataclass(frozen=True)
class Attention:
    """Attention groups, with the marks that mask other groups in a row.

    Marks are channels appended to queries and keys [rows, slots, heads, width]: a query has a one for each bit of its group's code
    and of the code's complement, a key has `_MASKED` where its group's bits are zero. Their product is 0 within a group and very
    negative elsewhere, and for empty slots. A mask would do the same, but with one, attention holds all scores in memory at once.
    """

    groups: Groups
    queries: str
    """The marks of queries [rows, slots, heads, marks]."""

    keys: str
    """The marks of keys [rows, slots, heads, marks]."""

    @staticmethod
    def of(builder: LayerBuilder, groups: Groups, heads: int) -> Attention:
        """Return the marks for `groups`."""
        graph = builder.graph
        # A bit and its complement: the bit alone could not tell a query of code 0 from any key.
        bits = np.arange(CODES)[:, None] >> np.arange(_MARKS // 2) & 1
        codes = graph.op("Gather", groups.codes, groups.patches)
        shape = graph.op("Concat", graph.op("Shape", codes), graph.const([heads, _MARKS]), axis=0)
        ones = graph.op("Gather", graph.const(np.concatenate([bits, 1 - bits], axis=1), graph.dtype), codes)
        masked = graph.op("Mul", graph.op("Sub", graph.const(1.0), ones), graph.const(_MASKED))
        keys = graph.op("Where", graph.op("Unsqueeze", groups.filled, graph.const([2])), masked, graph.const(_MASKED))
        return Attention(
            groups, *(graph.op("Expand", graph.op("Unsqueeze", marks, graph.const([2])), shape) for marks in (ones, keys))
        )


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit the tower: `pixel_values` [patches, values], `image_grid_thw` [images, 3] to `image_features` [tokens, hidden].

    DeepStack features, where the model has them, are `deepstack_features` [levels, tokens, hidden].
    """
    graph, tower = builder.graph, Tower.of(builder)
    kernel = builder.shape(f"{tower.name}.patch_embed.proj.weight")
    pixels = graph.input("pixel_values", graph.dtype, ["patches", int(np.prod(kernel[1:]))])
    grids = graph.input("image_grid_thw", np.int64, ["images", 3])
    patches = PatchGrid.of(graph, grids, graph.extent(pixels, 0), tower.merge)
    value = _embed(builder, tower, pixels, patches)
    tables = _rotary_tables(builder, tower, patches)
    # Once for the whole tower: groups and marks depend on the images' grids, not on the block.
    full = Attention.of(builder, patches.frames(), tower.heads)
    windowed = Attention.of(builder, patches.windows(tower.window), tower.heads) if tower.window else full
    levels: list[str] = []
    for block in range(tower.blocks):
        with graph.scope(f"blocks.{block}"):
            name = f"{tower.name}.blocks.{block}"
            value = _block(builder, tower, name, value, tables, full if block in tower.full_attention else windowed)
            if block in tower.levels:
                merger = f"{tower.name}.deepstack_merger_list.{tower.levels.index(block)}"
                levels.append(graph.op("Unsqueeze", _merged(builder, tower, merger, value), graph.const([0])))
    graph.output("image_features", _merged(builder, tower, f"{tower.name}.merger", value), graph.dtype, ["tokens", tower.features])
    if levels:
        shape = [len(levels), "tokens", tower.features]
        graph.output("deepstack_features", graph.op("Concat", *levels, axis=0), graph.dtype, shape)


def _embed(builder: LayerBuilder, tower: Tower, pixels: str, patches: PatchGrid) -> str:
    """Return the patch embeddings [patches, hidden]: a convolution with stride equal to its kernel is a matrix product."""
    graph, name = builder.graph, f"{tower.name}.patch_embed.proj"
    value = graph.op("MatMul", pixels, builder.tensor(f"{name}.weight", lambda kernel: kernel.flatten(1).T, "_matrix"))
    if builder.has(f"{name}.bias"):
        value = graph.op("Add", value, builder.tensor(f"{name}.bias"))
    if builder.has(f"{tower.name}.pos_embed.weight"):
        value = graph.op("Add", value, _positions(builder, f"{tower.name}.pos_embed.weight", patches))
    return value


def _positions(builder: LayerBuilder, name: str, patches: PatchGrid) -> str:
    """Return position embeddings [patches, hidden]: a learned square grid, interpolated bilinearly to each image."""
    graph = builder.graph
    # Qwen3-VL's config has no side: its learned positions are a square grid of this many rows.
    side = int(builder.shape(name)[0] ** 0.5)
    table = builder.tensor(name)
    rows = _nearest(builder, patches.row, patches.heights, side)
    columns = _nearest(builder, patches.column, patches.widths, side)
    total = ""
    for row, row_weight in rows:
        for column, column_weight in columns:
            index = graph.op("Add", graph.op("Mul", row, graph.const(side)), column)
            weight = graph.op("Unsqueeze", graph.cast(graph.op("Mul", row_weight, column_weight), graph.dtype), graph.const([1]))
            term = graph.op("Mul", graph.op("Gather", table, index), weight)
            total = graph.op("Add", total, term) if total else term
    return total


def _nearest(builder: LayerBuilder, index: str, length: str, side: int) -> list[tuple[str, str]]:
    """Return the two neighbours in a grid of `side` of each index of an axis of `length`, int64, with their weights, float32."""
    graph = builder.graph
    gaps = graph.op("Max", graph.op("Sub", length, graph.const(1)), graph.const(1))
    # As torch.linspace(0, side - 1, length): a single row or column lies at 0, hence at least one gap.
    scaled = graph.op("Mul", graph.cast(index, np.float32), graph.const(side - 1, np.float32))
    exact = graph.op("Div", scaled, graph.cast(gaps, np.float32))
    floor = graph.op("Floor", exact)
    before = graph.cast(floor, np.int64)
    after = graph.op("Min", graph.op("Add", before, graph.const(1)), graph.const(side - 1))
    fraction = graph.op("Sub", exact, floor)
    return [(before, graph.op("Sub", graph.const(1.0, np.float32), fraction)), (after, fraction)]


def _rotary_tables(builder: LayerBuilder, tower: Tower, patches: PatchGrid) -> RotaryTables:
    """Return the RoPE tables of patches: the first half of the frequencies is for rows, the second for columns."""
    graph = builder.graph
    frequencies = graph.const(builder.module(f"{tower.name}.rotary_pos_emb").inv_freq.numpy(), np.float32)
    axes = [graph.op("Unsqueeze", graph.cast(axis, np.float32), graph.const([1])) for axis in (patches.row, patches.column)]
    angles = graph.op("Concat", *(graph.op("Mul", axis, frequencies) for axis in axes), axis=1)
    tables = [graph.cast(graph.op(kind, angles), graph.dtype) for kind in ("Cos", "Sin")]
    rows = graph.op("Unsqueeze", graph.arange(graph.extent(patches.row, 0)), graph.const([0]))
    return RotaryTables(tables[0], tables[1], rows)


def _block(builder: LayerBuilder, tower: Tower, name: str, value: str, tables: RotaryTables, attention: Attention) -> str:
    """Return a pre-norm block of patches [patches, hidden]."""
    attended = _attention(
        builder, tower, builder.linear(_norm(builder, value, f"{name}.norm1"), f"{name}.attn.qkv"), tables, attention
    )
    value = builder.graph.op("Add", value, builder.linear(attended, f"{name}.attn.proj"))
    return builder.graph.op("Add", value, _feed_forward(builder, tower, _norm(builder, value, f"{name}.norm2"), f"{name}.mlp"))


def _attention(builder: LayerBuilder, tower: Tower, states: str, tables: RotaryTables, attention: Attention) -> str:
    """Return attention [patches, hidden] of concatenated queries, keys and values [patches, 3 · hidden]."""
    graph, groups = builder.graph, attention.groups
    query, key, content = graph.split(states, [tower.hidden] * 3)
    query = _marked(builder, tower, _rotated(builder, tower, query, tables), groups, attention.queries)
    key = _marked(builder, tower, _rotated(builder, tower, key, tables), groups, attention.keys)
    # Values need no marks: MultiHeadAttention takes values of another head size than queries.
    content = graph.op("Gather", content, groups.patches, axis=0)
    # The scale is given, as the operator would take it from the head size with the marks.
    attended = builder.attention(query, key, content, tower.heads, scale=tower.width**-0.5)
    attended = graph.reshape(graph.typed(attended, graph.dtype, (*groups.shape, tower.hidden)), [-1, tower.hidden])
    return graph.op("Gather", attended, groups.slots, axis=0)


def _rotated(builder: LayerBuilder, tower: Tower, value: str, tables: RotaryTables) -> str:
    """Return RoPE of queries or keys [patches, hidden], [1, patches, hidden]."""
    row = builder.graph.op("Unsqueeze", value, builder.graph.const([0]))
    rotated = builder.rotated(row, tables)
    return builder.graph.typed(rotated, builder.graph.dtype, (1, "patches", tower.hidden))


def _marked(builder: LayerBuilder, tower: Tower, value: str, groups: Groups, marks: str) -> str:
    """Return queries or keys arranged in groups, with marks [rows, slots, heads · (width + marks)]."""
    graph = builder.graph
    arranged = graph.op("Gather", graph.reshape(value, [-1, tower.heads, tower.width]), groups.patches, axis=0)
    return graph.reshape(graph.op("Concat", arranged, marks, axis=3), [0, 0, tower.heads * (tower.width + _MARKS)])


def _feed_forward(builder: LayerBuilder, tower: Tower, value: str, name: str) -> str:
    if builder.has_linear(f"{name}.gate_proj"):
        return feed_forward(builder, value, name, tower.activation)
    first, second = ("fc1", "fc2") if builder.has_linear(f"{name}.fc1") else ("linear_fc1", "linear_fc2")
    return builder.mlp(value, f"{name}.{first}", f"{name}.{second}", tower.activation)


def _merged(builder: LayerBuilder, tower: Tower, name: str, value: str) -> str:
    """Return merged tokens [tokens, features], one per square of patches; the norm is over a patch or over the square."""
    width = tower.hidden * tower.merge**2
    norm = f"{name}.ln_q" if builder.has(f"{name}.ln_q.weight") else f"{name}.norm"
    first, second = ("mlp.0", "mlp.2") if builder.has_linear(f"{name}.mlp.0") else ("linear_fc1", "linear_fc2")
    if builder.shape(f"{norm}.weight")[0] == width:
        value = _norm(builder, builder.graph.reshape(value, [-1, width]), norm)
    else:
        value = builder.graph.reshape(_norm(builder, value, norm), [-1, width])
    # The mergers' activation is nn.GELU in transformers' code, whatever the config's `hidden_act`.
    return builder.mlp(value, f"{name}.{first}", f"{name}.{second}", "gelu")


def _norm(builder: LayerBuilder, value: str, name: str) -> str:
    """Return RMSNorm of a value or, where the norm has a bias, LayerNorm."""
    if builder.has(f"{name}.bias"):
        return builder.layer_norm(value, name, _EPSILON)
    return builder.rms_norm(value, name, _EPSILON)
