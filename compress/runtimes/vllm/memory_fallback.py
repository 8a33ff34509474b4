"""Lower settings for a vLLM server that runs out of memory while loading: less memory, a shorter context, fewer sequences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from compress.recipe.schema import Frozen

Rung = Literal["memory share", "context", "sequences"]

_SHARE_FACTOR = 0.8
"""Each step takes a fifth less of the GPU's memory: 0.85, 0.68, 0.54. Smaller steps would cost a start of the server each, a minute
or more."""

_MIN_SHARE = 0.5
"""Below this share of the GPU, the next setting is lowered."""

_MIN_CONTEXT = 1024
"""The shortest context that is tried, in tokens: less hardly holds an image (640 × 480 pixels are 391 tokens in Qwen2.5-VL)
beside a question and an answer."""

_SEQUENCES = (64, 16, 4)
"""The steps of `--max-num-seqs`, a quarter each: activations and the sampler's logits grow with it."""

_DEFAULT_SEQUENCES = 256
"""A stand-in for vLLM's default of `--max-num-seqs`, which is 128 on CPUs and 256 or 1,024 on GPUs: all above the first step."""

_MAX_NUM_SEQS = "--max-num-seqs"
_CAUSE_LENGTH = 500
"""Characters of the log line that a report shows as the cause."""

# vLLM raises ValueError or RuntimeError for all of these: only the wording of its messages tells which setting would help.
_CACHE_TOO_SMALL = re.compile(r"KV cache is needed, which is larger than the available KV cache memory")
_ESTIMATED_CONTEXT = re.compile(r"estimated maximum model length is (\d+)")
_NO_CACHE = re.compile(r"No available memory for the cache blocks")
_SAMPLER_OUT_OF_MEMORY = re.compile(r"out of memory occurred when warming up sampler")
_OUT_OF_MEMORY = (
    re.compile(r"is less than desired (?:GPU|CPU) memory utilization"),
    re.compile(r"allocation is less than requested memory for kv"),
    # Of vLLM's own checks before it allocates, on GPUs and on CPUs; then torch's and the C++ library's errors.
    re.compile(r"less than (?:the )?requested memory", re.IGNORECASE),
    re.compile(r"\bCUDA out of memory\b|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"),
    re.compile(r"can't allocate memory: you tried to allocate|DefaultCPUAllocator: not enough memory"),
    re.compile(r"^(?:\S*: )?MemoryError\b|\bMemoryError:|std::bad_alloc|Cannot allocate memory", re.MULTILINE),
    re.compile(r"Failed core proc\(s\): \{[^}]*: -9\b"),
    # Linux's out-of-memory killer sends SIGKILL, and nothing is logged but the signal.
    re.compile(r"signal 9 \(SIGKILL\)|exit code 137\b|exitcode: -9\b|died with signal SIGKILL"),
)


class MemoryFallback(Frozen):
    """One setting that was lowered because a server ran out of memory while loading."""

    rung: Rung
    setting: Literal["gpu_memory_utilization", "kv_cache_gib", "max_model_len", "--max-num-seqs"]
    """The lowered field of the runtime, or argument of `vllm serve`."""

    value: float
    """The setting's new value."""

    before: str
    """The old value as text, with its unit."""

    after: str
    """The new value as text, with its unit."""

    cause: str = ""
    """The line of the server's log that reports the lack of memory."""


def ignore_fallback(step: MemoryFallback) -> None:
    """Do nothing: the default callback."""
    del step


@dataclass(frozen=True)
class Memory:
    """The settings that a server's memory use depends on."""

    share: float
    """`gpu_memory_utilization`; used on a GPU."""

    cache_gib: int
    """The KV cache's size; used on a CPU."""

    context: int
    """`max_model_len` in tokens."""

    sequences: int | None = None
    """`--max-num-seqs`: how many requests are batched; None for vLLM's default."""

    on_gpu: bool = False


def memory_fault(log: str) -> str | None:
    """Return the line of a server's log that says it ran out of memory; None where none does."""
    matches = (pattern.search(log) for pattern in (_CACHE_TOO_SMALL, _NO_CACHE, _SAMPLER_OUT_OF_MEMORY, *_OUT_OF_MEMORY))
    first = next((match for match in matches if match), None)
    if first is None:
        return None
    start = log.rfind("\n", 0, first.start()) + 1
    end = log.find("\n", first.end())
    return log[start : end if end >= 0 else len(log)].strip()


