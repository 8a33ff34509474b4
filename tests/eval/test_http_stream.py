"""HTTP answers taken apart as they come, in whatever portions."""

from __future__ import annotations

import asyncio

import pytest

from compress.errors import UsageError
from compress.eval.latency.http_stream import Connection, Reply, ResponseLimits, StreamError
from tests.eval.stream_server import event, stream_server

MOST = ResponseLimits(1_000_000, 1_000)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nB;name=value\r\n, 0\r\n\r\n wor\r\n2\r\nld\r\n0\r\nTrailer: yes\r\n\r\n"
)


def _feed(data: bytes, size: int) -> Reply:
    reply = Reply(0.0, MOST)
    for moment, start in enumerate(range(0, len(data), size)):
        assert not reply.complete, "an answer is whole with its last byte, not before"
        reply.feed(float(moment), data[start : start + size])
    return reply


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_are_put_together_however_they_are_cut(size: int) -> None:
    reply = _feed(CHUNKED, size)
    assert reply.complete
    assert reply.reusable
    assert reply.status == 200
    assert b"".join(piece for _, piece in reply.pieces) == b"hello, 0\r\n\r\n world"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_body_of_a_given_length_ends_there(size: int) -> None:
    reply = _feed(b"HTTP/1.1 503 Busy\r\ncontent-length: 5\r\n\r\nhello", size)
    assert (reply.complete, reply.status, b"".join(piece for _, piece in reply.pieces)) == (True, 503, b"hello")


def test_body_without_a_length_ends_with_the_connection() -> None:
    reply = _feed(b"HTTP/1.0 200 OK\r\n\r\nhello", 4)
    assert not reply.complete
    assert reply.close()
    assert not reply.reusable
    broken = _feed(CHUNKED[:-2], 1000)
    assert not broken.close()


def test_pieces_have_the_moment_they_came() -> None:
    reply = Reply(0.0, MOST)
    reply.feed(1.0, HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc")
    reply.feed(2.0, b"\r\n2\r\nde\r\n")
    reply.feed(3.0, b"0\r\n\r\n")
    assert reply.pieces == [(1.0, b"abc"), (2.0, b"de")]
    assert reply.complete


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-OpenSSH\r\n\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", b"a" * 70_000, b"HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with pytest.raises(StreamError, match="no HTTP answer"):
        Reply(0.0, MOST).feed(0.0, data)


def chunked(*lines: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"\r\n".join(lines) + b"\r\n"


@pytest.mark.parametrize(
    "size", [b"-5", b"+5", b"0x5", b" 5", b"5_0", b"", b"\xb2", b"5 5", b"f" * 17, b"5\n", b"0" * 20, b";x"], ids=repr
)
def test_sizes_of_chunks_are_hexadecimal_digits_alone(size: bytes) -> None:
    """Python reads most of these as numbers, one of them below 0."""
    with pytest.raises(StreamError, match=r"no HTTP answer: (.*[Cc]hunk|Invalid header)"):
        Reply(0.0, MOST).feed(0.0, chunked(size, b"hello"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (chunked(b"5", b"hello!"), "Expected LF after chunk data"),
        (chunked(b"5;" + b"x" * 100_000), "bytes without content"),
        (chunked(b"5;" + b"x" * 100_000, b"hello"), "bytes without content"),
        (chunked(b"0", *[b"X-More: 1"] * 10_000), "bytes without content"),
        (HEAD + b"X: " + b"x" * 90_000 + b"\r\n\r\n", "bytes without content"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20, "that only say to go on"),
        (HEAD + b"Content-Length: -1\r\n\r\n", "Invalid character in Content-Length"),
        (HEAD + b"Content-Length: \xb2\r\n\r\n", "Invalid character in Content-Length"),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", "Content-Length overflow"),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "no HTTP answer"),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "packed as 'gzip, chunked'"),
        (HEAD + b"Content-Encoding: gzip\r\n\r\n", "packed as 'gzip'"),
        (b"HTTP/1.1 \xb2\xb2\xb2 x\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 999 x\r\n\r\n", "no HTTP answer"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "no HTTP answer"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", "no HTTP answer"),
        (HEAD + b"\r\n" + b"x" * 1_000_000, "more than 1,000,000 bytes"),
    ],
)
def test_what_has_no_end_or_no_measure_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(StreamError, match=words):
        Reply(0.0, MOST).feed(0.0, data)


@pytest.mark.parametrize("head", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"])
@pytest.mark.parametrize("size", [1000, 40])
def test_bytes_after_an_answer_are_no_part_of_it_and_end_the_connection(head: bytes, size: int) -> None:
    data, reply = HEAD + head + b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", Reply(0.0, MOST)
    for start in range(0, len(data), size):
        reply.feed(0.0, data[start : start + size])
    assert (reply.complete, reply.reusable, reply.status) == (True, False, 200)
    assert b"".join(piece for _, piece in reply.pieces) == b"hello"


def test_pieces_are_counted() -> None:
    """Each takes memory of its own, however small."""
    reply = Reply(0.0, ResponseLimits(1_000_000, 10))
    reply.feed(0.0, HEAD + b"\r\n")
    for _ in range(10):
        reply.feed(0.0, b"x")
    with pytest.raises(StreamError, match=r"more than 1,000,000 bytes or 10 pieces \(limit stream_bytes"):
        reply.feed(0.0, b"x")
    assert ResponseLimits.of(100).bytes >= 100 * 4096
    assert ResponseLimits.of(100).pieces > 100


def test_an_error_of_a_stream_shows_no_control_character() -> None:
    with pytest.raises(StreamError) as caught:
        Reply(0.0, MOST).feed(0.0, b"\x1b[2J\x9b31m\r\n\r\n")
    assert "\x1b" not in str(caught.value)
    assert "\x9b" not in str(caught.value)


def test_connection_serves_one_request_after_the_other() -> None:
    async def ask(url: str) -> list[tuple[int, bytes]]:
        connection = Connection(f"{url}/deep")
        found: list[tuple[int, bytes]] = []
        for _ in range(2):
            reply = await connection.post("/path", {"X-Name": "value"}, b'{"max_tokens": 1}', MOST)
            found.append((reply.status, b"".join(piece for _, piece in reply.pieces)))
        connection.close()
        await asyncio.sleep(0)
        return found

    with stream_server(lambda body, number: [event({"number": number}), event(body)]) as server:
        assert asyncio.run(ask(server.url)) == [(200, event({"number": n}) + event({"max_tokens": 1})) for n in range(2)]
        assert [headers["X-Name"] for headers in server.headers] == ["value"] * 2


def test_key_with_a_lines_end_is_not_sent() -> None:
    with pytest.raises(UsageError, match="a header holds a line's end"):
        asyncio.run(Connection("http://127.0.0.1:1").post("/", {"Authorization": "Bearer a\r\nX: y"}, b"", MOST))
