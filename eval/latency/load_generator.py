"""A load generator for OpenAI-compatible servers: seeded requests at a fixed concurrency, with the timing of each answer."""

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

from compress.data.prompts import Prompt
from compress.errors import MissingError, ServerError
from compress.eval.latency.http_stream import Connection, ResponseLimits, StreamError
from compress.eval.latency.settings import LoadPoint
from compress.runtimes.runtime import RunningServer
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact

_PATH = "/v1/chat/completions"
_OK = 200
_MAX_FAULT = 200
"""Characters of a request's error that are kept."""

_ATTEMPTS = 10
"""How often a text is decoded and encoded until it has the requested number of tokens: as often as `vllm bench serve` does."""

_END = re.compile(rb"\r?\n\r?\n")
"""The end of a server-sent event."""

_END_OVERLAP = 3
"""Bytes of an event's end that may have arrived in an earlier piece: one less than the longest end."""

_DONE = "[DONE]"
"""The data of OpenAI's last event."""

_MAX_TOKENS = 1 << 31
"""A server's own count of tokens is cut there: it is untrusted."""

Client = Literal["vllm bench serve", "compress"]


@dataclass(frozen=True)
class RequestTiming:
    """The times of one request's answer, in seconds."""

    ttft: float
    """Until the first chunk. That of a server like vLLM, which first sends a chunk with only the role, is this chunk."""

    gaps: tuple[float, ...]
    """Between the chunks."""

    tokens: int
    fault: str | None = None
    """Why there is no answer; the times are empty then."""

    @property
    def seconds(self) -> float:
        """From sending the request to the answer's last chunk."""
        return self.ttft + sum(self.gaps)

    @property
    def between_tokens(self) -> tuple[float, ...]:
        """The gaps between two tokens, without the one after a chunk with only the role."""
        # vLLM's first chunk has the role alone: with it there are as many gaps as tokens, not one fewer.
        return self.gaps[1:] if len(self.gaps) >= self.tokens > 0 else self.gaps


@dataclass(frozen=True)
class Load:
    """The timings of one load."""

    samples: tuple[RequestTiming, ...]
    """One for each request, in the order of the requests."""

    seconds: float
    """The duration of the whole load."""

    client: Client
    began: float = 0.0
    """When the first request was sent, by `time.perf_counter`."""


@dataclass(frozen=True)
class Dialect:
    """The request options that a server accepts."""

    limit: str = "max_completion_tokens"
    """The key of the limit on output tokens."""

    fixed_length: bool = True
    """Whether it accepts vLLM's `ignore_eos`, so that every answer has the requested length."""

    usage: bool = True
    """Whether it accepts `stream_options`, to report the number of tokens."""

    def options(self, output_tokens: int) -> dict[str, Any]:
        """Return the keys of a request's body."""
        options: dict[str, Any] = {self.limit: output_tokens, "temperature": 0.0, "stream": True}
        options |= {"ignore_eos": True} if self.fixed_length else {}
        return options | ({"stream_options": {"include_usage": True}} if self.usage else {})


# The most precise first: answers of a fixed length compare best, and a server's own count beats counting chunks.
DIALECTS = (Dialect(), Dialect(fixed_length=False), Dialect("max_tokens", fixed_length=False, usage=False))
"""Tried in this order: vLLM's, that of servers with the current OpenAI API, that of older ones."""


@dataclass(frozen=True)
class Requests:
    """The messages of a load's requests, without the model and the options."""

    point: LoadPoint
    messages: tuple[list[dict[str, Any]], ...]

    def bodies(self, model: str, dialect: Dialect) -> list[bytes]:
        """Return the requests' bodies for a model in a server's dialect."""
        options = {"model": model} | dialect.options(self.point.output_tokens)
        return [json.dumps(options | {"messages": messages}).encode() for messages in self.messages]


