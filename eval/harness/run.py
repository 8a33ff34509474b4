"""Running an evaluation harness in its own environment against a session's server, and reading its results."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx

from compress.errors import CompressError, DataError, MissingError, RecipeError, ServerError
from compress.eval.harness import ENVIRONMENTS
from compress.eval.results import AdapterItem, ScoreMetrics, TaskMeasurement, check_pairs, read_items, write_items
from compress.eval.tasks.task import TaskContext
from compress.progress import Progress
from compress.runtimes.exchange import AnswerError, exchange, models_of
from compress.runtimes.openai_client import excerpt
from compress.runtimes.runtime import Served, capable
from compress.untrusted.redaction import redact_value
from compress.workers.worker import LogProgress, WorkerJob, run_job, variables_with

if TYPE_CHECKING:
    from compress.eval.tasks.adapter import Adapter

_WORKER = Path(__file__).with_name("worker.py")
_KEY_VARIABLE = "COMPRESS_ADAPTER_KEY"
"""Passes the server's key to the worker: a command line or job file would show it."""

_ADDED_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",  # the server has the GPU; lmms-eval would take a share of it
    "DO_NOT_TRACK": "1",
    "NO_COLOR": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}
_LOOPBACK = "127.0.0.1,localhost"
"""Added to NO_PROXY: the server is on this machine."""

_OFFLINE_VARIABLES = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}
"""Keep the harness from fetching data; a message names those that are set."""

_BARS = LogProgress(re.compile(rb"(?:Model Responding|Requesting API): +\d+%[^\r\n]*?(\d+)/(\d+) \["), "tasks", "ask", "requests")
"""The progress bars of lmms-eval and of lm-eval: requests done and in all."""

_MODELS_SECONDS = 30.0
"""The time limit of the request for the server's models."""

_MAX_MESSAGE = 1200
"""Characters of the harness's error that a message quotes; its log has all."""


_JOB_FIELDS = {"harness", "benchmark", "metric", "filter", "samples", "fewshot", "chat", "include_path", "concurrency"}
"""The fields of a task that its worker's job holds."""


def measure(task: Adapter, context: TaskContext) -> TaskMeasurement:
    """See `Adapter.measure`."""
    endpoint = capable(context.session, Served).endpoint
    with tempfile.TemporaryDirectory(prefix="compress-adapter-") as folder:
        outcome, items = _run(task, context, endpoint, Path(folder))
    if context.original_measurement is not None:
        original = [item for item in read_items(context.original_measurement, task.name) if isinstance(item, AdapterItem)]
        check_pairs(task.name, original, ((item.id, item.digest) for item in items))
    write_items(context.output_dir, task.name, items)
    # By what came: another harness's metric does not say.
    binary = all(item.score in (0.0, 1.0) for item in items)
    metrics = ScoreMetrics.of(task.task, outcome["metric"], items, binary=binary, details=outcome["details"])
    return TaskMeasurement(name=task.name, metrics=metrics)


def _run(task: Adapter, context: TaskContext, endpoint: Any, folder: Path) -> tuple[dict[str, Any], list[AdapterItem]]:
    """Run the harness to its end; return its outcome (metric and further figures), and its items."""
    name = ENVIRONMENTS[task.harness]
    client = cast("httpx.Client", endpoint.client)
    items = folder.absolute() / "items.jsonl"
    job = task.model_dump(mode="json", include=_JOB_FIELDS) | {
        "url": str(client.base_url).rstrip("/"),
        "model": str(endpoint.model),
        "seconds": task.request_seconds,
        # The original's for every artifact: prompts and their cuts are then the same.
        "tokenizer": str(context.original_checkpoint.absolute()),
        # lm-eval assumes 2,048 tokens for API models otherwise, and cuts longer prompts on the left without an error.
        "max_length": _context_length(client, str(endpoint.model)),
        "journal": str((context.output_dir / "journal" / f"{task.name}.harness.jsonl").absolute()),
        "items": str(items),
    }
    log = context.logs.absolute() / f"{name}-{task.name}.log"
    key = str(client.headers.get("Authorization", "")).removeprefix("Bearer ")
    worker_job = WorkerJob(
        environment=name,
        script=_WORKER,
        content=job,
        variables=_variables(key),
        log=log,
        bars=_BARS,
        name=f"task {task.name}: {name}",
        check=endpoint.check,  # the model's server may end first
    )
    outcome = run_job(worker_job, folder, context.progress)
    if "failed" in outcome:
        raise _failure(task, outcome["failed"], str(outcome["message"])[:_MAX_MESSAGE], f"Its log is {log}")
    answered = _items(items, name)
    _check_answers(task, answered, log, context.progress)
    return outcome, answered


