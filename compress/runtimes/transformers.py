"""The in-process runtime: transformers, on any checkpoint and any artifact of ours, unpacked to dense weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import ClassVar, Literal

from pydantic import PositiveInt

from compress.runtimes.runtime import Ability, OpenContext, Runtime, Session


class Transformers(Runtime):
    """Greedy answers and exact scores by the model's own code.

    `dtype` auto is float32 on a CPU and the checkpoint's own type on CUDA. `tokens_per_batch` bounds what is computed at once, the
    answers still to come included; a single prompt may be longer.
    """

    revision: ClassVar[int] = 2
    offers: ClassVar[frozenset[Ability]] = frozenset({"text", "scores", "comparison"})
    kl_definition: ClassVar[str] = "KL(original ‖ artifact) per token in nats, over the whole vocabulary, from float32 logits"

    runtime: Literal["transformers"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokens_per_batch: PositiveInt = 4096

    def versions(self) -> dict[str, str]:
        """Return the versions of the model code, of what it computes with, and of what prepares text and images for it."""
        return {name: version(name) for name in ("torch", "transformers", "tokenizers", "torchvision", "pillow")}

    def loaded_with(self, name: str) -> str:
        """Return what loads an artifact, in words for its model card."""
        own = "in process, from weights that compress itself unpacked: nothing of `from_pretrained` was tried"
        return f"{super().loaded_with(name)}, {own}"

    def open(self, context: OpenContext) -> AbstractContextManager[Session]:
        """Load the artifact into this process.

        Raises:
            CheckpointError: it is no artifact that can be read here.
            MissingError: `device: cuda` where there is no such device.
        """
        from compress.runtimes.transformers_session import TransformersSettings, open_session

        return open_session(context, TransformersSettings(self.dtype, self.device, self.tokens_per_batch))
