"""Emit linears by their scheme: dense, MatMulNBits for quantized weights, integer products for W8A8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from compress.export.onnx.graphs.graph import Weight
from compress.export.onnx.limits import block_size
from compress.numerics.packing import pack_words
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from compress.export.onnx.graphs.layer_builder import LayerBuilder

CHUNK = 1 << 22
"""Elements of a weight that are converted and written at once: 16 MiB in float32, whatever the matrix."""

_MAX_CODE = 127.0
"""The code of a token's largest magnitude."""

_ZERO_POINT = 128
"""The zero point of unsigned codes."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear: its name on disk and its scheme."""

    name: str
    scheme: Scheme


@dataclass(frozen=True)
class LinearWriter:
    """Adds linears to a builder's graph."""

    builder: LayerBuilder

    def linears(self, value: str, names: Sequence[str]) -> list[str]:
        """Return each linear of a value; fused into one matrix where all have one scheme and fusing saves operators."""
        fusible = len(names) > 1 and len({self._kind(name) for name in names}) == 1
        # Dense linears without a bias are one operator each, and splitting a fused result costs as much as it saves.
        if fusible and (names[0] in self.builder.source.quantized or self.builder.has(f"{names[0]}.bias")):
            sizes = [self._rows(name) for name in names]
            return list(self.builder.graph.split(self._fused(value, tuple(names)), sizes))
        return [self._fused(value, (name,)) for name in names]

    def _kind(self, name: str) -> tuple[Any, ...]:
        """Return a key that is equal for linears that can be fused."""
        linear = self.builder.source.quantized.get(name)
        if linear is None:
            return ("dense", self.builder.shape(f"{name}.weight")[1])
        # The schemes must be equal and the inputs as wide; a static input scale must be the same number, as a product has one.
        columns = self.builder.quantized_shape(name)[1]
        static_scale = float(self.builder.input_scale(name)) if linear.scheme.activations == "tensor" else None
        return (linear.scheme, columns, static_scale)

    def _rows(self, name: str) -> int:
        if name in self.builder.source.quantized:
            return self.builder.quantized_shape(name)[0]
        return self.builder.shape(f"{name}.weight")[0]

    def _fused(self, value: str, names: tuple[str, ...]) -> str:
        """Return linears of one scheme as one, their outputs side by side, with their biases."""
        linear = self.builder.source.quantized.get(names[0])
        if linear is None:
            product = self._dense(value, names)
        elif linear.scheme.activations is None:
            product = self._matmul_nbits(value, names)
        else:
            product = self._w8a8(value, names, linear.scheme.activations)
        return self._with_bias(product, names)

    def _with_bias(self, value: str, names: tuple[str, ...]) -> str:
        builder = self.builder
        biased = [f"{name}.bias" for name in names if builder.has(f"{name}.bias")]
        if not biased:
            return value

        def read() -> Iterable[NDArray[Any]]:
            for name in names:
                # In a fused matrix where only some linears have a bias, the others add zeros: one Add for all.
                bias = builder.mapped(f"{name}.bias") if f"{name}.bias" in biased else torch.zeros(self._rows(name))
                yield builder.floats(f"{name}.bias", bias)

        return builder.graph.op(
            "Add", value, self._weight(names, "bias", builder.graph.dtype, (sum(map(self._rows, names)),), read)
        )

    def _dense(self, value: str, names: tuple[str, ...]) -> str:
        """Return a product with dense matrices, stored [in, out]."""
        builder = self.builder
        rows, columns = sum(map(self._rows, names)), builder.shape(f"{names[0]}.weight")[1]

        def read() -> Iterable[NDArray[Any]]:
            matrices = [builder.mapped(f"{name}.weight") for name in names]
            # Transposed when written: MatMul wants [in, out], and constant folding of a Transpose holds both copies at load.
            for chunk in _concatenated_transposes(matrices, torch.float32):
                yield builder.floats(names[0], chunk)

        return builder.graph.op("MatMul", value, self._weight(names, "weight", builder.graph.dtype, (columns, rows), read))

    def _matmul_nbits(self, value: str, names: tuple[str, ...]) -> str:
        """Return a product with matrices of 4 or 8 bits, from the checkpoint's own codes and scales.

        MatMulNBits takes codes as bytes [out, blocks, block · bits / 8], lowest bits first, as in the checkpoint; scales [out ·
        blocks]; and zero points packed along the blocks.
        """
        builder, graph = self.builder, self.builder.graph
        scheme = builder.source.quantized[names[0]].scheme
        rows, columns = sum(map(self._rows, names)), builder.quantized_shape(names[0])[1]
        block = block_size(columns if scheme.group_size == -1 else scheme.group_size)
        blocks, byte = columns // block, np.dtype(np.uint8)

        def codes() -> Iterable[NDArray[Any]]:
            for name in names:
                yield _bytes(builder.packed(name).words)

        def scales() -> Iterable[NDArray[Any]]:
            for name in names:
                group_scales = builder.packed(name).scales
                # A group that is no power of two becomes several blocks of one scale: the same numbers, a few bytes more.
                yield builder.floats(name, group_scales.repeat_interleave(blocks // group_scales.shape[1], dim=1))

        def zero_points() -> Iterable[NDArray[Any]]:
            for name in names:
                group_points = builder.packed(name).zero_points
                block_points = group_points.repeat_interleave(blocks // group_points.shape[1], dim=1)
                # Words are 32 bits, MatMulNBits' rows of zero points whole bytes: what the last word has beyond them is cut.
                yield _bytes(pack_words(block_points, scheme.bits))[:, :point_bytes]

        point_bytes = -(-blocks * scheme.bits // 8)
        inputs = [
            value,
            self._weight(names, "codes", byte, (rows, blocks, block * scheme.bits // 8), codes),
            self._weight(names, "scales", graph.dtype, (rows * blocks,), scales),
        ]
        # Without zero points MatMulNBits takes 2^(bits - 1), which is the symmetric grids' unsigned zero.
        if not scheme.symmetric:
            inputs.append(self._weight(names, "zero_points", byte, (rows * point_bytes,), zero_points))
        level = builder.accuracy_level
        return graph.op("MatMulNBits", *inputs, K=columns, N=rows, bits=scheme.bits, block_size=block, accuracy_level=level)

    def _w8a8(self, value: str, names: tuple[str, ...], activations: str) -> str:
        """Return a product of 8-bit integers: the input has a dynamic scale per token, or a static scale.

        Both sides are uint8 with zero point 128: with signed weights ONNX Runtime's sums of two products saturate at 16 bits on
        processors without VNNI ("Quantize ONNX models", on data types).
        """
        builder, graph = self.builder, self.builder.graph
        rows, columns = sum(map(self._rows, names)), builder.quantized_shape(names[0])[1]

        def read_codes() -> Iterable[NDArray[Any]]:
            for chunk in _concatenated_transposes([builder.quantized(name).codes for name in names], torch.uint8):
                yield chunk.numpy()

        def read_scales() -> Iterable[NDArray[Any]]:
            for name in names:
                yield builder.floats(name, builder.quantized(name).scales.view(-1))

        codes = self._weight(names, "codes", np.dtype(np.uint8), (columns, rows), read_codes)
        scales = self._weight(names, "scales", graph.dtype, (rows,), read_scales)
        if activations == "tensor":
            scale = graph.const(builder.input_scale(names[0]), graph.dtype)
            zero = graph.const(_ZERO_POINT, np.uint8)
            # Shared: queries, keys and values read one input, which is rounded once.
            quantized = builder.shared(value, f"fixed {scale}", lambda: graph.op("QuantizeLinear", value, scale, zero))
            dense = builder.shared(quantized, "back", lambda: graph.op("DequantizeLinear", quantized, scale, zero))
            zeros = self._weight(names, "zero_points", np.dtype(np.uint8), (rows,), lambda: [np.full(rows, _ZERO_POINT, np.uint8)])
            # Q/DQ around a MatMul: ONNX Runtime fuses it to one integer product, and accelerators read this form.
            return graph.op("MatMul", dense, graph.op("DequantizeLinear", codes, scales, zeros, axis=1))
        return self._per_token(value, codes, scales)

    def _per_token(self, value: str, codes: str, scales: str) -> str:
        """Return a product with 8-bit codes and a dynamic scale per token; in float32, as the sums overflow float16."""
        builder, graph = self.builder, self.builder.graph
        # uint8 with zero point 128 on both sides: MatMulInteger with signed inputs has no fast CPU kernel in ONNX Runtime.
        zero = graph.const(_ZERO_POINT, np.uint8)
        wide = builder.shared(value, "wide", lambda: self._as(value, np.float32))
        scale = builder.shared(wide, "step", lambda: self._token_scales(wide))
        # QuantizeLinear's own scale is per tensor or per axis, not per token: the input is divided first and rounded with scale 1.
        one = graph.const(1.0, np.float32)
        quantized = builder.shared(wide, "codes", lambda: graph.op("QuantizeLinear", graph.op("Div", wide, scale), one, zero))
        product = graph.cast(graph.op("MatMulInteger", quantized, codes, zero, zero), np.float32)
        return self._as(graph.op("Mul", graph.op("Mul", product, scale), self._as(scales, np.float32)), graph.dtype)

    def _as(self, value: str, dtype: DTypeLike) -> str:
        """Return a value cast between float32 and the graph's type; itself where the two are the same."""
        return value if self.builder.graph.dtype == np.float32 else self.builder.graph.cast(value, dtype)

    def _token_scales(self, value: str) -> str:
        """Return the scale of each token, float32 [..., 1]: the largest magnitude becomes 127."""
        graph = self.builder.graph
        maximum = graph.op("ReduceMax", graph.op("Abs", value), graph.const([-1]), keepdims=1)
        scales = graph.op("Div", maximum, graph.const(_MAX_CODE, np.float32))
        # A token of zeros (padding behind a mask) would divide 0 by 0, and a NaN spreads through attention.
        is_zero = graph.op("Equal", scales, graph.const(0.0, np.float32))
        return graph.op("Where", is_zero, graph.const(1.0, np.float32), scales)

    def _weight(
        self,
        names: tuple[str, ...],
        tensor: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        read: Callable[[], Iterable[NDArray[Any]]],
    ) -> str:
        name = f"{'+'.join((names[0], *(other.rpartition('.')[2] for other in names[1:])))}.{tensor}"
        return self.builder.graph.weight(name, Weight(f"{'+'.join(names)}.{tensor}:{dtype.name}", dtype, shape, read))


def _concatenated_transposes(matrices: Sequence[Tensor], dtype: torch.dtype) -> Iterable[Tensor]:
    """Yield the transposes of matrices [out, in], concatenated to [in, sum of out], some rows at a time."""
    # Contiguous once: a strided read of each chunk from the mapped file would touch every page of the matrix again and again.
    transposed = [matrix.t().contiguous() for matrix in matrices]
    width = sum(matrix.shape[1] for matrix in transposed)
    step = max(1, CHUNK // width)
    for first in range(0, len(transposed[0]), step):
        rows = [matrix[first : first + step] for matrix in transposed]
        chunk = torch.empty(len(rows[0]), width, dtype=dtype)
        for target, columns in zip(torch.split(chunk, [block.shape[1] for block in rows], dim=1), rows, strict=True):
            target.copy_(columns)
        yield chunk


def _bytes(words: Tensor) -> NDArray[np.uint8]:
    return words.contiguous().view(torch.uint8).numpy()
