"""The onnxruntime runtime: ONNX Runtime in this process, on an artifact of format onnx."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from compress.errors import MissingError
from compress.runtimes.runtime import LOWER_BOUND, WHOLE_TOKENS, Ability, OpenContext, Prompt, RunningServer, Runtime, Session

if TYPE_CHECKING:
    from compress.eval.latency import LoadPoint
    from compress.eval.latency_results import ComponentTable
    from compress.runtimes.onnxruntime_session import OnnxruntimeSettings

Provider = Literal["cpu", "cuda", "tensorrt"]
"""What computes: ONNX Runtime's execution providers, by the names that recipes give them."""

_DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")
_BESIDE = ("onnx", "torch", "transformers", "tokenizers", "torchvision", "pillow")


class Onnxruntime(Runtime):
    """Greedy answers, scores and embeddings by ONNX Runtime.

    The original is exported first, to a folder that is removed once it is loaded, in the type `dtype` (auto: float32 on a CPU,
    float16 elsewhere), so that both are measured in one runtime. `providers` compute in that order of preference, each what the
    ones before it cannot; auto is CUDA where it can be used, and else the CPU. `threads` is for a CPU; left out, all its cores.
    `tokens_per_batch` bounds what is computed at once, the answers still to come included; a single prompt may be longer.
    `top_logprobs` is over how many of the original's likeliest tokens a comparison is taken apart, `whole_tokens` at how many
    tokens of a task it is over the whole vocabulary too.

    Latency is measured of a server of its own on loopback, at `port` or a free one, which makes one answer after the other: what
    is asked meanwhile waits. It may take `startup_seconds` to load, and one request `request_seconds`.
    """

    revision: ClassVar[int] = 2
    offers: ClassVar[frozenset[Ability]] = frozenset({"text", "scores", "comparison"})
    kl_definition: ClassVar[str] = (
        "KL(original ‖ artifact) per token in nats, over the original's top tokens (20 unless top_logprobs says otherwise), the "
        f"token that stands there, and one bucket for all others. {LOWER_BOUND}"
    )
    incidental: ClassVar[frozenset[str]] = frozenset({"threads", "port", "startup_seconds", "request_seconds"})
    pace: ClassVar[frozenset[str]] = frozenset({"threads"})
    serves: ClassVar[bool] = True

    runtime: Literal["onnxruntime"]
    providers: Literal["auto"] | Annotated[tuple[Provider, ...], Field(min_length=1)] = "auto"
    threads: PositiveInt | None = None
    dtype: Literal["auto", "float32", "float16"] = "auto"
    tokens_per_batch: PositiveInt = 4096
    top_logprobs: PositiveInt = 20
    whole_tokens: NonNegativeInt = WHOLE_TOKENS
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    startup_seconds: PositiveInt = 600
    request_seconds: PositiveInt = 600

    def versions(self) -> dict[str, str]:
        """Return the versions of ONNX Runtime, and of what prepares text and images for it.

        Raises:
            MissingError: ONNX Runtime, or onnx, is not installed.
        """
        return {**_installed(), **{name: _version(name) for name in _BESIDE}}

    def open(self, context: OpenContext) -> AbstractContextManager[Session]:
        """Load the artifact into this process; a checkpoint without graphs is exported first.

        Raises:
            CheckpointError: it cannot be read, or not exported; names the file.
            MissingError: ONNX Runtime is not installed, or lacks a provider, or an operator of the graphs.
        """
        self.versions()
        from compress.runtimes.onnxruntime_session import open_session

        return open_session(context, self._engine_settings())

    def serve(self, context: OpenContext) -> AbstractContextManager[RunningServer]:
        """Start a server for the artifact; a checkpoint without graphs is exported first. Its log is `onnxruntime.log`.

        Raises:
            UsageError: the model writes no text.
            CheckpointError: it cannot be exported.
            MissingError: ONNX Runtime is not installed, or lacks a provider.
            ServerError: the server did not come up.
        """
        self.versions()
        from compress.runtimes.onnxruntime_start import serve

        return serve(self, context, self._engine_settings())

    def time_components(self, context: OpenContext, point: LoadPoint, prompt: Prompt, repeats: int) -> ComponentTable:
        """Return how long each graph takes in this process.

        Raises:
            UsageError: the model writes no text.
            CheckpointError: it cannot be read, or not exported.
            DataError: the model takes no such prompt.
        """
        from compress.runtimes.onnxruntime_components import measure_components

        return measure_components(context, self._engine_settings(), point, prompt, repeats)

    def _engine_settings(self) -> OnnxruntimeSettings:
        from compress.runtimes.onnxruntime_session import OnnxruntimeSettings

        providers = None if self.providers == "auto" else self.providers
        return OnnxruntimeSettings(providers, self.threads, self.dtype, self.tokens_per_batch, self.top_logprobs, self.whole_tokens)


def _installed() -> dict[str, str]:
    """Return the version of ONNX Runtime under the name of the distribution that it came with."""
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
