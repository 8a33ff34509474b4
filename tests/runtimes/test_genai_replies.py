"""What onnxruntime-genai's process says, read within limits; a socket and another process stand for it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.errors import ServerError
from compress.runtimes.onnxruntime_genai.session import GenaiRequest, WorkerProcess, read_positions, read_tokens
from compress.workers.worker import run_worker

SECONDS = 600


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[WorkerProcess, socket.socket]]:
    command = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
    connection, other = socket.socketpair()
    with connection, other, run_worker("the worker", command, os.environ, tmp_path / "log") as server:
        yield WorkerProcess(connection, server, SECONDS), other


def test_lines_are_taken_one_by_one_however_they_come(ends: tuple[WorkerProcess, socket.socket]) -> None:
    worker, other = ends
    other.sendall(b'{"tokens": [1]}\n{"tok')
    other.sendall(b'ens": [2]}\n')
    assert [worker.ask(GenaiRequest("answer", "x", []))["tokens"] for _ in range(2)] == [[1], [2]]
    assert other.recv(1 << 16).count(b"\n") == 2


@pytest.mark.parametrize("line", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b"null"])
def test_a_reply_that_is_none_is_one_message(ends: tuple[WorkerProcess, socket.socket], line: bytes) -> None:
    worker, other = ends
    other.sendall(line + b"\n")
    with pytest.raises(
        ServerError, match=r"^onnxruntime-genai said what cannot be read \([^\n]+\); run compress runtime install onn"
    ):
        worker.reply(SECONDS)


def test_a_reply_without_end_is_refused(ends: tuple[WorkerProcess, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    worker, other = ends
    monkeypatch.setenv("COMPRESS_LIMIT_REPLY_BYTES", "1000")
    other.sendall(b" " * 1001)
    with pytest.raises(ServerError, match=r"more than 1,000 bytes, limit reply_bytes = 1,000, set by COMPRESS_LIMIT_REPLY_BYTES"):
        worker.reply(SECONDS)


def test_a_reply_that_has_begun_is_not_waited_for_without_end(ends: tuple[WorkerProcess, socket.socket]) -> None:
    worker, other = ends
    other.sendall(b" " * 100)
    with pytest.raises(ServerError, match=r"did not answer within 0\.1 seconds"):
        worker.reply(0.1)


@pytest.mark.parametrize("reply", [{}, {"tokens": None}, {"tokens": [1, "2"]}, {"tokens": [-1]}, {"tokens": [1, 2, 3]}])
def test_tokens_that_are_none_are_told(reply: dict[str, object]) -> None:
    with pytest.raises(ServerError, match="said what cannot be read"):
        read_tokens(reply, 2)


POSITIONS: list[object] = [
    None,
    [],
    [[5, -1.0]],
    [[6, -1.0, []]],
    [[5, None, []]],
    [[5, float("-inf"), []]],
    [[5, 10**400, []]],
    [[5, -1.0, [[-1, -1.0]]]],
    [[5, -1.0, [[1, float("nan")]]]],
    [[5, -1.0, [[1, -1.0], [2, -1.0], [3, -1.0]]]],
]


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_that_are_none_are_told(positions: object) -> None:
    assert read_positions({"positions": [[5, -1.0, [[1, -0.5]]]]}, (5,), 2)[0].top == ((1, -0.5),)
    with pytest.raises(ServerError, match="said what cannot be read"):
        read_positions({"positions": positions}, (5,), 2)
