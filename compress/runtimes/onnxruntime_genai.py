"""The onnxruntime-genai runtime: that project's own generation loop, image processor and tokenizer, on a folder made for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from compress.runtimes.environment import require
from compress.runtimes.runtime import LOWER_BOUND, WHOLE_TOKENS, OpenContext, Runtime, Session

ENVIRONMENT = "onnxruntime-genai"
"""What its environment is installed as."""

CONFIG = "genai_config.json"
"""The file by which onnxruntime-genai knows a folder as its own."""


class OnnxruntimeGenai(Runtime):
    """Greedy answers and scores by onnxruntime-genai, on the CPU, one prompt after the other.

    It runs in an environment and a process of its own. The original is exported first, in float32, to a folder that is removed
    afterwards, so that both are measured in one runtime. Loading may take `startup_seconds`, one prompt `request_seconds`.
    `top_logprobs` is over how many of the original's likeliest tokens a comparison is taken apart, `whole_tokens` at how many
    tokens of a task it is over the whole vocabulary too.
    """

    revision: ClassVar[int] = 2
    kl_definition: ClassVar[str] = (
        "KL(original ‖ artifact) per token in nats, over the original's top tokens (20 unless top_logprobs says otherwise) and one "
        "bucket for all others; top tokens of the original that the artifact does not have among its own are in that bucket for "
        f"both. {LOWER_BOUND}"
    )
    incidental: ClassVar[frozenset[str]] = frozenset({"startup_seconds", "request_seconds"})

    runtime: Literal["onnxruntime-genai"]
    top_logprobs: PositiveInt = 20
    whole_tokens: NonNegativeInt = WHOLE_TOKENS
    startup_seconds: PositiveInt = 600
    request_seconds: PositiveInt = 600

    def versions(self) -> dict[str, str]:
        """Return the versions in onnxruntime-genai's environment.

        Raises:
            MissingError: it is not installed here.
        """
        return require(ENVIRONMENT).versions

    def open(self, context: OpenContext) -> AbstractContextManager[Session]:
        """Load the artifact in a process of its own, which is ended with the context; its log is `onnxruntime-genai.log`.

        Raises:
            CheckpointError: it is no folder that onnxruntime-genai loads, or a checkpoint that cannot be exported to one.
            MissingError: onnxruntime-genai is not installed here.
            ServerError: the process died while it was loading.
        """
        from compress.runtimes.onnxruntime_genai_session import open_session

        return open_session(context, self)
