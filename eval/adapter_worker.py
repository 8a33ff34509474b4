"""Runs a harness's task against a server: a script for the harness's own environment, `adapter_worker.py JOB`.

JOB is a JSON file that `adapter_run` wrote (`Job` there). What came of it goes to the file `outcome` that it names, each item's
score to `items`. Nothing of this package is imported: the harness runs beside other versions than this package's.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, cast
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

FAILED = "[COMPRESS_REQUEST_FAILED] "
_LMMS_FAILED = "[LMMS_EVAL_REQUEST_FAILED"
"""What lmms-eval takes for the answer where a request failed."""
_KEY = "COMPRESS_ADAPTER_KEY"
_ATTEMPTS = 4
_PAUSE = 0.5
"""Seconds before the second attempt; doubled before each further one."""
_BOOTSTRAPS = 1000
_NEAR = 6
_SHOWN = 500


class UnknownNameError(Exception):
    """A job that asks for what the harness does not have; `kind` says of what."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class AnswerLog:
    """Answers on disk, a line each, so that a task that was interrupted asks only for those it has not had.

    What was asked several times was answered as often: each answer is given out once.
    """

    def __init__(self, path: Path) -> None:
        self.turn = threading.Lock()
        self.kept: dict[str, deque[Any]] = {}
        whole = path.read_bytes() if path.is_file() else b""
        lines = whole[: whole.rfind(b"\n") + 1]  # what follows the last line's end was being written when it ended
        for line in lines.splitlines():
            key, value = json.loads(line)
            self.kept.setdefault(key, deque()).append(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines)
        self.file = path.open("a", encoding="utf-8")

    def find(self, key: str) -> Any:
        """Return an answer of before, None where there is none left."""
        with self.turn:
            kept = self.kept.get(key)
            return kept.popleft() if kept else None

    def add(self, key: str, value: Any) -> None:
        """Keep an answer."""
        with self.turn:
            self.file.write(json.dumps([key, value]) + "\n")
            self.file.flush()


@dataclass(frozen=True)
class Found:
    """What a harness gave back: its tasks by name, their samples, and its aggregate figures by task and metric."""

    tasks: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    results: dict[str, dict[str, Any]]


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job, write its items, and return what there is to say of the whole."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = run_lmms(job) if job["harness"] == "lmms" else run_lm(job)
    chosen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for name, task in found.tasks.items():
        metrics = _metrics(task, job)
        for sample in _of_one_filter(found.samples.get(name, []), job):
            row, metric = item(name, task, sample, metrics)
            rows.append(row)
            chosen.add(metric)
    _write(Path(job["items"]), "".join(json.dumps(row) + "\n" for row in rows))
    return {"metric": ", ".join(sorted(chosen)), "details": details(found)}


def run_lm(job: dict[str, Any]) -> Found:
    """Run a task of lm-evaluation-harness."""
    tasks: Any = import_module("lm_eval.tasks")
    evaluator: Any = import_module("lm_eval.evaluator")
    manager = tasks.TaskManager(include_path=job["include_path"])
    _check_name(job, manager)
    loaded = _loading(job, lambda: manager.load([job["benchmark"]]))
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
    return Found(loaded["tasks"], dict(outcome["samples"]), dict(outcome["results"]))


def lm_model(job: dict[str, Any]) -> Any:
    """Return lm-eval's client of an OpenAI-compatible server; a request that fails again and again is one item's fault, no more."""
    clients: Any = import_module("lm_eval.models.openai_completions")
    errors: Any = import_module("aiohttp").ClientError
    base: Any = clients.LocalChatCompletion if job["chat"] else clients.LocalCompletionsAPI
    turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
    journal = AnswerLog(Path(job["journal"]))

    async def ask(self: Any, session: Any, sem: Any, messages: Any, *, generate: bool = True, **others: Any) -> Any:
        del sem  # the client's own is not below 2: with 1 it would ask in another way, which no failing item survives
        turn = turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(job["concurrency"]))
        key, fault = _sha(repr((messages, generate, others.get("gen_kwargs"), others.get("ctxlens"))).encode()), ""
        if (kept := journal.find(key)) is not None:
            return kept if generate else [(likelihood, greedy) for likelihood, greedy in kept]
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                answers = await base.amodel_call(self, session, turn, messages, generate=generate, **others)
                journal.add(key, answers)
                return answers
            except (errors, TimeoutError, LookupError, TypeError, ValueError) as error:
                fault = f"{type(error).__name__}: {error}"
        return [FAILED + fault if generate else (-math.inf, False)] * len(messages)

    made: Any = type("Client", (base,), {"api_key": os.environ.get(_KEY, ""), "amodel_call": ask})
    path = "chat/completions" if job["chat"] else "completions"
    return made(
        model=job["model"],
        base_url=f"{job['url']}/v1/{path}",
        num_concurrent=max(2, job["concurrency"]),
        max_retries=1,
        timeout=job["seconds"],
        **({} if job["chat"] else {"tokenizer": job["tokenizer"], "tokenizer_backend": "huggingface"}),
        **({"max_length": job["max_length"]} if job["max_length"] else {}),
    )


