"""Linears in a graph, by how the checkpoint holds them: as they are, in codes of few bits, or with rounded inputs too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from compress.export.graphs.graph import Weight
from compress.export.onnx_limits import block_size
from compress.numerics.packing import pack_words
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from compress.export.graphs.parts import Parts

PIECE = 1 << 22
"""How many numbers are made and written at once."""

_LARGEST = 127.0
_SIGN = 128


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear: its name on disk and its scheme."""

    name: str
    scheme: Scheme


@dataclass(frozen=True)
class LinearWriter:
    """Adds linears to the graph of `parts`."""

    parts: Parts

    def linears(self, value: str, names: Sequence[str]) -> list[str]:
        """Return what each linear makes of a value; as one matrix where all are held alike and that saves work on it."""
        several = len(names) > 1 and len({self._kind(name) for name in names}) == 1
        # Of plain products without a bias each is one operator, and taking one result apart costs as much as the others.
        if several and (names[0] in self.parts.source.held or self.parts.has(f"{names[0]}.bias")):
            sizes = [self._rows(name) for name in names]
            return list(self.parts.graph.split(self._one(value, tuple(names)), sizes))
        return [self._one(value, (name,)) for name in names]

    def _kind(self, name: str) -> tuple[Any, ...]:
        held = self.parts.source.held.get(name)
        if held is None:
            return ("plain", self.parts.shape(f"{name}.weight")[1])
        columns = self.parts.quantized_shape(name)[1]
        fixed = float(self.parts.input_scale(name)) if held.scheme.activations == "tensor" else None
        return (held.scheme, columns, fixed)

    def _rows(self, name: str) -> int:
        if name in self.parts.source.held:
            return self.parts.quantized_shape(name)[0]
        return self.parts.shape(f"{name}.weight")[0]

    def _one(self, value: str, names: tuple[str, ...]) -> str:
        held = self.parts.source.held.get(names[0])
        if held is None:
            found = self._plain(value, names)
        elif held.scheme.activations is None:
            found = self._blocks(value, names)
        else:
            found = self._integers(value, names, held.scheme.activations)
        return self._biased(found, names)

    def _biased(self, value: str, names: tuple[str, ...]) -> str:
        parts = self.parts
        biased = [f"{name}.bias" for name in names if parts.has(f"{name}.bias")]
        if not biased:
            return value

        def read() -> Iterable[NDArray[Any]]:
            for name in names:
                whole = parts.mapped(f"{name}.bias") if f"{name}.bias" in biased else torch.zeros(self._rows(name))
                yield parts.floats(f"{name}.bias", whole)

        return parts.graph.op("Add", value, self._weight(names, "bias", parts.graph.dtype, (sum(map(self._rows, names)),), read))

    def _plain(self, value: str, names: tuple[str, ...]) -> str:
        """Return a product with matrices as they are, stored [in, out]."""
        parts = self.parts
        rows, columns = sum(map(self._rows, names)), parts.shape(f"{names[0]}.weight")[1]

        def read() -> Iterable[NDArray[Any]]:
            matrices = [parts.mapped(f"{name}.weight") for name in names]
            for piece in _side_by_side(matrices, torch.float32):
                yield parts.floats(names[0], piece)

        return parts.graph.op("MatMul", value, self._weight(names, "weight", parts.graph.dtype, (columns, rows), read))

    def _blocks(self, value: str, names: tuple[str, ...]) -> str:
        """Return a product with matrices of 4 or 8 bits, from the checkpoint's own codes and scales.

        MatMulNBits holds codes as bytes [out, blocks, block · bits / 8], lowest bits first, which is how they lie in the checkpoint
        too; scales [out · blocks], zero points packed along the blocks.
        """
        parts, graph = self.parts, self.parts.graph
        scheme = parts.source.held[names[0]].scheme
        rows, columns = sum(map(self._rows, names)), parts.quantized_shape(names[0])[1]
        block = block_size(columns if scheme.group_size == -1 else scheme.group_size)
        blocks, byte = columns // block, np.dtype(np.uint8)

        def codes() -> Iterable[NDArray[Any]]:
            for name in names:
                yield _bytes(parts.packed(name).words)

        def scales() -> Iterable[NDArray[Any]]:
            for name in names:
                found = parts.packed(name).scales
                yield parts.floats(name, found.repeat_interleave(blocks // found.shape[1], dim=1))

        def zero_points() -> Iterable[NDArray[Any]]:
            for name in names:
                found = parts.packed(name).zero_points
                spread = found.repeat_interleave(blocks // found.shape[1], dim=1)
                yield _bytes(pack_words(spread, scheme.bits))[:, :packed]

        packed = -(-blocks * scheme.bits // 8)
        inputs = [
            value,
            self._weight(names, "codes", byte, (rows, blocks, block * scheme.bits // 8), codes),
            self._weight(names, "scales", graph.dtype, (rows * blocks,), scales),
        ]
        if not scheme.symmetric:
            inputs.append(self._weight(names, "zero_points", byte, (rows * packed,), zero_points))
        level = parts.accuracy_level
        return graph.op("MatMulNBits", *inputs, K=columns, N=rows, bits=scheme.bits, block_size=block, accuracy_level=level)

    def _integers(self, value: str, names: tuple[str, ...], activations: str) -> str:
        """Return a product of 8-bit integers: the input is rounded by a scale per token as it comes, or by one fixed scale.

        Both sides are bytes without a sign, zero at 128: with signed weights ONNX Runtime's sums of two products are cut off at 16
        bits on processors without VNNI ("Quantize ONNX models", on data types).
        """
        parts, graph = self.parts, self.parts.graph
        rows, columns = sum(map(self._rows, names)), parts.quantized_shape(names[0])[1]

        def read_codes() -> Iterable[NDArray[Any]]:
            for piece in _side_by_side([parts.quantized(name).codes for name in names], torch.uint8):
                yield piece.numpy()

        def read_scales() -> Iterable[NDArray[Any]]:
            for name in names:
                yield parts.floats(name, parts.quantized(name).scales.view(-1))

        codes = self._weight(names, "codes", np.dtype(np.uint8), (columns, rows), read_codes)
        scales = self._weight(names, "scales", graph.dtype, (rows,), read_scales)
        if activations == "tensor":
            scale = graph.const(parts.input_scale(names[0]), graph.dtype)
            zero = graph.const(_SIGN, np.uint8)
            rounded = parts.once(value, f"fixed {scale}", lambda: graph.op("QuantizeLinear", value, scale, zero))
            dense = parts.once(rounded, "back", lambda: graph.op("DequantizeLinear", rounded, scale, zero))
            zeros = self._weight(names, "zero_points", np.dtype(np.uint8), (rows,), lambda: [np.full(rows, _SIGN, np.uint8)])
            return graph.op("MatMul", dense, graph.op("DequantizeLinear", codes, scales, zeros, axis=1))
        return self._per_token(value, codes, scales)

    def _per_token(self, value: str, codes: str, scales: str) -> str:
        """Return a product with 8-bit codes, the input rounded by a scale per token; in float32, as its sums are beyond float16."""
        parts, graph = self.parts, self.parts.graph
        zero = graph.const(_SIGN, np.uint8)
        wide = parts.once(value, "wide", lambda: self._as(value, np.float32))
        step = parts.once(wide, "step", lambda: self._step(wide))
        one = graph.const(1.0, np.float32)
        rounded = parts.once(wide, "codes", lambda: graph.op("QuantizeLinear", graph.op("Div", wide, step), one, zero))
        product = graph.cast(graph.op("MatMulInteger", rounded, codes, zero, zero), np.float32)
        return self._as(graph.op("Mul", graph.op("Mul", product, step), self._as(scales, np.float32)), graph.dtype)

    def _as(self, value: str, dtype: DTypeLike) -> str:
        """Return a value of the graph's own type, or of float32, in another; itself where the graph knows but one."""
        return value if self.parts.graph.dtype == np.float32 else self.parts.graph.cast(value, dtype)

    def _step(self, value: str) -> str:
        """Return the scale of each token [..., 1], float32: its largest value becomes 127."""
        graph = self.parts.graph
        largest = graph.op("ReduceMax", graph.op("Abs", value), graph.const([-1]), keepdims=1)
        steps = graph.op("Div", largest, graph.const(_LARGEST, np.float32))
        none = graph.op("Equal", steps, graph.const(0.0, np.float32))
        return graph.op("Where", none, graph.const(1.0, np.float32), steps)

    def _weight(
        self,
        names: tuple[str, ...],
        part: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        read: Callable[[], Iterable[NDArray[Any]]],
    ) -> str:
        name = f"{'+'.join((names[0], *(other.rpartition('.')[2] for other in names[1:])))}.{part}"
        return self.parts.graph.weight(name, Weight(f"{'+'.join(names)}.{part}:{dtype.name}", dtype, shape, read))


def _side_by_side(matrices: Sequence[Tensor], dtype: torch.dtype) -> Iterable[Tensor]:
    """Give the transposes of matrices of as many columns, put side by side, in a type, some rows at a time."""
    turned = [matrix.t().contiguous() for matrix in matrices]
    width = sum(matrix.shape[1] for matrix in turned)
    step = max(1, PIECE // width)
    for first in range(0, len(turned[0]), step):
        rows = [matrix[first : first + step] for matrix in turned]
        piece = torch.empty(len(rows[0]), width, dtype=dtype)
        for place, part in zip(torch.split(piece, [each.shape[1] for each in rows], dim=1), rows, strict=True):
            place.copy_(part)
        yield piece


def _bytes(words: Tensor) -> NDArray[np.uint8]:
    return words.contiguous().view(torch.uint8).numpy()
