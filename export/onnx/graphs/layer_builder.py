"""Builds layers in a graph from a checkpoint's weights: linears, norms, activations, attention, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.checkpoints.checkpoint import Checkpoint, TensorEntry
from compress.checkpoints.layouts import PackedLinear, linear_shape, quantized_linears, read_linear, read_packed
from compress.checkpoints.skeleton import build_skeleton
from compress.engine.weights import WeightReader, is_finite, map_tensor
from compress.errors import CheckpointError
from compress.export.onnx.graphs.graph import Graph, Weight
from compress.export.onnx.graphs.linears import CHUNK, LinearWriter, QuantizedLinear
from compress.export.onnx.graphs.vocabulary import embed, head, head_name
from compress.families import Family
from compress.numerics.grids import QuantizedWeight

_FLOATS = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}


@dataclass(frozen=True)
class RotaryTables:
    """RoPE tables in a graph, and the row of each token in them."""

    cosines: str
    """[rows, head width / 2]"""

    sines: str
    """[rows, head width / 2]"""

    rows: str
    """Each token's row, int64 [batch, length]."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened for the emission of graphs."""

    checkpoint: Checkpoint
    family: Family
    model: Any
    """The model's modules on the meta device, with the buffers that are computed from the config."""

    reader: WeightReader
    quantized: dict[str, QuantizedLinear]
    """The quantized linears, by in-memory name."""

    @staticmethod
    def of(checkpoint: Checkpoint, family: Family, trust_remote_code: bool = False) -> Source:
        """Open a checkpoint; reads headers only.

        Raises:
            CheckpointError: transformers does not know the model.
        """
        schemes = quantized_linears(checkpoint)
        quantized = {
            family.module_name(f"{name}.weight").removesuffix(".weight"): QuantizedLinear(name, scheme)
            for name, scheme in schemes.items()
        }
        # float32: RoPE frequencies are buffers, and a bfloat16 model would compute them with 8 bits of mantissa.
        model = build_skeleton(checkpoint.folder, torch.float32, torch.device("cpu"), trust_remote_code)
        return Source(checkpoint, family, model, WeightReader(checkpoint, family), quantized)

    @property
    def config(self) -> Any:
        """The model's config as transformers' object, with defaults filled in."""
        return self.model.config


def hidden_state(source: Source, layer: Any) -> int:
    """Return the index of the hidden state that a config's `vision_feature_layer` names; 0 are the embeddings.

    Raises:
        CheckpointError: the tower has no such layer.
    """
    count = int(source.config.vision_config.num_hidden_layers)
    if not isinstance(layer, int) or not -count - 1 <= layer <= count:
        raise CheckpointError(
            f"{source.checkpoint.folder}/config.json: vision_feature_layer is {source.config.vision_feature_layer}, "
            f"of a tower of {count} blocks; fetch the checkpoint again"
        )
    # transformers' hidden states are the embeddings and one per block: -1 is state `count`, and -2, LLaVA's usual, the one before.
    return layer % (count + 1)


