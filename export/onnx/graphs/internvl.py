"""InternVL3's vision encoder (arXiv 2504.10479) as a graph: a BEiT-style tower (arXiv 2106.08254), pixel shuffle, a projector."""

from __future__ import annotations

from typing import Any

from compress.errors import CheckpointError
from compress.export.onnx.graphs.layer_builder import LayerBuilder, hidden_state

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
_QUERY_EPSILON, _PROJECTOR_EPSILON = 1e-6, 1e-5
"""The epsilons of the query and key norms and of the projector's norm: constants in transformers' code."""


def vision_encoder(builder: LayerBuilder) -> None:
    """Emit the tower and projector: `pixel_values` [tiles, 3, height, width] to `image_features` [tiles, tokens, hidden].

    Raises:
        CheckpointError: the config names a layer that the tower lacks, or its patches do not fit pixel shuffle.
    """
    graph, config = builder.graph, builder.source.config
    tower = config.vision_config
    height, width = (int(extent) for extent in tower.image_size)
    pixels = graph.input("pixel_values", graph.dtype, ["num_tiles", int(tower.num_channels), height, width])
    with graph.scope("vision"):
        value = _tower(builder, pixels)
    with graph.scope("projector"):
        value = _pixel_shuffle(builder, value)
        value = builder.layer_norm(value, f"{_PROJECTOR}.layer_norm", _PROJECTOR_EPSILON)
        value = builder.mlp(value, f"{_PROJECTOR}.linear_1", f"{_PROJECTOR}.linear_2", str(config.projector_hidden_act))
    tokens = _grid(builder) ** 2 // _factor(config) ** 2
    graph.output("image_features", value, graph.dtype, ["num_tiles", tokens, int(config.get_text_config().hidden_size)])


def _tower(builder: LayerBuilder, pixels: str) -> str:
    """Return the hidden states of the config's `vision_feature_layer`, [tiles, tokens, hidden], class token first."""
    config, tower = builder.source.config, builder.source.config.vision_config
    blocks = hidden_state(builder.source, config.vision_feature_layer)
    value = _embeddings(builder, pixels)
    for layer in range(blocks):
        with builder.graph.scope(f"layers.{layer}"):
            value = _block(builder, value, f"{_TOWER}.encoder.layer.{layer}")
    # transformers norms the tower's output only: the last hidden state is that output, an inner one is not.
    if config.vision_feature_layer == -1 and builder.has(f"{_TOWER}.layernorm.weight"):
        value = builder.layer_norm(value, f"{_TOWER}.layernorm", float(tower.layer_norm_eps))
    return value


def _embeddings(builder: LayerBuilder, pixels: str) -> str:
    """Return the embeddings of the class token and the patches, with positions."""
    graph, name = builder.graph, f"{_TOWER}.embeddings"
    value = builder.patches(pixels, f"{name}.patch_embeddings.projection")
    value = graph.op("Concat", builder.per_image(builder.tensor(f"{name}.cls_token"), pixels), value, axis=1)
    # `use_absolute_position_embeddings` in the config; the tensor is there exactly where it is true.
    if builder.has(f"{name}.position_embeddings"):
        value = graph.op("Add", value, builder.tensor(f"{name}.position_embeddings"))
    return value


def _block(builder: LayerBuilder, value: str, name: str) -> str:
    """Return a pre-norm block with LayerScale."""
    graph, tower = builder.graph, builder.source.config.vision_config
    attention = f"{name}.attention"
    normed = _norm(builder, value, f"{name}.layernorm_before")
    query, key, states = builder.linears(normed, [f"{attention}.{kind}_proj" for kind in "qkv"])
    if builder.has(f"{attention}.q_norm.weight"):
        # Over the whole width, not per head: InternViT-6B norms queries before they are split.
        query = builder.rms_norm(query, f"{attention}.q_norm", _QUERY_EPSILON)
        key = builder.rms_norm(key, f"{attention}.k_norm", _QUERY_EPSILON)
    attended = builder.attention(query, key, states, int(tower.num_attention_heads))
    attended = builder.linear(attended, f"{attention}.projection_layer")
    value = graph.op("Add", value, graph.op("Mul", attended, builder.tensor(f"{name}.lambda_1")))
    normed = _norm(builder, value, f"{name}.layernorm_after")
    hidden = builder.mlp(normed, f"{name}.mlp.fc1", f"{name}.mlp.fc2", str(tower.hidden_act))
    return graph.op("Add", value, graph.op("Mul", hidden, builder.tensor(f"{name}.lambda_2")))


def _norm(builder: LayerBuilder, value: str, name: str) -> str:
    tower = builder.source.config.vision_config
    norm = builder.rms_norm if tower.norm_type == "rms_norm" else builder.layer_norm
    return norm(value, name, float(tower.layer_norm_eps))


def _pixel_shuffle(builder: LayerBuilder, value: str) -> str:
    """Return pixel shuffle of features [tiles, tokens, hidden]: [tiles, squares, factor² · hidden], without the class token.

    Raises:
        CheckpointError: the patches do not divide into such squares.
    """
    graph, config = builder.graph, builder.source.config
    grid, factor, hidden = _grid(builder), _factor(config), int(config.vision_config.hidden_size)
    if config.vision_feature_select_strategy != "default" or grid % factor:
        raise CheckpointError(
            f"{builder.source.checkpoint.folder}/config.json: vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} and downsample_ratio {config.downsample_ratio} leave no whole squares of a "
            f"tile of {grid} by {grid} patches"
        )
    # "default" cuts the class token: pixel shuffle needs a square of patches.
    patches = graph.slice(value, 1, None, 1)
    squares = graph.reshape(patches, [-1, grid // factor, factor, grid // factor, factor, hidden])
    # One reshape and transpose: neighbouring patches of a square become channels of one token, in transformers' order.
    return graph.reshape(graph.transpose(squares, [0, 1, 3, 2, 4, 5]), [0, -1, factor * factor * hidden])


def _grid(builder: LayerBuilder) -> int:
    """Return the number of patches along each side of a tile, which transformers also assumes to be square."""
    tower = builder.source.config.vision_config
    return int(tower.image_size[0]) // int(tower.patch_size[0])


def _factor(config: Any) -> int:
    return int(1 / float(config.downsample_ratio))
