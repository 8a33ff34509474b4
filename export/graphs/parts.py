"""What every architecture's graphs are made of: a graph with a checkpoint's weights behind it, and the layers they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.checkpoint import Checkpoint, TensorEntry
from compress.engine.weights import WeightReader, is_finite, map_tensor
from compress.errors import CheckpointError
from compress.export.graphs.graph import Graph, Weight
from compress.export.graphs.linears import PIECE, LinearWriter, QuantizedLinear
from compress.export.graphs.vocabulary import embed, head, head_name
from compress.families import Family
from compress.layouts import PackedLinear, linear_shape, quantized_linears, read_linear, read_packed
from compress.numerics.grids import QuantizedWeight
from compress.skeleton import build_skeleton

_FLOATS = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}


@dataclass(frozen=True)
class Rotation:
    """The tables by which positions rotate queries and keys, [positions, head width / 2]; `places` is each token's row in them,
    int64 [batch, length].
    """

    cosines: str
    sines: str
    places: str


@dataclass(frozen=True)
class Source:
    """A checkpoint whose weights graphs are made from."""

    checkpoint: Checkpoint
    family: Family
    model: Any
    """The model's modules without their weights; buffers that are computed from the config are there."""
    reader: WeightReader
    held: dict[str, QuantizedLinear]
    """How each quantized linear is held, by its in-memory name."""

    @staticmethod
    def of(checkpoint: Checkpoint, family: Family, trust_remote_code: bool = False) -> Source:
        """Return the source that a checkpoint is, its headers read.

        Raises:
            CheckpointError: transformers knows no such model.
        """
        schemes = quantized_linears(checkpoint)
        held = {
            family.module_name(f"{name}.weight").removesuffix(".weight"): QuantizedLinear(name, scheme)
            for name, scheme in schemes.items()
        }
        model = build_skeleton(checkpoint.folder, torch.float32, torch.device("cpu"), trust_remote_code)
        return Source(checkpoint, family, model, WeightReader(checkpoint, family), held)

    @property
    def config(self) -> Any:
        """The model's config with every default filled in, transformers' own object."""
        return self.model.config


