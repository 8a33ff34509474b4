"""Load by this package's own client, on a server that speaks the streaming chat API; and the times in a stream."""

from __future__ import annotations

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from compress.errors import MissingError, ServerError
from compress.eval.latency.load_generator import DIALECTS, AnswerStream, make_prompts, make_requests, read_stream, run_load, warm_up
from compress.eval.latency.settings import LoadPoint
from compress.runtimes.runtime import RunningServer
from tests.eval.stream_server import Body, chunk, event, stream_server, whole_answer
from tests.raw_server import absent_server

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"
POINT = LoadPoint(concurrency=3, images=2, width=48, height=32, prompt_tokens=12, output_tokens=5)


def _served(url: str, key: str | None = None) -> RunningServer:
    return RunningServer(url, "the-model", key, process=0)


def test_requests_are_of_the_asked_size_and_the_same_for_the_same_seed() -> None:
    first, again = make_prompts(DEMO, POINT, 3, 7), make_prompts(DEMO, POINT, 3, 7)
    assert first == again
    assert first != make_prompts(DEMO, POINT, 3, 8)
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for prompt in first:
        assert abs(len(tokenizer.encode(prompt.text, add_special_tokens=False).ids) - 12) <= 1
        assert [Image.open(io.BytesIO(image)).size for image in prompt.images] == [(48, 32)] * 2
    assert len({image for prompt in first for image in prompt.images}) == 6


def test_bodies_hold_text_images_and_what_makes_answers_equally_long() -> None:
    body = json.loads(make_requests(DEMO, POINT, 1, 0).bodies("the-model", DIALECTS[0])[0])
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "image_url"]
    head, _, data = body["messages"][0]["content"][1]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "JPEG"
    assert (body["model"], body["max_completion_tokens"], body["ignore_eos"], body["temperature"]) == ("the-model", 5, True, 0.0)
    plain = json.loads(make_requests(DEMO, POINT.model_copy(update={"images": 0}), 1, 0).bodies("m", DIALECTS[2])[0])
    assert isinstance(plain["messages"][0]["content"], str)
    assert plain["max_tokens"] == 5
    assert "ignore_eos" not in plain


def test_artifact_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"tokenizer.json: is not there, and load is made of its tokens"):
        make_prompts(tmp_path, POINT, 1, 0)


def test_every_request_is_sent_once_and_so_many_are_under_way() -> None:
    """The server answers nobody before three requests are there: fewer at once would never end, more would be seen."""
    barrier = threading.Barrier(3)

    def together(body: Body, number: int) -> list[bytes]:
        barrier.wait(timeout=600)
        return whole_answer(body, number)

    requests = make_requests(DEMO, POINT, 9, 0)
    with stream_server(together) as server:
        load = run_load(_served(server.url, "secret"), requests.bodies("the-model", DIALECTS[0]), 3, 600, POINT.output_tokens)
    assert [sample.fault for sample in load.samples] == [None] * 9
    assert [(sample.tokens, len(sample.gaps), len(sample.between_tokens)) for sample in load.samples] == [(5, 5, 4)] * 9
    assert server.most_at_once == 3
    assert sorted(json.dumps(body["messages"]) for body in server.asked) == sorted(json.dumps(row) for row in requests.messages)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert load.seconds > 0
    assert load.client == "compress"


def test_failed_requests_keep_their_places_and_their_words() -> None:
    def sometimes(body: Body, number: int) -> list[bytes] | tuple[int, str]:
        if number % 4 == 1:
            return 503, "try again\nlater"
        if number % 4 == 2:
            return [chunk(), chunk("half")]
        if number % 4 == 3:
            return [chunk(), event({"error": {"message": "engine died"}})]
        return whole_answer(body, number)

    with stream_server(sometimes) as server:
        load = run_load(_served(server.url), make_requests(DEMO, POINT, 8, 0).bodies("m", DIALECTS[0]), 1, 600, POINT.output_tokens)
    faults = [None, "503: try again later", "the stream ended before the answer did", "engine died"]
    assert [sample.fault for sample in load.samples] == faults * 2


def test_unreachable_server_fails_every_request() -> None:
    with absent_server() as url:
        load = run_load(_served(url), make_requests(DEMO, POINT, 2, 0).bodies("m", DIALECTS[0]), 2, 600, POINT.output_tokens)
    assert all(sample.fault is not None and sample.fault.startswith("the server at 127.0.0.1:") for sample in load.samples)


