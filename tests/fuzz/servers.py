"""Servers as strangers may run them: sound answers, changed by a seed on their way; and what a run asks of each."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from compress.cli.display import Display
from compress.data.prompts import Prompt
from compress.errors import CompressError
from compress.eval.latency.load_generator import Requests, run_load, warm_up
from compress.eval.latency.settings import LoadPoint
from compress.pipeline.events import EventLog
from compress.runtimes import server_session
from compress.runtimes.endpoint.runtime import Endpoint
from compress.runtimes.openai_client import RetryPolicy, read_key
from compress.runtimes.runtime import OpenContext, Passage, RunningServer
from compress.runtimes.vllm.runtime import Vllm
from compress.runtimes.vllm.session import VllmSession
from compress.workers.server import await_service
from compress.workers.worker import run_worker
from tests.fuzz.answers import Way, body_ways, framing_ways
from tests.raw_server import Asked, http

KEY = "sk-secret/of+somebody=0123456789"
KEY_VARIABLE = "KEY_OF_THE_SERVER"
MODEL = "served"
ANSWER = "a red bus"
LIKELIHOOD = -0.5
CLIENTS = {
    "answers": ("/v1/models", "/version", "/v1/chat/completions"),
    "scores": ("/v1/models", "/version", "/v1/chat/completions", "/v1/chat/completions/render", "/inference/v1/generate"),
    "told": ("/version", "/v1/models", "/v1/chat/completions/render", "/inference/v1/generate"),
    "url": ("/version", "/v1/models"),
    "load": ("/v1/chat/completions",),
    "start": ("/health", "/v1/models"),
}
"""What is asked of a server, and the paths that it asks for. Most of a run's time goes into the first two."""
_PAUSE = 0.01
"""Seconds before the second attempt of a request, which every behaviour would otherwise wait for; the attempts are as many."""

_DRAWN = ("answers", "answers", "answers", "scores", "scores", "scores", "told", "url", "load", "load", "start")
_PROMPTS = (Prompt("a", "What is it?"), Prompt("b", "What else?"))
_PASSAGES = (Passage("t", (5, 6, 7)), Passage("p", (5, 6), _PROMPTS[0]))
_POINT = LoadPoint(concurrency=1, images=0, width=28, height=28, prompt_tokens=4, output_tokens=4)


def sound(asked: Asked, folder: str) -> bytes:
    """Return the body of a right answer."""
    body = cast("dict[str, Any]", json.loads(asked.body)) if asked.body else {}
    match asked.path:
        case "/v1/models":
            content: object = {"object": "list", "data": [{"id": MODEL, "object": "model", "root": folder}]}
        case "/version":
            content = {"version": "0.11.0"}
        case "/v1/chat/completions" if body.get("stream"):
            pieces: list[dict[str, Any]] = [
                {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]} for word in ANSWER.split()
            ]
            pieces.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            return "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces).encode() + b"data: [DONE]\n\n"
        case "/v1/chat/completions":
            said = {"role": "assistant", "content": ANSWER}
            content = {"choices": [{"index": 0, "message": said, "token_ids": [5, 6, 7], "finish_reason": "stop"}]}
        case "/v1/chat/completions/render":
            content = {"token_ids": [1, 2, 3], "features": None}
        case "/inference/v1/generate" if body["sampling_params"].get("logprobs"):
            tokens = [{"token_id": token, "logprob": math.log(share)} for token, share in enumerate((0.5, 0.25, 0.25))]
            content = {"choices": [{"logprobs": {"content": [{"top_logprobs": tokens[::-1]}]}}]}
        case "/inference/v1/generate":
            rows = [{str(token): {"logprob": LIKELIHOOD, "rank": 1}, "9": {"logprob": -2.5}} for token in body["token_ids"]]
            content = {"choices": [{"token_ids": [5]}], "prompt_logprobs": [None, *rows[1:]]}
        case _:
            content = {}
    return json.dumps(content).encode()


