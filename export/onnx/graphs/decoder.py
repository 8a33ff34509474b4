"""Llama-style decoders as a graph: RMSNorm, grouped-query attention with RoPE, a gated feed-forward.

Covers Llama, Mistral, Qwen2 and Qwen3, and Qwen-VL's M-RoPE (arXiv 2409.12191, 2511.21631).
Batches are padded on the right: GroupQueryAttention takes each row's number of tokens, the sum of its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.errors import CheckpointError
from compress.export.onnx.graphs.graph import Graph
from compress.export.onnx.graphs.layer_builder import LayerBuilder, RotaryTables
from compress.export.onnx.limits import ROPE_TYPES


@dataclass(frozen=True)
class SequenceLengths:
    """The length inputs of GroupQueryAttention."""

    last: str
    """Each row's number of tokens minus one, int32 [batch]."""

    total: str
    """The length of the longest row, int32."""


@dataclass(frozen=True)
class DecoderSize:
    """A decoder's dimensions."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    width: int
    """The head size."""

    @staticmethod
    def of(text: Any) -> DecoderSize:
        """Return the dimensions in a text config."""
        heads = int(text.num_attention_heads)
        return DecoderSize(
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            width=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        )


@dataclass(frozen=True)
class DecoderInputs:
    """What every self-attention of a decoder takes beside the hidden states."""

    size: DecoderSize
    lengths: SequenceLengths
    tables: RotaryTables | None
    """None for a decoder without RoPE."""

    @staticmethod
    def of(builder: LayerBuilder, *, rotary: bool = True) -> DecoderInputs:
        """Declare `attention_mask` and, for RoPE, `position_ids`.

        Raises:
            CheckpointError: the RoPE type is not supported.
        """
        text = builder.source.config.get_text_config()
        lengths = sequence_lengths(builder.graph)
        return DecoderInputs(DecoderSize.of(text), lengths, rotary_tables(builder, text) if rotary else None)


def decoder(builder: LayerBuilder) -> None:
    """Emit the decoder with its KV cache: see `docs/formats/onnx.md` for inputs and outputs.

    Raises:
        CheckpointError: its RoPE type is not supported.
    """
    graph, text = builder.graph, builder.source.config.get_text_config()
    hidden = graph.input("inputs_embeds", graph.dtype, ["batch_size", "sequence_length", int(text.hidden_size)])
    inputs = DecoderInputs.of(builder)
    levels = deepstack(builder, inputs.size)

    def feed(value: str, layer: int) -> str:
        output = feed_forward(builder, value, f"{builder.source.family.blocks}.{layer}.mlp", str(text.hidden_act))
        return graph.op("Add", output, levels[layer]) if layer < len(levels) else output

    decode(builder, hidden, lambda value, layer: self_attention(builder, value, layer, inputs), feed)


def decode(builder: LayerBuilder, hidden: str, attend: Callable[[str, int], str], feed: Callable[[str, int], str]) -> None:
    """Emit pre-norm blocks and the output head. `attend` and `feed` return attention and feed-forward of a value in a layer.

    A sum and the norm that follows it are one operator, so a block ends with the norm of the next.
    """
    text, blocks = builder.source.config.get_text_config(), builder.source.family.blocks
    layers, epsilon, width = int(text.num_hidden_layers), float(text.rms_norm_eps), int(text.hidden_size)
    norms = [*(f"{blocks}.{layer}.input_layernorm" for layer in range(layers)), f"{blocks.rpartition('.')[0]}.norm"]
    with builder.graph.scope("layers.0"):
        normed = builder.rms_norm(hidden, norms[0], epsilon)
    for layer in range(layers):
        with builder.graph.scope(f"layers.{layer}"):
            attended = attend(normed, layer)
            normed, hidden = builder.add_rms_norm(hidden, attended, f"{blocks}.{layer}.post_attention_layernorm", epsilon, width)
            normed, hidden = builder.add_rms_norm(hidden, feed(normed, layer), norms[layer + 1], epsilon, width)
    logits(builder, normed)


def sequence_lengths(graph: Graph) -> SequenceLengths:
    """Declare `attention_mask` and return the rows' lengths."""
    mask = graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
    count = graph.op("ReduceSum", mask, graph.const([-1]), keepdims=0)
    # GroupQueryAttention's `seqlens_k` is the number of tokens minus one, by its documentation.
    last = graph.cast(graph.op("Sub", count, graph.const(1)), np.int32)
    return SequenceLengths(last, graph.cast(graph.op("Squeeze", graph.extent(mask, 1)), np.int32))


