"""One ONNX graph in ONNX Runtime: its files are checked before they are loaded, and what it makes can stay where it was made."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Generator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compress.errors import CheckpointError, MissingError
from compress.onnx_files import check_files
from compress.runtimes.onnxruntime import Provider
from compress.runtimes.strip_activation_quantization import strip_activation_quantization

_ORT: Any = onnxruntime
_RAISED: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_WANTED: dict[Provider, str] = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu in the place of onnxruntime, and the CUDA and cuDNN that it names",
    "tensorrt": "onnxruntime-gpu in the place of onnxruntime, and tensorrt",
}
_OPTIONS: dict[Provider, dict[str, str]] = {"cuda": {"use_tf32": "0"}}  # as exact as what it is compared with
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_SILENT = 4
_LACKING = (
    "opset",
    "IR_VERSION",
    "IR version",
    "NOT_IMPLEMENTED",
    "No Op registered",
    "not a registered function/op",
    "Could not find an implementation",
)
_MEMORY = ("Failed to allocate", "out of memory", "bad allocation", "bad_alloc")
_FAILURES: tuple[type[Exception], ...] = (
    _RAISED.Fail,
    _RAISED.InvalidArgument,
    _RAISED.InvalidGraph,
    _RAISED.InvalidProtobuf,
    _RAISED.NoSuchFile,
    _RAISED.NotImplemented,
    _RAISED.RuntimeException,
    RuntimeError,
)


@dataclass(frozen=True)
class Engine:
    """What graphs are computed with: providers in order of preference; `threads` None for as many as there are cores."""

    providers: tuple[Provider, ...]
    threads: int | None = None

    @property
    def device(self) -> str:
        """Where the first provider has its memory."""
        return "cpu" if self.providers[0] == "cpu" else "cuda"


def choose_engine(wanted: tuple[Provider, ...] | None, threads: int | None) -> Engine:
    """Return what computes here: the providers that are wanted or, where none is named, CUDA if it can be used, else the CPU.

    Raises:
        MissingError: this ONNX Runtime was built without a provider that is wanted, or there is no device for it.
    """
    built: list[str] = _ORT.get_available_providers()
    usable = [name for name, provider in _PROVIDERS.items() if provider in built and (name == "cpu" or _has_device())]
    if wanted is None:
        return Engine(("cuda", "cpu") if "cuda" in usable else ("cpu",), threads)
    for name in wanted:
        if _PROVIDERS[name] not in built:
            raise MissingError(
                f"providers: {name}, which ONNX Runtime {_ORT.__version__} was built without here; install {_WANTED[name]}, or "
                f"name others (here: {', '.join(usable)})"
            )
        if name not in usable:
            raise MissingError(f"providers: {name}, and there is no CUDA device here; name cpu, or run where there is one")
    return Engine(wanted, threads)


class GraphSession:
    """One graph, loaded. `inputs` and `outputs` are its declared values, by name."""

    def __init__(self, path: Path, engine: Engine, *, exact: bool = False) -> None:
        """Check a graph's files and load it; `exact` computes with the same weights, and rounds no input of a matrix.

        Raises:
            CheckpointError: the graph or its data is missing, truncated, or no graph.
            MissingError: this ONNX Runtime lacks an opset, an operator or a provider that it needs.
        """
        check_files(path)
        self.path = path
        self.device = engine.device
        options: Any = _ORT.SessionOptions()
        options.log_severity_level = _SILENT  # what goes wrong is raised
        options.add_session_config_entry("session.x64quantprecision", "1")  # older CPUs add products of 8 bits in 16
        if engine.threads is not None:
            options.intra_op_num_threads = engine.threads
        providers = [(_PROVIDERS[name], _OPTIONS.get(name, {})) for name in engine.providers]
        model: str | bytes = str(path)
        if exact:
            model = strip_activation_quantization(path)
            options.graph_optimization_level = _ORT.GraphOptimizationLevel.ORT_DISABLE_ALL  # some expect integers on both sides
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        with self._telling("cannot load it"):
            self._session: Any = _ORT.InferenceSession(model, options, providers=providers)
        taken: list[str] = self._session.get_providers()
        for name in engine.providers:
            if _PROVIDERS[name] not in taken:
                raise MissingError(f"{path}: providers: {name} could not be started here; install {_WANTED[name]}")
        self.inputs: dict[str, Declared] = {value.name: _declared(path, value) for value in self._session.get_inputs()}
        self.outputs: dict[str, Declared] = {value.name: _declared(path, value) for value in self._session.get_outputs()}
        self.notes: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def expect(self, inputs: Set[str], outputs: Set[str]) -> None:
        """Check that the graph has these inputs and outputs.

        Raises:
            CheckpointError: it lacks one.
        """
        if lacking := sorted((inputs - self.inputs.keys()) | (outputs - self.outputs.keys())):
            raise CheckpointError(f"{self.path}: of another make, it has no {', '.join(lacking)}; export it with format: onnx")

    def hold(self, value: NDArray[Any]) -> Any:
        """Return an array as a value of ONNX Runtime's on the device, without a copy on a CPU."""
        return _ORT.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), self.device, 0)

    def keep(self, given: Mapping[str, Any], made: Mapping[str, Any]) -> BoundOutputs:
        """Bind values on the device, as `hold` gives them, to inputs and outputs for many runs; one may be both at once."""
        binding: Any = self._session.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in made.items():
            binding.bind_ortvalue_output(name, value)
        return BoundOutputs(binding, tuple(made), (*given.values(), *made.values()))

    def run(self, given: Mapping[str, Any], kept: BoundOutputs | None = None, staying: Collection[str] = ()) -> dict[str, Any]:
        """Compute the outputs that are not kept: arrays, or, of those in `staying`, values on the device.

        `given` has arrays, or values on the device, by the names of the inputs that are not kept; arrays take the type that is
        declared.

        Raises:
            CheckpointError: it cannot be computed.
            MissingError: there is too little memory.
        """
        kept = kept or self.keep({}, {})
        binding, bound = kept.binding, list[Any]()  # what is bound has to outlive the run
        for name, value in given.items():
            if isinstance(value, np.ndarray):
                array = np.ascontiguousarray(value, dtype=self.inputs[name].dtype)
                value = _ORT.OrtValue.ortvalue_from_numpy(array)
            bound.append(value)
            binding.bind_ortvalue_input(name, value)
        made = [name for name in self.outputs if name not in kept.outputs]
        for name in made:
            binding.bind_output(name, self.device if name in staying else "cpu")
        with self._telling("cannot run it"):
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        values: Any = binding.get_outputs_as_ortvaluevector()
        found = {name: values[place] for place, name in enumerate(made, len(kept.outputs))}
        return {name: _ORT.OrtValue(value) if name in staying else value.numpy() for name, value in found.items()}

    @contextmanager
    def _telling(self, what: str) -> Generator[None]:
        try:
            yield
        except _FAILURES as error:
            raise _told(self.path, what, " ".join(str(error).split())) from error


@dataclass(frozen=True)
class BoundOutputs:
    """What stays bound between runs of a graph: `outputs` are the names of those that are written in place."""

    binding: Any
    outputs: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Declared:
    """What a graph says of an input or output: its type, and its extents, words where they are free."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...] = field(default=())


def _told(path: Path, what: str, reason: str) -> CheckpointError | MissingError:
    version = f"ONNX Runtime {_ORT.__version__}"
    if any(words in reason for words in _LACKING):
        return MissingError(f"{path}: {version} {what}, it lacks an opset or operator ({reason}); install a newer one")
    if any(words in reason for words in _MEMORY):
        return MissingError(f"{path}: {version} {what} for want of memory ({reason}); lower tokens_per_batch")
    return CheckpointError(f"{path}: {version} {what} ({reason}); export it again")


def _declared(path: Path, value: Any) -> Declared:
    if value.type not in _TYPES:
        raise CheckpointError(f"{path}: {value.name} is a {value.type}, which is not known here; export it with format: onnx")
    return Declared(np.dtype(_TYPES[value.type]), tuple(value.shape))


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()
