"""An ONNX artifact behind an OpenAI-compatible API on loopback: a module that is run, with the JSON of a `Job` as its argument.

It offers what load is put on by: `/health`, `/v1/models` and `/v1/chat/completions`, streamed token by token or whole. Answers are
greedy, and made one after the other: a request waits until those before it have ended.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, cast

from compress.errors import CompressError, DataError
from compress.progress import Silent
from compress.runtimes.onnxruntime_graph import choose_engine
from compress.runtimes.onnxruntime_session import OnnxruntimeSession, OnnxruntimeSettings, Streamed, load
from compress.runtimes.runtime import OpenContext, Prompt

KEY = "COMPRESS_SERVER_KEY"
"""The environment variable that holds the key which requests are to name."""

_LONGEST_ANSWER = 256
"""How many tokens an answer has at most where a request does not say."""
_LARGEST_BODY = 1 << 30
_DATA_URL = "data:"
_HALF = "\ufffd"
"""What stands for a character of which only some bytes are there yet."""


@dataclass(frozen=True)
class ServerJob:
    """What is served: the artifact, the folder of its graphs, the name it goes by, and where."""

    artifact: str
    graphs: str
    model: str
    port: int
    settings: dict[str, Any]
    trust_remote_code: bool


class RequestError(Exception):
    """A request that is not answered: the HTTP status, and why."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class ServerRequest:
    """What is asked: a prompt, how many tokens the answer has at most, and how it is sent."""

    prompt: Prompt
    max_new_tokens: int
    ignore_eos: bool
    stream: bool
    usage: bool


def read_request(body: object, model: str) -> ServerRequest:
    """Read the body of a request for a chat completion: one turn of the user's, of text and images as data URLs.

    Raises:
        RequestError: it is none, names another model, or asks for what is not offered.
    """
    if not isinstance(body, dict):
        raise RequestError(400, "the body is no JSON object")
    given = cast("dict[str, Any]", body)
    if given.get("model", model) != model:
        raise RequestError(404, f"the model {given['model']!r} is not served here, only {model}")
    for key, plain in {"temperature": 0, "n": 1, "logprobs": False, "tools": None}.items():
        if given.get(key) not in (plain, None):
            raise RequestError(400, f"{key}: {given[key]!r} is not offered: answers are greedy, one each; leave it out")
    most = given.get("max_completion_tokens") or given.get("max_tokens") or _LONGEST_ANSWER
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise RequestError(400, f"max_tokens: {most!r} is no number of tokens")
    options = given.get("stream_options")
    return ServerRequest(
        prompt=_prompt(given.get("messages")),
        max_new_tokens=most,
        ignore_eos=bool(given.get("ignore_eos")),
        stream=bool(given.get("stream")),
        usage=isinstance(options, dict) and bool(cast("dict[str, Any]", options).get("include_usage")),
    )


def _prompt(messages: object) -> Prompt:
    turns = cast("list[Any]", messages) if isinstance(messages, list) else []
    if len(turns) != 1 or not isinstance(turns[0], dict) or cast("dict[str, Any]", turns[0]).get("role") != "user":
        raise RequestError(400, "messages: one turn of the user's is answered here, and nothing else")
    content: Any = cast("dict[str, Any]", turns[0]).get("content")
    parts = cast("list[Any]", [{"type": "text", "text": content}] if isinstance(content, str) else content)
    try:
        texts = [str(part["text"]) for part in parts if part["type"] == "text"]
        images = [_image(str(part["image_url"]["url"])) for part in parts if part["type"] == "image_url"]
    except (KeyError, TypeError) as error:
        raise RequestError(400, "messages: the content is neither text nor a list of text and image_url parts") from error
    if len(texts) + len(images) != len(parts):
        raise RequestError(400, "messages: has parts that are neither text nor image_url")
    return Prompt("request", "\n".join(texts), tuple(images))


