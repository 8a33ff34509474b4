"""A small builder of ONNX graphs: operators are added one by one, and large weights go to external data as a stream.

Specification: https://onnx.ai/onnx/intro (operators of opset 23) and, for the domain com.microsoft,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
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

from compress.files import telling_where

OPSET = 23
"""The version of the standard operators that graphs are written in; the first that normalises by the root mean square."""

IR_VERSION = 10
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
_LINE = 64
_END = np.iinfo(np.int64).max

Float = Literal["float32", "float16"]
Shape = Sequence[int | str]


@dataclass(frozen=True)
class Weight:
    """A large tensor that is read when it is written: two of one `key` are the same bytes and are stored once per folder.

    `read` gives it in pieces, one after the other, so that it is never in memory as a whole.
    """

    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Iterable[NDArray[Any]]]

    @property
    def bytes(self) -> int:
        """Its size in external data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """Where in a folder's external data a tensor lies."""

    location: str
    offset: int
    length: int


@dataclass
class Graph:
    """A graph that grows; values are known by their names. `float_type` is what its floating-point numbers are."""

    name: str
    float_type: Float = "float32"
    nodes: list[NodeProto] = field(default_factory=lambda: list[NodeProto]())
    inputs: list[ValueInfoProto] = field(default_factory=lambda: list[ValueInfoProto]())
    outputs: list[ValueInfoProto] = field(default_factory=lambda: list[ValueInfoProto]())
    weights: dict[str, Weight] = field(default_factory=lambda: dict[str, Weight]())
    notes: dict[str, str] = field(default_factory=lambda: dict[str, str]())
    """What is said of the graph in its file's metadata."""

    _constants: dict[tuple[str, tuple[int, ...], bytes], TensorProto] = field(default_factory=lambda: {}, repr=False)
    _known: list[ValueInfoProto] = field(default_factory=lambda: list[ValueInfoProto](), repr=False)
    _scopes: list[str] = field(default_factory=lambda: list[str](), repr=False)
    _counts: dict[str, int] = field(default_factory=lambda: dict[str, int](), repr=False)
    _aliases: dict[str, str] = field(default_factory=lambda: dict[str, str](), repr=False)
    """What values are called that are given out."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its floating-point numbers."""
        return np.dtype(self.float_type)

    @contextmanager
    def scope(self, name: str) -> Generator[None]:
        """Put `name` before the names of all that is added inside."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """Declare an input and return its name; an extent that is a word is free, and the same for all of that word."""
        self.inputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), list(shape)))
        return name

    def output(self, name: str, value: str, dtype: DTypeLike, shape: Shape, *, first: bool = False) -> None:
        """Give a value out under `name`, after the outputs that are there or before them."""
        value = self._aliases.get(value, value)
        if not self._rename(value, name):
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"/{name}"))
        self.outputs.insert(0 if first else len(self.outputs), helper.make_tensor_value_info(name, _onnx_type(dtype), list(shape)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with one output and return that; an input that is left out is an empty name."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, unused: Collection[int] = (), **attributes: Any) -> tuple[str, ...]:
        """Add an operator and return its outputs; those at the places `unused` are not made, and empty."""
        name = self._named(kind)
        named = (name,) if outputs == 1 else tuple(f"{name}:{place}" for place in range(outputs))
        results = tuple("" if place in unused else each for place, each in enumerate(named))
        self._add(kind, name, inputs, results, attributes)
        return results

    def const(self, value: Any, dtype: DTypeLike | None = None) -> str:
        """Return a small constant: fractions are of the graph's type, whole numbers int64, unless told; equal ones are one."""
        array = np.asarray(value)
        if dtype is None and array.dtype.kind in "fiu":
            dtype = self.dtype if array.dtype.kind == "f" else np.int64
        array = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return self._constants[key].name

    def weight(self, name: str, weight: Weight) -> str:
        """Add a large tensor, kept in external data, and return its name; a second time the same name is the same tensor."""
        if self.weights.setdefault(name, weight).key != weight.key:
            raise ValueError(f"{self.name}: two weights are called {name}")
        return name

    def typed(self, value: str, dtype: DTypeLike, shape: Shape) -> str:
        """Tell shape inference what a value is that an operator of another domain gives; returns the value."""
        if value not in self._aliases:  # what is given out is declared already
            self._known.append(helper.make_tensor_value_info(value, _onnx_type(dtype), list(shape)))
        return value

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        """Return the value in another shape; 0 keeps an extent, -1 takes what is left."""
        return self.op("Reshape", value, self.const(list(shape)))

    def slice(self, value: str, first: int, last: int | None, axis: int) -> str:
        """Return what lies in first:last along an axis; negative places count from the end, as None does for `last`."""
        end = _END if last is None else last
        return self.op("Slice", value, self.const([first]), self.const([end]), self.const([axis]))

    def split(self, value: str, sizes: Sequence[int], axis: int = -1) -> tuple[str, ...]:
        """Return the value's parts of these sizes along an axis."""
        return self.ops("Split", value, self.const(list(sizes)), outputs=len(sizes), axis=axis)

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """Return the value with its axes in another order."""
        return self.op("Transpose", value, perm=list(order))

    def cast(self, value: str, dtype: DTypeLike) -> str:
        """Return the value in another type."""
        return self.op("Cast", value, to=_onnx_type(dtype))

    def extent(self, value: str, axis: int) -> str:
        """Return how long a value is along an axis, int64 [1]."""
        return self.op("Shape", value, start=axis, **({} if axis == -1 else {"end": axis + 1}))

    def arange(self, count: str) -> str:
        """Return 0, 1, … up to `count` (int64 [1] or scalar), int64 [count]."""
        return self.op("Range", self.const(0), self.op("Squeeze", count), self.const(1))

    def save(self, folder: Path, stored: dict[str, Stored]) -> Path:
        """Write `name`.onnx and, unless every weight lies in `folder` already, `name`.onnx_data; returns the former.

        `stored` says where the weights of the folder's other graphs lie, by their keys, and learns of this one's.

        Raises:
            StoreError: the folder cannot be written.
        """
        path, data = folder / f"{self.name}.onnx", f"{self.name}.onnx_data"
        places: dict[str, Stored] = {}
        offset = 0
        new: list[tuple[Stored, Weight]] = []
        for name, weight in self.weights.items():
            if weight.key not in stored:
                offset += -offset % (_PAGE if weight.bytes >= _PAGE else _LINE)
                stored[weight.key] = Stored(data, offset, weight.bytes)
                offset += weight.bytes
                new.append((stored[weight.key], weight))
            places[name] = stored[weight.key]
        with telling_where(folder):
            if new:
                _write_data(folder / data, new)
            onnx.save_model(self._model(places), str(path))
        return path

    def _model(self, places: Mapping[str, Stored]) -> onnx.ModelProto:
        large = [_external(name, self.weights[name], place) for name, place in places.items()]
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, [*self._constants.values(), *large], value_info=self._known
        )
        domains = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            domains.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="vlm-compress")
        helper.set_model_props(model, self.notes)
        return model

    def _rename(self, value: str, name: str) -> bool:
        """Let what makes a value, and all that takes it, call it `name`; False where it is an input or given out already."""
        if value in {each.name for each in (*self.inputs, *self.outputs)} or value in self.weights:
            return False
        for node in self.nodes:
            for names in (node.input, node.output):
                for place, known in enumerate(names):
                    if known == value:
                        names[place] = name
        self._known = [each for each in self._known if each.name != value]
        self._aliases[value] = name
        return True

    def _named(self, kind: str) -> str:
        base = "/".join(("", *self._scopes, kind))
        count = self._counts[base] = self._counts.get(base, -1) + 1
        return f"{base}_{count}" if count else base

    def _add(self, kind: str, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Any]) -> None:
        domain = MICROSOFT if kind in _MICROSOFT_OPERATORS else None
        given = {key: value for key, value in attributes.items() if value is not None}
        taken = [self._aliases.get(value, value) for value in inputs]
        self.nodes.append(helper.make_node(kind, taken, list(outputs), name=name, domain=domain, **given))


def _onnx_type(dtype: DTypeLike) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _external(name: str, weight: Weight, place: Stored) -> TensorProto:
    tensor = TensorProto(name=name, data_type=_onnx_type(weight.dtype), dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place.location), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _write_data(path: Path, weights: Sequence[tuple[Stored, Weight]]) -> None:
    """Write weights to where they belong, piece by piece: while one is on its way to the disk, the next is made."""
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as writing:
        written: Future[int] | None = None
        for place, weight in weights:
            end = place.offset
            for piece in weight.read():
                if piece.dtype != weight.dtype:
                    raise ValueError(f"{weight.key}: read {piece.dtype}, said {weight.dtype}")
                if written is not None:
                    written.result()
                written = writing.submit(_write_at, file, end, np.ascontiguousarray(piece))
                end += piece.nbytes
            if end != place.offset + place.length:
                raise ValueError(f"{weight.key}: read {end - place.offset} bytes, said {place.length}")
        if written is not None:
            written.result()


def _write_at(file: BufferedWriter, offset: int, piece: NDArray[Any]) -> int:
    file.seek(offset)
    return file.write(piece.data)


__all__ = ["MICROSOFT", "OPSET", "Float", "Graph", "Shape", "Stored", "Weight"]
