"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL (arXiv 2409.12191, 2502.13923, 2511.21631) as one graph.

Patches of any number of images of any sizes are one sequence. What attention, rotary angles and position embeddings need to know
of the images is worked out in the graph from their grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.export.graphs.decoder import feed_forward
from compress.export.graphs.parts import Parts, Rotation
from compress.export.graphs.patch_grid import CODES, Groups, PatchGrid

_EPSILON = 1e-6
_NEVER = -15000.0
_MARKS = 8  # two for each bit of a code; with eight the width of a head stays one that kernels on GPUs take


@dataclass(frozen=True)
class Tower:
    """A tower's sizes, and the module it is. `features` is the width of what it gives; `window` is 0 where all blocks see whole
    frames, else the side of a window in patches; `levels` are the blocks whose results are given out too."""

    name: str
    hidden: int
    heads: int
    blocks: int
    merge: int
    features: int
    activation: str
    window: int
    whole: tuple[int, ...]
    levels: tuple[int, ...]

    @property
    def width(self) -> int:
        """A head's."""
        return self.hidden // self.heads

    @staticmethod
    def of(parts: Parts) -> Tower:
        """Return the tower of a checkpoint."""
        config = parts.source.config.vision_config
        blocks, merge = int(config.depth), int(config.spatial_merge_size)
        window = int(getattr(config, "window_size", 0)) // merge // int(config.patch_size) * merge
        features = getattr(config, "out_hidden_size", None)
        return Tower(
            name=parts.source.family.vision[0],
            hidden=int(config.hidden_size if features else config.embed_dim),
            heads=int(config.num_heads),
            blocks=blocks,
            merge=merge,
            features=int(features or config.hidden_size),
            activation=str(config.hidden_act),
            window=window,
            whole=tuple(config.fullatt_block_indexes) if window else tuple(range(blocks)),
            levels=tuple(getattr(config, "deepstack_visual_indexes", None) or ()),
        )