def make_prompts(artifact: Path, point: LoadPoint, count: int, seed: int) -> list[Prompt]:
    """Return prompts with text of random tokens and JPEG images of random pixels, as `vllm bench serve` makes them.

    They are equal for the same seed and tokenizer. As there, a text may be a token longer or shorter after encoding it again.

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


def run_load(served: RunningServer, bodies: Sequence[bytes], concurrency: int, request_seconds: float, tokens: int) -> Load:
    """Send all requests at this concurrency, and read every answer's stream to its end.

    A failed request is a sample with its fault. Answers are parsed after the last one has ended, so that parsing takes no time from
    the server's machine during the load. Proxies of the environment are ignored.
    """
    return asyncio.run(_run_load(served, bodies, concurrency, request_seconds, ResponseLimits.of(tokens)))


def warm_up(served: RunningServer, requests: Requests, request_seconds: float) -> Dialect:
    """Send the warm-up requests; return the dialect that the server accepts.

    Raises:
        ServerError: it accepts none; the message quotes its error.
    """
    probe, fault = Requests(requests.point, requests.messages[:1]), ""
    for dialect in DIALECTS:
        sample = run_load(served, probe.bodies(served.model, dialect), 1, request_seconds, requests.point.output_tokens).samples[0]
        if sample.fault is None:
            others = Requests(requests.point, requests.messages[1:])
            point = requests.point
            # At the load's own concurrency: batch sizes, too, are compiled or tuned at their first use.
            run_load(served, others.bodies(served.model, dialect), point.concurrency, request_seconds, point.output_tokens)
            return dialect
        fault = sample.fault
        # Only a refused option is worth another dialect; a timeout or a wrong key would come again.
        if not fault.startswith(("400", "422")):
            break
    raise ServerError(f"{served.url}: does not answer a request of the load ({fault}); {_remedy(fault)}")


def _remedy(fault: str) -> str:
    if fault.startswith(("401", "403")):
        return "set key_variable to the environment variable that holds its key"
    if fault.startswith("400"):
        return "ask for fewer tokens or smaller images, or raise max_model_len"
    return "see that it serves, then measure again"


async def _run_load(
    served: RunningServer, bodies: Sequence[bytes], concurrency: int, request_seconds: float, response_limits: ResponseLimits
) -> Load:
    # Identity: compressing a stream holds pieces back.
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
    headers |= {"Authorization": f"Bearer {served.key}"} if served.key else {}
    answers: list[AnswerStream | str] = [""] * len(bodies)
    # One iterator for all workers: a closed loop, in which a request begins when another ends.
    queue = iter(enumerate(bodies))

    async def worker() -> None:
        connection = Connection(served.url)
        for index, body in queue:
            try:
                async with asyncio.timeout(request_seconds):
                    answers[index] = await _post(connection, headers, body, response_limits)
            except TimeoutError:
                answers[index] = f"no answer within {request_seconds:g} seconds"
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(bodies)))))
    seconds = time.perf_counter() - began
    await asyncio.sleep(0)  # lets the event loop close the connections
    samples = tuple(RequestTiming(0.0, (), 0, answer) if isinstance(answer, str) else read_stream(answer) for answer in answers)
    return Load(samples, seconds, "compress", began)


@dataclass(frozen=True)
class AnswerStream:
    """The bytes of an answer's stream."""

    sent: float
    """When the request was sent."""

    pieces: list[tuple[float, bytes]]
    """Each received piece with its time."""


async def _post(
    connection: Connection, headers: dict[str, str], body: bytes, response_limits: ResponseLimits
) -> AnswerStream | str:
    """Return an answer's stream, or the fault."""
    try:
        reply = await connection.post(_PATH, headers, body, response_limits)
    except StreamError as error:
        return str(error)[:_MAX_FAULT]
    if reply.status != _OK:
        return f"{reply.status}: {_error_message(b''.join(piece for _, piece in reply.pieces).decode(errors='replace'))}"
    return AnswerStream(reply.sent, reply.pieces)