def run_lmms(job: dict[str, Any]) -> Found:
    """Run a task of lmms-eval."""
    tasks: Any = import_module("lmms_eval.tasks")
    evaluator: Any = import_module("lmms_eval.evaluator")
    client: Any = import_module("lmms_eval.models.chat.openai").OpenAICompatible
    manager = tasks.TaskManager("INFO", include_path=job["include_path"], model_name="openai")
    _check_name(job, manager)
    loaded = _loading(job, lambda: tasks.get_task_dict([job["benchmark"]], manager, "chat"))
    leaves = dict(_leaves(loaded))
    model = client(
        model=job["model"],
        base_url=f"{job['url']}/v1",
        api_key=os.environ.get(_KEY) or "none",
        num_concurrent=job["concurrency"],
        adaptive_max_concurrency=job["concurrency"],
        max_retries=_ATTEMPTS,
        retry_backoff_s=_PAUSE,
        httpx_trust_env=urlsplit(job["url"]).hostname != "127.0.0.1",
    )
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
        docs = undecoded(task.eval_docs)
        for sample in outcome["samples"][name]:
            sample["doc"] = docs[sample["doc_id"]]
    return Found(leaves, dict(outcome["samples"]), dict(outcome["results"]))


def journaled(client: Any, journal: AnswerLog) -> Any:
    """Return as much of an OpenAI client as lmms-eval uses, which asks the server only what the journal has no answer to."""
    completion: Any = import_module("openai.types.chat").ChatCompletion

    def create(**payload: Any) -> Any:
        key = _sha(json.dumps({**payload, "model": ""}, sort_keys=True).encode())  # a server started anew has another name for it
        if (kept := journal.find(key)) is not None:
            return completion.model_validate(kept)
        answer: Any = client.chat.completions.create(**payload)
        journal.add(key, answer.model_dump(mode="json"))
        return answer

    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def undecoded(docs: Any) -> Any:
    """Return a data set whose images come as the bytes they are stored as."""
    features: Any = getattr(docs, "features", None) or {}
    image: Any = import_module("datasets").Image
    for name, feature in features.items():
        if isinstance(feature, image):
            docs = docs.cast_column(name, image(decode=False))
    return docs


