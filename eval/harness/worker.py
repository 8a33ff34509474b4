"""Runs a harness's task against a server: a script of `compress/workers/job.py` for the harness's own environment.

The job is made in `run.py`; each item's score goes to its file `items`. Nothing of this package is imported.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

FAILED = "[COMPRESS_REQUEST_FAILED] "
"""The prefix of the text that lm-eval gets as the answer where a request failed."""

_LMMS_FAILED = "[LMMS_EVAL_REQUEST_FAILED"
"""The prefix of the text that lmms-eval takes as the answer where a request failed."""

_KEY_VARIABLE = "COMPRESS_ADAPTER_KEY"
_ATTEMPTS = 4
"""Attempts of a request before its item fails."""

_BACKOFF_SECONDS = 0.5
"""The pause before the second attempt; doubled before each further one."""

_BOOTSTRAPS = 1000
"""Bootstrap iterations of the harness's own standard errors, which are only shown; its default is 100,000."""

_SUGGESTIONS = 6
"""How many similar task names a message lists."""

_MAX_MESSAGE = 500
"""Characters of an error that are passed on."""


class UnknownNameError(Exception):
    """The harness has no such task, metric or filter; `kind` is `name` or `metric`."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class AnswerLog:
    """Answers on disk, a line each, so that an interrupted task only requests the rest.

    Equal requests have as many answers: each of these is returned once.
    """

    def __init__(self, path: Path) -> None:
        self.lock = threading.Lock()
        self.answers: dict[str, deque[Any]] = {}
        content = path.read_bytes() if path.is_file() else b""
        lines = content[: content.rfind(b"\n") + 1]  # what follows the last line's end was being written when it ended
        for line in lines.splitlines():
            key, value = json.loads(line)
            self.answers.setdefault(key, deque()).append(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines)
        self.file = path.open("a", encoding="utf-8")

    def find(self, key: str) -> Any:
        """Return a logged answer to this request, None where there is none left."""
        with self.lock:
            answers = self.answers.get(key)
            return answers.popleft() if answers else None

    def add(self, key: str, value: Any) -> None:
        """Log an answer."""
        with self.lock:
            self.file.write(json.dumps([key, value]) + "\n")
            self.file.flush()


@dataclass(frozen=True)
class HarnessResults:
    """A harness's results."""

    tasks: dict[str, Any]
    """The harness's task objects, by name."""

    samples: dict[str, list[dict[str, Any]]]
    """The logged samples, by task."""

    results: dict[str, dict[str, Any]]
    """The aggregate figures, by task and metric."""


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job, write its items, and return the metric and the aggregate figures."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results = run_lmms(job) if job["harness"] == "lmms" else run_lm(job)
    used_metrics: set[str] = set()
    rows: list[dict[str, Any]] = []
    for name, task in results.tasks.items():
        metrics = _metrics(task, job)
        for sample in _filtered_samples(results.samples.get(name, []), job):
            row, metric = item(name, task, sample, metrics)
            rows.append(row)
            used_metrics.add(metric)
    Path(job["items"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"metric": ", ".join(sorted(used_metrics)), "details": details(results)}


def run_lm(job: dict[str, Any]) -> HarnessResults:
    """Run a task of lm-evaluation-harness."""
    tasks: Any = import_module("lm_eval.tasks")
    evaluator: Any = import_module("lm_eval.evaluator")
    manager, loaded = _find_tasks(
        job,
        lambda defaults: tasks.TaskManager(include_path=job["include_path"], include_defaults=defaults),
        lambda manager: manager.load([job["benchmark"]]),
    )
    group = loaded["groups"].get(job["benchmark"])
    outcome = evaluator.simple_evaluate(
        model=lm_model(job),
        tasks=[group] if group is not None else list(loaded["tasks"].values()),
        task_manager=manager,
        num_fewshot=job["fewshot"],
        limit=job["samples"],
        bootstrap_iters=_BOOTSTRAPS,
        apply_chat_template=job["chat"],
        log_samples=True,
    )
    return HarnessResults(loaded["tasks"], dict(outcome["samples"]), dict(outcome["results"]))


def lm_model(job: dict[str, Any]) -> Any:
    """Return lm-eval's client of an OpenAI-compatible server, where a request that keeps failing fails its item only."""
    clients: Any = import_module("lm_eval.models.openai_completions")
    errors: Any = import_module("aiohttp").ClientError
    base: Any = clients.LocalChatCompletion if job["chat"] else clients.LocalCompletionsAPI
    semaphores: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
    journal = AnswerLog(Path(job["journal"]))

    async def ask(self: Any, session: Any, sem: Any, messages: Any, *, generate: bool = True, **options: Any) -> Any:
        del sem  # the client's own is at least 2: with 1 it sends requests by another path, where one failure ends the run
        semaphore = semaphores.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(job["concurrency"]))
        key, fault = _sha(repr((messages, generate, options.get("gen_kwargs"), options.get("ctxlens"))).encode()), ""
        if (logged := journal.find(key)) is not None:
            return logged if generate else [(likelihood, greedy) for likelihood, greedy in logged]
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_BACKOFF_SECONDS * 2 ** (attempt - 1))
            try:
                answers = await base.amodel_call(self, session, semaphore, messages, generate=generate, **options)
                journal.add(key, answers)
                return answers
            except (errors, TimeoutError, LookupError, TypeError, ValueError) as error:
                fault = f"{type(error).__name__}: {error}"
        # As answers, which the harness scores like others: one failed request costs one item, not the run.
        return [FAILED + fault if generate else (-math.inf, False)] * len(messages)

    client: Any = type("Client", (base,), {"api_key": os.environ.get(_KEY_VARIABLE, ""), "amodel_call": ask})
    path = "chat/completions" if job["chat"] else "completions"
    return client(
        model=job["model"],
        base_url=f"{job['url']}/v1/{path}",
        num_concurrent=max(2, job["concurrency"]),
        # Retries are this script's: lm-eval's end the whole run when they are used up.
        max_retries=1,
        timeout=job["seconds"],
        **({} if job["chat"] else {"tokenizer": job["tokenizer"], "tokenizer_backend": "huggingface"}),
        **({"max_length": job["max_length"]} if job["max_length"] else {}),
    )


