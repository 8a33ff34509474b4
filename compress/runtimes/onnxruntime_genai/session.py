"""Sessions with onnxruntime-genai in a worker process, over a socket: one line of JSON per request and per reply."""

from __future__ import annotations

import base64
import json
import math
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from compress.data.prompts import Prompt, check_image_count, open_images, write_prompt
from compress.errors import CheckpointError, DataError, ServerError
from compress.export.onnx.files import check_files
from compress.families import Family
from compress.files import disk_errors
from compress.progress import Progress
from compress.runtimes.exported import in_format_of
from compress.runtimes.inputs import Encoder
from compress.runtimes.onnxruntime_genai.runtime import ENVIRONMENT
from compress.runtimes.runtime import Answer, OpenContext, Passage, Score, scored_tokens
from compress.runtimes.server_session import token_ids
from compress.runtimes.top_tokens import Position, TopRecord, score_top
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable, reason
from compress.workers.environment import require
from compress.workers.worker import Worker, python_command, run_worker, variables_with

if TYPE_CHECKING:
    from compress.runtimes.onnxruntime_genai.runtime import OnnxruntimeGenai

_WORKER = Path(__file__).with_name("worker.py")
_CHUNK_BYTES = 1 << 20
"""Bytes of one read from the worker's socket."""

_LOG = "onnxruntime-genai.log"
_WORKER_VARIABLES = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class GenaiRequest:
    """A request to the worker; the fields are the keys of its JSON."""

    kind: Literal["answer", "score", "whole"]
    """Generate an answer, score given tokens, or return distributions over the full vocabulary."""

    text: str | None
    """The rendered prompt; None to score tokens without one."""

    images: list[str]
    """Paths of image files."""

    max_new_tokens: int = 0
    forbidden: tuple[int, ...] = ()
    """Tokens that an answer must not contain."""

    tokens: tuple[int, ...] = ()
    """The tokens to score."""

    top: int = 0
    """How many top tokens a score returns per position."""

    whole: tuple[int, ...] = ()
    """The indices of the scored tokens whose distributions are returned."""


@contextmanager
def open_session(runtime: OnnxruntimeGenai, context: OpenContext) -> Generator[OnnxruntimeGenaiSession]:
    """Load an artifact, or the export of a checkpoint, in a worker process that is ended with the context.

    Raises:
        CheckpointError: the folder cannot be loaded, or the checkpoint cannot be exported.
        MissingError: onnxruntime-genai is not installed.
        ServerError: the process exited while it was loading, or took too long.
    """
    require(ENVIRONMENT)  # before a checkpoint is exported
    with ExitStack() as resources:
        temporary = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="compress-genai-")))
        folder = in_format_of(runtime, context, _original_settings(context.family), temporary / "original")
        for path in sorted(folder.glob("*.onnx")):
            # A truncated file is found here, before a process is started that may load for minutes.
            check_files(path)
        listener = resources.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        # A socket, not a pipe: whatever a library prints goes to the log and cannot mix with replies.
        address = temporary / "socket"
        listener.bind(str(address))
        listener.listen(1)
        # So that the wait for the worker can see that it has died.
        listener.setblocking(False)
        command = python_command(ENVIRONMENT, str(_WORKER), str(folder.absolute()), str(address))
        variables = variables_with(_WORKER_VARIABLES)
        server = resources.enter_context(run_worker(ENVIRONMENT, command, variables, context.logs.absolute() / _LOG))
        connection = resources.enter_context(_accept(listener, server, runtime.startup_seconds))
        worker = WorkerProcess(connection, server, runtime.request_seconds)
        if "failed" in (reply := worker.reply(runtime.startup_seconds)):
            raise CheckpointError(
                f"{context.artifact}: onnxruntime-genai cannot load it ({printable(str(reply['failed']))}); export it again"
            )
        image_folder = temporary / "images"
        image_folder.mkdir()
        # From the exported folder: the library reads that tokenizer, too.
        encoder = Encoder.of(replace(context, artifact=folder), 1)
        yield OnnxruntimeGenaiSession(worker, encoder, image_folder, runtime)


def _original_settings(family: Family) -> dict[str, str]:
    """Return the export by which an original is measured: in float32, by the library's own builder where that knows it."""
    from compress.export.onnx_genai.limits import MODEL_TYPES

    built = family.name in MODEL_TYPES and MODEL_TYPES[family.name].built
    return {"format": "onnx-genai", "decoder": "builder" if built else "own"}


