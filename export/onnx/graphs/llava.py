"""LLaVA's vision encoder (arXiv 2304.08485) as a graph: CLIP's or SigLIP's tower, and a projector to the decoder's width."""

from __future__ import annotations

from typing import Any

from compress.export.onnx.graphs.clip_tower import clip_blocks, clip_embeddings
from compress.export.onnx.graphs.layer_builder import LayerBuilder, hidden_state

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit the tower and projector: `pixel_values` [images, 3, height, width] to `image_features` [images, tokens, hidden].

    Raises:
        CheckpointError: the config names a layer that the tower lacks.
    """
    graph, config = builder.graph, builder.source.config
    channels, side = int(config.vision_config.num_channels), int(config.vision_config.image_size)
    pixels = graph.input("pixel_values", graph.dtype, ["num_images", channels, side, side])
    features = tile_features(builder, pixels)
    graph.output("image_features", features, graph.dtype, ["num_images", tile_tokens(builder), hidden_size(config)])


def hidden_size(config: Any) -> int:
    """Return the decoder's width."""
    return int(config.get_text_config().hidden_size)


def tile_features(builder: LayerBuilder, pixels: str) -> str:
    """Return the image features of tiles [n, 3, height, width]: [n, tokens, hidden].

    Raises:
        CheckpointError: the config names a layer that the tower lacks.
    """
    graph, config = builder.graph, builder.source.config
    layers = _layers(builder, pixels)
    value = graph.op("Concat", *layers, axis=-1) if len(layers) > 1 else layers[0]
    if config.vision_feature_select_strategy == "default":
        value = graph.slice(value, 1, None, 1)
    with graph.scope("projector"):
        return builder.mlp(value, f"{_PROJECTOR}.linear_1", f"{_PROJECTOR}.linear_2", str(config.projector_hidden_act))


def tile_tokens(builder: LayerBuilder) -> int:
    """Return the number of image tokens per tile."""
    config = builder.source.config
    grid = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
    # CLIP's tower has a class token, SigLIP's none: with "default" transformers cuts the first token of either.
    has_class_token = builder.has(f"{_TOWER}.embeddings.class_embedding")
    return grid**2 + int(has_class_token) - int(config.vision_feature_select_strategy == "default")


def _layers(builder: LayerBuilder, pixels: str) -> list[str]:
    """Return the hidden states of the config's `vision_feature_layer`, in its order; 0 are the embeddings."""
    config, tower = builder.source.config, builder.source.config.vision_config
    setting = config.vision_feature_layer
    layers = [hidden_state(builder.source, layer) for layer in ([setting] if isinstance(setting, int) else setting)]
    with builder.graph.scope("vision"):
        # Blocks above the highest layer asked for are not emitted: LLaVA reads the one before the last, and needs no last block.
        states = {0: clip_embeddings(builder, pixels, _TOWER, tower)}
        first = 0
        for layer in sorted(set(layers) - {0}):
            states[layer] = clip_blocks(builder, states[first], f"{_TOWER}.encoder.layers", tower, range(first, layer))
            first = layer
    return [states[layer] for layer in layers]
