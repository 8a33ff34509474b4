"""A small ONNX graph writer: operators are added one by one, and large weights are streamed to external data.

Specification: https://onnx.ai/onnx/intro (operators of opset 23) and, for the domain com.microsoft,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.

onnx_ir 1.1 would replace the nodes alone: a tensor that several files share or that is read in pieces needs a class and a writer of
our own there too. Measured on eight layers of Qwen2.5-VL-3B, exports take as much processor time (8.5 s) and memory (1.0 GB);
building the nodes takes a fifth longer, and the files of graphs grow by a tenth: each weight has its type twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from compress.files import disk_errors

OPSET = 23
"""The opset of the standard operators; 23 is the first with RMSNormalization, for which ONNX Runtime 1.23 or later is needed."""

IR_VERSION = 10
"""The version of the ONNX file format."""

MICROSOFT = "com.microsoft"

_MICROSOFT_OPERATORS = frozenset(
    {
        "GroupQueryAttention",
        "MatMulNBits",
        "MultiHeadAttention",
        "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization",
    }
)
_PAGE = 4096
"""The alignment of tensors of at least a page: they can be memory-mapped."""

_CACHE_LINE = 64
"""The alignment of smaller tensors, so that vector loads do not straddle cache lines where the data are mapped."""

# ONNX's Slice cuts an end beyond the axis to its extent: the largest integer means "to the end".
_END = np.iinfo(np.int64).max

Float = Literal["float32", "float16"]
Shape = Sequence[int | str]


@dataclass(frozen=True)
class Weight:
    """A large tensor in external data, which is read only while it is written."""

    key: str
    """Tensors of one key have the same bytes and are stored once per folder."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Iterable[NDArray[Any]]]
    """Yields the tensor in chunks, so that it is never in memory as a whole."""

    @property
    def bytes(self) -> int:
        """Its size in external data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """The location of a tensor in a folder's external data."""

    location: str
    offset: int
    length: int