def step_down(memory: Memory, log: str) -> tuple[Memory, MemoryFallback] | None:
    """Return the next settings to try after a server exited with this log; None if it was not memory or nothing is left to lower.

    Settings are lowered in the order share, context, sequences, without those that cannot help: a lower share leaves even less
    for a KV cache that was too small.
    """
    cause = memory_fault(log)
    if cause is None:
        return None
    # The cache was too small: a lower share would leave it even less, a shorter context needs less of it.
    rungs = [_shorten_context, _lower_sequences]
    if not (_CACHE_TOO_SMALL.search(log) or _NO_CACHE.search(log)):
        # The sampler's memory is the logits of all sequences at once: their number comes first.
        rungs = [_lower_sequences, _lower_share, _shorten_context] if _SAMPLER_OUT_OF_MEMORY.search(log) else [_lower_share, *rungs]
    for rung in rungs:
        result = rung(memory, log)
        if result is not None:
            lowered, step = result
            return lowered, step.model_copy(update={"cause": cause[:_CAUSE_LENGTH]})
    return None


def sequences_of(arguments: tuple[str, ...]) -> int | None:
    """Return the `--max-num-seqs` among a server's arguments, the last of several; None where there is none."""
    sequences: int | None = None
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == _MAX_NUM_SEQS:
            text = value or next(iter(arguments[index + 1 : index + 2]), "")
            # argparse takes the last of several; what is no number is vLLM's to refuse.
            sequences = int(text) if text.isdigit() else sequences
    return sequences


def settings_after(settings: Mapping[str, Any], steps: Sequence[MemoryFallback]) -> dict[str, Any]:
    """Return the runtime's fields that differ from `settings` after these steps, to start the next server with."""
    changed: dict[str, Any] = {}
    for step in steps:
        if step.setting == _MAX_NUM_SEQS:
            # Appended: the last of several counts.
            changed["arguments"] = (*settings["arguments"], _MAX_NUM_SEQS, str(int(step.value)))
        else:
            changed[step.setting] = step.value if step.setting == "gpu_memory_utilization" else int(step.value)
    return changed


def _lower_share(memory: Memory, log: str) -> tuple[Memory, MemoryFallback] | None:
    del log
    if memory.on_gpu:
        lower = round(memory.share * _SHARE_FACTOR, 2)
        if lower < _MIN_SHARE:
            return None
        before, after = f"{memory.share:g} of the GPU", f"{lower:g} of the GPU"
        step = MemoryFallback(rung="memory share", setting="gpu_memory_utilization", value=lower, before=before, after=after)
        return replace(memory, share=lower), step
    cache = memory.cache_gib // 2
    if cache < 1:
        return None
    before, after = f"{memory.cache_gib} GiB of cache", f"{cache} GiB of cache"
    step = MemoryFallback(rung="memory share", setting="kv_cache_gib", value=cache, before=before, after=after)
    return replace(memory, cache_gib=cache), step


def _shorten_context(memory: Memory, log: str) -> tuple[Memory, MemoryFallback] | None:
    estimate = _ESTIMATED_CONTEXT.search(log)
    shorter = memory.context // 2
    # vLLM logs what would fit: one start instead of several halvings.
    if estimate and _MIN_CONTEXT <= int(estimate[1]) < memory.context:
        shorter = int(estimate[1])
    if shorter < _MIN_CONTEXT:
        return None
    before, after = f"{memory.context:,} tokens", f"{shorter:,} tokens"
    step = MemoryFallback(rung="context", setting="max_model_len", value=shorter, before=before, after=after)
    return replace(memory, context=shorter), step


def _lower_sequences(memory: Memory, log: str) -> tuple[Memory, MemoryFallback] | None:
    del log
    current = memory.sequences or _DEFAULT_SEQUENCES
    fewer = next((number for number in _SEQUENCES if number < current), None)
    if fewer is None:
        return None
    before = f"{memory.sequences} at once" if memory.sequences else "vLLM's own choice"
    step = MemoryFallback(rung="sequences", setting=_MAX_NUM_SEQS, value=fewer, before=before, after=f"{fewer} at once")
    return replace(memory, sequences=fewer), step
