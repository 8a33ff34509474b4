"""HTTP/1.1 posts whose answers come in pieces, each with the moment it came: little more than a socket, so that it costs little.

A load generator shares its machine with the server that it measures. A client for every purpose takes about as long for one
piece of an answer as a small model does for a token; here a piece is noted as it comes, and taken apart after the load.
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
from compress.limits import limits
from compress.redaction import redact
from compress.untrusted import printable

_HEAD_END = b"\r\n\r\n"
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9]{2})(?: .*)?")
_SIZE_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")
"""A chunk's size, in hexadecimal digits alone, and extensions that mean nothing here (RFC 9112, section 7.1)."""
_LONGEST_LINE = 4096
_INTERIM = 16
"""How many answers that only say to go on may come before the one that counts."""
_PIECES = 8
"""Pieces for each token that was asked for: vLLM sends one, and each takes memory of its own."""
_SPARE_BYTES, _SPARE_PIECES = 65_536, 64
_CONNECT_SECONDS = 30
_DIGITS = 15


class StreamError(Exception):
    """A connection could not be made, or ended in the middle of an answer, or more came than may; the message holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(redact(message)))


@dataclass(frozen=True)
class Most:
    """How much of one answer is taken in: bytes on the wire, and pieces."""

    bytes: int
    pieces: int

    @classmethod
    def of(cls, tokens: int) -> Most:
        """Return what an answer of so many tokens may need, and some for what stands around it."""
        return cls(_SPARE_BYTES + tokens * limits().stream_bytes, _SPARE_PIECES + tokens * _PIECES)


@dataclass
class Reply:
    """An answer as it comes: when its request was sent, its status, and its body's pieces with the moment of each.

    `feed` takes the bytes of the connection, in whatever portions they come.
    """

    sent: float
    most: Most
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=lambda: list[tuple[float, bytes]]())
    whole: bool = False
    reusable: bool = True
    _buffer: bytearray = field(default_factory=bytearray)
    _chunked: bool = False
    _left: int | None = None
    _taken: int = 0
    _interim: int = 0

    def feed(self, moment: float, data: bytes) -> None:
        """Take what has come at a moment.

        Raises:
            StreamError: it is no HTTP/1.1 answer, or larger than it may be.
        """
        self._taken += len(data)
        if self._taken > self.most.bytes or len(self.pieces) >= self.most.pieces:
            raise StreamError(
                f"the answer has more than {self.most.bytes:,} bytes or {self.most.pieces:,} pieces "
                f"({limits().set_by('stream_bytes')} a token)"
            )
        self._buffer += data
        if not self.status and not self._read_head():
            return
        body = self._unchunk() if self._chunked else self._take(self._left)
        if body:
            self.pieces.append((moment, body))

    def close(self) -> bool:
        """Take the connection's end; return whether the answer is whole."""
        if self.status and not self._chunked and self._left is None:
            self.whole = True
        self.reusable = False
        return self.whole

    def _take(self, left: int | None) -> bytes:
        size = len(self._buffer) if left is None else min(left, len(self._buffer))
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        if left is not None:
            self._left = left - size
            self.whole = self._left == 0
        return body

    def _read_head(self) -> bool:
        """Read the status and the headers once they are whole; one that only says to go on is skipped."""
        while True:
            end = self._buffer.find(_HEAD_END)
            if end > limits().head_bytes or (end < 0 and len(self._buffer) > limits().head_bytes):
                raise StreamError(f"no HTTP answer: its head does not end ({limits().set_by('head_bytes')})")
            if end < 0:
                return False
            lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
            del self._buffer[: end + len(_HEAD_END)]
            found = _STATUS_LINE.fullmatch(lines[0])
            if found is None:
                raise StreamError(f"no HTTP answer: {lines[0][:40]!r}")
            if found[1].startswith("1"):
                self._interim += 1
                if self._interim > _INTERIM:
                    raise StreamError(f"no HTTP answer: {self._interim} that only say to go on")
                continue
            self._read_headers(int(found[1]), lines[0][:8], lines[1:])
            return True

    def _read_headers(self, status: int, version: str, lines: list[str]) -> None:
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = status
        coding = headers.get("transfer-encoding", "").lower()
        self._chunked = coding == "chunked"
        length = headers.get("content-length", "")
        packed = headers.get("content-encoding", "identity").lower()
        if coding not in ("", "chunked", "identity") or packed not in ("", "identity"):
            raise StreamError(f"the answer is packed as {(coding or packed)[:40]!r}, which was not asked for")
        if length and not (length.isascii() and length.isdigit() and len(length) <= _DIGITS):
            raise StreamError(f"no HTTP answer: its length is {length[:40]!r}")
        self._left = int(length) if length and not self._chunked else None
        self.whole = self._left == 0 or status in (204, 304)
        keeps = self._chunked or self._left is not None
        self.reusable = keeps and version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"

    def _unchunk(self) -> bytes:
        """Take the chunks' content out of the buffer (RFC 9112, section 7.1).

        `_left` is None before a chunk's size, else how much of its content is missing; after that comes the end of its line.
        """
        found: list[bytes] = []
        while self._buffer and not self.whole:
            if self._left is None:
                end = self._buffer.find(b"\r\n")
                if end > _LONGEST_LINE or (end < 0 and len(self._buffer) > _LONGEST_LINE):
                    raise StreamError(f"no chunked HTTP answer: a chunk's size does not end within {_LONGEST_LINE:,} bytes")
                if end < 0:
                    break
                self._left = _chunk_size(bytes(self._buffer[:end]))
                if self._left == 0:
                    self._left, self.whole = None, self._end_chunks(end)
                    break
                del self._buffer[: end + 2]
            elif self._left:
                found.append(bytes(self._buffer[: self._left]))
                del self._buffer[: self._left]
                self._left -= len(found[-1])
            elif len(self._buffer) < 2:
                break
            elif self._buffer.startswith(b"\r\n"):
                del self._buffer[:2]
                self._left = None
            else:
                raise StreamError(f"no chunked HTTP answer: {bytes(self._buffer[:40])!r} after a chunk")
        return b"".join(found)

    def _end_chunks(self, end: int) -> bool:
        """Return whether what follows the last chunk, trailers and an empty line, has come."""
        rest = bytes(self._buffer[end:])
        if len(rest) > limits().head_bytes:
            raise StreamError(f"no chunked HTTP answer: its trailers do not end ({limits().set_by('head_bytes')})")
        return rest.startswith(b"\r\n\r\n") or (_HEAD_END in rest[2:])


