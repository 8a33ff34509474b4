"""The onnxruntime-genai runtime: that library's own generation loop, image processor and tokenizer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from compress.runtimes.runtime import LOWER_BOUND, WHOLE_TOKENS, Runtime
from compress.workers.environment import require

ENVIRONMENT = "onnxruntime-genai"
"""The name of its environment."""


class OnnxruntimeGenai(Runtime):
    """Greedy answers and scores by onnxruntime-genai, on the CPU, one prompt at a time.

    It runs in its own environment and process. The original is exported first, in float32, to a temporary folder, so that both are
    measured in one runtime.
    """

    revision: ClassVar[int] = 2
    opener: ClassVar[str] = "compress.runtimes.onnxruntime_genai.session:open_session"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx-genai"})
    kl_definition: ClassVar[str] = (
        "KL(original ‖ artifact) per token in nats, over the original's top tokens (20 unless top_logprobs says otherwise) and one "
        "bucket for all others; top tokens of the original that the artifact does not have among its own are in that bucket for "
        f"both. {LOWER_BOUND}"
    )
    not_in_key: ClassVar[frozenset[str]] = frozenset({"startup_seconds", "request_seconds"})

    runtime: Literal["onnxruntime-genai"]
    top_logprobs: PositiveInt = 20
    """How many of the original's top tokens KL is taken over; all others are merged into one bucket."""

    whole_tokens: NonNegativeInt = WHOLE_TOKENS
    """At how many of a task's tokens KL is over the full vocabulary too."""

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
