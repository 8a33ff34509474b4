"""Load on an OpenAI-compatible server: seeded requests, so many under way at once, each answer's stream with its times."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from compress.errors import MissingError, ServerError
from compress.eval.http_stream import Connection, Most, StreamError
from compress.eval.latency import LoadPoint
from compress.limits import limits
from compress.redaction import redact
from compress.runtimes.runtime import Prompt, RunningServer
from compress.untrusted import printable

_PATH = "/v1/chat/completions"
_OK = 200
_WORDS = 200
_ATTEMPTS = 10
_END = re.compile(rb"\r?\n\r?\n")
_SPLIT = 3
"""Bytes of an event's end that may have come already when the last of it does."""
_DONE = "[DONE]"
_MOST_TOKENS = 1 << 31

Client = Literal["vllm bench serve", "compress"]


@dataclass(frozen=True)
class RequestTiming:
    """One request: seconds until the first piece of the answer, and between its pieces; `fault` says why it has no answer.

    Where a server sends a piece that only says who speaks, as vLLM does with the first token, that is the first piece.
    """

    ttft: float
    gaps: tuple[float, ...]
    tokens: int
    fault: str | None = None

    @property
    def seconds(self) -> float:
        """From sending the request to the answer's last piece."""
        return self.ttft + sum(self.gaps)

    @property
    def between_tokens(self) -> tuple[float, ...]:
        """The gaps that lie between two tokens: not the one after a piece that only says who speaks."""
        return self.gaps[1:] if len(self.gaps) >= self.tokens > 0 else self.gaps


@dataclass(frozen=True)
class Load:
    """All requests of one load, in the order they were made up, and the seconds that the whole took.

    `began` is when the first was sent, by the clock of `time.perf_counter`.
    """

    samples: tuple[RequestTiming, ...]
    seconds: float
    client: Client
    began: float = 0.0


@dataclass(frozen=True)
class Dialect:
    """What a server takes beside the messages; `fixed_length` says whether answers can be made as long as asked."""

    limit: str = "max_completion_tokens"
    fixed_length: bool = True
    usage: bool = True

    def options(self, output_tokens: int) -> dict[str, Any]:
        """Return the keys of a request's body."""
        options: dict[str, Any] = {self.limit: output_tokens, "temperature": 0.0, "stream": True}
        options |= {"ignore_eos": True} if self.fixed_length else {}
        return options | ({"stream_options": {"include_usage": True}} if self.usage else {})


DIALECTS = (Dialect(), Dialect(fixed_length=False), Dialect("max_tokens", fixed_length=False, usage=False))
"""What is tried one after the other: vLLM's own, any newer server's, any older one's."""


@dataclass(frozen=True)
class Requests:
    """What is asked: bodies without the model and the options, made by one seed for one point from a tokenizer."""

    point: LoadPoint
    messages: tuple[list[dict[str, Any]], ...]

    def bodies(self, model: str, dialect: Dialect) -> list[bytes]:
        """Return the requests' bodies for a model in a server's dialect."""
        options = {"model": model} | dialect.options(self.point.output_tokens)
        return [json.dumps(options | {"messages": messages}).encode() for messages in self.messages]


def make_prompts(artifact: Path, point: LoadPoint, count: int, seed: int) -> list[Prompt]:
    """Return prompts with text of random tokens and JPEG images of random pixels; the same for the same seed and tokenizer.

    As in `vllm bench serve`, whose requests these are like, a text read back by the tokenizer may be a token longer or shorter.

    Raises:
        MissingError: the artifact has no tokenizer that can be read.
    """
    random = np.random.default_rng(seed)
    texts = _texts(artifact, point.prompt_tokens, count, random)
    return [
        Prompt(f"load-{number}", text, tuple(_image(random, point.width, point.height) for _ in range(point.images)))
        for number, text in enumerate(texts)
    ]


def make_requests(artifact: Path, point: LoadPoint, count: int, seed: int) -> Requests:
    """Return requests with such prompts; see `make_prompts`."""
    messages: list[list[dict[str, Any]]] = []
    for prompt in make_prompts(artifact, point, count, seed):
        urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in prompt.images]
        parts = [{"type": "text", "text": prompt.text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
        messages.append([{"role": "user", "content": parts if urls else prompt.text}])
    return Requests(point, tuple(messages))


def put_load(served: RunningServer, bodies: Sequence[bytes], concurrency: int, request_seconds: float, tokens: int) -> Load:
    """Send all requests, so many at a time, each for so many tokens, and read every answer's stream to its end.

    A request that fails is a sample with its fault. Nothing of an answer is looked into before the last one has ended, so that
    the reading costs the server's machine no time. The server is reached directly, whatever proxy the environment names.
    """
    return asyncio.run(_put_load(served, bodies, concurrency, request_seconds, Most.of(tokens)))


def warm_up(served: RunningServer, requests: Requests, request_seconds: float) -> Dialect:
    """Send requests that do not count; return the dialect in which the server answers.

    Raises:
        ServerError: it answers in none; its own words are in the message.
    """
    first, fault = Requests(requests.point, requests.messages[:1]), ""
    for dialect in DIALECTS:
        sample = put_load(served, first.bodies(served.model, dialect), 1, request_seconds, requests.point.output_tokens).samples[0]
        if sample.fault is None:
            rest = Requests(requests.point, requests.messages[1:])
            point = requests.point
            put_load(served, rest.bodies(served.model, dialect), point.concurrency, request_seconds, point.output_tokens)
            return dialect
        fault = sample.fault
        if not fault.startswith(("400", "422")):
            break
    raise ServerError(f"{served.url}: does not answer a request of the load ({fault}); {_remedy(fault)}")


def _remedy(fault: str) -> str:
    if fault.startswith(("401", "403")):
        return "set key_variable to the environment variable that holds its key"
    if fault.startswith("400"):
        return "ask for fewer tokens or smaller images, or raise max_model_len"
    return "see that it serves, then measure again"


async def _put_load(served: RunningServer, bodies: Sequence[bytes], concurrency: int, request_seconds: float, most: Most) -> Load:
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
    headers |= {"Authorization": f"Bearer {served.key}"} if served.key else {}
    found: list[Stream | str] = [""] * len(bodies)
    waiting = iter(enumerate(bodies))

    async def work() -> None:
        connection = Connection(served.url)
        for place, body in waiting:
            try:
                async with asyncio.timeout(request_seconds):
                    found[place] = await _ask(connection, headers, body, most)
            except TimeoutError:
                found[place] = f"no answer within {request_seconds:g} seconds"
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(min(concurrency, len(bodies)))))
    seconds = time.perf_counter() - began
    await asyncio.sleep(0)  # lets the connections end
    samples = tuple(RequestTiming(0.0, (), 0, answer) if isinstance(answer, str) else read_stream(answer) for answer in found)
    return Load(samples, seconds, "compress", began)


