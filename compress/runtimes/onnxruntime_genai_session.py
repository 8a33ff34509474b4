"""An artifact in a process of onnxruntime-genai's own, asked over a socket: one line of JSON per request and per reply."""

from __future__ import annotations

import base64
import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import open_checkpoint, read_config
from compress.conversation import check_image_count, load_processor, open_images, write_prompt
from compress.errors import CheckpointError, DataError, ServerError, UsageError
from compress.families import Family, family_at, family_of
from compress.files import telling_where
from compress.limits import limits
from compress.onnx_files import check_files
from compress.progress import Progress
from compress.runtimes.environment import require
from compress.runtimes.onnxruntime_genai import CONFIG, ENVIRONMENT
from compress.runtimes.runtime import (
    Ability,
    Answer,
    Embeddings,
    Faults,
    ImageInput,
    OpenContext,
    Passage,
    Prompt,
    Score,
    scored_tokens,
)
from compress.runtimes.server import Server, run_server
from compress.runtimes.top_tokens import Position, TopRecord, scores_of, write_record
from compress.runtimes.vllm_server import stop_tokens
from compress.runtimes.vllm_session import token_ids
from compress.untrusted import printable, reason

if TYPE_CHECKING:
    from compress.runtimes.onnxruntime_genai import OnnxruntimeGenai

_WORKER = Path(__file__).with_name("onnxruntime_genai_worker.py")
_PORTION = 1 << 20
_LOG = "onnxruntime-genai.log"
_DROPPED = {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"}
_SETTINGS = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class GenaiRequest:
    """What the worker is asked: an answer to a prompt, or how given tokens are predicted after it (None: from their own start).

    `images` are files; `forbidden` are tokens that no answer may hold, `top` is how many of the likeliest are told.
    At the scored tokens of these numbers in `whole`, a request of kind `whole` tells the whole vocabulary's log-probabilities.
    """

    kind: Literal["answer", "score", "whole"]
    text: str | None
    images: list[str]
    max_new_tokens: int = 0
    forbidden: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    top: int = 0
    whole: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenaiModel:
    """How an artifact reads prompts: by its processor, and its tokens that end an answer or stand for images and videos."""

    processor: Any
    family: Family
    stops: tuple[int, ...]
    placeholders: tuple[int, ...]


@contextmanager
def open_session(context: OpenContext, runtime: OnnxruntimeGenai) -> Generator[OnnxruntimeGenaiSession]:
    """Load an artifact, or the original, exported for it, in a process that is ended with the context.

    Raises:
        CheckpointError: the folder cannot be loaded, or the checkpoint not exported.
        MissingError: onnxruntime-genai is not installed.
        ServerError: the process died while it was loading, or took too long.
    """
    python = require(ENVIRONMENT).python
    with ExitStack() as resources:
        temporary = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="compress-genai-")))
        folder = context.artifact
        if not (folder / CONFIG).is_file():
            folder = _export(context, temporary / "original")
        for path in sorted(folder.glob("*.onnx")):
            check_files(path)
        listener = resources.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        address = temporary / "socket"
        listener.bind(str(address))
        listener.listen(1)
        listener.setblocking(False)
        command = [str(python), "-I", "-u", str(_WORKER), str(folder.absolute()), str(address)]
        server = resources.enter_context(run_server(ENVIRONMENT, command, _variables(), context.logs.absolute() / _LOG))
        connection = resources.enter_context(_accept(listener, server, runtime.startup_seconds))
        worker = WorkerProcess(connection, server, runtime.request_seconds)
        if "failed" in (told := worker.reply(runtime.startup_seconds)):
            raise CheckpointError(
                f"{context.artifact}: onnxruntime-genai cannot load it ({printable(str(told['failed']))}); export it again"
            )
        config = read_config(folder)
        family = family_at(folder, context.trust_remote_code)
        model = GenaiModel(
            load_processor(folder, context.trust_remote_code), family, stop_tokens(folder), family.placeholders(config)
        )
        pictures = temporary / "images"
        pictures.mkdir()
        yield OnnxruntimeGenaiSession(worker, model, pictures, runtime)


def _export(context: OpenContext, target: Path) -> Path:
    """Write a plain checkpoint as a folder of onnxruntime-genai's, in float32, and return that.

    Raises:
        CheckpointError: it cannot be held so.
    """
    from compress.export.format import ExportContext
    from compress.export.onnx_genai import OnnxGenai
    from compress.export.onnx_genai_limits import KINDS

    checkpoint = open_checkpoint(context.artifact)
    family = family_of(checkpoint.config, str(context.artifact), checkpoint, context.trust_remote_code)
    built = family.name in KINDS and KINDS[family.name].built
    target.mkdir()
    with telling_where(target):
        export = OnnxGenai(format="onnx-genai", decoder="builder" if built else "own")
        export.apply(ExportContext(context.artifact, target, family, context.progress))
    return target


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _DROPPED} | _SETTINGS


