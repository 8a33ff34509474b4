"""A minimal HTTP/1.1 client for POST requests with streamed answers, which stores each received piece with its time.

A load generator shares its machine with the server that it measures. A general HTTP client takes about as long for one piece of
an answer as a small model does for a token; here a piece is stored as it arrives, and parsed after the load.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from compress.errors import UsageError
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact

_HEAD_END = b"\r\n\r\n"
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: .*)?")
_SIZE_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")
"""A chunk's size in hexadecimal digits, and extensions, which are ignored (RFC 9112, section 7.1)."""

_MAX_SIZE_LINE = 4096
"""Bytes of the line with a chunk's size and extensions."""

_MAX_INTERIM = 16
"""Interim responses (1xx) that may precede the final one."""

_PIECES_PER_TOKEN = 8
"""Accepted pieces per requested token: vLLM sends one, and each takes memory of its own."""

_SPARE_BYTES, _SPARE_PIECES = 65_536, 64
"""Accepted beside the tokens: headers, usage, the end of the stream."""

_CONNECT_SECONDS = 30
"""The time limit of a connection; a request's own limit is its caller's."""

_MAX_LENGTH_DIGITS = 15
"""Digits of a Content-Length: the number stays exact in any type."""


class StreamError(Exception):
    """The connection failed or ended within an answer, or the answer is malformed or too large; the message holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(redact(message)))


@dataclass(frozen=True)
class ResponseLimits:
    """The size limits of one answer: bytes received, and pieces."""

    bytes: int
    pieces: int

    @classmethod
    def of(cls, tokens: int) -> ResponseLimits:
        """Return the limits of an answer of so many tokens."""
        return cls(_SPARE_BYTES + tokens * limits().stream_bytes, _SPARE_PIECES + tokens * _PIECES_PER_TOKEN)


@dataclass
class Reply:
    """An HTTP response that is parsed as it arrives."""

    sent: float
    """When the request was sent, by `time.perf_counter`."""

    limits: ResponseLimits
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=lambda: list[tuple[float, bytes]]())
    """The pieces of the body, each with its time."""

    complete: bool = False
    reusable: bool = True
    """Whether the connection can be used for another request."""

    _buffer: bytearray = field(default_factory=bytearray)
    _chunked: bool = False
    _left: int | None = None
    _received: int = 0
    _interim: int = 0

    def feed(self, time_received: float, data: bytes) -> None:
        """Parse received bytes.

        Raises:
            StreamError: they are no HTTP/1.1 response, or exceed the limits.
        """
        self._received += len(data)
        if self._received > self.limits.bytes or len(self.pieces) >= self.limits.pieces:
            raise StreamError(
                f"the answer has more than {self.limits.bytes:,} bytes or {self.limits.pieces:,} pieces "
                f"({limits().set_by('stream_bytes')} a token)"
            )
        self._buffer += data
        if not self.status and not self._read_head():
            return
        body = self._unchunk() if self._chunked else self._take(self._left)
        if body:
            self.pieces.append((time_received, body))

    def close(self) -> bool:
        """Handle the connection's end; return whether the answer is complete."""
        if self.status and not self._chunked and self._left is None:
            self.complete = True
        self.reusable = False
        return self.complete

    def _take(self, left: int | None) -> bytes:
        size = len(self._buffer) if left is None else min(left, len(self._buffer))
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        if left is not None:
            self._left = left - size
            self.complete = self._left == 0
        return body

    def _read_head(self) -> bool:
        """Read the status and the headers once they are complete; interim responses (1xx) are skipped."""
        while True:
            end = self._buffer.find(_HEAD_END)
            if end > limits().head_bytes or (end < 0 and len(self._buffer) > limits().head_bytes):
                raise StreamError(f"no HTTP answer: its head does not end ({limits().set_by('head_bytes')})")
            if end < 0:
                return False
            lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
            del self._buffer[: end + len(_HEAD_END)]
            match = _STATUS_LINE.fullmatch(lines[0])
            if match is None:
                raise StreamError(f"no HTTP answer: {lines[0][:40]!r}")
            if match[1].startswith("1"):
                self._interim += 1
                if self._interim > _MAX_INTERIM:
                    raise StreamError(f"no HTTP answer: {self._interim} that only say to go on")
                continue
            self._read_headers(int(match[1]), lines[0][:8], lines[1:])
            return True

    def _read_headers(self, status: int, version: str, lines: list[str]) -> None:
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = status
        transfer_coding = headers.get("transfer-encoding", "").lower()
        self._chunked = transfer_coding == "chunked"
        length = headers.get("content-length", "")
        content_coding = headers.get("content-encoding", "identity").lower()
        if transfer_coding not in ("", "chunked", "identity") or content_coding not in ("", "identity"):
            raise StreamError(f"the answer is packed as {(transfer_coding or content_coding)[:40]!r}, which was not asked for")
        if length and not (length.isascii() and length.isdigit() and len(length) <= _MAX_LENGTH_DIGITS):
            raise StreamError(f"no HTTP answer: its length is {length[:40]!r}")
        self._left = int(length) if length and not self._chunked else None
        self.complete = self._left == 0 or status in (204, 304)
        delimited = self._chunked or self._left is not None
        self.reusable = delimited and version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"

    def _unchunk(self) -> bytes:
        """Take the chunks' content out of the buffer (RFC 9112, section 7.1).

        `_left` is None before a chunk's size, else the number of missing bytes; at 0 the line end after the content is due.
        """
        contents: list[bytes] = []
        while self._buffer and not self.complete:
            if self._left is None:
                end = self._buffer.find(b"\r\n")
                if end > _MAX_SIZE_LINE or (end < 0 and len(self._buffer) > _MAX_SIZE_LINE):
                    raise StreamError(f"no chunked HTTP answer: a chunk's size does not end within {_MAX_SIZE_LINE:,} bytes")
                if end < 0:
                    break
                self._left = _chunk_size(bytes(self._buffer[:end]))
                if self._left == 0:
                    self._left, self.complete = None, self._end_chunks(end)
                    break
                del self._buffer[: end + 2]
            elif self._left:
                contents.append(bytes(self._buffer[: self._left]))
                del self._buffer[: self._left]
                self._left -= len(contents[-1])
            elif len(self._buffer) < 2:
                break
            elif self._buffer.startswith(b"\r\n"):
                del self._buffer[:2]
                self._left = None
            else:
                raise StreamError(f"no chunked HTTP answer: {bytes(self._buffer[:40])!r} after a chunk")
        return b"".join(contents)

    def _end_chunks(self, end: int) -> bool:
        """Return whether the trailers and the empty line after the last chunk have arrived."""
        rest = bytes(self._buffer[end:])
        if len(rest) > limits().head_bytes:
            raise StreamError(f"no chunked HTTP answer: its trailers do not end ({limits().set_by('head_bytes')})")
        return rest.startswith(b"\r\n\r\n") or (_HEAD_END in rest[2:])