def _chunk_size(line: bytes) -> int:
    found = _SIZE_LINE.fullmatch(line)
    if found is None:
        raise StreamError(f"no chunked HTTP answer: {line[:40]!r}")
    return int(found[1], 16)


class Connection(asyncio.Protocol):
    """A connection to a server, kept for one request after the other."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self._name, self._prefix = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def post(self, path: str, headers: dict[str, str], body: bytes, most: Most) -> Reply:
        """Send a body and return the answer, of at most so much, once it is whole.

        Raises:
            StreamError: the server cannot be reached, ended the connection, or does not speak HTTP.
            UsageError: a header holds a line's end.
        """
        lines = [f"POST {self._prefix}{path} HTTP/1.1", f"Host: {self._name}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise UsageError("a header holds a line's end; correct the key or the address of the server")
        head = "\r\n".join(lines).encode("latin-1", errors="replace") + _HEAD_END
        began = time.perf_counter()
        if self._transport is None or self._transport.is_closing():
            await self._connect()
        self._waiter = asyncio.get_running_loop().create_future()
        self._reply = Reply(began, most)
        cast("asyncio.Transport", self._transport).write(head + body)
        try:
            await self._waiter
            return self._reply
        finally:
            if not (self._reply.whole and self._reply.reusable):
                self.close()
            self._reply = self._waiter = None

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def data_received(self, data: bytes) -> None:
        """Note what has come."""
        moment, reply = time.perf_counter(), self._reply
        if reply is None:
            return
        try:
            reply.feed(moment, data)
        except StreamError as error:
            self._tell(error)
        else:
            if reply.whole:
                self._tell(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the connection's end."""
        self._transport = None
        if self._reply is not None:
            self._tell(None if self._reply.close() else StreamError(f"the server ended the connection ({exc or 'no answer'})"))

    def _tell(self, error: StreamError | None) -> None:
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