@dataclass(frozen=True)
class Attention:
    """The groups in which patches attend to each other, and what keeps them from all others in their rows.

    Queries and keys, [rows, places, heads, width], are made longer by these marks: a query has a one for each bit of its group's
    code and of that code's complement, a key has `_NEVER` where its group's has none. Their product is 0 in one group, and so
    low elsewhere, and for places where no patch is, that nothing is seen there. A mask would do the same, but with one attention
    holds all scores in memory at once.
    """

    groups: Groups
    queries: str
    keys: str

    @staticmethod
    def of(parts: Parts, groups: Groups, heads: int) -> Attention:
        """Return the attention in `groups`."""
        graph = parts.graph
        bits = np.arange(CODES)[:, None] >> np.arange(_MARKS // 2) & 1
        codes = graph.op("Gather", groups.codes, groups.patches)
        shape = graph.op("Concat", graph.op("Shape", codes), graph.const([heads, _MARKS]), axis=0)
        ones = graph.op("Gather", graph.const(np.concatenate([bits, 1 - bits], axis=1), graph.dtype), codes)
        others = graph.op("Mul", graph.op("Sub", graph.const(1.0), ones), graph.const(_NEVER))
        keys = graph.op("Where", graph.op("Unsqueeze", groups.filled, graph.const([2])), others, graph.const(_NEVER))
        return Attention(
            groups, *(graph.op("Expand", graph.op("Unsqueeze", each, graph.const([2])), shape) for each in (ones, keys))
        )


def vision_encoder(parts: Parts) -> None:
    """Emit the tower: `pixel_values` [patches, values], `image_grid_thw` [images, 3] to `image_features` [tokens, hidden].

    With features from within the tower, those are `deepstack_features` [levels, tokens, hidden].
    """
    graph, tower = parts.graph, Tower.of(parts)
    kernel = parts.shape(f"{tower.name}.patch_embed.proj.weight")
    pixels = graph.input("pixel_values", graph.dtype, ["patches", int(np.prod(kernel[1:]))])
    grids = graph.input("image_grid_thw", np.int64, ["images", 3])
    places = PatchGrid.of(graph, grids, graph.extent(pixels, 0), tower.merge)
    value = _embed(parts, tower, pixels, places)
    rotation = _rotation(parts, tower, places)
    whole = Attention.of(parts, places.frames(), tower.heads)
    windows = Attention.of(parts, places.windows(tower.window), tower.heads) if tower.window else whole
    levels: list[str] = []
    for block in range(tower.blocks):
        with graph.scope(f"blocks.{block}"):
            name = f"{tower.name}.blocks.{block}"
            value = _block(parts, tower, name, value, (rotation, whole if block in tower.whole else windows))
            if block in tower.levels:
                merger = f"{tower.name}.deepstack_merger_list.{tower.levels.index(block)}"
                levels.append(graph.op("Unsqueeze", _merged(parts, tower, merger, value), graph.const([0])))
    graph.output("image_features", _merged(parts, tower, f"{tower.name}.merger", value), graph.dtype, ["tokens", tower.features])
    if levels:
        shape = [len(levels), "tokens", tower.features]
        graph.output("deepstack_features", graph.op("Concat", *levels, axis=0), graph.dtype, shape)


def _embed(parts: Parts, tower: Tower, pixels: str, places: PatchGrid) -> str:
    """Return the patches' embeddings [patches, hidden]: a convolution whose kernels do not overlap is a product."""
    graph, name = parts.graph, f"{tower.name}.patch_embed.proj"
    value = graph.op("MatMul", pixels, parts.tensor(f"{name}.weight", lambda kernel: kernel.flatten(1).T, "_matrix"))
    if parts.has(f"{name}.bias"):
        value = graph.op("Add", value, parts.tensor(f"{name}.bias"))
    if parts.has(f"{tower.name}.pos_embed.weight"):
        value = graph.op("Add", value, _positions(parts, f"{tower.name}.pos_embed.weight", places))
    return value


def _positions(parts: Parts, name: str, places: PatchGrid) -> str:
    """Return learned embeddings of a square of places, [patches, hidden], stretched over each image between its corners.

    A patch takes the mean of the four places around it, weighed by how near they are.
    """
    graph = parts.graph
    side = int(parts.shape(name)[0] ** 0.5)
    table = parts.tensor(name)
    rows = _nearest(parts, places.row, places.heights, side)
    columns = _nearest(parts, places.column, places.widths, side)
    found = ""
    for row, nearness in rows:
        for column, weight in columns:
            place = graph.op("Add", graph.op("Mul", row, graph.const(side)), column)
            share = graph.op("Unsqueeze", graph.cast(graph.op("Mul", nearness, weight), graph.dtype), graph.const([1]))
            term = graph.op("Mul", graph.op("Gather", table, place), share)
            found = graph.op("Add", found, term) if found else term
    return found


def _nearest(parts: Parts, index: str, length: str, side: int) -> list[tuple[str, str]]:
    """Return the two of `side` places that lie around each index of an axis of `length`, int64, with their weights, float32."""
    graph = parts.graph
    gaps = graph.op("Max", graph.op("Sub", length, graph.const(1)), graph.const(1))
    scaled = graph.op("Mul", graph.cast(index, np.float32), graph.const(side - 1, np.float32))
    exact = graph.op("Div", scaled, graph.cast(gaps, np.float32))
    floor = graph.op("Floor", exact)
    before = graph.cast(floor, np.int64)
    after = graph.op("Min", graph.op("Add", before, graph.const(1)), graph.const(side - 1))
    share = graph.op("Sub", exact, floor)
    return [(before, graph.op("Sub", graph.const(1.0, np.float32), share)), (after, share)]


def _rotation(parts: Parts, tower: Tower, places: PatchGrid) -> Rotation:
    """Return the rotation of each patch: the first half of the frequencies turns by its row, the second by its column."""
    graph = parts.graph
    frequencies = graph.const(parts.module(f"{tower.name}.rotary_pos_emb").inv_freq.numpy(), np.float32)
    turns = [graph.op("Unsqueeze", graph.cast(each, np.float32), graph.const([1])) for each in (places.row, places.column)]
    angles = graph.op("Concat", *(graph.op("Mul", each, frequencies) for each in turns), axis=1)
    tables = [graph.cast(graph.op(kind, angles), graph.dtype) for kind in ("Cos", "Sin")]
    rows = graph.op("Unsqueeze", graph.arange(graph.extent(places.row, 0)), graph.const([0]))
    return Rotation(tables[0], tables[1], rows)


def _block(parts: Parts, tower: Tower, name: str, value: str, sight: tuple[Rotation, Attention]) -> str:
    """Return what a block makes of patches [patches, hidden]: attention and feed-forward, each normed first and added."""
    mixed = _attention(parts, tower, parts.linear(_norm(parts, value, f"{name}.norm1"), f"{name}.attn.qkv"), *sight)
    value = parts.graph.op("Add", value, parts.linear(mixed, f"{name}.attn.proj"))
    return parts.graph.op("Add", value, _feed_forward(parts, tower, _norm(parts, value, f"{name}.norm2"), f"{name}.mlp"))


def _attention(parts: Parts, tower: Tower, states: str, rotation: Rotation, attention: Attention) -> str:
    """Return attention [patches, hidden] of queries, keys and values that lie side by side, [patches, 3 · hidden]."""
    graph, groups = parts.graph, attention.groups
    query, key, content = graph.split(states, [tower.hidden] * 3)
    query = _marked(parts, tower, _rotated(parts, tower, query, rotation), groups, attention.queries)
    key = _marked(parts, tower, _rotated(parts, tower, key, rotation), groups, attention.keys)
    content = graph.op("Gather", content, groups.patches, axis=0)
    mixed = parts.attention(query, key, content, tower.heads, scale=tower.width**-0.5)
    mixed = graph.reshape(graph.typed(mixed, graph.dtype, (*groups.shape, tower.hidden)), [-1, tower.hidden])
    return graph.op("Gather", mixed, groups.places, axis=0)


def _rotated(parts: Parts, tower: Tower, value: str, rotation: Rotation) -> str:
    """Return [1, patches, hidden]: queries or keys [patches, hidden], turned by their places."""
    row = parts.graph.op("Unsqueeze", value, parts.graph.const([0]))
    turned = parts.rotated(row, rotation)
    return parts.graph.typed(turned, parts.graph.dtype, (1, "patches", tower.hidden))


def _marked(parts: Parts, tower: Tower, value: str, groups: Groups, marks: str) -> str:
    """Return queries or keys laid out in rows, [rows, places, heads · (width + marks)]."""
    graph = parts.graph
    laid = graph.op("Gather", graph.reshape(value, [-1, tower.heads, tower.width]), groups.patches, axis=0)
    return graph.reshape(graph.op("Concat", laid, marks, axis=3), [0, 0, tower.heads * (tower.width + _MARKS)])


def _feed_forward(parts: Parts, tower: Tower, value: str, name: str) -> str:
    if parts.has_linear(f"{name}.gate_proj"):
        return feed_forward(parts, value, name, tower.activation)
    first, second = ("fc1", "fc2") if parts.has_linear(f"{name}.fc1") else ("linear_fc1", "linear_fc2")
    return parts.linear(parts.linear(value, f"{name}.{first}", tower.activation), f"{name}.{second}")


def _merged(parts: Parts, tower: Tower, name: str, value: str) -> str:
    """Return tokens [tokens, features], each made of the patches of one square; the norm is of a patch or of the square."""
    width = tower.hidden * tower.merge**2
    norm = f"{name}.ln_q" if parts.has(f"{name}.ln_q.weight") else f"{name}.norm"
    first, second = ("mlp.0", "mlp.2") if parts.has_linear(f"{name}.mlp.0") else ("linear_fc1", "linear_fc2")
    if parts.shape(f"{norm}.weight")[0] == width:
        value = _norm(parts, parts.graph.reshape(value, [-1, width]), norm)
    else:
        value = parts.graph.reshape(_norm(parts, value, norm), [-1, width])
    return parts.linear(parts.linear(value, f"{name}.{first}", "gelu"), f"{name}.{second}")


def _norm(parts: Parts, value: str, name: str) -> str:
    """Return a value normed by its root mean square, or, where the norm has a bias, by its mean and spread."""
    if parts.has(f"{name}.bias"):
        return parts.layer_norm(value, name, _EPSILON)
    return parts.rms_norm(value, name, _EPSILON)
