"""Start the server of an ONNX artifact on loopback, with this Python."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UsageError
from compress.runtimes.onnxruntime.server import KEY, ServerJob
from compress.runtimes.onnxruntime.session import engine_of, graphs_of
from compress.runtimes.runtime import OpenContext, RunningServer
from compress.runtimes.vllm.start import plain_environment
from compress.untrusted.redaction import remember_secret
from compress.workers.server import await_service, choose_port
from compress.workers.worker import Worker, run_worker

if TYPE_CHECKING:
    from compress.runtimes.onnxruntime.runtime import Onnxruntime

_NAME = "ONNX Runtime"
_MODULE = "compress.runtimes.onnxruntime.server"
_PYTHON_VARIABLES = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
"""Variables that this Python finds its packages by: the server needs them too."""


@contextmanager
def serve(runtime: Onnxruntime, context: OpenContext) -> Generator[RunningServer]:
    """Start a server for an artifact, or for the graphs that a checkpoint is exported to, and wait until it answers.

    Raises:
        UsageError: the model generates no text.
        CheckpointError: a checkpoint cannot be exported.
        MissingError: a provider is not available.
        StoreError: the disk is too full for the exported checkpoint.
        ServerError: the server did not start.
    """
    family = context.family
    if family.head is None:
        raise UsageError(
            f"{context.artifact}: latency is measured of answers, and {family.name} compares images with texts and writes none; "
            "leave out eval.latency"
        )
    # The exported graphs are removed at the end of the inner block, when the server has them in memory; it lives as long as the
    # outer stack.
    with ExitStack() as stack:
        with (
            graphs_of(runtime, context, engine_of(runtime)) as graphs,
            context.progress.task("start onnxruntime", 1, "servers") as advance,
        ):
            server, served = stack.enter_context(_run(runtime, context, graphs))
            await_service(server, served, runtime.startup_seconds)
            advance(1)
        yield served


@contextmanager
def _run(runtime: Onnxruntime, context: OpenContext, graphs: Path) -> Generator[tuple[Worker, RunningServer]]:
    port = choose_port(runtime.port, _NAME)
    # A random name: another server on this port, by mistake, refuses it. A random key: loopback is open to every user of the
    # machine.
    model, key = f"compress-{secrets.token_hex(4)}", secrets.token_hex(16)
    remember_secret(key)
    artifact = str(context.artifact.absolute())
    job = ServerJob(artifact, str(graphs.absolute()), model, port, runtime.model_dump(mode="json"), context.trust_remote_code)
    # -P keeps the working directory off the module path: a file `json.py` there would be imported.
    command = [sys.executable, "-P", "-m", _MODULE, json.dumps(asdict(job))]
    variables = plain_environment() | {name: os.environ[name] for name in _PYTHON_VARIABLES if name in os.environ} | {KEY: key}
    with run_worker(f"{_NAME}, serving {artifact},", command, variables, context.logs / "onnxruntime.log") as server:
        yield server, RunningServer(f"http://127.0.0.1:{port}", model, key, server.process.pid, server.read_log)
