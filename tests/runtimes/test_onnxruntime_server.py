"""The server of an ONNX artifact: the demo model behind the API in a process of its own, under load and asked by hand."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from compress.data.prompts import Prompt
from compress.errors import DataError, RecipeError, ServerError, UsageError
from compress.eval.latency.load_generator import DIALECTS, make_prompts, make_requests, run_load, warm_up
from compress.eval.latency.server_under_load import ServerUnderLoad
from compress.eval.latency.settings import LatencySettings, LoadPoint
from compress.eval.latency.telemetry import monitor_server
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_at
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.runtimes.onnxruntime.runtime import Onnxruntime
from compress.runtimes.onnxruntime.server import Detokenizer, RequestError, read_request
from compress.runtimes.runtime import OpenContext, RunningServer
from tests.tiny import build_clip, picture

RECIPES = Path(__file__).parents[2] / "recipes"
DEMO = RECIPES / "demo" / "model"
SILENT = Silent()
QUESTION = "What colour is it?"
POINT = LoadPoint(concurrency=3, images=1, width=56, height=84, prompt_tokens=5, output_tokens=6)


def in_onnxruntime(**fields: Any) -> Onnxruntime:
    return Onnxruntime.model_validate({"runtime": "onnxruntime", "threads": 1, "providers": ["cpu"], **fields})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    fields = {"format": "onnx", "dtype": "float32"}
    Onnx.model_validate(fields).apply(ExportContext(DEMO, folder, family_at(DEMO), SILENT))
    return folder


@pytest.fixture(scope="module")
def session(artifact: Path) -> Generator[Any]:
    with in_onnxruntime().open(OpenContext.at(artifact, artifact / "logs", SILENT)) as session:
        yield session


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[RunningServer]:
    """The original, which is exported for it; nothing of it is left when the context ends."""
    logs = tmp_path_factory.mktemp("logs")
    with in_onnxruntime().serve(OpenContext.at(DEMO, logs, SILENT)) as served:
        assert [path.name for path in logs.iterdir()] == ["onnxruntime.log"], "the graphs are gone once they are loaded"
        processes = processes_of(served)
        yield served
    assert not any(process.is_running() for process in processes)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health", trust_env=False)


@pytest.fixture
def client(served: RunningServer) -> Generator[httpx.Client]:
    headers = {"Authorization": f"Bearer {served.key}"}
    with httpx.Client(base_url=served.url, headers=headers, trust_env=False, timeout=600) as client:
        yield client


def processes_of(served: RunningServer) -> list[psutil.Process]:
    leading = psutil.Process(served.process)
    processes = [leading, *leading.children(recursive=True)]
    assert len(processes) == 2
    return processes


def body(served: RunningServer, prompt: Prompt, **options: Any) -> dict[str, Any]:
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in prompt.images]
    content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": prompt.text}]
    return {"model": served.model, "messages": [{"role": "user", "content": content}], "temperature": 0, **options}


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_load_is_put_on_it(served: RunningServer) -> None:
    """Every request has as many tokens as asked, each an event of its own."""
    requests = make_requests(DEMO, POINT, 7, 0)
    assert warm_up(served, requests, 60) == DIALECTS[0]
    load = run_load(served, requests.bodies(served.model, DIALECTS[0]), POINT.concurrency, 60, POINT.output_tokens)
    assert [(sample.fault, sample.tokens, len(sample.between_tokens)) for sample in load.samples] == [(None, 6, 5)] * 7


def test_it_says_what_the_session_says(served: RunningServer, client: httpx.Client, session: Any) -> None:
    """Whole and streamed, with an image, with another one and without; the token that ends an answer is counted, and not said."""
    prompts = [Prompt("one", QUESTION, (picture(0),)), Prompt("other", QUESTION, (picture(4, 56, 84),)), Prompt("none", QUESTION)]
    for prompt, expected in zip(prompts, session.answer(prompts, 6, SILENT), strict=True):
        answer = client.post("/v1/chat/completions", json=body(served, prompt, max_tokens=6)).json()
        (choice,) = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, "stop")
        assert answer["usage"]["completion_tokens"] == len(expected.token_ids) + 1
        asked = body(served, prompt, max_completion_tokens=6, stream=True, stream_options={"include_usage": True})
        *chunks, last = events(client.post("/v1/chat/completions", json=asked).text)
        deltas = [event["choices"][0]["delta"] for event in chunks]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == expected.text
        assert [event["choices"][0]["finish_reason"] for event in chunks] == [None] * len(expected.token_ids) + ["stop"]
        assert (last["choices"], last["usage"]) == ([], answer["usage"])


def test_requests_that_it_does_not_answer(served: RunningServer, client: httpx.Client) -> None:
    assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200
    denied = httpx.post(f"{served.url}/v1/chat/completions", json={}, headers={"Authorization": "Bearer no"}, trust_env=False)
    assert (denied.status_code, denied.json()["error"]["code"]) == (401, 401)
    assert client.get("/v1/nothing").status_code == 404
    assert client.post("/v1/completions", json={}).status_code == 404
    assert "the body is no JSON" in client.post("/v1/chat/completions", content=b"{").json()["error"]["message"]
    for image, message in ((b"no image", "cannot be read as an image"), (picture(0)[:99], "cannot be read as an image")):
        refused = client.post("/v1/chat/completions", json=body(served, Prompt("", QUESTION, (image,)), stream=True))
        assert (refused.status_code, message in refused.json()["error"]["message"]) == (400, True)
    longer = client.post("/v1/chat/completions", json=body(served, Prompt("", QUESTION), max_tokens=4000))
    assert (longer.status_code, "the model takes 2048" in longer.text) == (400, True)
    assert client.post("/v1/chat/completions", json=body(served, Prompt("", QUESTION), max_tokens=1)).is_success


def test_tokens_come_one_by_one(session: Any) -> None:
    prompt = Prompt("one", QUESTION, (picture(0),))
    (answer,) = session.answer([prompt], 6, SILENT)
    streamed = session.stream(prompt, 6)
    spoken = list(streamed.tokens)
    assert tuple(token for token, _ in spoken[:-1]) == answer.token_ids
    assert [finish for _, finish in spoken] == [None] * len(answer.token_ids) + ["stop"]
    assert streamed.prompt_tokens > len(QUESTION.split())
    endless = list(session.stream(prompt, 6, ignore_eos=True).tokens)
    assert [finish for _, finish in endless] == [None] * 5 + ["length"]
    assert endless[: len(spoken) - 1] == spoken[:-1]
    with pytest.raises(DataError, match="the model takes 2048"):
        session.stream(prompt, 4000)


def test_pieces_add_up_to_the_answer(session: Any) -> None:
    """Whatever the tokens: also where a character lies in several of them, or ends in none."""
    nonempty: list[str] = []
    for first in range(0, 250, 25):
        detokenizer = Detokenizer(session)
        pieces = [detokenizer.add(token) for token in range(first, first + 25)]
        assert "".join([*pieces, detokenizer.flush()]) == detokenizer.text()
        nonempty += [piece for piece in pieces if piece]
    assert len(nonempty) > 50


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "another"}, 404, "'another' is not served here, only this"),
        ({"messages": []}, 400, "one turn of the user's"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, 400, "one turn of the user's"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "neither text nor image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:/x"}}]}]}, 400, "data URLs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,?"}}]}]},
            400,
            "no base64",
        ),
        ({"temperature": 0.7}, 400, "answers are greedy"),
        ({"n": 2}, 400, "one each"),
        ({"max_tokens": "many"}, 400, "no number of tokens"),
    ],
)
def test_a_request_for_what_is_not_offered_is_refused(changes: dict[str, Any], status: int, message: str) -> None:
    plain = {"model": "this", "messages": [{"role": "user", "content": QUESTION}]}
    assert read_request(plain, "this").prompt.text == QUESTION
    with pytest.raises(RequestError, match=message) as raised:
        read_request(plain | changes, "this")
    assert raised.value.status == status
    with pytest.raises(RequestError, match="no JSON object"):
        read_request([], "this")


def test_graphs_are_timed_one_by_one(artifact: Path, tmp_path: Path) -> None:
    for images, parts in ((1, ["vision", "prefill", "decode"]), (0, ["prefill", "decode"])):
        point = POINT.model_copy(update={"images": images})
        (prompt,) = make_prompts(DEMO, point, 1, 0)
        table = in_onnxruntime().time_components(OpenContext.at(artifact, tmp_path, SILENT), point, prompt, 2)
        assert (table.runtime, table.device, table.dtype) == ("onnxruntime", "cpu", "float32")
        assert [row.component for row in table.components] == parts
        assert all(row.repeats == 2 and 0 < row.least_ms <= row.median_ms for row in table.components)


def test_the_plan_measures_latency_and_refuses_what_has_no_server_to_ask(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"export": [{"format": "onnx"}], "eval.latency": {"concurrency": 1}}
    changes |= {"eval.runtime": {"runtime": "onnxruntime", "threads": 1}, "publish": None}

    def keys(**more: Any) -> dict[str, str]:
        return {step.name: step.key for step in make_plan(RECIPES / "demo.yaml", changes | more, Store(tmp_path)).steps}

    one, two = keys(), keys(**{"eval.runtime.threads": 2})
    assert {name for name in one if one[name] != two[name]} == {"latency"}, "threads shape how fast it is, and nothing else"
    with pytest.raises(RecipeError, match=r"adapter needs a server, and runtime onnxruntime has none for harnesses to ask"):
        keys(**{"eval.tasks.1": {"task": "adapter", "harness": "lmms", "benchmark": "mme"}, "gate.perplexity": None})


def test_a_model_that_writes_nothing_has_no_latency(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"eval\.latency: is measured of answers, and clip compares images with texts"):
        make_plan(RECIPES / "demo-clip.yaml", {"eval.latency": {"concurrency": 1}}, Store(tmp_path))
    model = build_clip(tmp_path / "clip")
    with (
        pytest.raises(UsageError, match=r"clip compares images with texts and writes none; leave out eval\.latency"),
        in_onnxruntime().serve(OpenContext.at(model, tmp_path, SILENT)),
    ):
        pass


def test_a_server_that_is_killed_is_told(served: RunningServer, tmp_path: Path) -> None:
    """The last test that asks it."""
    settings = LatencySettings(concurrency=(1,), requests=2, warmup=1)
    with monitor_server(served.process, served.read_log()) as watch:
        server = ServerUnderLoad(served, OpenContext.at(DEMO, tmp_path, SILENT), settings, None, 60, watch)
        load, used = server.run_load(POINT.at(1), "round 0")
        assert (load.client, [sample.fault for sample in load.samples]) == ("compress", [None, None])
        assert used.memory_bytes is not None
        guard, process = processes_of(served)
        process.kill()
        while guard.status() != psutil.STATUS_ZOMBIE:
            os.sched_yield()
        with pytest.raises(ServerError, match=r"its server ended under load[\s\S]*signal 9 \(SIGKILL\)") as raised:
            server.run_load(POINT.at(1), "round 1")
    assert served.key is not None and served.key not in f"{raised.value}{served.read_log()}{served}"