def _leaves(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Give the tasks in groups of tasks; what is a group comes with its name, or as a pair with it."""
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
    near = difflib.get_close_matches(str(job["benchmark"]), names, n=_NEAR)
    hint = f"; near it are {', '.join(near)}" if near else ""
    raise UnknownNameError("name", f"no task is called {job['benchmark']}{hint}")


def _loading(job: dict[str, Any], load: Any) -> Any:
    """Load tasks with their data; whatever ends it, code of the data set's own too, is told as a fault of the data."""
    job["loading"] = True
    loaded = load()
    job["loading"] = False
    return loaded


def _metrics(task: Any, job: dict[str, Any]) -> list[str]:
    """Return the metrics that may give an item its score, the first that it has counts.

    Raises:
        JobError: the metric asked for is none of the task's, or less of it is better.
    """
    names = [str(name) for name in task.aggregation()]
    if job["metric"] is not None and job["metric"] not in names:
        raise UnknownNameError("metric", f"the task's metrics are {', '.join(names)}, and not {job['metric']}")
    wanted = [job["metric"]] if job["metric"] is not None else names
    better = cast("dict[str, bool | None]", task.higher_is_better())
    if better.get(wanted[0]) is False:
        others = [name for name in names if better.get(name) is not False]
        instead = f"; name one of {', '.join(others)}" if others else ""
        raise UnknownNameError(
            "metric", f"the metric {wanted[0]} is the better the lower it is, which no limit here is for{instead}"
        )
    return [name for name in wanted if better.get(name) is not False]


def _of_one_filter(samples: Iterable[dict[str, Any]], job: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep of each item one reading of its answer: the one of the filter asked for, or the first."""
    kept: dict[Any, dict[str, Any]] = {}
    known: dict[str, None] = {}
    for sample in samples:
        known[str(sample.get("filter"))] = None
        if job["filter"] in (None, sample.get("filter")):
            kept.setdefault(sample["doc_id"], sample)
    if known and not kept:
        raise UnknownNameError("metric", f"the task's filters are {', '.join(known)}, and not {job['filter']}")
    return list(kept.values())


def item(name: str, task: Any, sample: dict[str, Any], metrics: list[str]) -> tuple[dict[str, Any], str]:
    """Return one item's row, and the metric that its score is of."""
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
        "cluster": _sha("\n".join(images).encode()) if images else digest,
        "accepted": _accepted(sample),
        "said": "" if fault else _said(sample),
        "score": score,
        "fault": fault,
    }
    return row, metric


def canonical(value: Any, images: list[str]) -> Any:
    """Return a document as plain JSON values, its images as digests, which are added to `images`."""
    if isinstance(value, dict):
        given = cast("dict[Any, Any]", value)
        if set(given) == {"bytes", "path"} and isinstance(given["bytes"], bytes):
            return canonical(given["bytes"], images)
        return {str(key): canonical(each, images) for key, each in given.items()}
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
    """Return what was asked, of each request its words."""
    return [[str(part) for part in _parts(request) if isinstance(part, str)] for request in sample["arguments"]]


def _parts(request: Any) -> list[Any]:
    return list(cast("Iterable[Any]", request)) if isinstance(request, (list, tuple)) else [request]


def _fault(sample: dict[str, Any]) -> str | None:
    """Return why there is no answer to an item, None where there is one."""
    for given in _flat(sample["resps"]):
        if isinstance(given, str) and given.startswith((FAILED, _LMMS_FAILED)):
            return given.partition("] ")[2][:_SHOWN] or "the request failed"
        if isinstance(given, float) and math.isinf(given):
            return "the server gave no likelihood of it"
    return None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in cast("list[Any]", value):
            yield from _flat(each)
    else:
        yield value


def _score(value: Any, task: Any, metric: str) -> float:
    """Return an item's own value of a metric: the number given for it, or the task's figure over that item alone.

    Raises:
        JobError: it has none.
    """
    given: Any = cast("dict[str, Any]", value).get("score", value) if isinstance(value, dict) else value
    if isinstance(given, (int, float)):
        return float(given)
    if hasattr(given, "item") and getattr(given, "size", 0) == 1:
        return float(given.item())
    try:
        return float(task.aggregation()[metric]([value]))
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        raise UnknownNameError(
            "metric", f"{metric} is of all items together and gives none a score of its own ({type(error).__name__}: {error})"
        ) from error


def _said(sample: dict[str, Any]) -> str:
    """Return the answer as it was read; of choices, the likeliest."""
    given = sample["filtered_resps"]
    first: Any = given[0] if given else ""
    if isinstance(first, (list, tuple)) and len(cast("list[Any]", first)) == 2 and isinstance(first[0], float):
        likeliest = max(range(len(given)), key=lambda place: given[place][0])
        return _choice(sample, likeliest)
    return str(cast("object", first))


def _accepted(sample: dict[str, Any]) -> list[str]:
    target = sample.get("target")
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(sample["arguments"]) > 1:
        return [_choice(sample, target)]
    if isinstance(target, (list, tuple)):
        return [str(each) for each in cast("list[Any]", target)]
    return [] if target is None else [str(target)]


def _choice(sample: dict[str, Any], place: int) -> str:
    parts = _parts(sample["arguments"][place])
    return str(parts[1] if len(parts) > 1 else parts[0]).strip()


def details(found: Found) -> dict[str, float]:
    """Return the harness's aggregate figures with their standard errors, by name, and of a lone task its version."""
    told: dict[str, float] = {}
    filters = {key.partition(",")[2] for row in found.results.values() for key in row if "," in key}
    for name, row in found.results.items():
        for key, value in row.items():
            metric, _, reading = key.partition(",")
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and reading:
                of_task = f"{name}: " if len(found.results) > 1 else ""
                told[f"{of_task}{metric}{f' ({reading})' if len(filters) > 1 else ''}"] = float(value)
    version: Any = next(iter(found.tasks.values())).VERSION if len(found.tasks) == 1 else None
    if isinstance(version, (int, float)):
        told["task version"] = float(version)
    return told


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def leave_word(job: dict[str, Any]) -> None:
    """See to it that an error that ends this process is left in the job's `outcome` as well as in the log."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        failed = error.kind if isinstance(error, UnknownNameError) else type(error).__name__
        message = str(error)
        if job.get("loading"):
            last: Any = getattr(error, "last_attempt", None)  # lmms-eval tries again and again, and tells only that it did
            cause = error if last is None else last.exception()
            failed, message = "data", f"{type(cause).__name__}: {str(cause)[:_SHOWN]}"
        _write(Path(job["outcome"]), json.dumps({"failed": failed, "message": message}))

    sys.excepthook = hook


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def run(path: Path) -> None:
    """Run the job of a file, and leave word of what came of it."""
    job = json.loads(path.read_text(encoding="utf-8"))
    leave_word(job)
    began = time.monotonic()
    told = main(job)
    _write(Path(job["outcome"]), json.dumps({**told, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