def _error_message(text: str) -> str:
    """Return the message of a server's error response."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        content: Any = json.loads(text)
        text = str(content["error"]["message"])
    return printable(" ".join(redact(text).split()))[:_MAX_FAULT]


def read_stream(stream: AnswerStream) -> RequestTiming:
    """Return the timing of a stream of server-sent events with OpenAI's chat completion chunks.

    A stream that is incomplete, contains an error, or anything but chunks, is a sample with its fault.
    """
    times: list[float] = []
    content_chunks, reported_tokens, ended = 0, 0, False
    for time_received, data in _events(stream.pieces):
        if data == _DONE:
            ended = True
            continue
        if data is None:
            return RequestTiming(0.0, (), 0, f"the stream holds an event that does not end ({limits().set_by('event_bytes')})")
        try:
            event: Any = json.loads(data)
            choices: Any = event.get("choices")
            usage: Mapping[str, Any] = event.get("usage") or {}
            reported_tokens = min(int(usage.get("completion_tokens") or reported_tokens), _MAX_TOKENS)
            if event.get("error"):
                return RequestTiming(0.0, (), 0, _error_message(data))
            if choices:
                times.append(time_received)
                # Only where the server reports no usage: several tokens may come in one chunk.
                content_chunks += bool(choices[0].get("delta", {}).get("content"))
                ended = ended or choices[0].get("finish_reason") is not None
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
            return RequestTiming(0.0, (), 0, "the stream holds what is no chunk of an answer")
    if not times or not ended:
        return RequestTiming(0.0, (), 0, "the stream ended before the answer did")
    gaps = tuple(after - before for before, after in pairwise(times))
    return RequestTiming(times[0] - stream.sent, gaps, reported_tokens or content_chunks)


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str | None]]:
    """Yield each event's data with the time of its last byte; None, as the last, for one that is too long."""
    buffer, limit = bytearray(), limits().event_bytes
    terminated = [*pieces, (pieces[-1][0], b"\n\n")] if pieces else []
    for time_received, piece in terminated:
        search_from = max(0, len(buffer) - _END_OVERLAP)
        buffer += piece
        while (end := _END.search(buffer, search_from)) is not None and end.start() <= limit:
            data = _data_of(bytes(buffer[: end.start()]))
            del buffer[: end.end()]
            search_from = 0
            if data:
                yield time_received, data
        if end is not None or len(buffer) > limit:
            yield time_received, None
            return


def _data_of(event: bytes) -> str:
    lines = event.decode(errors="replace").splitlines()
    return "\n".join(line.removeprefix("data:").lstrip(" ") for line in lines if line.startswith("data:"))


def _image(random: np.random.Generator, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    # Random pixels: no two images are equal, so that a server's image cache never helps.
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def _texts(artifact: Path, tokens: int, count: int, random: np.random.Generator) -> list[str]:
    """Return texts of about `tokens` random tokens."""
    from tokenizers import Tokenizer

    path = artifact / "tokenizer.json"
    if not path.is_file():
        raise MissingError(f"{path}: is not there, and load is made of its tokens; fetch the model again")
    # `tokenizers` alone: it reads no code of the model's.
    tokenizer: Any = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Without special tokens: an image placeholder in a text would ask for an image.
    special_ids = set(tokenizer.get_added_tokens_decoder())
    ordinary_ids = np.array(
        [token_id for token_id in range(tokenizer.get_vocab_size(with_added_tokens=False)) if token_id not in special_ids]
    )

    def text() -> str:
        ids = [int(token_id) for token_id in random.choice(ordinary_ids, tokens)]
        for _ in range(_ATTEMPTS):
            text_again = str(tokenizer.decode(ids, skip_special_tokens=False))
            ids = list(tokenizer.encode(text_again, add_special_tokens=False).ids)
            if len(ids) == tokens:
                return text_again
            missing = tokens - len(ids)
            ids = [*ids[:tokens], *(int(token_id) for token_id in random.choice(ordinary_ids, max(missing, 0)))]
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    return [text() for _ in range(count)]
