"""How a server is asked that fails: what is tried again, what is one item's fault, and when the whole is given up."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest

from compress.errors import ServerError
from compress.runtimes.openai_client import Address, ItemError, RetryingClient, RetryPolicy, open_client
from tests.chaos_server import MODEL, SECONDS, Manners, Refusal, StandIn, Trouble, stand_in
from tests.raw_server import mute_server

ROOT = Path(__file__).parent.parent.parent
QUICK = RetryPolicy(request_seconds=60, away_seconds=60, attempts=4, pause=0.01)
"""Quick to ask again; what must come is waited for longer than a busy machine takes."""


@contextmanager
def asker(server: StandIn, patience: RetryPolicy = QUICK, ended: threading.Event | None = None) -> Generator[RetryingClient]:
    address = Address(server.url)

    def check() -> None:
        if ended is not None and ended.is_set():
            raise ServerError("vLLM, serving x, ended.")

    with open_client(address, 8, trust_env=False) as client:
        opened = RetryingClient(client, address, patience, check)
        yield opened
        opened.close()


def ask(opened: RetryingClient, words: str) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": words}]}]}
    return opened.post("/v1/chat/completions", body, lambda content: str(content["choices"][0]["message"]["content"]))


def each(opened: RetryingClient, words: list[str], concurrency: int = 8) -> list[str]:
    return opened.each(
        words, lambda item: ask(opened, item), lambda item, fault: f"fault: {fault}", concurrency, lambda item, said: None
    )


@pytest.mark.parametrize("status", [400, 404, 413, 422, 501])
def test_what_the_server_refuses_is_asked_once(status: int) -> None:
    with stand_in(manners=Manners(statuses={"bad": Refusal(status, "no")})) as server, asker(server) as opened:
        with pytest.raises(ItemError, match=f"^{status}: no$"):
            ask(opened, "bad")
        assert server.asked.total() == 1


@pytest.mark.parametrize("status", [408, 500, 503])
def test_what_fails_is_asked_again_so_many_times(status: int) -> None:
    with stand_in(manners=Manners(statuses={"bad": Refusal(status, "no")})) as server, asker(server) as opened:
        with pytest.raises(ItemError, match=f"{status}: no"):
            ask(opened, "bad")
        assert server.asked.total() == QUICK.attempts


def test_what_is_too_slow_is_waited_for_twice() -> None:
    """The kernel takes the connections; nothing can answer."""
    with mute_server() as server, open_client(address := Address(server.url), 8, trust_env=False) as client:
        opened = RetryingClient(client, address, replace(QUICK, request_seconds=0.5), lambda: None)
        with pytest.raises(ItemError, match=r"no answer within 0\.5 seconds"):
            ask(opened, "unheard")
        assert server.connections() == 2


def test_an_answer_that_trickles_is_not_waited_for_without_end() -> None:
    """Each part comes in time; the whole does not."""
    ended = threading.Event()

    class Slow(httpx.SyncByteStream):
        def __iter__(self) -> Generator[bytes]:
            while not ended.wait(0.02):
                yield b" "

    address = Address("http://slow")
    patience = replace(QUICK, request_seconds=0.2)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Slow()))
    with (
        httpx.Client(transport=transport, base_url=address.url) as client,
        pytest.raises(ItemError, match=r"no answer within 0\.2 seconds"),
    ):
        ask(RetryingClient(client, address, patience, lambda: None), "anything")
    ended.set()


@pytest.mark.parametrize("told", ["0.3", None])
def test_being_asked_to_wait_is_no_failure(told: str | None) -> None:
    """Twenty refusals are more than an item has attempts; all threads wait as they are told."""
    with stand_in(manners=Manners(busy=20)) as server, asker(server) as opened:
        answers = each(opened, [f"question {number}" for number in range(10)], concurrency=2)
        assert all(answer.startswith("answer ") for answer in answers)
        assert server.asked.total() == 10


def test_waiting_as_told_has_an_end() -> None:
    with (
        stand_in(manners=Manners(busy=10**6)) as server,
        asker(server, replace(QUICK, away_seconds=0.2)) as opened,
        pytest.raises(ServerError, match=r"has asked to wait for more than 0.2 seconds \(429: slow down\); lower concurrency"),
    ):
        ask(opened, "question")


@pytest.mark.parametrize("header", ["0.2", formatdate(time.time() + 86400, usegmt=True)], ids=["seconds", "date"])
def test_a_server_says_when_to_come_back(header: str) -> None:
    """A day is too long: it counts as long as a server is waited for that does not answer at all."""
    refusal = Refusal(503, "restarting", {"Retry-After": header})
    patience = replace(QUICK, away_seconds=0.3, attempts=3)
    with stand_in(manners=Manners(statuses={"later": refusal})) as server, asker(server, patience) as opened:
        began = time.monotonic()
        with pytest.raises(ItemError, match="503: restarting"):
            ask(opened, "later")
        assert time.monotonic() - began >= 2 * 0.2
        assert server.asked.total() == 3


@pytest.mark.parametrize("header", ["soon", "-1", ""])
def test_a_time_to_come_back_that_cannot_be_read_is_none(header: str) -> None:
    refusal = Refusal(503, "restarting", {"Retry-After": header})
    with stand_in(manners=Manners(statuses={"later": refusal})) as server, asker(server) as opened:
        with pytest.raises(ItemError, match="503: restarting"):
            ask(opened, "later")
        assert server.asked.total() == QUICK.attempts


def test_a_server_that_comes_back_is_waited_for() -> None:
    with stand_in() as server, asker(server) as opened:
        assert ask(opened, "first").startswith("answer")
        server.close()
        back = threading.Timer(0.3, server.back)
        back.start()
        answers = each(opened, [f"question {number}" for number in range(30)])
        back.join()
        assert all(answer.startswith("answer ") for answer in answers)


def test_a_server_that_stays_away_ends_it() -> None:
    with stand_in() as server, asker(server, replace(QUICK, away_seconds=0.3)) as opened:
        server.close()
        with pytest.raises(ServerError) as caught:
            each(opened, [f"question {number}" for number in range(30)])
    assert str(caught.value) == (
        f"{server.url}: nothing has answered for 0.3 seconds; start the server again, and run the same command again: what has "
        "been answered is kept"
    )


def test_a_process_that_ended_is_told_at_once() -> None:
    ended = threading.Event()
    with stand_in() as server, asker(server, ended=ended) as opened:
        server.close()
        ended.set()
        with pytest.raises(
            ServerError, match=r"vLLM, serving x, ended\.\nTo go on, run the same command again: what has been answ"
        ):
            each(opened, [f"question {number}" for number in range(30)])


def test_failures_one_after_the_other_end_it() -> None:
    with stand_in(manners=Manners(statuses={"bad": Refusal(400, "no images here")})) as server, asker(server) as opened:
        words = [f"good {number}" for number in range(20)] + [f"bad {number}" for number in range(1000)]
        with pytest.raises(ServerError, match=r"16 items failed one after the other \(the last: 400: no images here\)") as caught:
            each(opened, words, concurrency=4)
        assert "run the same command again" in str(caught.value)
        assert 36 <= server.asked.total() < len(words)


def test_failures_between_answers_do_not() -> None:
    with stand_in(manners=Manners(statuses={"bad": Refusal(400, "no")})) as server, asker(server) as opened:
        words = [f"{'bad' if number % 3 else 'good'} {number}" for number in range(90)]
        answers = each(opened, words, concurrency=4)
    assert [answer.startswith("fault: 400: no") for answer in answers] == [number % 3 > 0 for number in range(90)]


def test_a_fault_of_ours_is_raised_as_it_is(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)

    def divide(item: str) -> str:
        return item[len(item) // 0 :]

    with stand_in() as server, asker(server) as opened, pytest.raises(ZeroDivisionError):
        opened.each(["a", "b"], divide, lambda item, fault: fault, 2, lambda item, said: None)
    assert not list(recwarn)


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # where this runs in the background it is ignored from the start
from compress.runtimes.openai_client import Address, RetryingClient, RetryPolicy, open_client
from tests.runtimes.test_openai_client import ask, each
address = Address(sys.argv[1])
patience = RetryPolicy(request_seconds=600, away_seconds=600)
with open_client(address, 8, trust_env=False) as client:
    each(RetryingClient(client, address, patience, lambda: None), [str(number) for number in range(8)], 4)
"""


def test_an_interrupt_ends_the_process_while_the_server_is_busy() -> None:
    """The server never answers; threads that wait for it must not keep the process."""
    with stand_in(Trouble(hold_after=0)) as server:
        command = [sys.executable, "-c", PROGRAM, server.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}) as process:
            try:
                server.wait_asked(4)
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=SECONDS)
            finally:
                process.kill()
        assert process.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in said