def _chunk_size(line: bytes) -> int:
    match = _SIZE_LINE.fullmatch(line)
    if match is None:
        raise StreamError(f"no chunked HTTP answer: {line[:40]!r}")
    return int(match[1], 16)


class Connection(asyncio.Protocol):
    """A persistent connection to a server, for one request after the other."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self._name, self._prefix = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def post(self, path: str, headers: dict[str, str], body: bytes, response_limits: ResponseLimits) -> Reply:
        """Send a body and return the answer once it is complete.

        Raises:
            StreamError: the server cannot be reached, ended the connection, or does not speak HTTP.
            UsageError: a header contains a line break.
        """
        lines = [f"POST {self._prefix}{path} HTTP/1.1", f"Host: {self._name}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise UsageError("a header holds a line's end; correct the key or the address of the server")
        head = "\r\n".join(lines).encode("latin-1", errors="replace") + _HEAD_END
        sent = time.perf_counter()
        if self._transport is None or self._transport.is_closing():
            await self._connect()
        self._waiter = asyncio.get_running_loop().create_future()
        self._reply = Reply(sent, response_limits)
        cast("asyncio.Transport", self._transport).write(head + body)
        try:
            await self._waiter
            return self._reply
        finally:
            if not (self._reply.complete and self._reply.reusable):
                self.close()
            self._reply = self._waiter = None

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def data_received(self, data: bytes) -> None:
        """Pass received bytes to the reply."""
        time_received, reply = time.perf_counter(), self._reply
        if reply is None:
            return
        try:
            reply.feed(time_received, data)
        except StreamError as error:
            self._finish(error)
        else:
            if reply.complete:
                self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the connection's end to the reply."""
        self._transport = None
        if self._reply is not None:
            self._finish(None if self._reply.close() else StreamError(f"the server ended the connection ({exc or 'no answer'})"))

    def _finish(self, error: StreamError | None) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if error is None:
            self._waiter.set_result(None)
        else:
            self._waiter.set_exception(error)

    async def _connect(self) -> None:
        loop, secure = asyncio.get_running_loop(), ssl.create_default_context() if self._secure else None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                transport, _ = await loop.create_connection(lambda: self, self._host, self._port, ssl=secure)
        except (OSError, TimeoutError) as error:
            raise StreamError(f"the server at {self._name} cannot be reached ({error or 'no answer'})") from error
        self._transport = transport
