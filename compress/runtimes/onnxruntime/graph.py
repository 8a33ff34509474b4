"""One ONNX graph in ONNX Runtime: its files are checked before loading, and outputs can stay on the device."""

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
from compress.export.onnx.files import check_files
from compress.runtimes.onnxruntime.runtime import Provider
from compress.runtimes.strip_activation_quantization import strip_activation_quantization

_ORT: Any = onnxruntime
# ONNX Runtime's exceptions are in its compiled module alone, and share no base class but Exception.
_RAISED: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_REMEDIES: dict[Provider, str] = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu in the place of onnxruntime, and the CUDA and cuDNN that it names",
    "tensorrt": "onnxruntime-gpu in the place of onnxruntime, and tensorrt",
}
_OPTIONS: dict[Provider, dict[str, str]] = {"cuda": {"use_tf32": "0"}}  # full float32 precision, as in the reference
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_FATAL = 4
"""ONNX Runtime's log level: errors are raised, so that they need no log."""

# Only the message tells a graph that is too new from one that is damaged; the wording differs between releases.
_UNSUPPORTED = (
    "opset",
    "IR_VERSION",
    "IR version",
    "NOT_IMPLEMENTED",
    "No Op registered",
    "not a registered function/op",
    "Could not find an implementation",
)
_OUT_OF_MEMORY = ("Failed to allocate", "out of memory", "bad allocation", "bad_alloc")
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
    """ONNX Runtime's configuration."""

    providers: tuple[Provider, ...]
    """In order of preference."""

    threads: int | None = None
    """None for one per core."""

    @property
    def device(self) -> str:
        """The device of the first provider."""
        return "cpu" if self.providers[0] == "cpu" else "cuda"


def choose_engine(requested: tuple[Provider, ...] | None, threads: int | None) -> Engine:
    """Return the engine with the requested providers or, for None, CUDA if it is available, else the CPU.

    Raises:
        MissingError: this ONNX Runtime was built without a requested provider, or there is no device for it.
    """
    built: list[str] = _ORT.get_available_providers()
    usable = [name for name, provider in _PROVIDERS.items() if provider in built and (name == "cpu" or _has_device())]
    if requested is None:
        return Engine(("cuda", "cpu") if "cuda" in usable else ("cpu",), threads)
    for name in requested:
        if _PROVIDERS[name] not in built:
            raise MissingError(
                f"providers: {name}, which ONNX Runtime {_ORT.__version__} was built without here; install {_REMEDIES[name]}, or "
                f"name others (here: {', '.join(usable)})"
            )
        if name not in usable:
            raise MissingError(f"providers: {name}, and there is no CUDA device here; name cpu, or run where there is one")
    return Engine(requested, threads)