def rotary_tables(builder: LayerBuilder, text: Any) -> RotaryTables:
    """Declare `position_ids`, of one axis or M-RoPE's three (time, height, width), and return their RoPE tables.

    Raises:
        CheckpointError: the RoPE type is not supported.
    """
    graph, rotary = builder.graph, builder.module(f"{builder.source.family.blocks.rpartition('.')[0]}.rotary_emb")
    parameters = cast("dict[str, Any]", text.rope_parameters or {})
    rope_type = str(parameters.get("rope_type", "default"))
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"{builder.source.checkpoint.folder}/config.json: rope_type {rope_type!r} is not in the graphs, which know "
            f"{', '.join(ROPE_TYPES)}; use format: vllm"
        )
    # Cosines and sines are computed per token from `position_ids`: M-RoPE has three axes and `dynamic` changes with the length;
    # GroupQueryAttention's own rotation (one axis, counted from its lengths) covers neither.
    axes = _frequency_axes(rotary)
    extents: list[int | str] = ["batch_size", "sequence_length"]
    positions = graph.input("position_ids", np.int64, extents if axes is None else [3, *extents])
    angles = _angles(builder, positions, rotary, text)
    tables: list[str] = []
    # Angles are float32 in float16 graphs too: an angle of some thousand radians has hardly a fraction left in float16.
    for function in ("Cos", "Sin"):
        table = graph.op(function, angles)
        # YaRN's temperature: transformers scales both tables, which scales the products of queries and keys by its square.
        if rotary.attention_scaling != 1.0:
            table = graph.op("Mul", table, graph.const(float(rotary.attention_scaling), np.float32))
        tables.append(table if graph.dtype == np.float32 else graph.cast(table, graph.dtype))
    batch = graph.op("Shape", positions, start=0 if axes is None else 1)
    # The tables have a row per token of this batch, so a token's row is its own index, not its position.
    indices = graph.op("Range", graph.const(0), graph.op("ReduceProd", batch, keepdims=0), graph.const(1))
    rows = graph.op("Reshape", indices, batch)
    return RotaryTables(tables[0], tables[1], rows)


def _angles(builder: LayerBuilder, positions: str, rotary: Any, text: Any) -> str:
    """Return the RoPE angles of each pair of channels, float32 [batch · sequence, pairs]."""
    graph, axes, pairs = builder.graph, _frequency_axes(rotary), len(rotary.inv_freq)
    dynamic = _frequencies(builder, positions, rotary, text)
    if dynamic:
        angles = graph.op("Mul", graph.op("Unsqueeze", graph.cast(positions, np.float32), graph.const([-1])), dynamic)
        return graph.reshape(angles, [-1, pairs])
    frequencies = np.zeros((1 if axes is None else 3, pairs), np.float32)
    frequencies[0 if axes is None else axes, np.arange(pairs)] = rotary.inv_freq.numpy()
    flat = graph.cast(graph.reshape(positions, [len(frequencies), -1]), np.float32)
    return graph.op("Gemm", flat, graph.const(frequencies, np.float32), transA=1)  # exact: each sum has one nonzero term


def _frequencies(builder: LayerBuilder, positions: str, rotary: Any, text: Any) -> str:
    """Return the frequencies of dynamic RoPE, float32 [batch, 1, pairs]; empty for other types.

    In rows longer than the trained context, frequencies shrink with the row's last position, low ones the most; transformers takes
    the batch's last position.
    """
    graph, parameters = builder.graph, cast("dict[str, Any]", text.rope_parameters or {})
    if parameters.get("rope_type") != "dynamic":
        return ""
    frequencies = graph.const(rotary.inv_freq.numpy(), np.float32)
    factor, pairs = float(parameters["factor"]), len(rotary.inv_freq)
    last = graph.cast(graph.op("ReduceMax", positions, graph.const([-1]), keepdims=1), np.float32)
    trained = graph.const(float(text.max_position_embeddings), np.float32)
    length = graph.op("Max", graph.op("Add", last, graph.const(1.0, np.float32)), trained)
    excess = graph.op(
        "Mul", graph.op("Sub", graph.op("Div", length, trained), graph.const(1.0, np.float32)), graph.const(factor, np.float32)
    )
    base = graph.op("Unsqueeze", graph.op("Add", excess, graph.const(1.0, np.float32)), graph.const([-1]))
    powers = -np.arange(pairs) / (pairs - 1)
    return graph.op("Mul", frequencies, graph.op("Pow", base, graph.const(powers, np.float32)))


def _frequency_axes(rotary: Any) -> NDArray[np.int64] | None:
    """Return the position axis of each frequency in M-RoPE, by the model's own code; None for one axis."""
    if not hasattr(rotary, "recomposition_frequencies"):
        return None
    import torch

    half = len(rotary.inv_freq)
    # The model's own function rearranges the axes' numbers themselves: which axis a pair of channels takes differs between Qwen2-VL
    # (sections side by side) and Qwen3-VL (interleaved).
    axes = torch.arange(3.0).view(3, 1, 1, 1).repeat(1, 1, 1, half)
    return rotary.recomposition_frequencies(axes).flatten()[:half].to(torch.int64).numpy()


