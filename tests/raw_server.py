"""A server on loopback whose bytes are its own: what it sends, and when, need be no HTTP."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Reply = Callable[["Asked"], Iterable[bytes]]
"""The bytes that a request is answered with, sent one after the other; then the connection ends."""


@dataclass(frozen=True)
class Asked:
    """A request: its first line's method and path, its head as it came, its body, and what is set when the server ends."""

    method: str
    path: str
    head: bytes
    body: bytes
    ended: threading.Event


@dataclass
class RawServer:
    """A server that runs: where, and the requests that came."""

    port: int
    asked: list[Asked] = field(default_factory=lambda: list[Asked]())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def http(content: object, status: str = "200 OK", *headers: str) -> bytes:
    """Return a whole answer; what is no bytes is its JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def drip(asked: Asked, first: bytes, then: bytes, seconds: float = 0.01) -> Generator[bytes]:
    """Give some bytes, and then others again and again, now and then, until the server ends or the client has gone."""
    yield first
    while not asked.ended.wait(seconds):
        yield then


def _read(connection: socket.socket, ended: threading.Event) -> Asked | None:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(1 << 16)):
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length and (more := connection.recv(1 << 16)):
        body += more
    method, path = head.decode("latin-1").split(" ")[:2]
    return Asked(method, path, head, body, ended)


@contextmanager
def raw_server(reply: Reply) -> Generator[RawServer]:
    """Serve while the context lasts."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    server = RawServer(listener.getsockname()[1])
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if (asked := _read(connection, ended)) is None:
                return
            server.asked.append(asked)
            for part in reply(asked):
                connection.sendall(part)

    def listen() -> None:
        with suppress(OSError):
            while not ended.is_set():
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextmanager
def absent_server() -> Generator[str]:
    """Give the URL of a port where nothing listens, and where nothing else can while the context lasts."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@dataclass(frozen=True)
class MuteServer:
    """A port that takes every connection, as the kernel does it, and where nothing answers."""

    url: str
    listener: socket.socket

    def connections(self) -> int:
        """Return how many connections were made, and forget them."""
        self.listener.setblocking(False)
        count = 0
        with suppress(BlockingIOError):
            while True:
                self.listener.accept()[0].close()
                count += 1
        return count


@contextmanager
def mute_server() -> Generator[MuteServer]:
    """Listen while the context lasts, and never answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield MuteServer(f"http://127.0.0.1:{listener.getsockname()[1]}", listener)