class GraphSession:
    """A loaded graph; `inputs` and `outputs` are its declared values, by name."""

    def __init__(self, path: Path, engine: Engine, *, exact: bool = False) -> None:
        """Check a graph's files and load it; `exact` strips activation quantization and keeps the weights.

        Raises:
            CheckpointError: the graph or its data is missing, truncated, or no graph.
            MissingError: this ONNX Runtime lacks an opset, an operator or a provider that it needs.
        """
        check_files(path)
        self.path = path
        self.device = engine.device
        options: Any = _ORT.SessionOptions()
        options.log_severity_level = _FATAL
        options.add_session_config_entry(
            "session.x64quantprecision", "1"
        )  # on CPUs without VNNI, int8 products would saturate in 16 bits
        if engine.threads is not None:
            options.intra_op_num_threads = engine.threads
        providers = [(_PROVIDERS[name], _OPTIONS.get(name, {})) for name in engine.providers]
        model: str | bytes = str(path)
        if exact:
            model = strip_activation_quantization(path)
            options.graph_optimization_level = (
                _ORT.GraphOptimizationLevel.ORT_DISABLE_ALL
            )  # some optimizations need quantized inputs on both sides
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        with self._mapped_errors("cannot load it"):
            self._session: Any = _ORT.InferenceSession(model, options, providers=providers)
        # Where a provider's libraries do not load ONNX Runtime falls back to the CPU without an error: other kernels, other speed.
        active: list[str] = self._session.get_providers()
        for name in engine.providers:
            if _PROVIDERS[name] not in active:
                raise MissingError(f"{path}: providers: {name} could not be started here; install {_REMEDIES[name]}")
        self.inputs: dict[str, Declared] = {value.name: _declared(path, value) for value in self._session.get_inputs()}
        self.outputs: dict[str, Declared] = {value.name: _declared(path, value) for value in self._session.get_outputs()}
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def check_signature(self, inputs: Set[str], outputs: Set[str]) -> None:
        """Check that the graph has these inputs and outputs, by name.

        Raises:
            CheckpointError: it lacks one.
        """
        if missing := sorted((inputs - self.inputs.keys()) | (outputs - self.outputs.keys())):
            raise CheckpointError(f"{self.path}: of another make, it has no {', '.join(missing)}; export it with format: onnx")

    def to_device(self, value: NDArray[Any]) -> Any:
        """Return an array as an `OrtValue` on the device; on a CPU, without a copy."""
        return _ORT.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), self.device, 0)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> BoundValues:
        """Bind values from `to_device` to inputs and outputs for many runs; a value may be both, as a KV cache is."""
        binding: Any = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return BoundValues(binding, tuple(outputs), (*inputs.values(), *outputs.values()))

    def run(self, feeds: Mapping[str, Any], bound: BoundValues | None = None, on_device: Collection[str] = ()) -> dict[str, Any]:
        """Compute the outputs that are not bound, by name: arrays, or for those in `on_device`, `OrtValue`s.

        `feeds` has arrays or `OrtValue`s for the inputs that are not bound; arrays are cast to the declared type.

        Raises:
            CheckpointError: it cannot be computed.
            MissingError: there is too little memory.
        """
        bound = bound or self.bind({}, {})
        binding, alive = bound.binding, list[Any]()  # bound values must outlive the run
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                array = np.ascontiguousarray(value, dtype=self.inputs[name].dtype)
                # Without a copy: ONNX Runtime reads numpy's memory, which `alive` keeps.
                value = _ORT.OrtValue.ortvalue_from_numpy(array)
            alive.append(value)
            binding.bind_ortvalue_input(name, value)
        # The vector below has the outputs in the order of their binding: those of `bound` first.
        unbound = [name for name in self.outputs if name not in bound.outputs]
        for name in unbound:
            binding.bind_output(name, self.device if name in on_device else "cpu")
        with self._mapped_errors("cannot run it"):
            # On CUDA copies to the device are asynchronous: without this a run may read what has not arrived.
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        values: Any = binding.get_outputs_as_ortvaluevector()
        results = {name: values[index] for index, name in enumerate(unbound, len(bound.outputs))}
        return {name: _ORT.OrtValue(value) if name in on_device else value.numpy() for name, value in results.items()}

    @contextmanager
    def _mapped_errors(self, problem: str) -> Generator[None]:
        try:
            yield
        except _FAILURES as error:
            raise _error_for(self.path, problem, " ".join(str(error).split())) from error


@dataclass(frozen=True)
class BoundValues:
    """Inputs and outputs that stay bound between runs of a graph."""

    binding: Any
    outputs: tuple[str, ...]
    """The names of the outputs that are written in place."""

    values: tuple[Any, ...]
    """The bound values, which must live as long as the binding."""


@dataclass(frozen=True)
class Declared:
    """The declaration of a graph's input or output."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...] = field(default=())
    """Extents; free ones are names."""


def _error_for(path: Path, problem: str, reason: str) -> CheckpointError | MissingError:
    version = f"ONNX Runtime {_ORT.__version__}"
    if any(text in reason for text in _UNSUPPORTED):
        return MissingError(f"{path}: {version} {problem}, it lacks an opset or operator ({reason}); install a newer one")
    if any(text in reason for text in _OUT_OF_MEMORY):
        return MissingError(f"{path}: {version} {problem} for want of memory ({reason}); lower tokens_per_batch")
    return CheckpointError(f"{path}: {version} {problem} ({reason}); export it again")


def _declared(path: Path, value: Any) -> Declared:
    if value.type not in _TYPES:
        raise CheckpointError(f"{path}: {value.name} is a {value.type}, which is not known here; export it with format: onnx")
    return Declared(np.dtype(_TYPES[value.type]), tuple(value.shape))


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()
