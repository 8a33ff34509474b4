"""LLaVA-NeXT's vision encoder as a graph: the features of the resized image and of its tiles, packed into one sequence.

An image is resized to the best of several resolutions, padded to it and cut into tiles. The resolution, the padding, and the patch
of each token follow from the image's size alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import CheckpointError
from compress.export.onnx.graphs.graph import Graph
from compress.export.onnx.graphs.layer_builder import LayerBuilder
from compress.export.onnx.graphs.llava import hidden_size, tile_features, tile_tokens

_NEWLINE = "model.image_newline"


@dataclass(frozen=True)
class Owners:
    """For each item of a ragged sequence, concatenated by image."""

    image: str
    """The index of the item's image."""

    index: str
    """The item's index in its image."""

    @staticmethod
    def of(graph: Graph, counts: str) -> Owners:
        """Return the owners for the number of items per image, int64 [images]."""
        ends = graph.op("CumSum", counts, graph.const(0))
        items = graph.arange(graph.op("ReduceSum", counts, keepdims=1))
        before = graph.op("GreaterOrEqual", graph.reshape(items, [-1, 1]), graph.reshape(ends, [1, -1]))
        image = graph.op("ReduceSum", graph.cast(before, np.int64), graph.const([1]), keepdims=0)
        starts = graph.op("Sub", ends, counts)
        return Owners(image, graph.op("Sub", items, graph.op("Gather", starts, image, axis=0)))


