"""An OpenAI-compatible server for an ONNX artifact on loopback: run as a module, with the JSON of a `ServerJob` as its argument.

It has the paths that the load generator needs: `/health`, `/v1/models` and `/v1/chat/completions`, streamed or not. Answers are
greedy, and generated one at a time: a request waits for those before it.
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

from compress.data.prompts import Prompt
from compress.errors import CompressError, DataError
from compress.progress import Silent
from compress.runtimes.onnxruntime.runtime import Onnxruntime
from compress.runtimes.onnxruntime.session import OnnxruntimeSession, StreamedAnswer, load_session
from compress.runtimes.runtime import OpenContext

KEY = "COMPRESS_SERVER_KEY"
"""The environment variable that holds the server's API key."""

_DEFAULT_MAX_TOKENS = 256
"""The length limit of an answer where the request has none: vLLM's is the rest of the context, which would block this server for
hours, as it answers one request at a time."""

_MAX_BODY_BYTES = 1 << 30
"""The largest accepted request body: images are in it, in base64. A body is read whole before it is parsed."""

_DATA_URL = "data:"
_REPLACEMENT = "\ufffd"
"""The tokenizer's output for an incomplete UTF-8 character."""


@dataclass(frozen=True)
class ServerJob:
    """The server's configuration."""

    artifact: str
    """The artifact's folder."""

    graphs: str
    """The folder of its graphs: for a checkpoint, the one it was exported to."""

    model: str
    """The served model's name."""

    port: int
    settings: dict[str, Any]
    """The runtime's fields."""

    trust_remote_code: bool


class RequestError(Exception):
    """A refused request: the HTTP status and the message."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class ServerRequest:
    """A parsed request for a chat completion."""

    prompt: Prompt
    max_new_tokens: int
    ignore_eos: bool
    stream: bool
    usage: bool
    """Whether a stream ends with a chunk on token usage."""


def read_request(body: object, model: str) -> ServerRequest:
    """Parse the body of a chat completion request: one user turn with text and images as data URLs.

    Raises:
        RequestError: it is malformed, names another model, or has an unsupported option.
    """
    if not isinstance(body, dict):
        raise RequestError(400, "the body is no JSON object")
    fields = cast("dict[str, Any]", body)
    # As vLLM answers: a load generator that was given another model's name must not measure this one.
    if fields.get("model", model) != model:
        raise RequestError(404, f"the model {fields['model']!r} is not served here, only {model}")
    # Refused rather than ignored: figures of sampled answers would be taken for what was asked.
    for key, supported in {"temperature": 0, "n": 1, "logprobs": False, "tools": None}.items():
        if fields.get(key) not in (supported, None):
            raise RequestError(400, f"{key}: {fields[key]!r} is not offered: answers are greedy, one each; leave it out")
    # OpenAI has replaced max_tokens by max_completion_tokens; vLLM takes both, and so do clients send either.
    max_tokens = fields.get("max_completion_tokens") or fields.get("max_tokens") or _DEFAULT_MAX_TOKENS
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise RequestError(400, f"max_tokens: {max_tokens!r} is no number of tokens")
    options = fields.get("stream_options")
    return ServerRequest(
        prompt=_prompt(fields.get("messages")),
        max_new_tokens=max_tokens,
        ignore_eos=bool(fields.get("ignore_eos")),
        stream=bool(fields.get("stream")),
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
    # A server that fetched URLs could be made to ask this machine's own network (SSRF).
    if not head.startswith(_DATA_URL) or not head.endswith(";base64"):
        raise RequestError(400, "image_url: give images as data URLs in base64; nothing is fetched here")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RequestError(400, f"image_url: no base64 ({error})") from error


class Detokenizer:
    """Incremental detokenization: the returned pieces, concatenated, are the answer's text."""

    def __init__(self, session: OnnxruntimeSession) -> None:
        self._session = session
        self.tokens: list[int] = []
        self._emitted = ""
        self._start = self._end = 0

    def add(self, token: int) -> str:
        """Append a token and return the text it completes; empty where it ends in the middle of a character.

        A token's text can depend on the previous one, such as its leading space: both are decoded, and the first's text is removed.
        """
        self.tokens.append(token)
        prefix = self._session.decode(self.tokens[self._start : self._end])
        # From the last two pieces on, not from the start: decoding all tokens each time would cost the square of the length.
        text = self._session.decode(self.tokens[self._start :])
        # A character may be spread over several byte tokens: held back until it is complete.
        if text.endswith(_REPLACEMENT) or len(text) <= len(prefix):
            return ""
        self._start, self._end = self._end, len(self.tokens)
        self._emitted += text[len(prefix) :]
        return text[len(prefix) :]

    def flush(self) -> str:
        """Return the text that has not been returned yet."""
        return self.text().removeprefix(self._emitted)

    def text(self) -> str:
        """Return the whole text."""
        return self._session.decode(self.tokens)


@dataclass(frozen=True)
class ServedArtifact:
    """A loaded artifact and how it is served."""

    session: OnnxruntimeSession
    artifact: str
    """The artifact's folder."""

    model: str
    """The served model's name."""

    key: str
    """The API key."""

    lock: threading.Lock
    """Held while an answer is generated: one at a time."""


