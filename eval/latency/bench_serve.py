"""Load generation by `vllm bench serve`, run in vLLM's environment."""

from __future__ import annotations

import json
import math
import secrets
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from compress.errors import ServerError
from compress.eval.latency.load_generator import Load, RequestTiming
from compress.eval.latency.settings import LoadPoint
from compress.files import disk_errors, write_text
from compress.runtimes.runtime import Environment, RunningServer
from compress.runtimes.vllm.start import plain_environment
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact
from compress.workers.worker import Worker, run_worker

_STARTUP_SECONDS = 600
"""Added to the requests' own time limits: the client's start."""

_MAX_FAULT = 200
"""Characters of a request's error that are kept."""


@dataclass(frozen=True)
class Bench:
    """The settings of `vllm bench serve`."""

    environment: Environment
    """vLLM's environment."""

    artifact: Path
    """The checkpoint folder whose tokenizer makes the prompts."""

    logs: Path
    request_seconds: float
    trust_remote_code: bool = False


def bench_serve(bench: Bench, served: RunningServer, point: LoadPoint, requests: int, seed: int) -> Load:
    """Run a load on a server with vLLM's client: random text and images, answers of a fixed length, one result per request.

    The server's key is passed in the client's environment only. The client's own warm-up is off: it repeats the first
    request, whose image the server would then have in its cache.

    Raises:
        ServerError: the client failed; its last lines are in the message.
    """
    name = f"bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as folder:
        result_options = ("--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", f"{name}.json")
        path = Path(folder) / f"{name}.json"
        # The longest a load can take: every round of concurrent requests at its own time limit.
        limit = _STARTUP_SECONDS + math.ceil(requests / point.concurrency) * bench.request_seconds
        command = [*_command(bench, served, point, requests, seed), *result_options]
        with run_worker("vllm bench serve", command, _variables(served), bench.logs / f"{name}.log") as client:
            _wait(client, served, path, limit)
        load = read_bench(path)
        with disk_errors(bench.logs):  # redacted: it contains the server's messages
            write_text(bench.logs / path.name, redact(path.read_text(encoding="utf-8", errors="replace")))
    return load


def _variables(served: RunningServer) -> dict[str, str]:
    # A proxy would add its own latency, or not reach the loopback interface.
    variables = plain_environment() | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return variables | ({"OPENAI_API_KEY": served.key} if served.key else {})


def _wait(client: Worker, served: RunningServer, result: Path, limit: float) -> None:
    """Wait until the client has written its result and ended.

    Raises:
        ServerError: it failed, or did not end.
    """
    try:
        client.process.wait(limit)
    except subprocess.TimeoutExpired as error:
        raise ServerError(
            f"{served.url}: {client.name} did not end within {limit:g} seconds; look into the server's log"
        ) from error
    if not result.is_file():
        raise ServerError(f"{served.url}: {client.name} ended without a result{client.exit_reason()}")


def read_bench(path: Path) -> Load:
    """Read the result file of `vllm bench serve --save-result --save-detailed`.

    Raises:
        ServerError: it has no result for each request, as files of other versions of vLLM.
    """
    try:
        content = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        rows = zip(content["ttfts"], content["itls"], content["output_lens"], content["errors"], strict=True)
        samples = tuple(_sample(*row) for row in rows)
        began = min((float(start) for start in content["start_times"] if start), default=0.0)
        return Load(samples, float(content["duration"]), "vllm bench serve", began)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ServerError(f"{path}: holds no result of vllm bench serve for each request ({error}); install vLLM anew") from error


def _sample(ttft: float, gaps: list[float], tokens: int, fault: str) -> RequestTiming:
    if fault or not tokens:
        # vLLM's client keeps a traceback as the error; its last line says what happened.
        lines = [line for line in fault.splitlines() if line.strip()]
        return RequestTiming(0.0, (), 0, printable(redact(lines[-1].strip()))[:_MAX_FAULT] if lines else "no answer")
    return RequestTiming(float(ttft), tuple(float(gap) for gap in gaps), int(tokens))


def _command(bench: Bench, served: RunningServer, point: LoadPoint, requests: int, seed: int) -> list[str]:
    command = [str(bench.environment.python), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", served.url, "--endpoint", "/v1/chat/completions"]
    command += ["--model", served.model, "--served-model-name", served.model, "--tokenizer", str(bench.artifact)]
    command += ["--random-input-len", str(point.prompt_tokens), "--random-output-len", str(point.output_tokens)]
    # Ratio 0: every prompt has the same length, so that loads of two models are equal.
    command += ["--random-range-ratio", "0", "--num-prompts", str(requests), "--max-concurrency", str(point.concurrency)]
    # --ignore-eos: answers of equal length, or a model that stops early would look faster.
    command += ["--seed", str(seed), "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--trust-remote-code"] if bench.trust_remote_code else []
    if not point.images:
        return [*command, "--dataset-name", "random"]
    command += ["--dataset-name", "random-mm", "--random-mm-base-items-per-request", str(point.images)]
    command += ["--random-mm-num-mm-items-range-ratio", "0"]
    command += ["--random-mm-limit-mm-per-prompt", json.dumps({"image": point.images})]
    return [*command, "--random-mm-bucket-config", f"{{({point.height}, {point.width}, 1): 1.0}}"]
