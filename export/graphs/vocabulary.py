"""The two ends of a decoder, embeddings and output head: as they are or rounded to few bits; stored once where they are one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.export.graphs.graph import Weight
from compress.export.graphs.linears import PIECE
from compress.export.onnx_limits import EXPORT_GROUP_SIZE, block_size
from compress.numerics.grids import QuantizedWeight
from compress.numerics.packing import pack_words
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme
from compress.output_head import head_is_tied

if TYPE_CHECKING:
    from compress.export.graphs.parts import Parts

_ZERO = 128


@dataclass(frozen=True)
class Rounded:
    """A matrix [rows, columns] rounded to nearest, symmetric, in blocks along its rows."""

    name: str
    bits: int
    block: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """How many blocks a row has."""
        return self.columns // self.block


def embed(parts: Parts, ids: str, name: str) -> str:
    """Return rows of the matrix `name` for ids of any shape."""
    graph = parts.graph
    if parts.embedding_bits is None:
        return graph.op("Gather", parts.tensor(f"{name}.weight"), ids, axis=0)
    rounded = _rounded(parts, name, parts.embedding_bits)
    codes = graph.op("Gather", _codes(parts, rounded, (rounded.rows, rounded.blocks, rounded.block)), ids, axis=0)
    scales = graph.op("Gather", _scales(parts, rounded, (rounded.rows, rounded.blocks)), ids, axis=0)
    centred = graph.op("Sub", graph.cast(codes, graph.dtype), graph.const(float(_ZERO)))
    found = graph.op("Mul", centred, graph.op("Unsqueeze", scales, graph.const([-1])))
    extents = graph.op("Concat", graph.op("Shape", ids), graph.const([rounded.columns]), axis=0)
    return graph.op("Reshape", found, extents)


def head_name(parts: Parts) -> str:
    """Return the module whose matrix the output head is: its own, or the embeddings' where the two are one."""
    family = parts.source.family
    assert family.head is not None, "only models that write have an output head"
    return family.embeddings if head_is_tied(parts.source.checkpoint, family) else family.head


def head(parts: Parts, value: str) -> str:
    """Return the logits of a value [batch, length, hidden]."""
    graph, name = parts.graph, head_name(parts)
    if name in parts.source.held:
        return parts.linear(value, name)
    if parts.head_bits is not None:
        rounded = _rounded(parts, name, parts.head_bits)
        return graph.op(
            "MatMulNBits",
            value,
            _codes(parts, rounded, (rounded.rows, rounded.blocks, rounded.block * rounded.bits // 8)),
            _scales(parts, rounded, (rounded.rows * rounded.blocks,)),
            K=rounded.columns,
            N=rounded.rows,
            bits=rounded.bits,
            block_size=rounded.block,
            accuracy_level=parts.accuracy_level,
        )
    if name != parts.source.family.embeddings:
        return parts.linear(value, name)
    rows, columns = parts.shape(f"{name}.weight")  # stored once, as the embeddings need it
    flat = graph.op("Gemm", graph.reshape(value, [-1, columns]), parts.tensor(f"{name}.weight"), transB=1)
    extents = graph.op("Concat", graph.op("Shape", value, end=2), graph.const([rows]), axis=0)
    return graph.op("Reshape", flat, extents)


def _rounded(parts: Parts, name: str, bits: int) -> Rounded:
    rows, columns = parts.shape(f"{name}.weight")
    return Rounded(name, bits, min(EXPORT_GROUP_SIZE, block_size(columns)), rows, columns)


def _codes(parts: Parts, rounded: Rounded, shape: tuple[int, ...]) -> str:
    def read() -> Iterable[NDArray[Any]]:
        for piece in _pieces(parts, rounded):
            yield pack_words(piece.codes, rounded.bits).view(torch.uint8).numpy()

    return _weight(parts, rounded, "codes", Weight("", np.dtype(np.uint8), shape, read))


def _scales(parts: Parts, rounded: Rounded, shape: tuple[int, ...]) -> str:
    def read() -> Iterable[NDArray[Any]]:
        for piece in _pieces(parts, rounded):
            yield parts.floats(rounded.name, piece.scales)

    return _weight(parts, rounded, "scales", Weight("", parts.graph.dtype, shape, read))


def _pieces(parts: Parts, rounded: Rounded) -> Iterable[QuantizedWeight]:
    """Give the rounded matrix, some rows at a time."""
    scheme = Scheme(rounded.bits, rounded.block, symmetric=True)
    for rows in torch.split(parts.source.reader.tensor(f"{rounded.name}.weight"), max(1, PIECE // rounded.columns)):
        yield quantize(rows, scheme, torch.float32)


def _weight(parts: Parts, rounded: Rounded, part: str, weight: Weight) -> str:
    """Return a tensor of a rounded matrix: embeddings and a head that are one, in as many bits, share the bytes."""
    name = f"{rounded.name}.{part}{rounded.bits}"
    return parts.graph.weight(name, replace(weight, key=f"{name}:{weight.dtype.name}"))
