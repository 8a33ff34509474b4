"""Emit embeddings and the output head: dense or quantized; stored once where they are tied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.checkpoints.output_head import head_is_tied
from compress.export.onnx.graphs.graph import Weight
from compress.export.onnx.graphs.linears import CHUNK
from compress.export.onnx.limits import EXPORT_GROUP_SIZE, block_size
from compress.numerics.grids import QuantizedWeight
from compress.numerics.packing import pack_words
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from compress.export.onnx.graphs.layer_builder import LayerBuilder

_ZERO_POINT = 128
"""The zero point of unsigned 8-bit codes."""


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix [rows, columns] that the export rounds to nearest, symmetric, in groups along its rows."""

    name: str
    bits: int
    block: int
    """The group size."""

    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Groups per row."""
        return self.columns // self.block


def embed(builder: LayerBuilder, ids: str, name: str) -> str:
    """Return rows of the matrix `name` for ids of any shape."""
    graph = builder.graph
    if builder.embedding_bits is None:
        return graph.op("Gather", builder.tensor(f"{name}.weight"), ids, axis=0)
    matrix = _rounded_matrix(builder, name, builder.embedding_bits)
    codes = graph.op("Gather", _codes(builder, matrix, (matrix.rows, matrix.blocks, matrix.block)), ids, axis=0)
    scales = graph.op("Gather", _scales(builder, matrix, (matrix.rows, matrix.blocks)), ids, axis=0)
    # After the Gather: only the rows of the prompt's tokens are dequantized. MatMulNBits implies the same zero point, so
    # that a tied head reads the same codes.
    centred = graph.op("Sub", graph.cast(codes, graph.dtype), graph.const(float(_ZERO_POINT)))
    rows = graph.op("Mul", centred, graph.op("Unsqueeze", scales, graph.const([-1])))
    extents = graph.op("Concat", graph.op("Shape", ids), graph.const([matrix.columns]), axis=0)
    return graph.op("Reshape", rows, extents)


def head_name(builder: LayerBuilder) -> str:
    """Return the module that has the output head's matrix: the head, or the embeddings where the two are tied."""
    family = builder.source.family
    assert family.head is not None, "only generative models have an output head"
    # Decided from the tensors, not by `tie_word_embeddings` alone: some checkpoints claim a tie and ship a head of their own.
    return family.embeddings if head_is_tied(builder.source.checkpoint, family) else family.head


def head(builder: LayerBuilder, value: str) -> str:
    """Return the logits of a value [batch, length, hidden]."""
    graph, name = builder.graph, head_name(builder)
    if name in builder.source.quantized:
        # By the head's own scheme: a stage has rounded it, and it is not rounded again.
        return builder.linear(value, name)
    if builder.head_bits is not None:
        matrix = _rounded_matrix(builder, name, builder.head_bits)
        return graph.op(
            "MatMulNBits",
            value,
            _codes(builder, matrix, (matrix.rows, matrix.blocks, matrix.block * matrix.bits // 8)),
            _scales(builder, matrix, (matrix.rows * matrix.blocks,)),
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=builder.accuracy_level,
        )
    if name != builder.source.family.embeddings:
        return builder.linear(value, name)
    rows, columns = builder.shape(f"{name}.weight")  # tied and stored once, in the embeddings' layout
    # Gemm, as MatMul cannot transpose: the matrix stays [vocabulary, hidden], as Gather reads it for the embeddings.
    flat = graph.op("Gemm", graph.reshape(value, [-1, columns]), builder.tensor(f"{name}.weight"), transB=1)
    extents = graph.op("Concat", graph.op("Shape", value, end=2), graph.const([rows]), axis=0)
    return graph.op("Reshape", flat, extents)


def _rounded_matrix(builder: LayerBuilder, name: str, bits: int) -> RoundedMatrix:
    rows, columns = builder.shape(f"{name}.weight")
    # A width that 32 does not divide gets blocks of 16.
    return RoundedMatrix(name, bits, min(EXPORT_GROUP_SIZE, block_size(columns)), rows, columns)


def _codes(builder: LayerBuilder, matrix: RoundedMatrix, shape: tuple[int, ...]) -> str:
    def read() -> Iterable[NDArray[Any]]:
        for chunk in _chunks(builder, matrix):
            yield pack_words(chunk.codes, matrix.bits).view(torch.uint8).numpy()

    return _weight(builder, matrix, "codes", Weight("", np.dtype(np.uint8), shape, read))


def _scales(builder: LayerBuilder, matrix: RoundedMatrix, shape: tuple[int, ...]) -> str:
    def read() -> Iterable[NDArray[Any]]:
        for chunk in _chunks(builder, matrix):
            yield builder.floats(matrix.name, chunk.scales)

    return _weight(builder, matrix, "scales", Weight("", builder.graph.dtype, shape, read))


def _chunks(builder: LayerBuilder, matrix: RoundedMatrix) -> Iterable[QuantizedWeight]:
    """Yield the quantized matrix, some rows at a time."""
    scheme = Scheme(matrix.bits, matrix.block, symmetric=True)
    for rows in torch.split(builder.source.reader.tensor(f"{matrix.name}.weight"), max(1, CHUNK // matrix.columns)):
        yield quantize(rows, scheme, torch.float32)


def _weight(builder: LayerBuilder, matrix: RoundedMatrix, tensor: str, weight: Weight) -> str:
    """Add a tensor of a quantized matrix; tied embeddings and head of equal bits share its bytes."""
    name = f"{matrix.name}.{tensor}{matrix.bits}"
    return builder.graph.weight(name, replace(weight, key=f"{name}:{weight.dtype.name}"))
