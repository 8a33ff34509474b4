"""A stand-in for a server with an OpenAI-compatible API, with the troubles that real ones have, as often as it is told to.

It answers a question by a hash of its words and images, so that a wrong or exchanged answer is seen; and it counts what it was
asked, and what it answered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, cast

from compress.data.prompts import Prompt

MODEL = "served"
SECONDS = 600
"""How long anything that must come is waited for: longer than the busiest machine takes."""
MALFORMED = (b"{", b"<html>down</html>", b'{"choices": []}', b'{"choices": [{"message": {"content": 7}}]}', b"[1, 2]")


def digest_of(text: str, images: list[bytes] | tuple[bytes, ...]) -> str:
    """Return what a question is known by."""
    return hashlib.sha256(b"\0".join([text.encode(), *images])).hexdigest()


def answer_to(prompt: Prompt) -> str:
    """Return what the server answers to a prompt."""
    return f"answer {digest_of(prompt.text, prompt.images)[:16]}"


@dataclass
class Trouble:
    """How often, as shares of all requests, it fails in which way; which ones, `seed` decides, whatever order they come in.

    A stalled request is not answered at all. After `restart_after` requests it goes away, once, for `down` seconds. After
    `hold_after` answers, it answers nothing until `released`.
    """

    failing: float = 0.0
    resetting: float = 0.0
    stalling: float = 0.0
    malformed: float = 0.0
    truncated: float = 0.0
    restart_after: int | None = None
    down: float = 0.3
    hold_after: int | None = None
    seed: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def of(self, digest: str, attempt: int) -> str | None:
        """Return what befalls a question when it is asked for the `attempt`-th time."""
        drawn = int(hashlib.sha256(f"{self.seed}:{attempt}:{digest}".encode()).hexdigest()[:12], 16) / 16**12
        stalling = self.stalling if attempt == 1 else 0.0
        shares = {
            "stall": stalling,
            "fail": self.failing,
            "reset": self.resetting,
            "malform": self.malformed,
            "truncate": self.truncated,
        }
        for kind, share in shares.items():
            if drawn < share:
                return kind
            drawn -= share
        return None


@dataclass(frozen=True)
class Refusal:
    """What it says instead of an answer."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=lambda: dict[str, str]())


@dataclass
class Manners:
    """What it serves, the key it wants, and what it refuses questions with that hold certain words."""

    models: tuple[str, ...] = (MODEL,)
    key: str | None = None
    tells_models: bool = True
    models_said: object = None
    """What it says that it serves, in place of a list as the API has it."""
    version: str | None = None
    statuses: dict[str, Refusal] = field(default_factory=lambda: dict[str, Refusal]())
    busy: int = 0
    """How many requests are refused with 429 at first."""


