"""Environments of workers whose commands run in forks of a process that has imported what they need; see `server.py`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from compress.progress import Silent
from compress.workers.environment import install, runtimes_home
from compress.workers.worker import variables_with

MODULES: dict[str, Sequence[str]] = {
    "vllm": (
        "vllm.entrypoints.cli.main",
        "vllm.entrypoints.cli.serve",
        "vllm.v1.engine.async_llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.entrypoints.generate.structured_decisions.api_router",
        "vllm.model_executor.layers.quantization.auto_gptq",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
        "vllm.model_executor.layers.quantization.fp_quant",
        "model_hosting_container_standards.sagemaker",
        "transformers.tokenization_mistral_common",
    ),
    "llmcompressor": ("llmcompressor", "transformers.models.auto.modeling_auto"),
    "lmms-eval": ("lmms_eval.evaluator", "lmms_eval.models"),
    "lm-eval": ("lm_eval.evaluator", "lm_eval.models"),
    "onnxruntime-genai": ("onnxruntime_genai", "torch", "transformers"),
}
"""The modules that the commands of each environment import, by its name."""

OWN_MODULES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "scipy.stats",
    "pyarrow.dataset",
    "compress.pipeline.runner",
    "compress.cli.commands.run",
)
"""Those that a run imports in this interpreter."""

_VARIABLES = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Those of `compress.runtimes.vllm.start` that libraries read when they are imported."""


@functools.cache
def folder() -> Path:
    """Return the folder, in place of `runtimes_home()`, of all environments: links, and the preloaded ones that `add` makes."""
    made = Path(_temporary().name)
    for environment in runtimes_home().iterdir():
        if environment.is_dir():
            (made / environment.name).symlink_to(environment)
    return made


@functools.cache
def add(name: str) -> None:
    """Preload an environment of `folder()`."""
    real = install(name, Silent()).python
    replaced = folder() / real.parents[1].name
    replaced.unlink(missing_ok=True)
    (replaced / "bin").mkdir(parents=True)
    for entry in real.parents[1].iterdir():
        if entry.name != "bin":
            (replaced / entry.name).symlink_to(entry)
    _serve(real, MODULES[name], replaced / "bin" / "python", variables_with(_VARIABLES))


@functools.cache
def own_python(*modules: str) -> str:
    """Return the command that stands in for this interpreter, with the modules imported, `OWN_MODULES` by default."""
    command = Path(tempfile.mkdtemp(dir=_temporary().name)) / "python"
    _serve(Path(sys.executable), modules or OWN_MODULES, command, os.environ)
    return str(command)


def command_line(*arguments: str) -> list[str]:
    """Return the command that runs this package's command line, as `python -m compress.cli` does."""
    return [own_python(), "-m", "compress.cli", *arguments]


def wait_for_killed_commands() -> None:
    """Wait for the ends of the commands of clients that were killed, which the servers kill."""
    commands = [child for server in _servers for child in psutil.Process(server.pid).children()]
    _, alive = psutil.wait_procs(commands, timeout=60)
    assert not alive


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="preloaded-")  # kept until this process ends


def _serve(python: Path, modules: Sequence[str], command: Path, variables: Mapping[str, str]) -> None:
    """Start a server, which ends with this process, and write the command that stands in for its Python."""
    here = Path(__file__).parent
    socket = command.with_name("socket")
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {here / "client.py"} {socket} {python} "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    start = [str(python), "-P", str(here / "server.py"), str(socket), *modules]
    server = subprocess.Popen(start, stdin=subprocess.PIPE, env=variables)
    _servers.append(server)
    while not socket.exists():
        assert server.poll() is None, f"{python}: {', '.join(modules)} cannot be imported"
        time.sleep(0.05)


_servers: list[subprocess.Popen[bytes]] = []
"""Kept, as the standard input of a process that nobody refers to is closed."""