def deepstack(builder: LayerBuilder, size: DecoderSize) -> list[str]:
    """Declare `deepstack_embeds`, which are added after the first blocks (arXiv 2511.21631); return one value per block."""
    indexes = getattr(getattr(builder.source.config, "vision_config", None), "deepstack_visual_indexes", None)
    if not indexes:
        return []
    graph = builder.graph
    embeds = graph.input("deepstack_embeds", graph.dtype, [len(indexes), "batch_size", "sequence_length", size.hidden])
    return [graph.op("Gather", embeds, graph.const(level), axis=0) for level in range(len(indexes))]


def self_attention(builder: LayerBuilder, value: str, layer: int, inputs: DecoderInputs) -> str:
    """Return causal attention of a value [batch, sequence, hidden] in `layer`, with its KV cache."""
    graph, size, name = builder.graph, inputs.size, f"{builder.source.family.blocks}.{layer}.self_attn"
    query, key, content = builder.linears(value, [f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"])
    if builder.has(f"{name}.q_norm.weight"):
        # Qwen3 norms each head's queries and keys, before RoPE, as the weights differ between the two channels of a RoPE pair.
        epsilon = float(builder.source.config.get_text_config().rms_norm_eps)
        query = head_norm(builder, query, f"{name}.q_norm", epsilon, size.width)
        key = head_norm(builder, key, f"{name}.k_norm", epsilon, size.width)
    if inputs.tables is not None:
        query, key = (
            graph.typed(builder.rotated(states, inputs.tables), graph.dtype, ("batch_size", "sequence_length", heads * size.width))
            for states, heads in ((query, size.heads), (key, size.kv_heads))
        )
    past = [
        graph.input(
            f"past_key_values.{layer}.{kind}", graph.dtype, ["batch_size", size.kv_heads, "past_sequence_length", size.width]
        )
        for kind in ("key", "value")
    ]
    attended, *present = graph.ops(
        "GroupQueryAttention",
        *(query, key, content, *past, inputs.lengths.last, inputs.lengths.total),
        outputs=3,
        num_heads=size.heads,
        kv_num_heads=size.kv_heads,
        # The cache keeps all tokens; the window limits which of them are read.
        local_window_size=window(builder.source.config.get_text_config(), layer),
    )
    graph.typed(attended, graph.dtype, ("batch_size", "sequence_length", size.heads * size.width))
    for kind, states in zip(("key", "value"), present, strict=True):
        extent = ("batch_size", size.kv_heads, "total_sequence_length", size.width)
        graph.output(f"present.{layer}.{kind}", graph.typed(states, graph.dtype, extent), graph.dtype, extent)
    out = f"{name}.o_proj" if builder.has_linear(f"{name}.o_proj") else f"{name}.out_proj"
    return builder.linear(attended, out)


def head_norm(builder: LayerBuilder, value: str, name: str, epsilon: float, width: int) -> str:
    """Return RMSNorm `name` of each head of a value [batch, sequence, heads · width]."""
    graph = builder.graph
    return graph.reshape(builder.rms_norm(graph.reshape(value, [0, 0, -1, width]), name, epsilon), [0, 0, -1])


def window(text: Any, layer: int) -> int | None:
    """Return a layer's sliding window in tokens, the current one included (arXiv 2310.06825); None for full attention."""
    kinds = getattr(text, "layer_types", None)
    # Qwen2 configs give `sliding_window` even where no layer uses it; `layer_types` says which do.
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(text, "sliding_window", None)


def feed_forward(builder: LayerBuilder, value: str, name: str, activation: str) -> str:
    """Return the gated feed-forward `name` (arXiv 2002.05202) of a value."""
    # One product for both where they share a scheme: they read the same input.
    gate, up = builder.linears(value, [f"{name}.gate_proj", f"{name}.up_proj"])
    return builder.linear(builder.graph.op("Mul", builder.activation(gate, activation), up), f"{name}.down_proj")


def logits(builder: LayerBuilder, value: str) -> None:
    """Declare `num_logits_to_keep` (0 for all) and the output `logits`, float32, of a value's last positions."""
    graph = builder.graph
    count = graph.input("num_logits_to_keep", np.int64, [])
    first = graph.op("Neg", graph.reshape(count, [1]))
    # Sliced before the head: of a prompt only the last position's logits are needed, and the head is the widest matrix. -0 is 0, so
    # that a count of 0 keeps all.
    last = graph.op("Slice", value, first, graph.const([np.iinfo(np.int64).max]), graph.const([1]))
    scores = builder.head(last)
    # Logits are compared and turned into probabilities in float32, whatever the graph computes in.
    exact = scores if graph.dtype == np.float32 else graph.cast(scores, np.float32)
    graph.output("logits", exact, np.float32, ["batch_size", "kept_length", builder.vocabulary], first=True)
