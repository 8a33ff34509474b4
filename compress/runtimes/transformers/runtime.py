"""The in-process runtime: transformers, with every checkpoint and artifact dequantized to dense weights."""

from __future__ import annotations

from importlib.metadata import version
from typing import ClassVar, Literal

from pydantic import PositiveInt

from compress.runtimes.runtime import Capability, Embeds, Generates, Runtime, Scores


class Transformers(Runtime):
    """Greedy answers and exact scores by the model's own code."""

    revision: ClassVar[int] = 2
    formats: ClassVar[frozenset[str]] = frozenset({"vllm"})
    opener: ClassVar[str] = "compress.runtimes.transformers.session:open_session"
    offers: ClassVar[frozenset[Capability]] = frozenset({Generates, Scores, Embeds})
    kl_definition: ClassVar[str] = "KL(original ‖ artifact) per token in nats, over the whole vocabulary, from float32 logits"

    runtime: Literal["transformers"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type to compute in; auto is float32 on a CPU, the checkpoint's own type on CUDA."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokens_per_batch: PositiveInt = 4096
    """The most tokens in a batch, prompts and answers together; a single prompt may be longer."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the model code, torch, and the libraries that prepare its inputs."""
        return {name: version(name) for name in ("torch", "transformers", "tokenizers", "torchvision", "pillow")}

    def component_device(self) -> str:
        """Return the device of its settings."""
        return self.device

    def loaded_with(self, name: str) -> str:
        """Return how an artifact is loaded, as text for its model card."""
        note = "in process, from weights that compress itself unpacked: nothing of `from_pretrained` was tried"
        return f"{super().loaded_with(name)}, {note}"