def _accept(listener: socket.socket, server: Worker, seconds: float) -> socket.socket:
    """Wait until the worker connects.

    Raises:
        ServerError: it exited, or took too long.
    """
    connections: list[socket.socket] = []

    def connected() -> bool:
        try:
            connections.append(listener.accept()[0])
        except BlockingIOError:
            return False
        return True

    server.wait(connected, seconds)
    return connections[0]


class WorkerProcess:
    """The client side of the worker's socket. The artifact may be untrusted, so replies are read within limits."""

    def __init__(self, connection: socket.socket, server: Worker, request_seconds: float) -> None:
        self._connection = connection
        self._server = server
        self._seconds = request_seconds
        self._buffer = bytearray()

    def ask(self, request: GenaiRequest) -> dict[str, Any]:
        """Send a request and return the reply.

        Raises:
            ServerError: the worker exited, took too long, or its reply cannot be read.
        """
        self._connection.settimeout(self._seconds)
        try:
            self._connection.sendall(json.dumps(asdict(request)).encode() + b"\n")
        except TimeoutError as error:
            raise self._late(self._seconds) from error
        except OSError as error:
            raise self._exited() from error
        return self.reply(self._seconds)

    def reply(self, seconds: float) -> dict[str, Any]:
        """Wait for the worker's next line, for at most `seconds`.

        Raises:
            ServerError: it exited, took too long, or its line is too long or cannot be read.
        """
        try:
            content: object = json.loads(self._line(time.monotonic() + seconds))
        except TimeoutError as error:
            raise self._late(seconds) from error
        except OSError as error:
            raise self._exited() from error
        except (ValueError, RecursionError) as error:
            raise unreadable(error) from error
        if not isinstance(content, dict):
            raise unreadable(TypeError("no JSON object"))
        return cast("dict[str, Any]", content)

    def _line(self, deadline: float) -> bytes:
        """Return the bytes up to the next line break.

        Raises:
            TimeoutError, ServerError: it does not arrive in time, or the line is too long.
        """
        limit, searched = limits().reply_bytes, 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            # What has been searched is not searched again: replies of whole distributions have hundreds of megabytes.
            searched = len(self._buffer)
            if searched > limit:
                raise unreadable(ValueError(f"more than {limit:,} bytes, {limits().set_by('reply_bytes')}"))
            if (seconds := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            # What is left of the deadline: a timeout per read would start anew with each byte.
            self._connection.settimeout(seconds)
            if not (chunk := self._connection.recv(_CHUNK_BYTES)):
                raise self._exited()
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _late(self, seconds: float) -> ServerError:
        return ServerError(
            f"onnxruntime-genai did not answer within {seconds:g} seconds; raise request_seconds, or use a smaller model"
            f"{self._server.exit_reason()}"
        )

    def _exited(self) -> ServerError:
        self._server.process.wait()
        return ServerError(f"onnxruntime-genai ended; the machine may have run out of memory{self._server.exit_reason()}")


def unreadable(error: Exception) -> ServerError:
    """Return the error for a reply that cannot be read."""
    return ServerError(
        f"onnxruntime-genai said what cannot be read ({type(error).__name__}: {reason(error)}); run compress runtime install "
        f"{ENVIRONMENT} again"
    )


def read_tokens(reply: Mapping[str, Any], limit: int) -> list[int]:
    """Return a reply's tokens.

    Raises:
        ServerError: they are invalid, or more than `limit`.
    """
    try:
        return token_ids(reply["tokens"], limit)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error) from error


def read_positions(reply: Mapping[str, Any], tokens: Sequence[int], top: int) -> list[Position]:
    """Return a reply's predictions of these tokens.

    Raises:
        ServerError: they are of other tokens, or have an invalid log-probability.
    """
    try:
        rows = cast("list[tuple[int, float, list[tuple[int, float]]]]", reply["positions"])
        # Another tokenizer inside the library would score other tokens, whose likelihoods say nothing here.
        if [token for token, _, _ in rows] != list(tokens):
            raise ValueError("other tokens than it was given")
        top_ids = [token_ids([token for token, _ in best], top) for _, _, best in rows]
        logs = [(float(value), [float(log) for _, log in best]) for _, value, best in rows]
        if not all(math.isfinite(log) for value, best in logs for log in (value, *best)):
            raise ValueError("what is no log-probability")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise unreadable(error) from error
    return [
        Position(token=token, log_probability=value, top=tuple(zip(ids, best, strict=True)))
        for token, ids, (value, best) in zip(tokens, top_ids, logs, strict=True)
    ]


