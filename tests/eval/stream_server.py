"""A small server that speaks the streaming OpenAI chat API: what it says, and where it fails, is told beforehand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = Callable[[Body, int], "list[bytes] | tuple[int, str]"]
"""The pieces of a stream, or a status and a message, for a request's body and number."""


def chunk(content: str | None = None, finish: str | None = None) -> bytes:
    """Return an event with a piece of an answer; without content, the one that says who speaks."""
    delta = {"role": "assistant", "content": ""} if content is None else {"content": content}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def event(content: object) -> bytes:
    """Return a server-sent event."""
    return b"data: " + (content if isinstance(content, str) else json.dumps(content)).encode() + b"\n\n"


def whole_answer(body: Body, number: int) -> list[bytes]:
    """Return an answer of as many tokens as asked, as vLLM streams it."""
    del number
    tokens = int(body.get("max_completion_tokens") or body["max_tokens"])
    words = [chunk(f"w{place}", "length" if place == tokens - 1 else None) for place in range(tokens)]
    usage = [event({"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 3}})] if "stream_options" in body else []
    return [chunk(), *words, *usage, event("[DONE]")]


@dataclass
class StreamServer:
    """A server that runs: where, and what it was asked, in the order the requests came."""

    url: str
    asked: list[Body] = field(default_factory=lambda: list[Body]())
    headers: list[dict[str, str]] = field(default_factory=lambda: list[dict[str, str]]())
    most_at_once: int = 0
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def stream_server(reply: Reply = whole_answer) -> Generator[StreamServer]:
    """Serve on loopback while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.asked)
                state.asked.append(body)
                state.headers.append(dict(self.headers.items()))
                state.under_way += 1
                state.most_at_once = max(state.most_at_once, state.under_way)
            try:
                self._say(reply(body, number))
            finally:
                with state.lock:
                    state.under_way -= 1

        def _say(self, said: list[bytes] | tuple[int, str]) -> None:
            if isinstance(said, tuple):
                content = json.dumps({"error": {"message": said[1]}}).encode()
                self.send_response(said[0])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in said:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = StreamServer(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