@dataclass
class Behaviour:
    """A server that answers one of the paths in its own way: the first time, or each time."""

    client: str
    path: str
    way: Way
    once: bool
    folder: str
    done: int = 0

    @property
    def sound(self) -> bool:
        """Whether the right result is due; a load's client asks for plain answers alone."""
        return self.way.sound and not (self.client == "load" and self.way.packed)

    def __str__(self) -> str:
        return f"{self.client}, {self.path}{' once' if self.once else ''}: {self.way.name}"

    def reply(self, asked: Asked) -> Iterable[bytes]:
        """Answer a request."""
        plain = self.client in ("answers", "load") and asked.path == "/version"
        body = sound(asked, self.folder)
        if asked.path != self.path or (self.once and self.done):
            return [http(b"{}", "404 Not Found") if plain else http(body)]
        self.done += 1
        return self.way.reply(asked, body)


def behave(seed: int, folder: Path, elsewhere: str) -> Behaviour:
    """Return a behaviour by a seed; `elsewhere` is a URL that no client may be led to."""
    chance = random.Random(seed)
    client = chance.choice(_DRAWN)
    ways = framing_ways(chance, KEY, elsewhere) if chance.randrange(5) < 3 else body_ways(chance, KEY)
    return Behaviour(client, chance.choice(CLIENTS[client]), chance.choice(ways), chance.randrange(3) == 0, str(folder))


def consume(client: str, url: str, folder: str, target: str) -> int:
    """Ask a server what a run asks it; print what came of it and return the exit code that the command line would give."""
    place = Path(target)
    progress = EventLog(place / "events.jsonl", Display(Console(stderr=True, soft_wrap=True)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_session, "RetryPolicy", partial(RetryPolicy, pause=_PAUSE))
            found = _ask(client, url, Path(folder), place, progress)
    except CompressError as error:
        sys.stderr.write(f"error: {error}\n")
        progress.write("run-finished", error=str(error))
        return error.exit_code
    print(json.dumps(found))  # noqa: T201 - what the test judges
    return 0


def _ask(client: str, url: str, folder: Path, place: Path, progress: EventLog) -> dict[str, Any]:
    context = OpenContext.at(folder, place, progress, name="original")
    where = {"url": f"{url}/v1", "model": MODEL}
    patience = {"request_seconds": 1, "startup_seconds": 1, "key_variable": KEY_VARIABLE, "top_logprobs": 2, "concurrency": 2}
    endpoint = Endpoint.model_validate({"runtime": "endpoint", "original": where, "artifacts": {"other": where}, **patience})
    served = RunningServer(url, MODEL, read_key(KEY_VARIABLE, url))
    match client:
        case "told":
            missing = {capability.__name__: reason for capability, reason in endpoint.missing().items()}
            return {"versions": endpoint.versions(), "missing": missing}
        case "url":
            runtime = Vllm.model_validate({"runtime": "vllm", "url": url, **patience})
            with runtime.serve(context) as found:
                return {"versions": runtime.versions(), "model": found.model}
        case "load":
            messages = tuple([{"role": "user", "content": prompt.text}] for prompt in _PROMPTS)
            dialect = warm_up(served, requests := Requests(_POINT, messages), 1.0)
            load = run_load(served, requests.bodies(MODEL, dialect), 1, 1.0, _POINT.output_tokens)
            return {"samples": [asdict(sample) for sample in load.samples]}
        case "start":
            command = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
            with run_worker("the server", command, os.environ, place / "server.log") as server:
                await_service(server, served, 1.0)
            return {"model": MODEL}
        case _:
            pass
    with endpoint.open(context) as session:
        answers = [asdict(answer) for answer in session.answer(_PROMPTS, 8, progress)]
        if not isinstance(session, VllmSession):
            return {"answers": answers}
        scores = session.score(_PASSAGES, place / "record", None, progress)
        again = session.score(_PASSAGES, None, place / "record", progress)
        whole = session.distributions(_PASSAGES, ((0, 0),), progress)
    rows = [{"likelihood": [float(v) for v in one.negative_log_likelihood], "fault": one.fault} for one in scores]
    kl = [[] if one.kl is None else [float(value) for value in one.kl] for one in again]
    shares = [None if row is None else np.exp(row).tolist() for row in whole]
    return {"answers": answers, "scores": rows, "kl": kl, "shares": shares}