@dataclass
class Parts:
    """A graph and what its weights come from. Names are those of the model's modules in memory.

    `accuracy_level` is MatMulNBits': 4 rounds what comes into such a matrix to 8 bits in blocks, 0 computes in the graph's type.
    `head_bits` and `embedding_bits` say in how many bits the output head and the embeddings are held; None as they are.
    """

    graph: Graph
    source: Source
    accuracy_level: int = 4
    head_bits: int | None = None
    embedding_bits: int | None = None
    _inputs: dict[tuple[str, str], str] = field(default_factory=lambda: dict[tuple[str, str], str](), repr=False)

    @property
    def float_type(self) -> torch.dtype:
        """The type of the graph's floating-point numbers."""
        return _FLOATS[self.graph.dtype]

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name."""
        return name in self.source.reader.disk_names

    def has_linear(self, name: str) -> bool:
        """Return whether the checkpoint has a linear of this name, quantized or not."""
        return name in self.source.held or self.has(f"{name}.weight")

    def module(self, name: str) -> Any:
        """Return a module of the model, whose parameters are not there."""
        return self.source.model.get_submodule(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entry(name).shape

    def mapped(self, name: str) -> Tensor:
        """Return a tensor as it lies on disk, a view of the file; what is written of it is checked by `floats`."""
        return map_tensor(self._entry(name))

    def _entry(self, name: str) -> TensorEntry:
        reader = self.source.reader
        if name not in reader.disk_names:
            raise CheckpointError(f"{reader.checkpoint.folder}: holds no tensor for the model's {name}; fetch the checkpoint again")
        return reader.checkpoint.tensors[reader.disk_names[name]]

    def tensor(self, name: str, change: Callable[[Tensor], Tensor] | None = None, form: str = "") -> str:
        """Return a tensor of the checkpoint in the graph's type; `change` makes of it what is stored, which `form` names."""
        shape, dtype = self.shape(name), self.graph.dtype

        def read() -> Iterable[NDArray[Any]]:
            found = self.mapped(name)
            for piece in torch.split((found if change is None else change(found)).reshape(-1), PIECE):
                yield self.floats(name, piece)

        if change is not None:
            shape = tuple(change(torch.empty(shape, device="meta")).shape)
        key = f"{name}{form}:{dtype.name}"
        return self.graph.weight(f"{name}{form}", Weight(key, dtype, shape, read))

    def floats(self, name: str, tensor: Tensor) -> NDArray[Any]:
        """Return a tensor, or a piece of it, in the graph's type.

        Raises:
            CheckpointError: it holds NaN or infinite values, or one that is too large for the type.
        """
        found = tensor.to(self.float_type)
        if not is_finite(found):
            if found.dtype == torch.float16 and is_finite(tensor):
                raise CheckpointError(f"{name}: has values beyond 65504, the largest that float16 holds; set dtype: float32")
            raise CheckpointError(f"{name}: holds NaN or infinite values; fetch the checkpoint again or mend it")
        return found.contiguous().numpy()

    def linear(self, value: str, name: str, activation: str = "") -> str:
        """Return what the linear `name` makes of a value [..., in]: [..., out], with its bias where it has one."""
        return self.linears(value, [name], activation)[0]

    def linears(self, value: str, names: Sequence[str], activation: str = "") -> list[str]:
        """Return what several linears make of one value; those that are held alike are one matrix."""
        found = LinearWriter(self).linears(value, names)
        return [self.activation(each, activation) for each in found] if activation else found

    def embed(self, ids: str, name: str) -> str:
        """Return rows of the embedding matrix `name`, [..., width], for ids of any shape."""
        return embed(self, ids, name)

    def head(self, value: str) -> str:
        """Return the output head's logits of a value [batch, length, hidden]."""
        return head(self, value)

    @property
    def vocabulary(self) -> int:
        """How many tokens the output head tells apart."""
        name = head_name(self)
        return self.quantized_shape(name)[0] if name in self.source.held else self.shape(f"{name}.weight")[0]

    def quantized(self, name: str) -> QuantizedWeight:
        """Return the codes, scales and zero points of a quantized linear, as stored."""
        held = self.source.held[name]
        return read_linear(held.name, held.scheme, self.source.reader.disk_tensor)

    def packed(self, name: str) -> PackedLinear:
        """Return the same of one whose codes are packed, with these as they lie on disk."""
        held = self.source.held[name]
        return read_packed(held.name, held.scheme, self.source.reader.disk_tensor)

    def quantized_shape(self, name: str) -> tuple[int, int]:
        """Return [out, in] of a quantized linear."""
        return linear_shape(self.source.checkpoint, self.source.held[name].name)

    def input_scale(self, name: str) -> float:
        """Return the fixed scale of what comes into a quantized linear."""
        return float(self.source.reader.disk_tensor(f"{self.source.held[name].name}.input_scale"))

    def once(self, value: str, kind: str, make: Callable[[], str]) -> str:
        """Return what `make` adds for a value the first time, and the same again later."""
        key = (value, kind)
        if key not in self._inputs:
            self._inputs[key] = make()
        return self._inputs[key]

    def layer_norm(self, value: str, name: str, epsilon: float) -> str:
        """Return LayerNorm `name` of a value, over its last axis."""
        weights = [self.tensor(f"{name}.weight"), *([self.tensor(f"{name}.bias")] if self.has(f"{name}.bias") else [])]
        return self.graph.op("LayerNormalization", value, *weights, axis=-1, epsilon=epsilon)

    def rms_norm(self, value: str, name: str, epsilon: float) -> str:
        """Return RMSNorm `name` of a value, over its last axis (arXiv 1910.07467)."""
        return self.graph.op("RMSNormalization", value, self.tensor(f"{name}.weight"), axis=-1, epsilon=epsilon)

    def add_rms_norm(self, value: str, more: str, name: str, epsilon: float, width: int) -> tuple[str, str]:
        """Return RMSNorm `name` of the sum of two values [batch, sequence, width], and the sum."""
        graph = self.graph
        inputs = (value, more, self.tensor(f"{name}.weight"))
        outputs = graph.ops("SkipSimplifiedLayerNormalization", *inputs, outputs=4, unused=(1, 2), epsilon=epsilon)
        shape = ("batch_size", "sequence_length", width)
        return graph.typed(outputs[0], graph.dtype, shape), graph.typed(outputs[3], graph.dtype, shape)

    def activation(self, value: str, kind: str) -> str:
        """Return an activation of a value, by the name that configs give it.

        Raises:
            CheckpointError: it is none of those known.
        """
        graph = self.graph
        match kind:
            case "relu":
                return graph.op("Relu", value)
            case "gelu":
                return graph.op("Gelu", value)
            case "gelu_pytorch_tanh" | "gelu_new":
                return graph.op("Gelu", value, approximate="tanh")
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
        """Return attention of [batch, length, heads · width] over keys and values of such shapes: as `query`.

        `bias` [batch or 1, heads or 1, queries, keys] is added to the scores, which are scaled by 1/√width unless told.
        """
        return self.graph.op("MultiHeadAttention", query, key, value, "", "", bias, num_heads=heads, scale=scale)

    def rotated(self, value: str, rotation: Rotation) -> str:
        """Return [batch, length, heads · width] rotated by its positions (arXiv 2104.09864, halves as in GPT-NeoX)."""
        return self.graph.op("RotaryEmbedding", value, rotation.places, rotation.cosines, rotation.sines)