def _accept(listener: socket.socket, server: Server, seconds: float) -> socket.socket:
    """Wait until the worker connects.

    Raises:
        ServerError: it ended before, or took too long.
    """
    found: list[socket.socket] = []

    def connected() -> bool:
        try:
            found.append(listener.accept()[0])
        except BlockingIOError:
            return False
        return True

    server.wait(connected, seconds)
    return found[0]


class WorkerProcess:
    """The other side of the socket. It runs a folder that may be a stranger's, so what it says is read within limits."""

    def __init__(self, connection: socket.socket, server: Server, request_seconds: float) -> None:
        self._connection = connection
        self._server = server
        self._seconds = request_seconds
        self._rest = bytearray()

    def ask(self, request: GenaiRequest) -> dict[str, Any]:
        """Return what came of a request.

        Raises:
            ServerError: the worker ended, took too long, or said what cannot be read.
        """
        self._connection.settimeout(self._seconds)
        try:
            self._connection.sendall(json.dumps(asdict(request)).encode() + b"\n")
        except TimeoutError as error:
            raise self._late(self._seconds) from error
        except OSError as error:
            raise self._ended() from error
        return self.reply(self._seconds)

    def reply(self, seconds: float) -> dict[str, Any]:
        """Wait for the worker's next line.

        Raises:
            ServerError: it ended, there was none after so many seconds, or one that is too long or cannot be read.
        """
        try:
            content: object = json.loads(self._line(time.monotonic() + seconds))
        except TimeoutError as error:
            raise self._late(seconds) from error
        except OSError as error:
            raise self._ended() from error
        except (ValueError, RecursionError) as error:
            raise unreadable(error) from error
        if not isinstance(content, dict):
            raise unreadable(TypeError("no JSON object"))
        return cast("dict[str, Any]", content)

    def _line(self, deadline: float) -> bytes:
        """Return the bytes up to the next line's end.

        Raises:
            TimeoutError, ServerError: it does not come in time, or is too long.
        """
        most, looked = limits().reply_bytes, 0
        while (end := self._rest.find(b"\n", looked)) < 0:
            looked = len(self._rest)
            if looked > most:
                raise unreadable(ValueError(f"more than {most:,} bytes, {limits().set_by('reply_bytes')}"))
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            if not (portion := self._connection.recv(_PORTION)):
                raise self._ended()
            self._rest += portion
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return line

    def _late(self, seconds: float) -> ServerError:
        return ServerError(
            f"onnxruntime-genai did not answer within {seconds:g} seconds; raise request_seconds, or use a smaller model"
            f"{self._server.exit_reason()}"
        )

    def _ended(self) -> ServerError:
        self._server.process.wait()
        return ServerError(f"onnxruntime-genai ended; the machine may have run out of memory{self._server.exit_reason()}")


def unreadable(error: Exception) -> ServerError:
    """Return what to say of a reply that is none."""
    return ServerError(
        f"onnxruntime-genai said what cannot be read ({type(error).__name__}: {reason(error)}); run compress runtime install "
        f"{ENVIRONMENT} again"
    )


def read_tokens(told: Mapping[str, Any], most: int) -> list[int]:
    """Return the tokens of a reply.

    Raises:
        ServerError: they are none.
    """
    try:
        return token_ids(told["tokens"], most)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error) from error


def read_positions(told: Mapping[str, Any], tokens: Sequence[int], top: int) -> list[Position]:
    """Return how a reply says that these tokens were predicted.

    Raises:
        ServerError: it is of other tokens, or says what is no log-probability.
    """
    try:
        rows = cast("list[tuple[int, float, list[tuple[int, float]]]]", told["positions"])
        if [token for token, _, _ in rows] != list(tokens):
            raise ValueError("other tokens than it was given")
        likely = [token_ids([place for place, _ in best], top) for _, _, best in rows]
        logs = [(float(value), [float(log) for _, log in best]) for _, value, best in rows]
        if not all(math.isfinite(log) for value, best in logs for log in (value, *best)):
            raise ValueError("what is no log-probability")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise unreadable(error) from error
    return [
        Position(token=token, log_probability=value, top=tuple(zip(places, best, strict=True)))
        for token, places, (value, best) in zip(tokens, likely, logs, strict=True)
    ]