def run_lmms(job: dict[str, Any]) -> HarnessResults:
    """Run a task of lmms-eval."""
    tasks: Any = import_module("lmms_eval.tasks")
    evaluator: Any = import_module("lmms_eval.evaluator")
    client: Any = import_module("lmms_eval.models.chat.openai").OpenAICompatible
    manager, loaded = _find_tasks(
        job,
        lambda defaults: tasks.TaskManager(
            "INFO", include_path=job["include_path"], include_defaults=defaults, model_name="openai"
        ),
        lambda manager: tasks.get_task_dict([job["benchmark"]], manager, "chat"),
    )
    leaves = dict(_leaves(loaded))
    model = client(
        model=job["model"],
        base_url=f"{job['url']}/v1",
        api_key=os.environ.get(_KEY_VARIABLE) or "none",
        num_concurrent=job["concurrency"],
        adaptive_max_concurrency=job["concurrency"],
        max_retries=_ATTEMPTS,
        retry_backoff_s=_BACKOFF_SECONDS,
        # A proxy of the environment may not reach the loopback interface.
        httpx_trust_env=urlsplit(job["url"]).hostname != "127.0.0.1",
    )
    # The client's own retries are off: lmms-eval retries as well, and both would multiply.
    model.client = journaled(model.client.with_options(timeout=job["seconds"], max_retries=0), AnswerLog(Path(job["journal"])))
    outcome = evaluator.simple_evaluate(
        model=model,
        tasks=list(leaves.values()),
        task_manager=manager,
        num_fewshot=job["fewshot"],
        limit=job["samples"],
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=True,
    )
    for name, task in leaves.items():
        # Digests are of the files' bytes: decoded pixels depend on Pillow's version and take memory for every item.
        docs = undecoded(task.eval_docs)
        for sample in outcome["samples"][name]:
            sample["doc"] = docs[sample["doc_id"]]
    return HarnessResults(leaves, dict(outcome["samples"]), dict(outcome["results"]))


def journaled(client: Any, journal: AnswerLog) -> Any:
    """Return the part of an OpenAI client that lmms-eval uses, which takes answers from the journal where there are some."""
    completion: Any = import_module("openai.types.chat").ChatCompletion

    def create(**payload: Any) -> Any:
        key = _sha(json.dumps({**payload, "model": ""}, sort_keys=True).encode())  # a server started anew has another name for it
        if (logged := journal.find(key)) is not None:
            return completion.model_validate(logged)
        answer: Any = client.chat.completions.create(**payload)
        journal.add(key, answer.model_dump(mode="json"))
        return answer

    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def undecoded(docs: Any) -> Any:
    """Return the data set with images as stored bytes instead of decoded ones."""
    features: Any = getattr(docs, "features", None) or {}
    image: Any = import_module("datasets").Image
    for name, feature in features.items():
        if isinstance(feature, image):
            docs = docs.cast_column(name, image(decode=False))
    return docs