class StandIn:
    """The server, while it runs; `asked` and `answered` count questions by their digest."""

    def __init__(self, trouble: Trouble, manners: Manners) -> None:
        self.trouble = trouble
        self.manners = manners
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._restarted = False
        self._stopping = threading.Event()
        self._http = self._listen(0)
        self.port = int(self._http.server_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait(self, answers: int) -> None:
        """Wait until so many questions are answered."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.answered.total() >= answers, SECONDS)

    def wait_asked(self, requests: int) -> None:
        """Wait until so many questions were asked."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.asked.total() >= requests, SECONDS)

    def close(self) -> None:
        """Go away, and do not come back."""
        self._leave()
        self._stopping.set()
        self.release()

    def back(self) -> None:
        """Listen at the same port again after `close`."""
        self._stopping.clear()
        self._http = self._listen(self.port)

    def _listen(self, port: int) -> ThreadingHTTPServer:
        stand_in = self

        class Handler(_Handler):
            server_of = stand_in

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Keep quiet about connections that ended."""

        http = Http(("127.0.0.1", port), Handler)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return http

    def _leave(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        with self.changed:
            held = list(self._connections)
        for connection in held:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # what was sent still arrives

    def _restart(self) -> None:
        self._leave()
        self.happened["restart"] += 1
        if not self._stopping.wait(self.trouble.down):
            self._http = self._listen(self.port)

    def take(self, digest: str, body: dict[str, Any]) -> int:
        """Count a question; return how often it was asked so far."""
        with self.changed:
            self.asked[digest] += 1
            self.bodies.append(body)
            self.changed.notify_all()
            due = self.trouble.restart_after is not None and self.asked.total() >= self.trouble.restart_after
            begin = due and not self._restarted
            self._restarted = self._restarted or begin
            if self.trouble.hold_after is not None and self.answered.total() >= self.trouble.hold_after:
                self.changed.wait_for(self.trouble.released.is_set, SECONDS)
            attempt = self.asked[digest]
        if begin:
            threading.Thread(target=self._restart, daemon=True).start()
        return attempt

    def refuse(self) -> bool:
        """Return whether this request is one too many."""
        with self.changed:
            self.manners.busy -= 1
            return self.manners.busy >= 0

    def note(self, digest: str) -> None:
        """Count an answer."""
        with self.changed:
            self.answered[digest] += 1
            self.changed.notify_all()

    def release(self) -> None:
        """Answer again after `hold_after`."""
        self.trouble.released.set()
        with self.changed:
            self.changed.notify_all()

    def stall(self) -> None:
        """Wait until the server ends."""
        self._stopping.wait(120)

    def enter(self, connection: socket.socket) -> None:
        """Know a connection, to end it with the server."""
        with self.changed:
            self._connections.add(connection)

    def leave(self, connection: socket.socket) -> None:
        """Forget a connection."""
        with self.changed:
            self._connections.discard(connection)


class _Handler(BaseHTTPRequestHandler):
    server_of: ClassVar[StandIn]
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server_of.enter(self.connection)

    def finish(self) -> None:
        self.server_of.leave(self.connection)
        with suppress(OSError, ValueError):
            super().finish()

    def do_GET(self) -> None:
        manners = self.server_of.manners
        if self._lacks_key():
            return
        if self.path == "/v1/models" and manners.tells_models:
            content = manners.models_said or {
                "object": "list",
                "data": [{"id": name, "object": "model"} for name in manners.models],
            }
            self._send(200, content)
        elif self.path == "/version" and manners.version is not None:
            self._send(200, {"version": manners.version})
        else:
            self._send(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._lacks_key():
            return
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": "Not Found"}})
            return
        body = cast("dict[str, Any]", json.loads(content))
        text, images = _question(body)
        if self.server_of.refuse():
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
            return
        digest = digest_of(text, images)
        attempt = self.server_of.take(digest, body)
        refused = next((refusal for words, refusal in self.server_of.manners.statuses.items() if words in text), None)
        if refused is not None:
            self._send(refused.status, {"error": {"message": refused.message}}, refused.headers)
            return
        kind = self.server_of.trouble.of(digest, attempt)
        if kind is not None:
            self.server_of.happened[kind] += 1
            self._misbehave(kind, digest)
            return
        said = {"role": "assistant", "content": f"answer {digest[:16]}"}
        self._send(200, {"choices": [{"index": 0, "message": said, "finish_reason": "stop"}]})
        self.server_of.note(digest)

    def _misbehave(self, kind: str, digest: str) -> None:
        match kind:
            case "fail":
                self._send(500, {"error": {"message": "the engine stumbled"}})
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.server_of.leave(self.connection)
                os.close(self.connection.detach())
                self.close_connection = True
            case "stall":
                self.server_of.stall()
                self.close_connection = True
            case "malform":
                self._send_bytes(200, MALFORMED[int(digest[:4], 16) % len(MALFORMED)], {})
            case _:
                whole = json.dumps({"choices": [{"message": {"content": "cut off"}}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                self.wfile.write(whole[: len(whole) // 2])
                self.wfile.flush()
                self.close_connection = True

    def _lacks_key(self) -> bool:
        key = self.server_of.manners.key
        given = self.headers.get("Authorization", "")
        if key is None or given == f"Bearer {key}":
            return False
        self._send(401, {"error": {"message": f"Incorrect API key provided: {given.removeprefix('Bearer ')}"}})
        return True

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(content).encode(), headers or {})

    def _send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        del format, args


def _question(body: dict[str, Any]) -> tuple[str, list[bytes]]:
    parts = cast("list[dict[str, Any]]", body["messages"][0]["content"])
    images = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts if part["type"] == "image_url"]
    return next(str(part["text"]) for part in parts if part["type"] == "text"), images


@contextmanager
def stand_in(trouble: Trouble | None = None, manners: Manners | None = None) -> Generator[StandIn]:
    """Run a server on loopback while the context is open."""
    server = StandIn(trouble or Trouble(), manners or Manners())
    try:
        yield server
    finally:
        server.close()
