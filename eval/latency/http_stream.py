"""A minimal HTTP/1.1 client for POST requests with streamed answers, which stores each received piece with its time.

A load generator shares its machine with the server that it measures. A general HTTP client takes about as long for one piece of
an answer as a small model does for a token; here a piece is stored as it arrives, and parsed after the load.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from compress.errors import UsageError
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact

_HEAD_END = b"\r\n\r\n"
_OK, _MAX_STATUS = 200, 599
"""The statuses of a final response."""

_SLICE = 16_384
"""Bytes that are parsed at once: limits that are judged between them are exceeded by less than that."""

_MAX_INTERIM = 16
"""Interim responses (1xx) that may precede the final one: HTTP bounds them by nothing, and each is parsed in vain."""

_PIECES_PER_TOKEN = 8
"""Accepted pieces per requested token: vLLM sends one, and each takes memory of its own."""

_SPARE_BYTES, _SPARE_PIECES = 65_536, 64
"""Accepted beside the tokens: headers, usage, the end of the stream."""

_CONNECT_SECONDS = 30
"""The time limit of a connection; a request's own limit is its caller's. A server under load may be slow to accept."""


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

    _message: _Message = field(init=False, repr=False)
    _received: int = 0
    _idle: int = 0
    """Bytes received since the last that belong to the body."""

    def __post_init__(self) -> None:
        self._message = _Message()

    def feed(self, time_received: float, data: bytes) -> None:
        """Parse received bytes.

        Raises:
            StreamError: they are no HTTP/1.1 response, or exceed the limits.
        """
        self._received += len(data)
        # Also by pieces: each is a Python object, so that a server sending byte by byte would take a hundred times its bytes.
        if self._received > self.limits.bytes or len(self.pieces) >= self.limits.pieces:
            raise StreamError(
                f"the answer has more than {self.limits.bytes:,} bytes or {self.limits.pieces:,} pieces "
                f"({limits().set_by('stream_bytes')} a token)"
            )
        message = self._message
        # In slices, as limits on heads and empty chunks are judged between them.
        for start in range(0, len(data), _SLICE):
            self._parse(data[start : start + _SLICE])
        self.status, self.complete, self.reusable = message.status, message.complete, message.reusable
        if message.content:
            # The time of reception, taken before parsing: what is measured is the server, not this parser.
            self.pieces.append((time_received, b"".join(message.content)))
            message.content.clear()

    def close(self) -> bool:
        """Handle the connection's end; return whether the answer is complete."""
        self.complete = self.complete or self._message.ends_with_connection
        self.reusable = False
        return self.complete

    def _parse(self, data: bytes) -> None:
        message, pieces = self._message, len(self._message.content)
        try:
            message.parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            message.reusable = False
            if not message.complete:
                begin = "" if message.status else f", in {data[:40].decode('latin-1')!r}"
                raise StreamError(f"no HTTP answer: {error}{begin}") from None
        if message.fault:
            raise StreamError(message.fault)
        self._idle = 0 if len(message.content) > pieces or message.complete else self._idle + len(data)
        if self._idle and self._idle > limits().head_bytes:  # the limit takes longer to read than a piece to parse
            raise StreamError(f"no HTTP answer: {self._idle:,} bytes without content ({limits().set_by('head_bytes')})")


class _Message:
    """What the parser has read of an answer; interim responses (1xx) before it are skipped, and whatever follows it."""

    def __init__(self) -> None:
        self.parser = HttpResponseParser(self)
        self.status = 0
        self.content: list[bytes] = []
        self.complete = False
        self.reusable = True
        self.ends_with_connection = False
        self.fault = ""
        self._headers: dict[str, str] = {}
        self._interim = 0

    def on_message_begin(self) -> None:
        """Forget an interim response's headers."""
        if self.complete:
            self.reusable = False
        self._headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header, not a trailer."""
        # After the head come trailers, which must not change how the body is read.
        if not self.status:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip().lower()

    def on_headers_complete(self) -> None:
        """Judge the head."""
        if self.complete:
            return
        status, version = self.parser.get_status_code(), self.parser.get_http_version()
        if status < _OK:
            self._interim += 1
            self.fault = f"no HTTP answer: {self._interim} that only say to go on" if self._interim > _MAX_INTERIM else ""
            return
        self.status = status
        transfer, content = self._headers.get("transfer-encoding", ""), self._headers.get("content-encoding", "")
        if version not in ("1.0", "1.1") or status > _MAX_STATUS:
            self.fault = f"no HTTP answer: its status is {status}, of HTTP/{version}"
        elif transfer not in ("", "chunked", "identity") or content not in ("", "identity"):
            self.fault = f"the answer is packed as {(transfer or content)[:40]!r}, which was not asked for"
        # HTTP/1.1, section 6.3: a body without a length or chunks ends where the connection does.
        self.ends_with_connection = transfer != "chunked" and "content-length" not in self._headers
        self.reusable = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Store a part of the body."""
        if not self.complete:
            self.content.append(body)

    def on_message_complete(self) -> None:
        """Mark the answer's end."""
        self.complete = self.status > 0


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
        # A key read from a file often ends with a line break, which would split the request (header injection).
        if any("\r" in line or "\n" in line for line in lines):
            raise UsageError("a header holds a line's end; correct the key or the address of the server")
        head = "\r\n".join(lines).encode("latin-1", errors="replace") + _HEAD_END
        # Before connecting: a client's first request pays for that, as `vllm bench serve` counts it.
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
