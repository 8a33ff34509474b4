"""What LLaVA (arXiv 2304.08485) sees, as a graph: CLIP's or SigLIP's tower, and a projector to the decoder's width."""

from __future__ import annotations

from typing import Any

from compress.errors import CheckpointError
from compress.export.graphs.clip_tower import clip_blocks, clip_embeddings
from compress.export.graphs.layer_builder import LayerBuilder

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit the tower and projector: `pixel_values` [images, 3, height, width] to `image_features` [images, tokens, hidden].

    Raises:
        CheckpointError: the config names a layer that the tower lacks.
    """
    graph, config = builder.graph, builder.source.config
    channels, side = int(config.vision_config.num_channels), int(config.vision_config.image_size)
    pixels = graph.input("pixel_values", graph.dtype, ["num_images", channels, side, side])
    found = tile_features(builder, pixels)
    graph.output("image_features", found, graph.dtype, ["num_images", tile_tokens(builder), hidden_size(config)])


def hidden_size(config: Any) -> int:
    """Return the decoder's width."""
    return int(config.get_text_config().hidden_size)


def tile_features(builder: LayerBuilder, pixels: str) -> str:
    """Return what the decoder sees of tiles [n, 3, height, width]: [n, tokens, hidden].

    Raises:
        CheckpointError: the config names a layer that the tower lacks.
    """
    graph, config = builder.graph, builder.source.config
    layers = _layers(builder, pixels)
    value = graph.op("Concat", *layers, axis=-1) if len(layers) > 1 else layers[0]
    if config.vision_feature_select_strategy == "default":
        value = graph.slice(value, 1, None, 1)
    with graph.scope("projector"):
        grown = builder.linear(value, f"{_PROJECTOR}.linear_1", str(config.projector_hidden_act))
        return builder.linear(grown, f"{_PROJECTOR}.linear_2")


def tile_tokens(builder: LayerBuilder) -> int:
    """Return how many tokens the decoder sees of a tile."""
    config = builder.source.config
    grid = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
    token = builder.has(f"{_TOWER}.embeddings.class_embedding")
    return grid**2 + int(token) - int(config.vision_feature_select_strategy == "default")


def _layers(builder: LayerBuilder, pixels: str) -> list[str]:
    """Return what the blocks give whose results the config wants, in its order; 0 is what enters the first."""
    config, tower = builder.source.config, builder.source.config.vision_config
    count, said = int(tower.num_hidden_layers), config.vision_feature_layer
    wanted = [said] if isinstance(said, int) else [int(layer) for layer in said]
    if not all(-count - 1 <= layer <= count for layer in wanted):
        raise CheckpointError(
            f"{builder.source.checkpoint.folder}/config.json: vision_feature_layer is {said}, "
            f"of a tower of {count} blocks; fetch the checkpoint again"
        )
    places = [layer % (count + 1) for layer in wanted]
    with builder.graph.scope("vision"):
        found = {0: clip_embeddings(builder, pixels, _TOWER, tower)}
        first = 0
        for place in sorted(set(places) - {0}):
            found[place] = clip_blocks(builder, found[first], f"{_TOWER}.encoder.layers", tower, range(first, place))
            first = place
    return [found[place] for place in places]