class OnnxruntimeGenaiSession:
    """An artifact that onnxruntime-genai has loaded."""

    offers: frozenset[Ability] = frozenset({"text", "scores"})
    block: int | None = None

    def __init__(self, worker: WorkerProcess, model: GenaiModel, pictures: Path, runtime: OnnxruntimeGenai) -> None:
        self._worker = worker
        self._model = model
        self._pictures = pictures
        self._top = runtime.top_logprobs
        self.whole_tokens = runtime.whole_tokens

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, each: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; the model's sampling settings and penalties are left out. See `Session.answer`.

        Tokens that stand for images and videos are never said: no model could read such an answer back.

        Raises:
            ServerError: the process ended, or does not answer any more.
        """
        answers: list[Answer] = []
        with progress.task("answer", len(prompts), "prompts") as advance:
            for prompt in prompts:
                told = self._ask(prompt, "answer", max_new_tokens=max_new_tokens, forbidden=self._model.placeholders)
                answers.append(self._finish(prompt, told, max_new_tokens))
                if each is not None:
                    each(answers[-1])
                advance(1)
        return answers

    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Session.score`.

        Raises:
            ServerError: the process ended, or does not answer any more.
            UsageError: `against` was recorded on other passages, by another runtime, or with another `top_logprobs`.
            StoreError: the record cannot be written.
        """
        original = TopRecord(against, passages, self._top) if against is not None else None
        found: list[list[Position] | str] = []
        with progress.task("score", sum(len(passage.token_ids) for passage in passages), "tokens") as advance:
            for passage in passages:
                found.append(self._positions(passage))
                advance(len(passage.token_ids))
        if record is not None:
            write_record(record, passages, [[] if isinstance(row, str) else row for row in found], self._top)
        return scores_of(passages, found, original)

    def distributions(
        self, passages: Sequence[Passage], places: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return how each place is predicted over the whole vocabulary; see `WholeVocabulary`.

        Raises:
            ServerError: the process ended, or does not answer any more.
        """
        found: dict[tuple[int, int], NDArray[np.float32]] = {}
        with progress.task("whole vocabulary", len(places), "tokens") as advance:
            for passage in dict.fromkeys(passage for passage, _ in places):
                wanted = tuple(token for each, token in places if each == passage)
                told = self._scored(passages[passage], "whole", whole=wanted)
                try:
                    for token, encoded in zip(wanted, told.get("distributions", ()), strict=False):
                        found[passage, token] = np.frombuffer(base64.b64decode(encoded), dtype="<f4").astype(np.float32)
                except (TypeError, ValueError) as error:
                    raise unreadable(error) from error
                advance(len(wanted))
        return [found.get(place) for place in places]

    def classify(
        self, pictures: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Refuse to tell which of some texts an image shows.

        Raises:
            UsageError: always; onnxruntime-genai only writes.
        """
        del pictures, classes, progress, faults
        raise UsageError("task zero-shot: cannot be measured with runtime: onnxruntime-genai; set eval.runtime to onnxruntime")

    def embed(
        self, pictures: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Refuse to say where images and texts lie.

        Raises:
            UsageError: always; onnxruntime-genai only writes.
        """
        del pictures, texts, progress, faults
        raise UsageError("task retrieval: cannot be measured with runtime: onnxruntime-genai; set eval.runtime to onnxruntime")

    def _positions(self, passage: Passage) -> list[Position] | str:
        """Ask how each of a passage's tokens was predicted, one entry per scored token; or return why that cannot be told."""
        if not scored_tokens(passage):
            return []
        told = self._scored(passage, "score", top=self._top)
        if "fault" in told:
            return _named(passage.id, str(told["fault"]))
        return read_positions(told, scored_tokens(passage), self._top)

    def _scored(self, passage: Passage, kind: Literal["score", "whole"], **settings: Any) -> dict[str, Any]:
        if passage.prompt is None:
            return self._worker.ask(GenaiRequest(kind, None, [], tokens=passage.token_ids, **settings))
        return self._ask(passage.prompt, kind, tokens=passage.token_ids, **settings)

    def _ask(self, prompt: Prompt, kind: Literal["answer", "score", "whole"], **settings: Any) -> dict[str, Any]:
        """Ask about a prompt, its images as files that are removed again."""
        paths: list[Path] = []
        try:
            check_image_count(self._model.family, prompt)
            # Its image reader ends the whole process on a file that it cannot read, and knows no format but PNG and JPEG.
            for place, image in enumerate(open_images(prompt)):
                paths.append(self._pictures / f"{place}.png")
                with telling_where(self._pictures):
                    image.save(paths[-1], compress_level=1)
            text = write_prompt(self._model.processor, prompt)
            return self._worker.ask(GenaiRequest(kind, text, [str(path) for path in paths], **settings))
        except DataError as error:
            return {"fault": str(error)}
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    def _finish(self, prompt: Prompt, told: dict[str, Any], most: int) -> Answer:
        if "fault" in told:
            return Answer(id=prompt.id, text="", token_ids=(), fault=_named(prompt.id, str(told["fault"])))
        ids = read_tokens(told, most)
        end = next((place for place, token in enumerate(ids) if token in self._model.stops), len(ids))
        text = self._model.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(id=prompt.id, text=text, token_ids=tuple(ids[:end]))


def _named(name: str, fault: str) -> str:
    return fault if fault.startswith(f"{name}: ") else f"{name}: {fault}"
