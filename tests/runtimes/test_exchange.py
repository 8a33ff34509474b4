"""What a server may take in time and send in bytes, whatever it does."""

from __future__ import annotations

import gzip
import json
import math
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from compress.errors import MissingError, ServerError
from compress.progress import Silent
from compress.runtimes.endpoint.runtime import Endpoint, EndpointModel
from compress.runtimes.exchange import AnswerError, Response, exchange, models_of, open_http
from compress.runtimes.openai_client import Address, ItemError, RetryingClient, RetryPolicy, open_client
from compress.runtimes.runtime import OpenContext
from compress.runtimes.server_session import answer_text, token_ids
from compress.runtimes.top_tokens import position_of
from compress.runtimes.vllm.runtime import Vllm
from tests.raw_server import Asked, drip, http, raw_server

SLOW = 0.3
"""A server that never ends an answer is given up after so long: that it would end it sooner cannot happen."""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

DRIPS: dict[str, tuple[bytes, bytes]] = {
    "status line": (b"HTTP/1.1 200 O", b"K"),
    "headers": (HEAD, b"X-More: 1\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (HEAD + b"Content-Length: 1000000\r\n\r\n", b" "),
    "chunks": (CHUNKED, b"1\r\n \r\n"),
    "chunk extension": (CHUNKED + b"5;", b"x"),
    "trailers": (CHUNKED + b"0\r\n", b"X-More: 1\r\n"),
    "packed": (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 1000000\r\n\r\n" + gzip.compress(b"{}")[:12], b""),
}


def ask(reply: Callable[[Asked], Iterable[bytes]], seconds: float = 60.0) -> Response:
    with raw_server(reply) as server, open_http(server.url, {}, 1, trust_env=False) as client:
        with exchange(client, "GET", "/v1/models", seconds) as answer:
            return answer
        raise AssertionError


@pytest.mark.parametrize("where", DRIPS)
def test_no_trickle_evades_the_deadline(where: str) -> None:
    """Every byte comes well within the time that is waited; the whole never does."""
    with pytest.raises(httpx.TimeoutException):
        ask(lambda asked: drip(asked, *DRIPS[where]), SLOW)


def test_a_trickle_is_an_item_that_failed() -> None:
    with raw_server(lambda asked: drip(asked, *DRIPS["headers"])) as server:
        address = Address(server.url)
        with open_client(address, 1, trust_env=False) as client:
            asker = RetryingClient(client, address, RetryPolicy(SLOW, 10, pause=0.01), lambda: None)
            with pytest.raises(ItemError, match=f"no answer within {SLOW} seconds"):
                asker.post("/v1/chat/completions", {}, lambda content: content)


def packed(size: int, how: str) -> bytes:
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | (16 if how == "gzip" else 0))
    block = b" " * 1_000_000
    parts = [compressor.compress(block) for _ in range(size // len(block))]
    return b"".join([*parts, compressor.flush()])


@pytest.mark.parametrize("how", ["gzip", "deflate"])
def test_a_packed_answer_is_unpacked_and_counted_so(how: str) -> None:
    small = packed(2_000_000, how)
    assert ask(lambda asked: [http(small, "200 OK", f"Content-Encoding: {how}")]).content == b" " * 2_000_000
    large = packed(40_000_000, how)
    with pytest.raises(
        AnswerError, match=r"its answer has more than 33,554,432 bytes \(limit answer_bytes = 33,554,432, set by COM"
    ):
        ask(lambda asked: [http(large, "200 OK", f"Content-Encoding: {how}")])


@pytest.mark.parametrize("header", ["br", "zstd", "gzip, gzip", "nonsense"])
def test_an_answer_packed_otherwise_is_refused(header: str) -> None:
    with pytest.raises(AnswerError, match=r"its answer is packed as .*, which was not asked for"):
        ask(lambda asked: [http(b"{}", "200 OK", f"Content-Encoding: {header}")])


def endless(asked: Asked) -> Iterable[bytes]:
    yield CHUNKED
    while not asked.ended.is_set():
        yield b"10000\r\n" + b" " * 65536 + b"\r\n"


def test_bytes_without_end_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnswerError, match="more than 33,554,432 bytes"):
        ask(endless)
    monkeypatch.setenv("COMPRESS_LIMIT_ANSWER_BYTES", "1000")
    with pytest.raises(AnswerError, match=r"more than 1,000 bytes \(limit answer_bytes = 1,000"):
        ask(lambda asked: [http(b" " * 1001)])
    assert ask(lambda asked: [http(b" " * 1000)]).content == b" " * 1000


def test_a_head_without_end_is_not_taken() -> None:
    def heads(asked: Asked) -> Iterable[bytes]:
        yield b"HTTP/1.1 200 OK\r\n"
        while not asked.ended.is_set():
            yield b"X-More: " + b"x" * 8000 + b"\r\n"

    with pytest.raises(httpx.RemoteProtocolError):
        ask(heads)


def test_values_are_counted_before_they_are_made() -> None:
    answer = Response(200, httpx.Headers(), b"[" + b"{}," * 4_000_000 + b"0]")
    with pytest.raises(AnswerError, match=r"about 8,000,001 values \(limit answer_values = 4,000,000"):
        answer.json()
    assert Response(200, httpx.Headers(), b'{"a": [1, 2]}').json() == {"a": [1, 2]}


def test_no_cookie_is_kept_and_no_redirect_followed() -> None:
    def reply(asked: Asked) -> Iterable[bytes]:
        return [http({}, "307 Temporary Redirect", "Location: http://127.0.0.1:1/elsewhere", "Set-Cookie: a=b; Path=/")]

    with raw_server(reply) as server, open_http(server.url, {"Authorization": "Bearer key"}, 1, trust_env=False) as client:
        for _ in range(2):
            with exchange(client, "GET", "/v1/models", 60) as answer:
                assert answer.status == 307
        assert [b"cookie" in asked.head.lower() for asked in server.asked] == [False, False]


def test_a_proxy_of_the_environment_is_used_unless_it_is_not_for_that_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(lambda asked: [http({"by": "proxy"})]) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://user:pass@127.0.0.1:{proxy.port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "localhost")
        with open_http("http://model.invalid", {}, 1, trust_env=True) as client, exchange(client, "GET", "/x", 60) as answer:
            assert answer.json() == {"by": "proxy"}
        assert proxy.asked[0].path == "http://model.invalid/x"
        assert b"proxy-authorization: basic dxnlcjpwyxnz" in proxy.asked[0].head.lower()
        with (
            open_http("http://localhost:1", {}, 1, trust_env=True) as client,
            pytest.raises(httpx.ConnectError),
            exchange(client, "GET", "/x", 60),
        ):
            pass
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(MissingError, match=r"the proxy 127\.0\.0\.1 speaks SOCKS"):
        open_http("http://model.invalid", {}, 1, trust_env=True)


def test_a_client_that_is_closed_lets_go_of_what_another_thread_waits_for() -> None:
    """Else the thread, and its socket, would stay until the server answers or the deadline comes."""
    errors: list[Exception] = []

    def wait(client: httpx.Client) -> None:
        try:
            with exchange(client, "GET", "/x", 600):
                pass
        except httpx.HTTPError as error:
            errors.append(error)

    came = threading.Event()

    def silent(asked: Asked) -> Iterable[bytes]:
        came.set()
        asked.ended.wait()
        return []

    with raw_server(silent) as server:
        with open_http(server.url, {}, 1, trust_env=False) as client:
            waiting = threading.Thread(target=wait, args=(client,))
            waiting.start()
            assert came.wait(600)
        waiting.join(600)
        assert len(errors) == 1
        assert not waiting.is_alive()


def test_a_list_of_models_is_read_with_care() -> None:
    assert models_of({"data": [{"id": "a", "root": "/x"}]}) == [{"id": "a", "root": "/x"}]
    wrong: list[object] = [None, [], {}, *({"data": data} for data in ("abc", {"id": "a"}, ["a"], [{"id": 1}], [None]))]
    for content in wrong:
        with pytest.raises(ValueError, match="holds no list of models"):
            models_of(content)


@pytest.mark.parametrize("name", ["endpoint", "vllm"])
@pytest.mark.parametrize(
    ("content", "status"),
    [
        *((content, "200 OK") for content in (b"[1]", b'{"data": [7]}', b"[" * 100_000, b"{")),
        (b"", "302 Found"),
        (b"x", "500 No"),
    ],
)
def test_whatever_stands_for_the_models_is_one_clear_error(name: str, content: bytes, status: str, tmp_path: Path) -> None:
    headers = ("Location: http://evil.invalid/\x9b31m",) if status.startswith("302") else ()
    with raw_server(lambda asked: [http(content, status, *headers)]) as server:
        if name == "vllm":
            runtime: Any = Vllm(runtime="vllm", url=server.url)
        else:
            runtime = Endpoint(runtime="endpoint", original=EndpointModel(url=server.url, model="m"), artifacts={})
        with pytest.raises(ServerError) as caught, runtime.open(OpenContext.at(Path("recipes/demo/model"), tmp_path, Silent())):
            pass
        assert str(caught.value).startswith(server.url)
        assert "\x9b" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_answers_are_texts_that_can_be_written() -> None:
    assert answer_text(None, 1) == ""
    assert answer_text("half \ud800", 1) == "half ?"
    assert len(answer_text("x" * 1024, 1)) == 1024
    with pytest.raises(ValueError, match=r"1,025 characters where 1 tokens were asked for \(limit answer_characters = 1,024"):
        answer_text("x" * 1025, 1)
    for content in (7, ["a"], {"a": 1}, True):
        with pytest.raises(TypeError, match="no text"):
            answer_text(content, 1)


def test_tokens_are_numbers_of_a_vocabulary() -> None:
    assert token_ids([0, 151_935], 2) == [0, 151_935]
    with pytest.raises(ValueError, match="it has 3 tokens where 2 were asked for"):
        token_ids([1, 2, 3], 2)
    for wrong in (["1"], [-1], [1 << 31], [1.0], [math.inf], [None], [10**400]):
        with pytest.raises(ValueError, match="what is no token"):
            token_ids(wrong, 2)
    with pytest.raises(TypeError, match="no list"):
        token_ids("12", 2)


def test_log_probabilities_are_such() -> None:
    row = {str(token): {"logprob": -float(token)} for token in range(3)}
    assert position_of("a", 2, row, 2).top == ((0, 0.0), (1, -1.0))
    with pytest.raises(ValueError, match="3 tokens at a position where 1 were asked for"):
        position_of("a", 2, row, 1)
    for wrong in (math.nan, math.inf, 1e308, 0.5):
        with pytest.raises(ValueError, match="no log-probability"):
            position_of("a", 2, row | {"1": {"logprob": wrong}}, 2)
    with pytest.raises(ValueError, match="what is no token"):
        position_of("a", 2, row | {"-1": {"logprob": -1.0}, "7": {"logprob": -1.0}}, 5)


@pytest.mark.parametrize("told", ["²", "9" * 400, "1e5", "Fri, 31 Dec 99999 23:59:59 GMT", "0x10", "١"])
def test_no_time_to_come_back_is_a_fault_of_ours(told: str) -> None:
    """Only digits count, as they are written in ASCII."""
    count = threading.Semaphore(0)

    def reply(asked: Asked) -> Iterable[bytes]:
        count.release()
        return [http(b"busy", "500 Busy", f"Retry-After: {told.encode().decode('latin-1')}")]

    with raw_server(reply) as server:
        address = Address(server.url)
        with open_client(address, 1, trust_env=False) as client:
            asker = RetryingClient(client, address, RetryPolicy(60, 0.01, attempts=2, pause=0.001), lambda: None)
            with pytest.raises(ItemError, match="500: busy"):
                asker.post("/x", {}, json.dumps)
    assert count.acquire(blocking=False)