def _items(path: Path, name: str) -> list[AdapterItem]:
    """Return the items that a harness wrote, with secrets redacted: they contain the server's replies."""
    # Not `splitlines`, which also splits at separators that JSON leaves unescaped within strings (U+2028).
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        return [AdapterItem.model_validate(redact_value(json.loads(line))) for line in lines if line]
    except (ValueError, RecursionError) as error:
        reason = excerpt(f"{type(error).__name__}: {error}")
        raise ServerError(f"{name}: wrote down an item that cannot be read ({reason}); install its environment anew") from error


def _context_length(client: httpx.Client, model: str) -> int | None:
    """Return the server's context length in tokens, None where it is unknown: lm-eval truncates longer prompts."""
    try:
        with exchange(client, "GET", "/v1/models", _MODELS_SECONDS) as answer:
            length = {row["id"]: row.get("max_model_len") for row in models_of(answer.json())}.get(model)
    except (httpx.HTTPError, AnswerError, ValueError, RecursionError):
        return None
    return length if isinstance(length, int) and length > 0 else None


def _variables(key: str) -> dict[str, str]:
    proxied = {name: ",".join(filter(None, (os.environ.get(name), _LOOPBACK))) for name in ("NO_PROXY", "no_proxy")}
    return variables_with({**_ADDED_VARIABLES, **proxied, _KEY_VARIABLE: key})


def _failure(task: Adapter, failed: str, message: str, log: str) -> CompressError:
    """Return the error for what ended the worker."""
    where = f"task {task.name}: {ENVIRONMENTS[task.harness]}"
    match failed:
        case "name":
            return RecipeError([f"{where}: {message}; correct benchmark, or name its folder as include_path. {log}"])
        case "metric":
            return RecipeError([f"{where}: {message}. {log}"])
        case "data":
            return MissingError(f"{where}: {message}\n{_data_remedy(os.environ)} {log}")
        case _:
            return ServerError(f"{where} failed with {failed}: {message}\n{_remedy(task, failed)} {log}")


def _data_remedy(variables: Mapping[str, str]) -> str:
    offline = sorted(name for name in _OFFLINE_VARIABLES if variables.get(name, "").upper() in {"1", "TRUE", "YES", "ON"})
    if offline:
        return f"{' and '.join(offline)} is set: the data must be in the hub's cache; unset it to fetch them."
    return (
        "The harness reads its data itself, from the hub: see that it is reached and the data set open to you (HF_TOKEN), and that "
        "the files of include_path name files that are there."
    )


def _remedy(task: Adapter, failed: str) -> str:
    if failed in {"NotImplementedError", "AssertionError"} and task.harness == "lmms":
        return "lmms-eval asks a server for text alone: tasks that compare likelihoods cannot be run so."
    if failed == "NotImplementedError":
        return "Likelihoods are asked for by completions: leave out chat."
    return "What went wrong lies in the harness or the task's own code; try it with samples: 8."


def _check_answers(task: Adapter, items: list[AdapterItem], log: Path, progress: Progress) -> None:
    """Check that there are items and that the server answered some; warn of those it did not."""
    name = ENVIRONMENTS[task.harness]
    if not items:
        raise DataError(f"task {task.name}: {name} found no item to ask; its log is {log}")
    failed = [item for item in items if item.fault is not None]
    if len(failed) == len(items):
        raise ServerError(
            f"task {task.name}: {name} had no answer to any of its {len(items):,} items ({failed[0].fault}); see that the server "
            f"serves this model and takes such requests. Its log is {log}"
        )
    if failed:
        progress.warn(
            f"task {task.name}: {len(failed):,} of {len(items):,} items have no answer and count 0, such as {failed[0].id}: "
            f"{failed[0].fault}"
        )