def _leaves(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tasks within nested groups of tasks, by name."""
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _leaves(cast("dict[Any, Any]", task))
        else:
            one: Any = cast("Any", task)[1] if isinstance(task, tuple) else task
            if one is not None:
                yield str(name), one


def _check_name(job: dict[str, Any], manager: Any) -> None:
    names = cast("list[str]", manager.all_tasks)
    if job["benchmark"] in names:
        return
    similar = difflib.get_close_matches(str(job["benchmark"]), names, n=_SUGGESTIONS)
    hint = f"; near it are {', '.join(similar)}" if similar else ""
    raise UnknownNameError("name", f"no task is called {job['benchmark']}{hint}")


def _find_tasks(job: dict[str, Any], index: Callable[[bool], Any], load: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Return the harness's index of tasks, and the job's task or group with its data.

    `index` takes whether the harness's own tasks are in it: thousands of files, which lm-eval reads for a quarter of a minute. They
    are left out where the user's are enough.
    """
    if job["include_path"]:
        own = index(False)
        if job["benchmark"] in own.all_tasks:
            # A group of the user's may name tasks of the harness, which this index does not find.
            with suppress(LookupError, TypeError, ValueError):
                return own, _load_tasks(job, lambda: load(own))
            job["loading"] = False
    manager = index(True)
    _check_name(job, manager)
    return manager, _load_tasks(job, lambda: load(manager))


def _load_tasks(job: dict[str, Any], load: Any) -> Any:
    """Load tasks with their data; any error on the way, of the data set's own code too, is reported as an error of the data."""
    job["loading"] = True
    loaded = load()
    job["loading"] = False
    return loaded


def _metrics(task: Any, job: dict[str, Any]) -> list[str]:
    """Return the metrics that can score an item, in the order of preference.

    Raises:
        UnknownNameError: the job's metric is none of the task's, or lower values of it are better.
    """
    names = [str(name) for name in task.aggregation()]
    if job["metric"] is not None and job["metric"] not in names:
        raise UnknownNameError("metric", f"the task's metrics are {', '.join(names)}, and not {job['metric']}")
    candidates = [job["metric"]] if job["metric"] is not None else names
    higher_is_better = cast("dict[str, bool | None]", task.higher_is_better())
    if higher_is_better.get(candidates[0]) is False:
        alternatives = [name for name in names if higher_is_better.get(name) is not False]
        hint = f"; name one of {', '.join(alternatives)}" if alternatives else ""
        raise UnknownNameError(
            "metric", f"the metric {candidates[0]} is the better the lower it is, which no limit here is for{hint}"
        )
    return [name for name in candidates if higher_is_better.get(name) is not False]


def _filtered_samples(samples: Iterable[dict[str, Any]], job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one sample of each item: that of the job's filter, or the first."""
    chosen: dict[Any, dict[str, Any]] = {}
    filters: dict[str, None] = {}
    for sample in samples:
        filters[str(sample.get("filter"))] = None
        if job["filter"] in (None, sample.get("filter")):
            # lm-eval logs a sample per filter and item: the first filter is the task's main one.
            chosen.setdefault(sample["doc_id"], sample)
    if filters and not chosen:
        raise UnknownNameError("metric", f"the task's filters are {', '.join(filters)}, and not {job['filter']}")
    return list(chosen.values())


def item(name: str, task: Any, sample: dict[str, Any], metrics: list[str]) -> tuple[dict[str, Any], str]:
    """Return an item's row, and the metric of its score."""
    images: list[str] = []
    content = canonical(sample["doc"], images)
    digest = _sha(json.dumps([name, content, _prompt(sample)], sort_keys=True, default=str).encode())
    metric = next((each for each in metrics if each in sample), None)
    if metric is None:
        raise UnknownNameError("metric", f"item {sample['doc_id']} of {name} has none of the metrics {', '.join(metrics)}")
    fault = _fault(sample)
    score = 0.0 if fault else _score(sample[metric], task, metric)
    row = {
        "id": f"{name}-{sample['doc_id']}",
        "digest": digest,
        # Items about the same images are one cluster, as in this package's own tasks.
        "cluster": _sha("\n".join(images).encode()) if images else digest,
        "accepted": _accepted(sample),
        "said": "" if fault else _answer_text(sample),
        "score": score,
        "fault": fault,
    }
    return row, metric


def canonical(value: Any, images: list[str]) -> Any:
    """Return a document as plain JSON values, its images as digests, which are added to `images`."""
    if isinstance(value, dict):
        mapping = cast("dict[Any, Any]", value)
        # datasets' undecoded form; the path is of the machine that it was cached on, and must not be in a digest.
        if set(mapping) == {"bytes", "path"} and isinstance(mapping["bytes"], bytes):
            return canonical(mapping["bytes"], images)
        return {str(key): canonical(each, images) for key, each in mapping.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(each, images) for each in cast("list[Any]", value)]
    if isinstance(value, bytes):
        images.append(_sha(value))
        return images[-1]
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        images.append(_sha(f"{value.mode} {value.size}".encode() + value.tobytes()))
        return images[-1]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return canonical(value.tolist(), images) if hasattr(value, "tolist") else type(value).__name__


def _prompt(sample: dict[str, Any]) -> Any:
    """Return the texts of each request."""
    return [[str(part) for part in _parts(request) if isinstance(part, str)] for request in sample["arguments"]]


def _parts(request: Any) -> list[Any]:
    return list(cast("Iterable[Any]", request)) if isinstance(request, (list, tuple)) else [request]


def _fault(sample: dict[str, Any]) -> str | None:
    """Return why there is no answer to an item, None where there is one."""
    for response in _flat(sample["resps"]):
        if isinstance(response, str) and response.startswith((FAILED, _LMMS_FAILED)):
            return response.partition("] ")[2][:_MAX_MESSAGE] or "the request failed"
        if isinstance(response, float) and math.isinf(response):
            return "the server gave no likelihood of it"
    return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in cast("list[Any]", value):
            yield from _flat(each)
    else:
        yield value


def _score(value: Any, task: Any, metric: str) -> float:
    """Return an item's value of a metric: its number, or the task's aggregate over this item alone.

    Raises:
        UnknownNameError: it has none.
    """
    number: Any = cast("dict[str, Any]", value).get("score", value) if isinstance(value, dict) else value
    if isinstance(number, (int, float)):
        return float(number)
    if hasattr(number, "item") and getattr(number, "size", 0) == 1:
        return float(number.item())
    try:
        return float(task.aggregation()[metric]([value]))
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        raise UnknownNameError(
            "metric", f"{metric} is of all items together and gives none a score of its own ({type(error).__name__}: {error})"
        ) from error


def _answer_text(sample: dict[str, Any]) -> str:
    """Return the answer after the filter; of choices, the most likely one."""
    responses = sample["filtered_resps"]
    first: Any = responses[0] if responses else ""
    if isinstance(first, (list, tuple)) and len(cast("list[Any]", first)) == 2 and isinstance(first[0], float):
        best = max(range(len(responses)), key=lambda index: responses[index][0])
        return _choice(sample, best)
    return str(cast("object", first))


def _accepted(sample: dict[str, Any]) -> list[str]:
    target = sample.get("target")
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(sample["arguments"]) > 1:
        return [_choice(sample, target)]
    if isinstance(target, (list, tuple)):
        return [str(each) for each in cast("list[Any]", target)]
    return [] if target is None else [str(target)]


def _choice(sample: dict[str, Any], index: int) -> str:
    texts = _parts(sample["arguments"][index])
    return str(texts[1] if len(texts) > 1 else texts[0]).strip()


def details(results: HarnessResults) -> dict[str, float]:
    """Return the harness's aggregate figures and standard errors by name, and the version of a single task."""
    figures: dict[str, float] = {}
    filters = {key.partition(",")[2] for row in results.results.values() for key in row if "," in key}
    for name, row in results.results.items():
        for key, value in row.items():
            metric, _, filter_name = key.partition(",")
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and filter_name:
                prefix = f"{name}: " if len(results.results) > 1 else ""
                figures[f"{prefix}{metric}{f' ({filter_name})' if len(filters) > 1 else ''}"] = float(value)
    version: Any = next(iter(results.tasks.values())).VERSION if len(results.tasks) == 1 else None
    if isinstance(version, (int, float)):
        figures["task version"] = float(version)
    return figures


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def describe(error: BaseException, job: dict[str, Any]) -> tuple[str, str]:
    """Return the kind of an error that ended a job, and its message."""
    if job.get("loading"):
        last: Any = getattr(error, "last_attempt", None)  # lmms-eval retries, and its error names only that it did
        cause = error if last is None else last.exception()
        return "data", f"{type(cause).__name__}: {str(cause)[:_MAX_MESSAGE]}"
    return error.kind if isinstance(error, UnknownNameError) else type(error).__name__, str(error)