@dataclass(frozen=True)
class Stream:
    """An answer as it came: when the request was sent, and each piece of bytes with its time."""

    sent: float
    pieces: list[tuple[float, bytes]]


async def _ask(connection: Connection, headers: dict[str, str], body: bytes, most: Most) -> Stream | str:
    """Return an answer's stream, or why there is none."""
    try:
        reply = await connection.post(_PATH, headers, body, most)
    except StreamError as error:
        return str(error)[:_WORDS]
    if reply.status != _OK:
        return f"{reply.status}: {_told(b''.join(piece for _, piece in reply.pieces).decode(errors='replace'))}"
    return Stream(reply.sent, reply.pieces)


def _told(text: str) -> str:
    """Return a server's own words on a failure."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        content: Any = json.loads(text)
        text = str(content["error"]["message"])
    return printable(" ".join(redact(text).split()))[:_WORDS]


def read_stream(stream: Stream) -> RequestTiming:
    """Return the times in an answer's stream of server-sent events, OpenAI's chat completion chunks.

    One that breaks off, holds an error or something else than chunks is a sample with its fault.
    """
    times: list[float] = []
    spoken, told, ended = 0, 0, False
    for moment, data in _events(stream.pieces):
        if data == _DONE:
            ended = True
            continue
        if data is None:
            return RequestTiming(0.0, (), 0, f"the stream holds an event that does not end ({limits().set_by('event_bytes')})")
        try:
            event: Any = json.loads(data)
            choices: Any = event.get("choices")
            usage: Mapping[str, Any] = event.get("usage") or {}
            told = min(int(usage.get("completion_tokens") or told), _MOST_TOKENS)
            if event.get("error"):
                return RequestTiming(0.0, (), 0, _told(data))
            if choices:
                times.append(moment)
                spoken += bool(choices[0].get("delta", {}).get("content"))
                ended = ended or choices[0].get("finish_reason") is not None
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
            return RequestTiming(0.0, (), 0, "the stream holds what is no chunk of an answer")
    if not times or not ended:
        return RequestTiming(0.0, (), 0, "the stream ended before the answer did")
    gaps = tuple(after - before for before, after in pairwise(times))
    return RequestTiming(times[0] - stream.sent, gaps, told or spoken)


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str | None]]:
    """Give the data of each event with the time its last byte came; None, as the last, for one that is too long."""
    rest, most = bytearray(), limits().event_bytes
    closed = [*pieces, (pieces[-1][0], b"\n\n")] if pieces else []
    for moment, piece in closed:
        looked = max(0, len(rest) - _SPLIT)
        rest += piece
        while (end := _END.search(rest, looked)) is not None and end.start() <= most:
            data = _data_of(bytes(rest[: end.start()]))
            del rest[: end.end()]
            looked = 0
            if data:
                yield moment, data
        if end is not None or len(rest) > most:
            yield moment, None
            return


def _data_of(event: bytes) -> str:
    lines = event.decode(errors="replace").splitlines()
    return "\n".join(line.removeprefix("data:").lstrip(" ") for line in lines if line.startswith("data:"))


def _image(random: np.random.Generator, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def _texts(artifact: Path, tokens: int, count: int, random: np.random.Generator) -> list[str]:
    """Return texts of about so many random tokens."""
    from tokenizers import Tokenizer

    path = artifact / "tokenizer.json"
    if not path.is_file():
        raise MissingError(f"{path}: is not there, and load is made of its tokens; fetch the model again")
    tokenizer: Any = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    marks = set(tokenizer.get_added_tokens_decoder())
    plain = np.array([number for number in range(tokenizer.get_vocab_size(with_added_tokens=False)) if number not in marks])

    def text() -> str:
        ids = [int(number) for number in random.choice(plain, tokens)]
        for _ in range(_ATTEMPTS):
            written = str(tokenizer.decode(ids, skip_special_tokens=False))
            ids = list(tokenizer.encode(written, add_special_tokens=False).ids)
            if len(ids) == tokens:
                return written
            missing = tokens - len(ids)
            ids = [*ids[:tokens], *(int(number) for number in random.choice(plain, max(missing, 0)))]
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    return [text() for _ in range(count)]