def _image(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not head.startswith(_DATA_URL) or not head.endswith(";base64"):
        raise RequestError(400, "image_url: give images as data URLs in base64; nothing is fetched here")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RequestError(400, f"image_url: no base64 ({error})") from error


class Wording:
    """Makes text of an answer's tokens as they come; `pieces` of it, one after the other, are the answer."""

    def __init__(self, session: OnnxruntimeSession) -> None:
        self._session = session
        self.tokens: list[int] = []
        self._said = ""
        self._start = self._read = 0

    def piece(self, token: int) -> str:
        """Take a token and return what it adds; nothing where it ends amid a character.

        A token's text can depend on the one before it, such as a space: both are decoded, and the former's text is taken off.
        """
        self.tokens.append(token)
        before = self._session.words(self.tokens[self._start : self._read])
        words = self._session.words(self.tokens[self._start :])
        if words.endswith(_HALF) or len(words) <= len(before):
            return ""
        self._start, self._read = self._read, len(self.tokens)
        self._said += words[len(before) :]
        return words[len(before) :]

    def rest(self) -> str:
        """Return what is left at the answer's end."""
        return self.whole().removeprefix(self._said)

    def whole(self) -> str:
        """Return all that was said."""
        return self._session.words(self.tokens)


@dataclass(frozen=True)
class Loaded:
    """A loaded artifact, its name, the key that requests are to name, and what lets one answer at a time be made."""

    session: OnnxruntimeSession
    artifact: str
    model: str
    key: str
    turn: threading.Lock


class ArtifactServer(ThreadingHTTPServer):
    """A thread for each connection, which all ask one artifact."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, loaded: Loaded, port: int) -> None:
        self.loaded = loaded
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token is sent when it is made
    timeout: ClassVar[float | None] = 300.0

    @property
    def _loaded(self) -> Loaded:
        return cast("ArtifactServer", self.server).loaded

    def do_GET(self) -> None:
        """Answer `/health`, which needs no key, and `/v1/models`."""
        if self.path == "/health":
            self._send(200, b"")
            return
        try:
            self._check_key()
            if self.path != "/v1/models":
                raise RequestError(404, f"{self.path}: nothing is served there")
        except RequestError as error:
            self._refuse(error)
            return
        loaded = self._loaded
        row = {"id": loaded.model, "object": "model", "owned_by": "compress", "root": loaded.artifact}
        self._send_json(200, {"object": "list", "data": [row | {"max_model_len": loaded.session.longest}]})

    def do_POST(self) -> None:
        """Answer `/v1/chat/completions`."""
        try:
            self._check_key()
            body = self._body()
            if self.path != "/v1/chat/completions":
                raise RequestError(404, f"{self.path}: nothing is served there")
            request = read_request(body, self._loaded.model)
            with self._loaded.turn:
                self._answer(request)
        except RequestError as error:
            self._refuse(error)
        except (ConnectionError, TimeoutError):  # who asked has gone
            self.close_connection = True

    def _check_key(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._loaded.key.encode()):
            self.close_connection = True
            raise RequestError(401, "the key is not the one that this server was started with")

    def _body(self) -> object:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _LARGEST_BODY:
            self.close_connection = True
            raise RequestError(413 if length.isdigit() else 411, f"a body of {length or 'unknown'} bytes is not read")
        try:
            return cast("object", json.loads(self.rfile.read(int(length))))
        except ValueError as error:
            raise RequestError(400, f"the body is no JSON ({error})") from error

    def _answer(self, request: ServerRequest) -> None:
        """Make an answer and send it: what is at fault with the prompt is known before anything is sent."""
        try:
            streamed = self._loaded.session.stream(request.prompt, request.max_new_tokens, ignore_eos=request.ignore_eos)
            if request.stream:
                self._send_stream(request, streamed)
            else:
                self._send_whole(streamed)
        except DataError as error:
            raise RequestError(400, str(error)) from error

    def _send_whole(self, streamed: Streamed) -> None:
        wording, finish, made = Wording(self._loaded.session), "length", 0
        try:
            for token, ended in streamed.tokens:
                made, finish = made + 1, ended or finish
                if ended != "stop":
                    wording.tokens.append(token)
        except CompressError as error:
            raise RequestError(500, str(error)) from error
        message = {"role": "assistant", "content": wording.whole()}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        self._send_json(200, self._head("chat.completion") | {"choices": [choice], "usage": _usage(streamed.prompt_tokens, made)})

    def _send_stream(self, request: ServerRequest, streamed: Streamed) -> None:
        """Send an event for each token as it is made; the first says who speaks, the last why it is the last."""
        head, wording, made = self._head("chat.completion.chunk"), Wording(self._loaded.session), 0
        try:
            for token, finish in streamed.tokens:
                made += 1
                piece = "" if finish == "stop" else wording.piece(token)
                delta = {"content": piece + wording.rest() if finish else piece}
                if made == 1:
                    self._begin_stream()
                    delta |= {"role": "assistant"}
                self._event(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})
        except CompressError as error:
            if not made:
                raise RequestError(500, str(error)) from error
            self._event({"error": _fault(500, str(error))})
        else:
            if request.usage:
                self._event(head | {"choices": [], "usage": _usage(streamed.prompt_tokens, made)})
            self._event("[DONE]")
        finally:
            streamed.tokens.close()
        self.wfile.write(b"0\r\n\r\n")

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, content: Mapping[str, Any] | str) -> None:
        event = f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode()
        self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{secrets.token_hex(12)}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self._loaded.model}

    def _refuse(self, error: RequestError) -> None:
        self._send_json(error.status, {"error": _fault(error.status, str(error))})

    def _send_json(self, status: int, content: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(content).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _usage(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _fault(status: int, message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error" if status < 500 else "server_error", "code": status}


def main(arguments: Sequence[str]) -> None:
    """Load what the job names and serve it until the process is ended; the port is listened to once it is loaded.

    Raises:
        CompressError: it cannot be loaded.
    """
    job = ServerJob(**json.loads(arguments[0]))
    key = os.environ.pop(KEY)
    settings = OnnxruntimeSettings(**job.settings)
    engine = choose_engine(settings.providers, settings.threads)
    graphs, artifact = Path(job.graphs), Path(job.artifact)
    session = load(graphs, OpenContext(artifact, graphs, Silent(), job.trust_remote_code, job.model), settings, engine)
    with ArtifactServer(Loaded(session, job.artifact, job.model, key, threading.Lock()), job.port) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