@dataclass
class LayerBuilder:
    """Adds layers to a graph, with weights from a checkpoint. Names are those of the model's modules in memory."""

    graph: Graph
    source: Source
    accuracy_level: int = 4
    """MatMulNBits' attribute: 4 quantizes its input to 8 bits in blocks, 0 computes in the graph's type."""

    head_bits: int | None = None
    """The bits of the output head; None leaves it as it is."""

    embedding_bits: int | None = None
    """The bits of the embeddings; None leaves them as they are."""

    _shared: dict[tuple[str, str], str] = field(default_factory=lambda: dict[tuple[str, str], str](), repr=False)

    @property
    def float_type(self) -> torch.dtype:
        """The graph's float type."""
        return _FLOATS[self.graph.dtype]

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name."""
        return name in self.source.reader.disk_names

    def has_linear(self, name: str) -> bool:
        """Return whether the checkpoint has a linear of this name, quantized or not."""
        return name in self.source.quantized or self.has(f"{name}.weight")

    def module(self, name: str) -> Any:
        """Return a module of the model, on the meta device."""
        return self.source.model.get_submodule(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entry(name).shape

    def mapped(self, name: str) -> Tensor:
        """Return a tensor as a view of the memory-mapped file; `floats` checks what is written of it."""
        return map_tensor(self._entry(name))

    def _entry(self, name: str) -> TensorEntry:
        reader = self.source.reader
        if name not in reader.disk_names:
            raise CheckpointError(f"{reader.checkpoint.folder}: holds no tensor for the model's {name}; fetch the checkpoint again")
        return reader.checkpoint.tensors[reader.disk_names[name]]

    def tensor(self, name: str, transform: Callable[[Tensor], Tensor] | None = None, suffix: str = "") -> str:
        """Return a tensor of the checkpoint in the graph's type, after `transform`; `suffix` is added to the name of the result."""
        shape, dtype = self.shape(name), self.graph.dtype

        def read() -> Iterable[NDArray[Any]]:
            mapped = self.mapped(name)
            # In pieces: an embedding matrix in bfloat16 becomes twice as large in float32.
            for chunk in torch.split((mapped if transform is None else transform(mapped)).reshape(-1), CHUNK):
                yield self.floats(name, chunk)

        if transform is not None:
            # On the meta device: shapes are needed when the graph is laid out, long before the bytes are read.
            shape = tuple(transform(torch.empty(shape, device="meta")).shape)
        key = f"{name}{suffix}:{dtype.name}"
        return self.graph.weight(f"{name}{suffix}", Weight(key, dtype, shape, read))

    def floats(self, name: str, tensor: Tensor) -> NDArray[Any]:
        """Return a tensor, or a piece of it, in the graph's type.

        Raises:
            CheckpointError: it has NaN or infinite values, or values that overflow the type.
        """
        # A NaN in a weight survives every export and shows up only as empty answers; one value is checked where it is written.
        converted = tensor.to(self.float_type)
        if not is_finite(converted):
            if converted.dtype == torch.float16 and is_finite(tensor):
                raise CheckpointError(f"{name}: has values beyond 65504, the largest that float16 holds; set dtype: float32")
            raise CheckpointError(f"{name}: holds NaN or infinite values; fetch the checkpoint again or mend it")
        return converted.contiguous().numpy()

    def linear(self, value: str, name: str, activation: str = "") -> str:
        """Return the linear `name`, with its bias if it has one, of a value [..., in]: [..., out]."""
        return self.linears(value, [name], activation)[0]

    def linears(self, value: str, names: Sequence[str], activation: str = "") -> list[str]:
        """Return several linears of one value; those of one scheme may be fused into one matrix."""
        outputs = LinearWriter(self).linears(value, names)
        return [self.activation(output, activation) for output in outputs] if activation else outputs

    def mlp(self, value: str, first: str, second: str, activation: str) -> str:
        """Return the linear `second` of an activation of the linear `first` of a value."""
        return self.linear(self.linear(value, first, activation), second)

    def patches(self, pixels: str, name: str, kernel: str = "") -> str:
        """Return the patches [n, patches, hidden] of images [n, channels, height, width]: convolution `name`, one patch a stride.

        `kernel` takes the place of its weight.
        """
        graph, (hidden, _, *extent) = self.graph, self.shape(f"{name}.weight")
        inputs = [kernel or self.tensor(f"{name}.weight"), *([self.tensor(f"{name}.bias")] if self.has(f"{name}.bias") else [])]
        grid = graph.op("Conv", pixels, *inputs, kernel_shape=extent, strides=extent)
        # 0 keeps the number of images dynamic; -1 is then the one extent that may be inferred.
        return graph.transpose(graph.reshape(grid, [0, hidden, -1]), [0, 2, 1])

    def per_image(self, value: str, images: str) -> str:
        """Return a value [1, length, hidden] repeated for each of the images [n, …], [n, length, hidden]."""
        graph = self.graph
        return graph.op("Expand", value, graph.op("Concat", graph.extent(images, 0), graph.const([1, 1]), axis=0))

    def embed(self, ids: str, name: str) -> str:
        """Return rows of the embedding matrix `name`, [..., width], for ids of any shape."""
        return embed(self, ids, name)

    def head(self, value: str) -> str:
        """Return the output head's logits of a value [batch, length, hidden]."""
        return head(self, value)

    @property
    def vocabulary(self) -> int:
        """The output head's vocabulary size."""
        name = head_name(self)
        return self.quantized_shape(name)[0] if name in self.source.quantized else self.shape(f"{name}.weight")[0]

    def quantized(self, name: str) -> QuantizedWeight:
        """Return a quantized linear's codes, scales and zero points."""
        linear = self.source.quantized[name]
        return read_linear(linear.name, linear.scheme, self.source.reader.disk_tensor)

    def packed(self, name: str) -> PackedLinear:
        """Return a quantized linear with its codes packed as on disk."""
        linear = self.source.quantized[name]
        return read_packed(linear.name, linear.scheme, self.source.reader.disk_tensor)

    def quantized_shape(self, name: str) -> tuple[int, int]:
        """Return [out, in] of a quantized linear."""
        return linear_shape(self.source.checkpoint, self.source.quantized[name].name)

    def input_scale(self, name: str) -> float:
        """Return the static scale of a quantized linear's input."""
        return float(self.source.reader.disk_tensor(f"{self.source.quantized[name].name}.input_scale"))

    def shared(self, value: str, kind: str, emit: Callable[[], str]) -> str:
        """Return the result of `emit` for a value, emitted once per value and kind."""
        key = (value, kind)
        if key not in self._shared:
            self._shared[key] = emit()
        return self._shared[key]

    def layer_norm(self, value: str, name: str, epsilon: float) -> str:
        """Return LayerNorm `name` of a value, over its last axis."""
        weights = [self.tensor(f"{name}.weight"), *([self.tensor(f"{name}.bias")] if self.has(f"{name}.bias") else [])]
        return self.graph.op("LayerNormalization", value, *weights, axis=-1, epsilon=epsilon)

    def rms_norm(self, value: str, name: str, epsilon: float) -> str:
        """Return RMSNorm `name` of a value, over its last axis (arXiv 1910.07467)."""
        return self.graph.op("RMSNormalization", value, self.tensor(f"{name}.weight"), axis=-1, epsilon=epsilon)

    def add_rms_norm(self, value: str, residual: str, name: str, epsilon: float, width: int) -> tuple[str, str]:
        """Return RMSNorm `name` of the sum of two values [batch, sequence, width], and the sum."""
        graph = self.graph
        inputs = (value, residual, self.tensor(f"{name}.weight"))
        # ONNX Runtime does not fuse an Add with opset 23's RMSNormalization, so the fused operator is emitted. Its outputs 1 and 2
        # (mean, inverse deviation) exist for training; output 3 is the sum.
        outputs = graph.ops("SkipSimplifiedLayerNormalization", *inputs, outputs=4, unused=(1, 2), epsilon=epsilon)
        shape = ("batch_size", "sequence_length", width)
        # onnx's shape inference stops at com.microsoft: without declared types the operators after it would have none.
        return graph.typed(outputs[0], graph.dtype, shape), graph.typed(outputs[3], graph.dtype, shape)

    def activation(self, value: str, kind: str) -> str:
        """Return an activation of a value, by its name in transformers' configs.

        Raises:
            CheckpointError: it is not supported.
        """
        graph = self.graph
        match kind:
            case "relu":
                return graph.op("Relu", value)
            # "gelu" is the exact one with erf in transformers; the tanh approximation has names of its own.
            case "gelu":
                return graph.op("Gelu", value)
            case "gelu_pytorch_tanh" | "gelu_new":
                return graph.op("Gelu", value, approximate="tanh")
            # ONNX has Swish from opset 24 on. ONNX Runtime fuses the pair to QuickGelu, as it does the next.
            case "silu" | "swish":
                return graph.op("Mul", value, graph.op("Sigmoid", value))
            case "quick_gelu":
                return graph.op("Mul", value, graph.op("Sigmoid", graph.op("Mul", value, graph.const(1.702))))
            case "tanh":
                return graph.op("Tanh", value)
            case _:
                folder = self.source.checkpoint.folder
                raise CheckpointError(f"{folder}/config.json: activation {kind!r} is not known to this export; use format: vllm")

    def attention(self, query: str, key: str, value: str, heads: int, bias: str = "", scale: float | None = None) -> str:
        """Return attention of queries, keys and values [batch, length, heads · width], in the queries' shape.

        `bias` [batch or 1, heads or 1, queries, keys] is added to the scores; `scale` is 1/√width by default.
        """
        # The empty inputs are a fused bias and a key padding mask: any mask turns off the CPU's tiled kernel, and all scores are
        # then in memory at once. Towers therefore mask by marks where they can (see `qwen_vision`).
        return self.graph.op("MultiHeadAttention", query, key, value, "", "", bias, num_heads=heads, scale=scale)

    def rotated(self, value: str, tables: RotaryTables) -> str:
        """Return RoPE (arXiv 2104.09864, halves as in GPT-NeoX) of queries or keys [batch, length, heads · width]."""
        return self.graph.op("RotaryEmbedding", value, tables.rows, tables.cosines, tables.sines)
