"""What is tried when a vLLM server runs out of memory while it loads: a lower share, a shorter context, fewer sequences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from compress.schema import Frozen

Rung = Literal["memory share", "context", "sequences"]

_SHARE_FACTOR = 0.8
_LEAST_SHARE = 0.5
_LEAST_CONTEXT = 1024
_SEQUENCES = (64, 16, 4)
_DEFAULT_SEQUENCES = 256
_MAX_SEQUENCES = "--max-num-seqs"
_CAUSE_LENGTH = 500

_TOO_SHORT = re.compile(r"KV cache is needed, which is larger than the available KV cache memory")
_ESTIMATED = re.compile(r"estimated maximum model length is (\d+)")
_NOTHING_LEFT = re.compile(r"No available memory for the cache blocks")
_SEQUENCES_SIGN = re.compile(r"out of memory occurred when warming up sampler")
_SIGNS = (
    re.compile(r"is less than desired (?:GPU|CPU) memory utilization"),
    re.compile(r"allocation is less than requested memory for kv"),
    re.compile(r"less than (?:the )?requested memory", re.IGNORECASE),
    re.compile(r"\bCUDA out of memory\b|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"),
    re.compile(r"can't allocate memory: you tried to allocate|DefaultCPUAllocator: not enough memory"),
    re.compile(r"^(?:\S*: )?MemoryError\b|\bMemoryError:|std::bad_alloc|Cannot allocate memory", re.MULTILINE),
    re.compile(r"Failed core proc\(s\): \{[^}]*: -9\b"),
    re.compile(r"signal 9 \(SIGKILL\)|exit code 137\b|exitcode: -9\b|died with signal SIGKILL"),
)


class LadderStep(Frozen):
    """One thing that was lowered because a server ran out of memory while it loaded, and what the server had said.

    `setting` is what `value` was set to in its place: a field of the runtime, or an argument of `vllm serve`.
    """

    rung: Rung
    setting: Literal["gpu_memory_utilization", "kv_cache_gib", "max_model_len", "--max-num-seqs"]
    value: float
    before: str
    after: str
    cause: str = ""


def ignore_step(step: LadderStep) -> None:
    """Drop what was told."""
    del step


@dataclass(frozen=True)
class Memory:
    """What a server is started with that its memory depends on.

    `share` is of a GPU's memory, `cache_gib` what the cache takes on a CPU, `context` in tokens; `sequences` are how many requests
    are computed at once, None for vLLM's own choice. `on_gpu` tells which of the first two counts.
    """

    share: float
    cache_gib: int
    context: int
    sequences: int | None = None
    on_gpu: bool = False


def memory_fault(log: str) -> str | None:
    """Return the line of a server's log that says it ran out of memory; None where none does."""
    found = [sign.search(log) for sign in (_TOO_SHORT, _NOTHING_LEFT, _SEQUENCES_SIGN, *_SIGNS)]
    first = next((match for match in found if match), None)
    if first is None:
        return None
    start = log.rfind("\n", 0, first.start()) + 1
    end = log.find("\n", first.end())
    return log[start : end if end >= 0 else len(log)].strip()


def step_down(memory: Memory, log: str) -> tuple[Memory, LadderStep] | None:
    """Return what to try next after a server ended with such a log; None where memory was not the cause or nothing is left.

    The rungs are taken in the order share, context, sequences; a rung that cannot help with what the log says is left out: a
    lower share leaves still less for a cache that was too small.
    """
    cause = memory_fault(log)
    if cause is None:
        return None
    rungs = [_context, _sequences]
    if not (_TOO_SHORT.search(log) or _NOTHING_LEFT.search(log)):
        rungs = [_sequences, _share, _context] if _SEQUENCES_SIGN.search(log) else [_share, *rungs]
    for rung in rungs:
        found = rung(memory, log)
        if found is not None:
            lowered, step = found
            return lowered, step.model_copy(update={"cause": cause[:_CAUSE_LENGTH]})
    return None


def sequences_of(arguments: tuple[str, ...]) -> int | None:
    """Return the `--max-num-seqs` among a server's arguments, of several the last, which counts; None where there is none."""
    found: int | None = None
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == _MAX_SEQUENCES:
            text = value or next(iter(arguments[place + 1 : place + 2]), "")
            found = int(text) if text.isdigit() else found
    return found


def carried(settings: Mapping[str, Any], steps: Sequence[LadderStep]) -> dict[str, Any]:
    """Return what a runtime's fields become when it begins where the ladder ended."""
    changed: dict[str, Any] = {}
    for step in steps:
        if step.setting == _MAX_SEQUENCES:
            changed["arguments"] = (*settings["arguments"], _MAX_SEQUENCES, str(int(step.value)))
        else:
            changed[step.setting] = step.value if step.setting == "gpu_memory_utilization" else int(step.value)
    return changed


def _share(memory: Memory, log: str) -> tuple[Memory, LadderStep] | None:
    del log
    if memory.on_gpu:
        lower = round(memory.share * _SHARE_FACTOR, 2)
        if lower < _LEAST_SHARE:
            return None
        before, after = f"{memory.share:g} of the GPU", f"{lower:g} of the GPU"
        step = LadderStep(rung="memory share", setting="gpu_memory_utilization", value=lower, before=before, after=after)
        return replace(memory, share=lower), step
    cache = memory.cache_gib // 2
    if cache < 1:
        return None
    before, after = f"{memory.cache_gib} GiB of cache", f"{cache} GiB of cache"
    step = LadderStep(rung="memory share", setting="kv_cache_gib", value=cache, before=before, after=after)
    return replace(memory, cache_gib=cache), step


def _context(memory: Memory, log: str) -> tuple[Memory, LadderStep] | None:
    told = _ESTIMATED.search(log)
    shorter = memory.context // 2
    if told and _LEAST_CONTEXT <= int(told[1]) < memory.context:
        shorter = int(told[1])
    if shorter < _LEAST_CONTEXT:
        return None
    before, after = f"{memory.context:,} tokens", f"{shorter:,} tokens"
    step = LadderStep(rung="context", setting="max_model_len", value=shorter, before=before, after=after)
    return replace(memory, context=shorter), step


def _sequences(memory: Memory, log: str) -> tuple[Memory, LadderStep] | None:
    del log
    current = memory.sequences or _DEFAULT_SEQUENCES
    fewer = next((number for number in _SEQUENCES if number < current), None)
    if fewer is None:
        return None
    before = f"{memory.sequences} at once" if memory.sequences else "vLLM's own choice"
    step = LadderStep(rung="sequences", setting=_MAX_SEQUENCES, value=fewer, before=before, after=f"{fewer} at once")
    return replace(memory, sequences=fewer), step