def test_warm_up_finds_the_dialect_a_server_takes() -> None:
    def older(body: Body, number: int) -> list[bytes] | tuple[int, str]:
        known = {"model", "messages", "max_tokens", "temperature", "stream"}
        return whole_answer(body, number) if body.keys() <= known else (400, f"unknown {sorted(body.keys() - known)}")

    with stream_server(older) as server:
        dialect = warm_up(_served(server.url), make_requests(DEMO, POINT, 4, 0), 600)
        assert dialect == DIALECTS[2]
        assert len(server.asked) == 2 + 4
    with stream_server() as server:
        assert warm_up(_served(server.url), make_requests(DEMO, POINT, 4, 0), 600) == DIALECTS[0]
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("status", "words", "asked"),
    [(401, "set key_variable", 1), (400, "ask for fewer tokens or smaller images", 3), (500, "see that it serves", 1)],
)
def test_server_that_refuses_the_load_is_named_with_its_words(status: int, words: str, asked: int) -> None:
    with (
        stream_server(lambda body, number: (status, "no such thing")) as server,
        pytest.raises(ServerError, match=rf"does not answer a request of the load \({status}: no such thing\); {words}"),
    ):
        warm_up(_served(server.url, "key"), make_requests(DEMO, POINT, 4, 0), 600)
    assert len(server.asked) == asked


def test_times_are_those_of_the_stream() -> None:
    pieces = [(10.5, chunk()), (10.5, chunk("a")), (11.0, chunk("b")), (13.0, chunk("c", "length")), (13.5, event("[DONE]"))]
    sample = read_stream(AnswerStream(10.0, pieces))
    assert (sample.ttft, sample.gaps, sample.tokens, sample.seconds) == (0.5, (0.0, 0.5, 2.0), 3, 3.0)
    assert sample.between_tokens == (0.5, 2.0)


def test_event_counts_when_its_last_byte_came_however_it_was_cut() -> None:
    text = b": ping\n\n" + chunk("a") + chunk("b", "stop").replace(b"\n\n", b"\r\n\r\n") + event("[DONE]")
    cut = len(b": ping\n\n" + chunk("a")) - 1
    sample = read_stream(AnswerStream(0.0, [(1.0, text[:cut]), (2.0, text[cut : cut + 9]), (4.0, text[cut + 9 :])]))
    assert (sample.ttft, sample.gaps, sample.tokens) == (2.0, (2.0,), 2)
    assert sample.between_tokens == (2.0,)


def test_tokens_are_the_servers_count_where_it_tells() -> None:
    pieces = [(1.0, chunk("two words")), (2.0, chunk("", "stop")), (2.0, event({"choices": [], "usage": {"completion_tokens": 7}}))]
    assert read_stream(AnswerStream(0.0, pieces)).tokens == 7


@pytest.mark.parametrize("data", ["{", "[1]", '{"choices": [7]}', '"text"'])
def test_what_is_no_stream_of_chunks_is_a_fault(data: str) -> None:
    assert read_stream(AnswerStream(0.0, [(1.0, event(data))])).fault == "the stream holds what is no chunk of an answer"


def test_empty_stream_is_a_fault() -> None:
    assert read_stream(AnswerStream(0.0, [])).fault == "the stream ended before the answer did"


def test_an_event_that_does_not_end_is_a_fault_and_found_in_one_pass() -> None:
    """A thousand pieces that are each put before all that came earlier would take minutes."""
    pieces = [(float(place), b"data: " + b"x" * 60) for place in range(100_000)]
    fault = read_stream(AnswerStream(0.0, pieces)).fault
    assert fault == "the stream holds an event that does not end (limit event_bytes = 65,536, set by COMPRESS_LIMIT_EVENT_BYTES)"
    whole = b"data: " + b" " * 65_000 + b'{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
    assert read_stream(AnswerStream(0.0, [(1.0, whole[place : place + 1]) for place in range(len(whole))])).fault is None


@pytest.mark.parametrize(
    "data", ["[" * 60_000, '{"choices": [{"delta": {}}], "usage": {"completion_tokens": 1e999}}', "{" + '"a":{' * 9000]
)
def test_an_event_that_no_parser_bears_is_a_fault(data: str) -> None:
    assert read_stream(AnswerStream(0.0, [(1.0, event(data))])).fault == "the stream holds what is no chunk of an answer"


def test_a_server_that_floods_fails_its_request() -> None:
    """An answer of five tokens has no thousand pieces."""
    with stream_server(lambda body, number: [chunk("word " * 1000)] * 1000) as server:
        load = run_load(_served(server.url), make_requests(DEMO, POINT, 2, 0).bodies("m", DIALECTS[0]), 1, 600, POINT.output_tokens)
    assert all("the answer has more than 86,016 bytes" in (sample.fault or "") for sample in load.samples)
