"""HTTP/1.1 posts whose answers come in pieces, each with the moment it came: little more than a socket, so that it costs little.

A load generator shares its machine with the server that it measures. A client for every purpose takes about as long for one
piece of an answer as a small model does for a token; here a piece is noted as it comes, and taken apart after the load.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from compress.errors import UsageError

_HEAD_END = b"\r\n\r\n"
_LARGEST_HEAD = 65536
_CONNECT_SECONDS = 30


class StreamError(Exception):
    """A connection could not be made, or ended in the middle of an answer."""


@dataclass
class Reply:
    """An answer as it comes: when its request was sent, its status, and its body's pieces with the moment of each.

    `feed` takes the bytes of the connection, in whatever portions they come.
    """

    sent: float
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=lambda: list[tuple[float, bytes]]())
    whole: bool = False
    reusable: bool = True
    _buffer: bytearray = field(default_factory=bytearray)
    _chunked: bool = False
    _left: int | None = None

    def feed(self, moment: float, data: bytes) -> None:
        """Take what has come at a moment.

        Raises:
            StreamError: it is no HTTP/1.1 answer.
        """
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
            if end < 0:
                if len(self._buffer) > _LARGEST_HEAD:
                    raise StreamError("no HTTP answer: its head does not end")
                return False
            lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
            del self._buffer[: end + len(_HEAD_END)]
            parts = lines[0].split(" ", 2)
            if not parts[0].startswith("HTTP/1.") or len(parts) < 2 or not parts[1].isdigit():
                raise StreamError(f"no HTTP answer: {lines[0][:40]!r}")
            if parts[1].startswith("1"):
                continue
            self._read_headers(int(parts[1]), parts[0], lines[1:])
            return True

    def _read_headers(self, status: int, version: str, lines: list[str]) -> None:
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = status
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length", "")
        self._left = int(length) if length.isdigit() and not self._chunked else None
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
            else:
                del self._buffer[:2]
                self._left = None
        return b"".join(found)

    def _end_chunks(self, end: int) -> bool:
        """Return whether what follows the last chunk, trailers and an empty line, has come."""
        rest = bytes(self._buffer[end:])
        return rest.startswith(b"\r\n\r\n") or (_HEAD_END in rest[2:])


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError as error:
        raise StreamError(f"no chunked HTTP answer: {line[:40]!r}") from error


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

    async def post(self, path: str, headers: dict[str, str], body: bytes) -> Reply:
        """Send a body and return the answer once it is whole.

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
        self._reply = Reply(began)
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
