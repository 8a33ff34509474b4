"""Decoders of Llama's make as a graph: RMSNorm, grouped-query attention with rotated positions, a gated feed-forward.

It covers Llama, Mistral, Qwen2 and Qwen3, and Qwen-VL's positions in three streams (arXiv 2409.12191, 2511.21631).
Batches are padded on the right: grouped-query attention reads how many tokens a row has from the sum of its mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.errors import CheckpointError
from compress.export.graphs.graph import Graph
from compress.export.graphs.parts import Parts, Rotation
from compress.export.onnx_limits import ROPE_TYPES


@dataclass(frozen=True)
class Extents:
    """What grouped-query attention is told: each row's tokens less one, int32 [batch], and the longest row, int32."""

    last: str
    total: str


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    width: int

    @staticmethod
    def of(text: Any) -> Shape:
        """Return the sizes that a text config says."""
        heads = int(text.num_attention_heads)
        return Shape(
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            width=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        )


def decoder(parts: Parts) -> None:
    """Emit the decoder, with its cache: see `docs/formats/onnx.md` for inputs and outputs.

    Raises:
        CheckpointError: its positions are rotated in a way that is not known here.
    """
    graph, text = parts.graph, parts.source.config.get_text_config()
    shape, epsilon = Shape.of(text), float(text.rms_norm_eps)
    hidden = graph.input("inputs_embeds", graph.dtype, ["batch_size", "sequence_length", shape.hidden])
    extents = row_extents(graph)
    rotation = rotate(parts, text, shape)
    added = deepstack(parts, shape)
    blocks = parts.source.family.blocks
    with graph.scope("layers.0"):
        normed = parts.rms_norm(hidden, f"{blocks}.0.input_layernorm", epsilon)
    for layer in range(shape.layers):
        block = f"{blocks}.{layer}"
        with graph.scope(f"layers.{layer}"):
            mixed = self_attention(parts, normed, f"{block}.self_attn", layer, shape, rotation, extents)
            normed, hidden = parts.add_rms_norm(hidden, mixed, f"{block}.post_attention_layernorm", epsilon, shape.hidden)
            grown = feed_forward(parts, normed, f"{block}.mlp", str(text.hidden_act))
            if layer < len(added):
                grown = graph.op("Add", grown, added[layer])
            last = layer + 1 == shape.layers
            following = f"{blocks.rpartition('.')[0]}.norm" if last else f"{blocks}.{layer + 1}.input_layernorm"
            normed, hidden = parts.add_rms_norm(hidden, grown, following, epsilon, shape.hidden)
    logits(parts, normed)


def row_extents(graph: Graph) -> Extents:
    """Declare `attention_mask` and return what it says of each row."""
    mask = graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
    count = graph.op("ReduceSum", mask, graph.const([-1]), keepdims=0)
    last = graph.cast(graph.op("Sub", count, graph.const(1)), np.int32)
    return Extents(last, graph.cast(graph.op("Squeeze", graph.extent(mask, 1)), np.int32))


