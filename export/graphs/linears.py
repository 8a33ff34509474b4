"""Linears in a graph, by how the checkpoint holds them: as they are, in codes of few bits, or with rounded inputs too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.export.graphs.graph import Weight
from compress.export.onnx_limits import block_size
from compress.numerics.packing import pack_words
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from compress.export.graphs.parts import Parts
    from compress.numerics.grids import QuantizedWeight

_LARGEST = 127.0
_SIGN = 128


@dataclass(frozen=True)
class Held:
    """A quantized linear: its name on disk and its scheme."""

    name: str
    scheme: Scheme


@dataclass(frozen=True)
class LinearWriter:
    """Adds linears to the graph of `parts`."""

    parts: Parts

    def linears(self, value: str, names: Sequence[str]) -> list[str]:
        """Return what each linear makes of a value; as one matrix where all are held alike."""
        if len(names) > 1 and len({self._kind(name) for name in names}) == 1:
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

        def read() -> NDArray[Any]:
            rows = [
                parts.source.reader.tensor(f"{name}.bias").float() if f"{name}.bias" in biased else torch.zeros(self._rows(name))
                for name in names
            ]
            return parts.floats(biased[0], torch.cat(rows))

        return parts.graph.op("Add", value, self._weight(names, "bias", parts.graph.dtype, (sum(map(self._rows, names)),), read))

    def _plain(self, value: str, names: tuple[str, ...]) -> str:
        """Return a product with matrices as they are, stored [in, out]."""
        parts = self.parts
        rows, columns = sum(map(self._rows, names)), parts.shape(f"{names[0]}.weight")[1]

        def read() -> NDArray[Any]:
            whole = np.empty((columns, rows), parts.graph.dtype)
            first = 0
            for name in names:
                found = parts.floats(name, parts.source.reader.tensor(f"{name}.weight"))
                whole[:, first : first + len(found)] = found.T
                first += len(found)
            return whole

        return parts.graph.op("MatMul", value, self._weight(names, "weight", parts.graph.dtype, (columns, rows), read))

    def _blocks(self, value: str, names: tuple[str, ...]) -> str:
        """Return a product with matrices of 4 or 8 bits, from the checkpoint's own codes and scales.

        MatMulNBits holds codes as bytes [out, blocks, block · bits / 8], lowest bits first, scales [out · blocks], zero points
        packed along the blocks.
        """
        parts, graph = self.parts, self.parts.graph
        scheme = parts.source.held[names[0]].scheme
        rows, columns = sum(map(self._rows, names)), parts.quantized_shape(names[0])[1]
        block = block_size(columns if scheme.group_size == -1 else scheme.group_size)
        blocks = columns // block
        codes = self._weight(
            names,
            "codes",
            np.dtype(np.uint8),
            (rows, blocks, block * scheme.bits // 8),
            self._each(names, lambda weight: pack_words(weight.codes, scheme.bits).view(torch.uint8).numpy()),
        )

        def scales(weight: QuantizedWeight) -> NDArray[Any]:
            spread = weight.scales.repeat_interleave(blocks // weight.scales.shape[1], dim=1)
            return parts.floats(names[0], spread.reshape(-1))

        inputs = [value, codes, self._weight(names, "scales", graph.dtype, (rows * blocks,), self._each(names, scales))]
        if not scheme.symmetric:
            packed = -(-blocks * scheme.bits // 8)
            points = self._each(names, lambda weight: _zero_points(weight, blocks))
            inputs.append(self._weight(names, "zero_points", np.dtype(np.uint8), (rows * packed,), points))
        return graph.op(
            "MatMulNBits",
            *inputs,
            K=columns,
            N=rows,
            bits=scheme.bits,
            block_size=block,
            accuracy_level=parts.accuracy_level,
        )

    def _integers(self, value: str, names: tuple[str, ...], activations: str) -> str:
        """Return a product of 8-bit integers: the input is rounded by a scale per token as it comes, or by one fixed scale."""
        parts, graph = self.parts, self.parts.graph
        rows, columns = sum(map(self._rows, names)), parts.quantized_shape(names[0])[1]
        codes = self._weight(
            names,
            "codes",
            np.dtype(np.int8),
            (columns, rows),
            self._each(names, lambda weight: (weight.codes ^ _SIGN).view(torch.int8).numpy(), axis=1),
        )
        scales = self._weight(
            names, "scales", graph.dtype, (rows,), self._each(names, lambda weight: parts.floats(names[0], weight.scales.view(-1)))
        )
        if activations == "tensor":
            scale = graph.const(parts.input_scale(names[0]), graph.dtype)
            zero = graph.const(0, np.int8)
            rounded = parts.once(value, f"fixed {scale}", lambda: graph.op("QuantizeLinear", value, scale, zero))
            dense = parts.once(rounded, "back", lambda: graph.op("DequantizeLinear", rounded, scale, zero))
            return graph.op("MatMul", dense, graph.op("DequantizeLinear", codes, scales, axis=1))
        step = parts.once(value, "step", lambda: self._step(value))
        zero = graph.const(_SIGN, np.uint8)  # bytes without a sign: only for these there are fast kernels
        divided = parts.once(
            value, "codes", lambda: graph.op("QuantizeLinear", graph.op("Div", value, step), graph.const(1.0), zero)
        )
        product = graph.cast(graph.op("MatMulInteger", divided, codes, zero), graph.dtype)
        return graph.op("Mul", graph.op("Mul", product, step), scales)

    def _step(self, value: str) -> str:
        """Return the scale of each token [..., 1]: its largest value becomes 127."""
        graph = self.parts.graph
        largest = graph.op("ReduceMax", graph.op("Abs", value), graph.const([-1]), keepdims=1)
        steps = graph.op("Div", largest, graph.const(_LARGEST))
        return graph.op("Where", graph.op("Equal", steps, graph.const(0.0)), graph.const(1.0), steps)

    def _each(
        self, names: tuple[str, ...], make: Callable[[QuantizedWeight], NDArray[Any]], axis: int = 0
    ) -> Callable[[], NDArray[Any]]:
        """Return what reads quantized matrices one after the other and puts together what is made of each; along the columns
        of a transposed matrix for `axis` 1."""

        def read() -> NDArray[Any]:
            found = [make(self.parts.quantized(name)) for name in names]
            return np.concatenate(found) if axis == 0 else np.ascontiguousarray(np.concatenate(found).T)

        return read

    def _weight(
        self, names: tuple[str, ...], part: str, dtype: np.dtype[Any], shape: tuple[int, ...], read: Callable[[], NDArray[Any]]
    ) -> str:
        name = f"{'+'.join((names[0], *(other.rpartition('.')[2] for other in names[1:])))}.{part}"
        return self.parts.graph.weight(
            name, Weight(f"{'+'.join(names)}.{part}:{dtype.name}", dtype, shape, lambda: read().reshape(shape))
        )


def _zero_points(weight: QuantizedWeight, blocks: int) -> NDArray[Any]:
    points = weight.zero_points
    assert points is not None, "only integers are laid out this way"
    spread = points.repeat_interleave(blocks // points.shape[1], dim=1)
    bits = weight.scheme.bits
    packed = -(-blocks * bits // 8)
    return _bytes(pack_words(spread, bits))[:, :packed].copy()


def _bytes(words: Tensor) -> NDArray[np.uint8]:
    return words.contiguous().view(torch.uint8).numpy()