class ArtifactServer(ThreadingHTTPServer):
    """An HTTP server with a thread per connection, for one artifact."""

    # A thread that generates must not keep the process alive when the server is ended.
    daemon_threads = True
    # The kernel's backlog: a load generator opens all its connections at once, and the default of 5 would have them retried by TCP.
    request_queue_size = 1024

    def __init__(self, served: ServedArtifact, port: int) -> None:
        self.served = served
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token is sent as soon as it is generated
    # An idle connection holds a thread.
    timeout: ClassVar[float | None] = 300.0

    @property
    def _served(self) -> ServedArtifact:
        return cast("ArtifactServer", self.server).served

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
        served = self._served
        row = {"id": served.model, "object": "model", "owned_by": "compress", "root": served.artifact}
        self._send_json(200, {"object": "list", "data": [row | {"max_model_len": served.session.max_length}]})

    def do_POST(self) -> None:
        """Answer `/v1/chat/completions`."""
        try:
            self._check_key()
            # Read before the path is looked at: what is left of a body would be parsed as the connection's next request.
            body = self._body()
            if self.path != "/v1/chat/completions":
                raise RequestError(404, f"{self.path}: nothing is served there")
            request = read_request(body, self._served.model)
            with self._served.lock:
                self._answer(request)
        except RequestError as error:
            self._refuse(error)
        except (ConnectionError, TimeoutError):  # the client has disconnected
            self.close_connection = True

    def _check_key(self) -> None:
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        # In constant time: `==` would tell other users of this machine how many characters they have right.
        if not hmac.compare_digest(key.encode(), self._served.key.encode()):
            # The body has not been read, so that the connection cannot be used for another request.
            self.close_connection = True
            raise RequestError(401, "the key is not the one that this server was started with")

    def _body(self) -> object:
        length = self.headers.get("Content-Length", "")
        # A chunked body has no length, and is refused: it could be endless.
        if not length.isdigit() or int(length) > _MAX_BODY_BYTES:
            self.close_connection = True
            raise RequestError(413 if length.isdigit() else 411, f"a body of {length or 'unknown'} bytes is not read")
        try:
            return cast("object", json.loads(self.rfile.read(int(length))))
        except ValueError as error:
            raise RequestError(400, f"the body is no JSON ({error})") from error

    def _answer(self, request: ServerRequest) -> None:
        """Generate an answer and send it; faults of the prompt are known before anything is sent."""
        try:
            streamed = self._served.session.stream(request.prompt, request.max_new_tokens, ignore_eos=request.ignore_eos)
            if request.stream:
                self._send_stream(request, streamed)
            else:
                self._send_whole(streamed)
        except DataError as error:
            raise RequestError(400, str(error)) from error

    def _send_whole(self, streamed: StreamedAnswer) -> None:
        detokenizer, finish, count = Detokenizer(self._served.session), "length", 0
        try:
            for token, ended in streamed.tokens:
                count, finish = count + 1, ended or finish
                if ended != "stop":
                    detokenizer.tokens.append(token)
        except CompressError as error:
            raise RequestError(500, str(error)) from error
        message = {"role": "assistant", "content": detokenizer.text()}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        self._send_json(200, self._head("chat.completion") | {"choices": [choice], "usage": _usage(streamed.prompt_tokens, count)})

    def _send_stream(self, request: ServerRequest, streamed: StreamedAnswer) -> None:
        """Send an event per token as it is generated; the first has the role, the last the finish reason."""
        head, detokenizer, count = self._head("chat.completion.chunk"), Detokenizer(self._served.session), 0
        try:
            for token, finish in streamed.tokens:
                count += 1
                text = "" if finish == "stop" else detokenizer.add(token)
                delta = {"content": text + detokenizer.flush() if finish else text}
                # Only now: an earlier fault still becomes a status, and the time to the first event is that of the first token.
                if count == 1:
                    self._begin_stream()
                    delta |= {"role": "assistant"}
                self._event(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})
        except CompressError as error:
            if not count:
                raise RequestError(500, str(error)) from error
            # Status 200 has been sent: vLLM, too, reports such an error as an event.
            self._event({"error": _fault(500, str(error))})
        else:
            if request.usage:
                self._event(head | {"choices": [], "usage": _usage(streamed.prompt_tokens, count)})
            self._event("[DONE]")
        finally:
            # A client that went away ends the generation: the next request is waiting for the lock.
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
        return {"id": name, "object": kind, "created": int(time.time()), "model": self._served.model}

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


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _fault(status: int, message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error" if status < 500 else "server_error", "code": status}


def main(arguments: Sequence[str]) -> None:
    """Load the job's artifact and serve it until the process is ended; the port is opened once it is loaded.

    Raises:
        CompressError: it cannot be loaded.
    """
    job = ServerJob(**json.loads(arguments[0]))
    # Popped, so that no child process inherits it; not an argument, as any user can read a process's command line.
    key = os.environ.pop(KEY)
    graphs, artifact = Path(job.graphs), Path(job.artifact)
    context = OpenContext.at(artifact, graphs, Silent(), job.trust_remote_code, job.model)
    # Before the port is opened: the first answer to /health means that requests can be served.
    session = load_session(Onnxruntime(**job.settings), context, graphs)
    assert isinstance(session, OnnxruntimeSession), "a model that writes no text is refused before its server is started"
    with ArtifactServer(ServedArtifact(session, job.artifact, job.model, key, threading.Lock()), job.port) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
