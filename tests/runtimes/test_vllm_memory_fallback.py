"""What is tried when a server runs out of memory: by the words that vLLM's logs hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from compress.data.prompts import Prompt
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.vllm.memory_fallback import Memory, MemoryFallback, memory_fault, sequences_of, settings_after, step_down
from compress.runtimes.vllm.runtime import Vllm
from compress.workers.environment import install

PRELOADED = ("vllm",)

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"
GPU = Memory(share=0.85, cache_gib=2, context=8192, on_gpu=True)
CPU = Memory(share=0.85, cache_gib=8, context=8192)

STARTUP = (
    "(EngineCore pid=11) ValueError: Free memory on device cuda:0 (10.2/79.1 GiB) on startup is less than desired GPU memory "
    "utilization (0.85, 67.2 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
TOO_SHORT = (
    "ValueError: To serve at least one request with the model's max seq len (8192), (1.75 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (0.9 GiB). Based on the available memory, the estimated maximum model length is 4208. Try "
    "increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or decreasing `max_model_len`"
)
NOTHING_LEFT = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine"
)
ALLOCATION = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.2 GiB is free."
)
SAMPLER = (
    "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try lowering "
    "`max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
)
CPU_CACHE = (
    "(Worker pid=7) ValueError: Available memory on node 0 (11.9/23.46 GiB) on kv cache allocation is less than requested memory "
    "for kv (64.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes."
)
CPU_STARTUP = (
    "ValueError: Available memory on node 0 (3.1/23.46 GiB) on startup is less than desired CPU memory utilization "
    "(0.85, 19.9 GiB)."
)
CPU_ALLOCATION = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "9 bytes."
)
KILLED = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}"
GUARDED = "The server ended with signal 9 (SIGKILL)."

OTHERS = (
    "ValueError: The model's architecture is not supported",
    "INFO: CUDA graph memory pool: 0.3 GiB; GPU KV cache size: 12,345 tokens; Available KV cache memory: 3.1 GiB",
    "The server ended with exit code 1.",
    "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge",
)


@pytest.mark.parametrize(
    "log", [STARTUP, TOO_SHORT, NOTHING_LEFT, ALLOCATION, SAMPLER, CPU_CACHE, CPU_STARTUP, CPU_ALLOCATION, KILLED, GUARDED]
)
def test_words_of_memory_are_known(log: str) -> None:
    assert memory_fault(f"INFO before\n{log}\nINFO after") == log


@pytest.mark.parametrize("log", OTHERS)
def test_other_faults_are_not_taken_for_memory(log: str) -> None:
    assert memory_fault(log) is None
    assert step_down(GPU, log) is None


def test_memory_is_lowered_from_share_to_context_to_sequences_and_ends() -> None:
    memory, taken = GPU, list[MemoryFallback]()
    while (lower := step_down(memory, ALLOCATION)) is not None:
        memory, step = lower
        taken.append(step)
    rungs = [step.rung for step in taken]
    assert rungs == ["memory share"] * 2 + ["context"] * 3 + ["sequences"] * 3
    assert memory == replace(GPU, share=0.54, context=1024, sequences=4)
    assert [step.after for step in taken][:3] == ["0.68 of the GPU", "0.54 of the GPU", "4,096 tokens"]
    assert all(step.cause == ALLOCATION for step in taken)


def test_share_is_left_alone_where_a_lower_one_would_leave_less_for_the_cache() -> None:
    lower = step_down(GPU, NOTHING_LEFT)
    assert lower is not None
    assert lower[1].rung == "context"


def test_context_is_what_vllm_estimates() -> None:
    lower = step_down(GPU, TOO_SHORT)
    assert lower is not None
    assert (lower[0].context, lower[1].before, lower[1].after) == (4208, "8,192 tokens", "4,208 tokens")


def test_sequences_are_fewer_first_where_the_sampler_was_too_much() -> None:
    lower = step_down(GPU, SAMPLER)
    assert lower is not None
    assert (lower[0].sequences, lower[1].before, lower[1].after) == (64, "vLLM's own choice", "64 at once")


def test_cache_is_halved_on_a_cpu() -> None:
    lower = step_down(CPU, CPU_CACHE)
    assert lower is not None
    assert (lower[0].cache_gib, lower[1].setting, lower[1].after) == (4, "kv_cache_gib", "4 GiB of cache")
    least = step_down(replace(CPU, cache_gib=1), CPU_CACHE)
    assert least is not None
    assert least[1].rung == "context"


def test_sequences_are_read_from_the_arguments() -> None:
    assert sequences_of(("--max-num-seqs", "32")) == 32
    assert sequences_of(("--max-num-seqs=8", "--enforce-eager")) == 8
    assert sequences_of(("--max-num-seqs=8", "--max-num-seqs", "4")) == 4
    assert sequences_of(("--enforce-eager",)) is None


def test_steps_carry_over_to_the_next_server() -> None:
    runtime = Vllm(runtime="vllm", arguments=("--limit-mm-per-prompt", '{"image": 2}'))
    memory, steps = replace(GPU, share=0.6, context=1024), list[MemoryFallback]()
    for _ in range(2):
        lower = step_down(memory, SAMPLER)
        assert lower is not None
        memory = lower[0]
        steps.append(lower[1])
    steps.append(MemoryFallback(rung="context", setting="max_model_len", value=2048, before="", after=""))
    lowered = runtime.model_copy(update=settings_after(runtime.model_dump(), steps))
    assert lowered.max_model_len == 2048
    assert sequences_of(lowered.arguments) == 16
    assert lowered.arguments[:2] == runtime.arguments


@pytest.mark.slow
def test_server_that_cannot_hold_its_context_comes_up_with_a_shorter_one(tmp_path: Path) -> None:
    """A cache of 1 GiB holds a million tokens of the demo, not the two million that its copy is said to take."""
    install("vllm", Silent())
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.get("text_config", config)["max_position_embeddings"] = 2_000_000
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    steps: list[MemoryFallback] = []
    runtime = Vllm(runtime="vllm", kv_cache_gib=1, max_model_len=2_000_000)
    context = replace(OpenContext.at(model, tmp_path / "logs", Silent()), on_fallback=steps.append)
    with runtime.open(context) as session:
        (answer,) = session.answer([Prompt("one", "Is there a circle?")], 2, Silent())
    assert answer.fault is None
    assert [(step.rung, step.before) for step in steps] == [("context", "2,000,000 tokens")]
    assert "is larger than the available KV cache memory" in steps[0].cause