def rotate(parts: Parts, text: Any, shape: Shape) -> Rotation:
    """Declare `position_ids`, in one stream or Qwen-VL's three (time, height, width), and return the tables they make.

    Raises:
        CheckpointError: they are rotated in a way that is not known here.
    """
    graph, rotary = parts.graph, parts.module(f"{parts.source.family.blocks.rpartition('.')[0]}.rotary_emb")
    parameters = cast("dict[str, Any]", text.rope_parameters or {})
    kind = str(parameters.get("rope_type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"{parts.source.checkpoint.folder}/config.json: rope_type {kind!r} is not in the graphs, which know "
            f"{', '.join(ROPE_TYPES)}; use format: vllm"
        )
    streams = _streams(rotary)
    extents: list[int | str] = ["batch_size", "sequence_length"]
    places = graph.input("position_ids", np.int64, extents if streams is None else [3, *extents])
    angles = _angles(parts, places, rotary, text)
    tables: list[str] = []
    for function in ("Cos", "Sin"):
        table = graph.op(function, angles)
        if rotary.attention_scaling != 1.0:
            table = graph.op("Mul", table, graph.const(float(rotary.attention_scaling), np.float32))
        tables.append(table if graph.dtype == np.float32 else graph.cast(table, graph.dtype))
    given = graph.op("Shape", places, start=0 if streams is None else 1)
    every = graph.op("Range", graph.const(0), graph.op("ReduceProd", given, keepdims=0), graph.const(1))
    rows = graph.op("Reshape", every, given)
    return Rotation(tables[0], tables[1], rows)


def _angles(parts: Parts, places: str, rotary: Any, text: Any) -> str:
    """Return by which angles positions turn each pair of channels, float32 [batch · sequence, pairs]."""
    graph, streams, pairs = parts.graph, _streams(rotary), len(rotary.inv_freq)
    dynamic = _frequencies(parts, places, rotary, text)
    if dynamic:
        angles = graph.op("Mul", graph.op("Unsqueeze", graph.cast(places, np.float32), graph.const([-1])), dynamic)
        return graph.reshape(angles, [-1, pairs])
    mixed = np.zeros((1 if streams is None else 3, pairs), np.float32)
    mixed[0 if streams is None else streams, np.arange(pairs)] = rotary.inv_freq.numpy()
    flat = graph.cast(graph.reshape(places, [len(mixed), -1]), np.float32)
    return graph.op("Gemm", flat, graph.const(mixed, np.float32), transA=1)  # each sum has one term that is not zero


def _frequencies(parts: Parts, places: str, rotary: Any, text: Any) -> str:
    """Return the angle by which each pair of channels turns per position where that is dynamic, float32 [batch, 1, pairs].

    Those of rows longer than the model was trained for shrink, the slow ones the most, with the row's last position; transformers
    takes the last of the whole batch. Empty where all are fixed.
    """
    graph, parameters = parts.graph, cast("dict[str, Any]", text.rope_parameters or {})
    if parameters.get("rope_type") != "dynamic":
        return ""
    fixed = graph.const(rotary.inv_freq.numpy(), np.float32)
    factor, pairs = float(parameters["factor"]), len(rotary.inv_freq)
    last = graph.cast(graph.op("ReduceMax", places, graph.const([-1]), keepdims=1), np.float32)
    trained = graph.const(float(text.max_position_embeddings), np.float32)
    length = graph.op("Max", graph.op("Add", last, graph.const(1.0, np.float32)), trained)
    excess = graph.op(
        "Mul", graph.op("Sub", graph.op("Div", length, trained), graph.const(1.0, np.float32)), graph.const(factor, np.float32)
    )
    grown = graph.op("Unsqueeze", graph.op("Add", excess, graph.const(1.0, np.float32)), graph.const([-1]))
    powers = -np.arange(pairs) / (pairs - 1)
    return graph.op("Mul", fixed, graph.op("Pow", grown, graph.const(powers, np.float32)))


def _streams(rotary: Any) -> NDArray[np.int64] | None:
    """Return which of the three streams of positions each frequency follows, as the model's own code mixes them."""
    if not hasattr(rotary, "recomposition_frequencies"):
        return None
    import torch

    half = len(rotary.inv_freq)
    marks = torch.arange(3.0).view(3, 1, 1, 1).repeat(1, 1, 1, half)
    return rotary.recomposition_frequencies(marks).flatten()[:half].to(torch.int64).numpy()


def deepstack(parts: Parts, shape: Shape) -> list[str]:
    """Declare `deepstack_embeds` where the vision tower's inner features are added after the first blocks (arXiv 2511.21631)."""
    indexes = getattr(getattr(parts.source.config, "vision_config", None), "deepstack_visual_indexes", None)
    if not indexes:
        return []
    graph = parts.graph
    found = graph.input("deepstack_embeds", graph.dtype, [len(indexes), "batch_size", "sequence_length", shape.hidden])
    return [graph.op("Gather", found, graph.const(level), axis=0) for level in range(len(indexes))]


def self_attention(
    parts: Parts, value: str, name: str, layer: int, shape: Shape, rotation: Rotation | None, extents: Extents
) -> str:
    """Return causal attention `name` of a value [batch, sequence, hidden], its keys and values kept in the cache of `layer`."""
    graph = parts.graph
    query, key, states = parts.linears(value, [f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"])
    if parts.has(f"{name}.q_norm.weight"):
        epsilon = float(parts.source.config.get_text_config().rms_norm_eps)
        query = head_norm(parts, query, f"{name}.q_norm", epsilon, shape.width)
        key = head_norm(parts, key, f"{name}.k_norm", epsilon, shape.width)
    if rotation is not None:
        query, key = (
            graph.typed(
                parts.rotated(each, rotation),
                graph.dtype,
                ("batch_size", "sequence_length", heads * shape.width),
            )
            for each, heads in ((query, shape.heads), (key, shape.kv_heads))
        )
    past = [
        graph.input(
            f"past_key_values.{layer}.{part}", graph.dtype, ["batch_size", shape.kv_heads, "past_sequence_length", shape.width]
        )
        for part in ("key", "value")
    ]
    mixed, *present = graph.ops(
        "GroupQueryAttention",
        *(query, key, states, *past, extents.last, extents.total),
        outputs=3,
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        local_window_size=window(parts.source.config.get_text_config(), layer),
    )
    graph.typed(mixed, graph.dtype, ("batch_size", "sequence_length", shape.heads * shape.width))
    for part, each in zip(("key", "value"), present, strict=True):
        extent = ("batch_size", shape.kv_heads, "total_sequence_length", shape.width)
        graph.output(f"present.{layer}.{part}", graph.typed(each, graph.dtype, extent), graph.dtype, extent)
    out = f"{name}.o_proj" if parts.has_linear(f"{name}.o_proj") else f"{name}.out_proj"
    return parts.linear(mixed, out)


def head_norm(parts: Parts, value: str, name: str, epsilon: float, width: int) -> str:
    """Return RMSNorm `name` of each head of a value [batch, sequence, heads · width]."""
    graph = parts.graph
    return graph.reshape(parts.rms_norm(graph.reshape(value, [0, 0, -1, width]), name, epsilon), [0, 0, -1])


def window(text: Any, layer: int) -> int | None:
    """Return how many tokens, itself among them, a token of this layer sees (arXiv 2310.06825); None: all before it."""
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(text, "sliding_window", None)


def feed_forward(parts: Parts, value: str, name: str, activation: str) -> str:
    """Return the gated feed-forward `name` (arXiv 2002.05202) of a value."""
    gate, up = parts.linears(value, [f"{name}.gate_proj", f"{name}.up_proj"])
    return parts.linear(parts.graph.op("Mul", parts.activation(gate, activation), up), f"{name}.down_proj")


def logits(parts: Parts, value: str) -> None:
    """Declare `num_logits_to_keep` (0 for all) and give out the logits, float32, of a value's last positions."""
    graph = parts.graph
    kept = graph.input("num_logits_to_keep", np.int64, [])
    first = graph.op("Neg", graph.reshape(kept, [1]))
    last = graph.op("Slice", value, first, graph.const([np.iinfo(np.int64).max]), graph.const([1]))
    found = parts.head(last)
    wide = found if graph.dtype == np.float32 else graph.cast(found, np.float32)
    graph.output("logits", wide, np.float32, ["batch_size", "kept_length", parts.vocabulary], first=True)