class OnnxruntimeGenaiSession:
    """An artifact loaded by onnxruntime-genai."""

    block: int | None = None

    def __init__(self, worker: WorkerProcess, encoder: Encoder, image_folder: Path, runtime: OnnxruntimeGenai) -> None:
        self._worker = worker
        self._encoder = encoder
        self._image_folder = image_folder
        self._top = runtime.top_logprobs
        self.whole_tokens = runtime.whole_tokens

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; see `Generates.answer`.

        Raises:
            ServerError: the worker process exited, or has stopped answering.
        """
        answers: list[Answer] = []
        with progress.task("answer", len(prompts), "prompts") as advance:
            for prompt in prompts:
                reply = self._ask(prompt, "answer", max_new_tokens=max_new_tokens, forbidden=self._encoder.tokens.placeholders)
                answers.append(self._parse_answer(prompt, reply, max_new_tokens))
                if on_answer is not None:
                    on_answer(answers[-1])
                advance(1)
        return answers

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Scores.score`.

        Raises:
            ServerError: the worker process exited, or has stopped answering.
            UsageError: `reference` was recorded on other passages, by another runtime, or with another `top_logprobs`.
            StoreError: the record cannot be written.
        """

        def predict(original: TopRecord | None) -> list[list[Position] | str]:
            del original
            positions: list[list[Position] | str] = []
            with progress.task("score", sum(len(passage.token_ids) for passage in passages), "tokens") as advance:
                for passage in passages:
                    positions.append(self._positions(passage))
                    advance(len(passage.token_ids))
            return positions

        return score_top(passages, record, reference, self._top, predict)

    def distributions(
        self, passages: Sequence[Passage], positions: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return the distribution over the full vocabulary at each position; see `FullVocabularySession`.

        Raises:
            ServerError: the worker process exited, or has stopped answering.
        """
        distributions: dict[tuple[int, int], NDArray[np.float32]] = {}
        with progress.task("whole vocabulary", len(positions), "tokens") as advance:
            for passage in dict.fromkeys(passage for passage, _ in positions):
                tokens = tuple(token for index, token in positions if index == passage)
                reply = self._scored(passages[passage], "whole", whole=tokens)
                try:
                    for token, encoded in zip(tokens, reply.get("distributions", ()), strict=False):
                        distributions[passage, token] = np.frombuffer(base64.b64decode(encoded), dtype="<f4").astype(np.float32)
                except (TypeError, ValueError) as error:
                    raise unreadable(error) from error
                advance(len(tokens))
        return [distributions.get(position) for position in positions]

    def _positions(self, passage: Passage) -> list[Position] | str:
        """Request the predictions of a passage's tokens, one per scored token; a fault instead if there are none."""
        if not scored_tokens(passage):
            return []
        reply = self._scored(passage, "score", top=self._top)
        if "fault" in reply:
            return _named(passage.id, str(reply["fault"]))
        return read_positions(reply, scored_tokens(passage), self._top)

    def _scored(self, passage: Passage, kind: Literal["score", "whole"], **settings: Any) -> dict[str, Any]:
        if passage.prompt is None:
            return self._worker.ask(GenaiRequest(kind, None, [], tokens=passage.token_ids, **settings))
        return self._ask(passage.prompt, kind, tokens=passage.token_ids, **settings)

    def _ask(self, prompt: Prompt, kind: Literal["answer", "score", "whole"], **settings: Any) -> dict[str, Any]:
        """Send a request with a prompt; its images are passed as temporary files."""
        paths: list[Path] = []
        try:
            check_image_count(self._encoder.family, prompt)
            # onnxruntime-genai reads PNG and JPEG alone, and exits on a file that it cannot read: images are decoded here first.
            for index, image in enumerate(open_images(prompt)):
                paths.append(self._image_folder / f"{index}.png")
                with disk_errors(self._image_folder):
                    # PNG is lossless, and level 1 the fastest: the file lives for one prompt.
                    image.save(paths[-1], compress_level=1)
            text = write_prompt(self._encoder.processor, prompt)
            return self._worker.ask(GenaiRequest(kind, text, [str(path) for path in paths], **settings))
        except DataError as error:
            return {"fault": str(error)}
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def _parse_answer(self, prompt: Prompt, reply: dict[str, Any], max_new_tokens: int) -> Answer:
        if "fault" in reply:
            return Answer(id=prompt.id, text="", token_ids=(), fault=_named(prompt.id, str(reply["fault"])))
        ids = read_tokens(reply, max_new_tokens)
        # The library returns the end-of-sequence token as part of the sequence.
        end = next((index for index, token in enumerate(ids) if token in self._encoder.tokens.stops), len(ids))
        text = self._encoder.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(id=prompt.id, text=text, token_ids=tuple(ids[:end]))


def _named(name: str, fault: str) -> str:
    return fault if fault.startswith(f"{name}: ") else f"{name}: {fault}"
