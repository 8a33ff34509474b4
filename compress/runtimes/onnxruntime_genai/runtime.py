"""The onnxruntime-genai runtime: that library's own generation loop, image processor and tokenizer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from compress.runtimes.top_tokens_runtime import TopTokensRuntime
from compress.workers.environment import require

ENVIRONMENT = "onnxruntime-genai"
"""The name of its environment."""


class OnnxruntimeGenai(TopTokensRuntime):
    """Greedy answers and scores by onnxruntime-genai, on the CPU, one prompt at a time.

    It runs in its own environment and process. The original is exported first, in float32, to a temporary folder, so that both are
    measured in one runtime.
    """

    revision: ClassVar[int] = 2
    opener: ClassVar[str] = "compress.runtimes.onnxruntime_genai.session:open_session"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx-genai"})
    not_in_key: ClassVar[frozenset[str]] = frozenset({"startup_seconds", "request_seconds"})

    runtime: Literal["onnxruntime-genai"]
    startup_seconds: PositiveInt = 600
    """The timeout for loading."""

    request_seconds: PositiveInt = 600
    """The timeout for one prompt."""

    def versions(self) -> dict[str, str]:
        """Return the versions in onnxruntime-genai's environment.

        Raises:
            MissingError: it is not installed here.
        """
        return require(ENVIRONMENT).versions
