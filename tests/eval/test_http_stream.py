"""HTTP answers taken apart as they come, in whatever portions."""

from __future__ import annotations

import asyncio

import pytest

from compress.errors import UsageError
from compress.eval.http_stream import Connection, Reply, StreamError
from tests.eval.stream_server import event, stream_server

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nB;name=value\r\n, 0\r\n\r\n wor\r\n2\r\nld\r\n0\r\nTrailer: yes\r\n\r\n"
)


def _feed(data: bytes, size: int) -> Reply:
    reply = Reply(0.0)
    for moment, start in enumerate(range(0, len(data), size)):
        assert not reply.whole, "an answer is whole with its last byte, not before"
        reply.feed(float(moment), data[start : start + size])
    return reply


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_are_put_together_however_they_are_cut(size: int) -> None:
    reply = _feed(CHUNKED, size)
    assert reply.whole
    assert reply.reusable
    assert reply.status == 200
    assert b"".join(piece for _, piece in reply.pieces) == b"hello, 0\r\n\r\n world"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_body_of_a_given_length_ends_there(size: int) -> None:
    reply = _feed(b"HTTP/1.1 503 Busy\r\ncontent-length: 5\r\n\r\nhello", size)
    assert (reply.whole, reply.status, b"".join(piece for _, piece in reply.pieces)) == (True, 503, b"hello")


def test_body_without_a_length_ends_with_the_connection() -> None:
    reply = _feed(b"HTTP/1.0 200 OK\r\n\r\nhello", 4)
    assert not reply.whole
    assert reply.close()
    assert not reply.reusable
    broken = _feed(CHUNKED[:-2], 1000)
    assert not broken.close()


def test_pieces_have_the_moment_they_came() -> None:
    reply = Reply(0.0)
    reply.feed(1.0, HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc")
    reply.feed(2.0, b"\r\n2\r\nde\r\n")
    reply.feed(3.0, b"0\r\n\r\n")
    assert reply.pieces == [(1.0, b"abc"), (2.0, b"de")]
    assert reply.whole


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-OpenSSH\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", b"a" * 70_000, b"HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with pytest.raises(StreamError, match=r"no (chunked )?HTTP answer"):
        Reply(0.0).feed(0.0, data)


def test_connection_serves_one_request_after_the_other() -> None:
    async def ask(url: str) -> list[tuple[int, bytes]]:
        connection = Connection(f"{url}/deep")
        found: list[tuple[int, bytes]] = []
        for _ in range(2):
            reply = await connection.post("/path", {"X-Name": "value"}, b'{"max_tokens": 1}')
            found.append((reply.status, b"".join(piece for _, piece in reply.pieces)))
        connection.close()
        await asyncio.sleep(0)
        return found

    with stream_server(lambda body, number: [event({"number": number}), event(body)]) as server:
        assert asyncio.run(ask(server.url)) == [(200, event({"number": n}) + event({"max_tokens": 1})) for n in range(2)]
        assert [headers["X-Name"] for headers in server.headers] == ["value"] * 2


def test_key_with_a_lines_end_is_not_sent() -> None:
    with pytest.raises(UsageError, match="a header holds a line's end"):
        asyncio.run(Connection("http://127.0.0.1:1").post("/", {"Authorization": "Bearer a\r\nX: y"}, b""))