@dataclass
class Graph:
    """A graph under construction; values are referred to by name."""

    name: str
    float_type: Float = "float32"
    nodes: list[NodeProto] = field(default_factory=lambda: list[NodeProto]())
    inputs: list[ValueInfoProto] = field(default_factory=lambda: list[ValueInfoProto]())
    outputs: list[ValueInfoProto] = field(default_factory=lambda: list[ValueInfoProto]())
    weights: dict[str, Weight] = field(default_factory=lambda: dict[str, Weight]())
    metadata: dict[str, str] = field(default_factory=lambda: dict[str, str]())
    """The metadata of the graph's file."""

    _constants: dict[tuple[str, tuple[int, ...], bytes], TensorProto] = field(default_factory=lambda: {}, repr=False)
    _value_info: list[ValueInfoProto] = field(default_factory=lambda: list[ValueInfoProto](), repr=False)
    _scopes: list[str] = field(default_factory=lambda: list[str](), repr=False)
    _counts: dict[str, int] = field(default_factory=lambda: dict[str, int](), repr=False)
    _aliases: dict[str, str] = field(default_factory=lambda: dict[str, str](), repr=False)
    """The output names of values that were renamed."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The graph's float type."""
        return np.dtype(self.float_type)

    @contextmanager
    def scope(self, name: str) -> Generator[None]:
        """Prefix the names of all nodes that are added in the context."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """Declare an input and return its name; a string in `shape` is a dynamic dimension."""
        self.inputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), list(shape)))
        return name

    def output(self, name: str, value: str, dtype: DTypeLike, shape: Shape, *, first: bool = False) -> None:
        """Declare a value as the output `name`, after the present outputs or, with `first`, before them."""
        # A value that became an output has that output's name from then on: `value` may still be the former one.
        value = self._aliases.get(value, value)
        if not self._rename(value, name):
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"/{name}"))
        self.outputs.insert(0 if first else len(self.outputs), helper.make_tensor_value_info(name, _onnx_type(dtype), list(shape)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with one output and return that; an omitted optional input is an empty name."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, unused: Collection[int] = (), **attributes: Any) -> tuple[str, ...]:
        """Add an operator and return its outputs; those at the indices `unused` are omitted, and empty."""
        name = self._node_name(kind)
        names = (name,) if outputs == 1 else tuple(f"{name}:{index}" for index in range(outputs))
        results = tuple("" if index in unused else output for index, output in enumerate(names))
        self._add(kind, name, inputs, results, attributes)
        return results

    # Shared by value: thousands of shapes and axes recur, and each initializer costs a protobuf record and a lookup at load.
    def const(self, value: Any, dtype: DTypeLike | None = None) -> str:
        """Return a small constant, shared by value: by default floats are of the graph's type, integers int64."""
        array = np.asarray(value)
        if dtype is None and array.dtype.kind in "fiu":
            dtype = self.dtype if array.dtype.kind == "f" else np.int64
        # `ascontiguousarray` makes a scalar one-dimensional: the reshape restores rank 0, which Range and QuantizeLinear need.
        array = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return self._constants[key].name

    def weight(self, name: str, weight: Weight) -> str:
        """Add a tensor in external data and return its name; a name that exists must have the same key."""
        if self.weights.setdefault(name, weight).key != weight.key:
            raise ValueError(f"{self.name}: two weights are called {name}")
        return name

    def typed(self, value: str, dtype: DTypeLike, shape: Shape) -> str:
        """Declare a value's type for shape inference, which does not know com.microsoft; return the value."""
        if value not in self._aliases:  # outputs declare their own type
            self._value_info.append(helper.make_tensor_value_info(value, _onnx_type(dtype), list(shape)))
        return value

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        """Return the value in another shape; 0 keeps an extent, -1 is inferred."""
        return self.op("Reshape", value, self.const(list(shape)))

    def slice(self, value: str, first: int, last: int | None, axis: int) -> str:
        """Return first:last along an axis; negative indices count from the end, None is the end."""
        end = _END if last is None else last
        return self.op("Slice", value, self.const([first]), self.const([end]), self.const([axis]))

    def split(self, value: str, sizes: Sequence[int], axis: int = -1) -> tuple[str, ...]:
        """Return the value split into these sizes along an axis."""
        return self.ops("Split", value, self.const(list(sizes)), outputs=len(sizes), axis=axis)

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """Return the value with its axes in another order."""
        return self.op("Transpose", value, perm=list(order))

    def cast(self, value: str, dtype: DTypeLike) -> str:
        """Return the value in another type."""
        return self.op("Cast", value, to=_onnx_type(dtype))

    def extent(self, value: str, axis: int) -> str:
        """Return the size of an axis, int64 [1]."""
        # For the last axis `end` is left out: -1 + 1 = 0 would be an empty range.
        return self.op("Shape", value, start=axis, **({} if axis == -1 else {"end": axis + 1}))

    def arange(self, count: str) -> str:
        """Return 0, 1, … up to `count` (int64 [1] or scalar), int64 [count]."""
        return self.op("Range", self.const(0), self.op("Squeeze", count), self.const(1))

    def save(self, folder: Path, stored: dict[str, Stored]) -> Path:
        """Write `name`.onnx and, unless every weight is in `folder` already, `name`.onnx_data; return the former.

        `stored` has the locations of the other graphs' weights, by key; this graph's are added.

        Raises:
            StoreError: the folder cannot be written.
        """
        path, data = folder / f"{self.name}.onnx", f"{self.name}.onnx_data"
        locations: dict[str, Stored] = {}
        offset = 0
        new: list[tuple[Stored, Weight]] = []
        for name, weight in self.weights.items():
            if weight.key not in stored:
                # The ONNX format recommends page-aligned offsets for external data, as mmap accepts no others.
                offset += -offset % (_PAGE if weight.bytes >= _PAGE else _CACHE_LINE)
                stored[weight.key] = Stored(data, offset, weight.bytes)
                offset += weight.bytes
                new.append((stored[weight.key], weight))
            locations[name] = stored[weight.key]
        with disk_errors(folder):
            # Data first: a graph file then never points to data that are not there yet.
            if new:
                _write_data(folder / data, new)
            onnx.save_model(self._model(locations), str(path))
        return path

    def _model(self, locations: Mapping[str, Stored]) -> onnx.ModelProto:
        external = [_external(name, self.weights[name], location) for name, location in locations.items()]
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, [*self._constants.values(), *external], value_info=self._value_info
        )
        # A graph of standard operators alone (float embeddings) must not demand Microsoft's domain.
        domains = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            domains.append(helper.make_opsetid(MICROSOFT, 1))
        # `ir_version` is given because onnx writes its own newest by default, which an older ONNX Runtime refuses to load.
        model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="vlm-compress")
        helper.set_model_props(model, self.metadata)
        return model

    def _rename(self, value: str, name: str) -> bool:
        """Rename a value in all nodes; return False, and do nothing, if it is an input or an output."""
        if value in {declared.name for declared in (*self.inputs, *self.outputs)} or value in self.weights:
            return False
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, current in enumerate(names):
                    if current == value:
                        names[index] = name
        self._value_info = [info for info in self._value_info if info.name != value]
        self._aliases[value] = name
        return True

    def _node_name(self, kind: str) -> str:
        base = "/".join(("", *self._scopes, kind))
        count = self._counts[base] = self._counts.get(base, -1) + 1
        return f"{base}_{count}" if count else base

    def _add(self, kind: str, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Any]) -> None:
        # RotaryEmbedding exists in both domains: com.microsoft's derives the head size from the tables, opset 23's needs num_heads.
        domain = MICROSOFT if kind in _MICROSOFT_OPERATORS else None
        # None means the operator's default, such as no sliding window: ONNX has no attribute without a value.
        present = {key: value for key, value in attributes.items() if value is not None}
        current = [self._aliases.get(value, value) for value in inputs]
        self.nodes.append(helper.make_node(kind, current, list(outputs), name=name, domain=domain, **present))


def _onnx_type(dtype: DTypeLike) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _external(name: str, weight: Weight, location: Stored) -> TensorProto:
    tensor = TensorProto(name=name, data_type=_onnx_type(weight.dtype), dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location.location), ("offset", location.offset), ("length", location.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _write_data(path: Path, weights: Sequence[tuple[Stored, Weight]]) -> None:
    """Write weights to their offsets, chunk by chunk: one is written while the next is computed."""
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as executor:
        pending: Future[int] | None = None
        for location, weight in weights:
            end = location.offset
            for chunk in weight.read():
                if chunk.dtype != weight.dtype:
                    raise ValueError(f"{weight.key}: read {chunk.dtype}, said {weight.dtype}")
                # One write is pending at most: two chunks in memory, however slow the disk is.
                if pending is not None:
                    pending.result()
                pending = executor.submit(_write_at, file, end, np.ascontiguousarray(chunk))
                end += chunk.nbytes
            # Offsets were laid out from shapes before anything was read: other bytes would overlap the next tensor silently.
            if end != location.offset + location.length:
                raise ValueError(f"{weight.key}: read {end - location.offset} bytes, said {location.length}")
        if pending is not None:
            pending.result()


def _write_at(file: BufferedWriter, offset: int, chunk: NDArray[Any]) -> int:
    file.seek(offset)
    return file.write(chunk.data)


__all__ = ["MICROSOFT", "OPSET", "Float", "Graph", "Shape", "Stored", "Weight"]
