"""The transformer of CLIP (arXiv 2103.00020) as a graph: for images and texts, and for SigLIP (arXiv 2303.15343)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.export.onnx.graphs.graph import Weight
from compress.export.onnx.graphs.layer_builder import LayerBuilder
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme

_SIGN_BIT = 128
"""Flipped to turn unsigned codes with zero point 128 into int8."""

_PER_CHANNEL = Scheme(bits=8, group_size=-1, symmetric=True)


@dataclass(frozen=True)
class PooledPositions:
    """The positions that the pooled output needs: the last block is computed for these alone."""

    select: Callable[[str], str]
    """Selects them [batch, positions, hidden] from a value [batch, length, hidden]."""

    bias: str = ""
    """Added to their attention scores."""


def clip_embeddings(builder: LayerBuilder, pixels: str, prefix: str, config: Any, *, quantized: bool = False) -> str:
    """Return the embeddings of images [n, 3, height, width] with positions, [n, tokens, hidden], after the pre-norm if any.

    `prefix` is the tower's module. A class token, where the model has one, is first. `quantized` stores the patch embedding in
    8-bit integers with a scale per channel.
    """
    graph, name = builder.graph, f"{prefix}.embeddings"
    kernel = _quantized_kernel(builder, f"{name}.patch_embedding.weight") if quantized else ""
    value = builder.patches(pixels, f"{name}.patch_embedding", kernel)
    if builder.has(f"{name}.class_embedding"):
        token = builder.tensor(f"{name}.class_embedding", lambda token: token.view(1, 1, -1), "_row")
        value = graph.op("Concat", builder.per_image(token, pixels), value, axis=1)
    value = graph.op("Add", value, builder.tensor(f"{name}.position_embedding.weight"))
    # "layrnorm" is the name in the published checkpoints; SigLIP has no such norm, and no class token.
    if builder.has(f"{prefix}.pre_layrnorm.weight"):
        value = builder.layer_norm(value, f"{prefix}.pre_layrnorm", float(config.layer_norm_eps))
    return value


def clip_blocks(
    builder: LayerBuilder,
    value: str,
    prefix: str,
    config: Any,
    layers: range,
    *,
    bias: str = "",
    pooled: PooledPositions | None = None,
) -> str:
    """Return the blocks `layers` of `prefix` (a module list) of a value [batch, length, hidden].

    `bias` [batch or 1, 1, length, length] is added to the attention scores. With `pooled` the last block returns those positions.
    """
    for layer in layers:
        with builder.graph.scope(f"layers.{layer}"):
            value = _block(
                builder,
                value,
                f"{prefix}.{layer}",
                config,
                PooledPositions(_all, bias) if layer != layers[-1] or pooled is None else pooled,
            )
    return value


def _block(builder: LayerBuilder, value: str, name: str, config: Any, positions: PooledPositions) -> str:
    """Return a pre-norm block at the selected positions."""
    graph, epsilon, attention = builder.graph, float(config.layer_norm_eps), f"{name}.self_attn"
    normed = builder.layer_norm(value, f"{name}.layer_norm1", epsilon)
    # Queries at all positions share their input with keys and values, and may be fused with them; at few they have another input.
    if positions.select is _all:
        query, key, states = builder.linears(normed, [f"{attention}.{kind}_proj" for kind in "qkv"])
    else:
        query = builder.linear(positions.select(normed), f"{attention}.q_proj")
        key, states = builder.linears(normed, [f"{attention}.k_proj", f"{attention}.v_proj"])
    attended = builder.attention(query, key, states, int(config.num_attention_heads), positions.bias)
    value = graph.op("Add", positions.select(value), builder.linear(attended, f"{attention}.out_proj"))
    normed = builder.layer_norm(value, f"{name}.layer_norm2", epsilon)
    return graph.op("Add", value, builder.mlp(normed, f"{name}.mlp.fc1", f"{name}.mlp.fc2", str(config.hidden_act)))


def _all(value: str) -> str:
    return value


def _quantized_kernel(builder: LayerBuilder, name: str) -> str:
    """Return a convolution's kernel [out, …], stored as int8 codes with a scale per channel."""
    graph, shape = builder.graph, builder.shape(name)

    def quantized() -> Any:
        return quantize(builder.source.reader.tensor(name).float().flatten(1), _PER_CHANNEL, torch.float32)

    def codes() -> Iterable[NDArray[Any]]:
        # ^ 128 subtracts 128 modulo 256: the same bits read as int8 are the signed codes, and need no zero point.
        yield (quantized().codes ^ _SIGN_BIT).view(torch.int8).numpy()

    def scales() -> Iterable[NDArray[Any]]:
        yield builder.floats(name, quantized().scales)

    stored_codes = graph.weight(f"{name}.codes8", Weight(f"{name}.codes8", np.dtype(np.int8), shape, codes))
    stored_scales = graph.weight(
        f"{name}.scales8", Weight(f"{name}.scales8:{graph.dtype.name}", graph.dtype, (shape[0], *([1] * (len(shape) - 1))), scales)
    )
    # Dequantized in the graph: Conv has no weight-only form for 8 bits in ONNX Runtime, and the kernel is small.
    return graph.op("Mul", graph.cast(stored_codes, graph.dtype), stored_scales)
