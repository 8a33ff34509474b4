"""The onnxruntime runtime: ONNX Runtime in this process, for artifacts of format onnx."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from compress.errors import MissingError
from compress.runtimes.runtime import (
    Capability,
    Embeds,
    Generates,
    OpenContext,
    RunningServer,
    Scores,
    ServingRuntime,
)
from compress.runtimes.top_tokens_runtime import LOWER_BOUND, TopTokensRuntime

Provider = Literal["cpu", "cuda", "tensorrt"]
"""ONNX Runtime's execution providers, by their names in recipes."""

# The GPU build first: where both are installed it is the one that was added on purpose.
_DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")
# In the key: another release may resize images or build prompts differently, and the answers are then others.
_INPUT_LIBRARIES = ("onnx", "torch", "transformers", "tokenizers", "torchvision", "pillow")


class Onnxruntime(ServingRuntime, TopTokensRuntime):
    """Greedy answers, scores and embeddings by ONNX Runtime.

    The original is exported first, to a temporary folder, so that both are measured in one runtime. Latency is measured with a
    server on loopback that answers one request at a time; others wait.
    """

    revision: ClassVar[int] = 2
    formats: ClassVar[frozenset[str]] = frozenset({"onnx"})
    opener: ClassVar[str] = "compress.runtimes.onnxruntime.session:open_session"
    server: ClassVar[str] = "compress.runtimes.onnxruntime.start:serve"
    component_timer: ClassVar[str] = "compress.runtimes.onnxruntime.components:measure_components"
    components_note: ClassVar[str] = "by ONNX Runtime; the projector is part of vision"
    offers: ClassVar[frozenset[Capability]] = frozenset({Generates, Scores, Embeds})
    kl_definition: ClassVar[str] = (
        "KL(original ‖ artifact) per token in nats, over the original's top tokens (20 unless top_logprobs says otherwise), the "
        f"token that stands there, and one bucket for all others. {LOWER_BOUND}"
    )
    # `tokens_per_batch` is in the key: padding and batch sizes move the last bits of the logits.
    not_in_key: ClassVar[frozenset[str]] = frozenset({"threads", "port", "startup_seconds", "request_seconds"})
    speed_fields: ClassVar[frozenset[str]] = frozenset({"threads"})

    runtime: Literal["onnxruntime"]
    providers: Literal["auto"] | Annotated[tuple[Provider, ...], Field(min_length=1)] = "auto"
    """Execution providers in order of preference; auto is CUDA where it is available, else the CPU."""

    threads: PositiveInt | None = None
    """CPU threads; by default one per core."""

    dtype: Literal["auto", "float32", "float16"] = "auto"
    """The type that the original is exported in; auto is float32 on a CPU, float16 elsewhere."""

    tokens_per_batch: PositiveInt = 4096
    """The most tokens in a batch, prompts and answers together; a single prompt may be longer."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """The server's port; by default a free one."""

    startup_seconds: PositiveInt = 600
    request_seconds: PositiveInt = 600

    def versions(self) -> dict[str, str]:
        """Return the versions of ONNX Runtime, and of the libraries that prepare its inputs.

        Raises:
            MissingError: ONNX Runtime, or onnx, is not installed.
        """
        return {**_onnxruntime_version(), **{name: _version(name) for name in _INPUT_LIBRARIES}}

    def open(self, context: OpenContext) -> AbstractContextManager[Any]:
        """Load the artifact into this process; a checkpoint without graphs is exported first. See `Runtime.open`."""
        self.versions()  # a missing package is reported before anything is imported
        return super().open(context)

    def serve(self, context: OpenContext) -> AbstractContextManager[RunningServer]:
        """Start a server for the artifact; a checkpoint without graphs is exported first. See `ServingRuntime.serve`."""
        self.versions()
        return super().serve(context)

    def latency_notes(self, *, components: bool) -> list[str]:
        """Return how its server differs from others."""
        del components
        return [
            "The server makes one answer after the other: requests queue. Its memory includes the libraries that prepare prompts, "
            "which draws ratios of memory towards one."
        ]


def _onnxruntime_version() -> dict[str, str]:
    """Return the version of ONNX Runtime, by the name of its installed distribution."""
    for name in _DISTRIBUTIONS:
        try:
            return {name: version(name)}
        except PackageNotFoundError:
            continue
    raise MissingError(
        "runtime: onnxruntime, and ONNX Runtime is not installed here: pip install 'vlm-compress[onnx]', or, for "
        "CUDA, 'vlm-compress[onnx-gpu]'"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise MissingError(
            f"runtime: onnxruntime needs {name}, which is not installed here: pip install 'vlm-compress[onnx]'"
        ) from error