@dataclass(frozen=True)
class Layout:
    """The position of each image in its tiles, int64 [images]; lengths are in patches."""

    tiles: str
    """The number of tiles, the resized image included."""

    columns: str
    """The number of tiles side by side."""

    top: str
    """Rows of padding above the image."""

    left: str
    """Columns of padding to its left."""

    height: str
    """Rows without padding."""

    width: str
    """Columns without padding."""


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit the tower, the projector and the packing of tiles.

    `pixel_values` [images, tiles, 3, height, width] (per image the resized image, its tiles row by row, and padding) and
    `image_sizes` int64 [images, 2] (height and width in pixels) to `image_features` [tokens, hidden]: per image the features of the
    resized image, then its rows of patches without padding, each followed by `image_newline`.

    Raises:
        CheckpointError: the tower does not return one token per patch.
    """
    graph, config = builder.graph, builder.source.config
    channels, side = int(config.vision_config.num_channels), int(config.vision_config.image_size)
    pixels = graph.input("pixel_values", graph.dtype, ["num_images", "num_tiles", channels, side, side])
    sizes = graph.input("image_sizes", np.int64, ["num_images", 2])
    grid = side // int(config.vision_config.patch_size)
    if (tokens := tile_tokens(builder)) != grid**2:
        raise CheckpointError(
            f"{builder.source.checkpoint.folder}/config.json: vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} leaves {tokens} tokens of the {grid**2} patches of a tile, which cannot be "
            "put together again"
        )
    with graph.scope("layout"):
        layout = image_layout(graph, sizes, config, grid)
    with graph.scope("tiles"):
        owners = Owners.of(graph, layout.tiles)
        flat = graph.op("Add", graph.op("Mul", owners.image, graph.extent(pixels, 1)), owners.index)
        # The processor pads every image to the most tiles of the batch: padding is dropped before the tower computes it.
        tiles = graph.op("Gather", graph.reshape(pixels, [-1, channels, side, side]), flat, axis=0)
    width = hidden_size(config)
    features = graph.reshape(tile_features(builder, tiles), [-1, width])
    with graph.scope("packed"):
        newline = builder.tensor(_NEWLINE, lambda row: row.view(1, -1), "_row")
        rows = graph.op("Concat", features, newline, axis=0)
        packed = graph.op("Gather", rows, token_rows(graph, layout, grid), axis=0)
    graph.output("image_features", packed, graph.dtype, ["num_tokens", width])


def image_layout(graph: Graph, sizes: str, config: Any, grid: int) -> Layout:
    """Return the layout of images of these sizes."""
    pixels = np.asarray(config.image_grid_pinpoints, np.int64)
    # By area, so that ArgMax, which takes the first maximum, prefers the smaller of resolutions that keep as many pixels.
    resolutions = pixels[np.argsort(pixels.prod(axis=1), kind="stable")]
    best = _best_resolution(graph, sizes, resolutions)
    # In the graph, not in the caller: every client would have to copy the rules by which a resolution follows from a size.
    counts = graph.op("Gather", graph.const(resolutions // int(config.vision_config.image_size)), best, axis=0)  # [images, 2]
    original, tiled = (graph.split(value, [1, 1], axis=1) for value in (sizes, counts))
    high, wide = (graph.op("Squeeze", value, graph.const([1])) for value in original)
    rows, columns = (graph.op("Squeeze", value, graph.const([1])) for value in tiled)
    height, width = (graph.op("Mul", value, graph.const(grid)) for value in (rows, columns))
    # Aspect ratios are compared as products of integers: a quotient of floats could differ from transformers' in the last bit.
    crosswise = (graph.op("Mul", wide, height), graph.op("Mul", high, width))
    wider = graph.op("Greater", *crosswise)
    none = graph.const(0)
    # transformers rounds these quotients to 7 decimals and truncates: the integer division is the same
    above = _padding(graph, height, graph.op("Div", crosswise[1], wide))
    beside = _padding(graph, width, graph.op("Div", crosswise[0], high))
    top, left = graph.op("Where", wider, above, none), graph.op("Where", wider, none, beside)
    return Layout(
        # 1 for the resized image, which comes first.
        tiles=graph.op("Add", graph.op("Mul", rows, columns), graph.const(1)),
        columns=columns,
        top=top,
        left=left,
        height=graph.op("Sub", height, graph.op("Add", top, top)),
        width=graph.op("Sub", width, graph.op("Add", left, left)),
    )


def _padding(graph: Graph, total: str, used: str) -> str:
    return graph.op("Div", graph.op("Sub", total, used), graph.const(2))


def _best_resolution(graph: Graph, sizes: str, resolutions: Any) -> str:
    """Return the index of each image's resolution, int64 [images]: the one that keeps most pixels, the smallest of equals.

    `resolutions` [resolutions, 2] are sorted by area. Scales are float64, as in transformers: where a scaled size should be an
    integer, their rounding error decides whether it is truncated by one.
    """
    exact = graph.op("Unsqueeze", graph.cast(sizes, np.float64), graph.const([1]))  # [images, 1, 2]
    scales = graph.op("Div", graph.const(resolutions, np.float64), exact)
    scale = graph.op("ReduceMin", scales, graph.const([-1]), keepdims=1)
    scaled = graph.cast(graph.op("Mul", exact, scale), np.int64)
    effective = graph.op("ReduceProd", scaled, graph.const([-1]), keepdims=0)  # [images, resolutions]
    # Enlarging an image adds no pixels of information, so at most the image's own count.
    effective = graph.op("Min", effective, graph.op("ReduceProd", sizes, graph.const([-1]), keepdims=1))
    # As float64, which holds these integers exactly.
    return graph.op("ArgMax", graph.cast(effective, np.float64), axis=1, keepdims=0)


def token_rows(graph: Graph, layout: Layout, grid: int) -> str:
    """Return each token's row in the features of all tiles, the last (-1) for a newline, int64 [tokens]."""
    patches = graph.const(grid**2)
    side, one = graph.const(grid), graph.const(1)
    lines = graph.op("Mul", layout.height, graph.op("Add", layout.width, one))
    owners = Owners.of(graph, graph.op("Add", lines, patches))

    def of_image(value: str) -> str:
        return graph.op("Gather", value, owners.image, axis=0)

    first = of_image(graph.op("Mul", graph.op("Sub", graph.op("CumSum", layout.tiles, graph.const(0)), layout.tiles), patches))
    width = of_image(layout.width)
    inside = graph.op("Sub", owners.index, patches)
    line = graph.op("Add", width, one)
    row = graph.op("Add", graph.op("Div", inside, line), of_image(layout.top))
    column = graph.op("Mod", inside, line)
    ends = graph.op("Equal", column, width)
    column = graph.op("Add", column, of_image(layout.left))
    tile = graph.op("Add", graph.op("Mul", graph.op("Div", row, side), of_image(layout.columns)), graph.op("Div", column, side))
    patch = graph.op("Add", graph.op("Mul", graph.op("Mod", row, side), side), graph.op("Mod", column, side))
    tiled = graph.op("Add", graph.op("Mul", graph.op("Add", tile, one), patches), patch)
    is_resized = graph.op("Less", owners.index, patches)
    rows = graph.op("Add", first, graph.op("Where", is_resized, owners.index, tiled))
    newline = graph.op("And", ends, graph.op("Not", is_resized))
    # Gather counts negative indices from the end, where the newline's row was appended.
    return graph.op("Where", newline, graph.const(-1), rows)
