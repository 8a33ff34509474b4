"""The interface between evaluation and runtimes: open an artifact, generate answers, score tokens, embed images and texts."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compress.checkpoints.quantization_config import KernelKind
from compress.data.prompts import Prompt
from compress.errors import UsageError
from compress.families import Family
from compress.families.resolve import family_at
from compress.progress import Progress
from compress.recipe.schema import Frozen, load_attribute, load_row
from compress.runtimes import RUNTIMES
from compress.runtimes.vllm.memory_fallback import MemoryFallback, ignore_fallback

if TYPE_CHECKING:
    from compress.eval.latency.results import ComponentTable
    from compress.eval.latency.settings import LoadPoint
    from compress.runtimes.openai_client import ServedModel


@dataclass(frozen=True)
class ImageInput:
    """One encoded image (PNG, JPEG, …)."""

    id: str
    image: bytes


@dataclass(frozen=True)
class Answer:
    """A model's greedily decoded answer to one prompt, without special tokens."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    """The answer's tokens; empty where the server does not return them."""

    fault: str | None = None
    """Why there is no answer, in a few words; text and tokens are empty then."""


@dataclass(frozen=True)
class Passage:
    """A token sequence to be scored: the continuation of a prompt, or a text on its own."""

    id: str
    token_ids: tuple[int, ...]
    prompt: Prompt | None = None
    """The prompt, rendered by the chat template, that the tokens continue; None where the text stands alone."""


@dataclass(frozen=True)
class Score:
    """Log-likelihoods of a passage's tokens and, where a reference was given, their divergence from the original model.

    Each array has one entry per scored token: all of the passage's after a prompt, all but the first without one.
    """

    id: str
    negative_log_likelihood: NDArray[np.float64]
    """In nats."""

    kl: NDArray[np.float64] | None = None
    """KL(original ‖ this model) in nats; None where there was no reference."""

    same_top: NDArray[np.bool_] | None = None
    """Whether both models rank the same token first; None where there was no reference."""

    fault: str | None = None
    """Why there is no score, in a few words; the arrays are empty then."""

    at_least: bool = False
    """Whether `kl` is a lower bound: taken over the top tokens, with all other tokens merged into one bucket."""

    whole: NDArray[np.float64] | None = None
    """KL over the full vocabulary in nats, NaN at tokens outside the random sample; None where no token was sampled."""

    weight: float = 1.0
    """How many scored tokens each sampled token represents."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of images and texts in one space, L2-normalised."""

    images: NDArray[np.float32]
    """[images, embedding dimension]"""

    texts: NDArray[np.float32]
    """[texts, embedding dimension]"""

    scale: float
    """The model's logit scale: an image-text logit is `scale` times their cosine similarity."""


Faults = dict[int, str]
"""Why inputs could not be given to a model, by their index in the input sequence."""


class Session(Protocol):
    """A loaded artifact. What it can do is which of the protocols below it implements; see `CAPABILITIES`."""


@runtime_checkable
class Generates(Protocol):
    """A session that generates text."""

    @property
    def block(self) -> int | None:
        """How many prompts share batches: answers are bit-identical only when the same prompts are asked together.

        None where each prompt is a request of its own.
        """
        ...

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Return the greedily decoded answer to each prompt, in order; `on_answer` is called with every answer as it arrives.

        The model's sampling settings and penalties are left out. Placeholder tokens of images and videos are suppressed: an answer
        that has one could not be scored. A prompt that cannot be answered gives an answer with its fault.

        Raises:
            ServerError: the runtime has stopped answering altogether.
        """
        ...


@runtime_checkable
class Scores(Protocol):
    """A session that gives the log-probabilities of given tokens."""

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages, in order; one that cannot be scored, or compared, gives a score with its fault.

        With `record`, the predictions that a later comparison needs are written to that new folder. With `reference`, the folder
        that the original recorded for the same passages in the same order, each token's prediction is compared with the original's.

        Raises:
            ServerError: the runtime has stopped answering altogether.
            UsageError: `reference` was recorded on other passages, by another runtime, or with other settings.
            StoreError: the record cannot be written.
        """
        ...


@runtime_checkable
class Embeds(Protocol):
    """A session that compares images with texts (CLIP)."""

    def classify(
        self, images: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return zero-shot log-probabilities [images, classes]; each class is a list of one or more texts.

        An image that cannot be decoded has NaN in its row, and its fault is put into `faults` under its index.

        Raises:
            DataError: a text exceeds the model's context length, or an image cannot be decoded and `faults` is None.
        """
        ...

    def embed(
        self, images: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return the embeddings of images and texts; see `classify` for images that cannot be decoded."""
        ...


@runtime_checkable
class Served(Protocol):
    """A session with a server that other programs can ask; it batches requests, so that repeated ones may differ a little."""

    @property
    def endpoint(self) -> ServedModel:
        """The served model."""
        ...

    def reordered(self) -> Session:
        """Return a session of the same model that sends requests in another order and other batches; closed with this one."""
        ...


@runtime_checkable
class FullVocabularySession(Protocol):
    """A session whose `score` compares top tokens only, and which can also give distributions over the full vocabulary."""

    @property
    def whole_tokens(self) -> int:
        """How many of a task's scored tokens are compared over the full vocabulary."""
        ...

    def distributions(
        self, passages: Sequence[Passage], positions: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return the log-probabilities [vocabulary], in nats, at each position: (passage index, index of its scored token).

        An entry is None where the request failed; all are None, with a warning, where the runtime refuses full distributions.

        Raises:
            ServerError: the runtime has stopped answering altogether.
        """
        ...


Capability = type[Any]
"""One of the protocols in `CAPABILITIES`: what a task needs of a session, and a runtime's sessions offer."""

CAPABILITIES: Mapping[Capability, str] = {
    Generates: "answers",
    Scores: "log-probabilities of given tokens",
    Embeds: "a comparison of images with texts",
    Served: "a server for harnesses to ask",
}
"""What a session may be able to do, and what it gives, for messages."""

AsCapable = TypeVar("AsCapable")


def capable(session: Session, capability: type[AsCapable]) -> AsCapable:
    """Return a session as one with a capability.

    Raises:
        UsageError: it lacks that.
    """
    if not isinstance(session, capability):
        raise UsageError(f"what serves this model does not offer {CAPABILITIES[capability]}; measure another task")
    return session


@dataclass(frozen=True)
class OpenContext:
    """What a runtime needs to open an artifact."""

    artifact: Path
    """The artifact's folder."""

    logs: Path
    """The folder for server logs."""

    progress: Progress
    family: Family
    trust_remote_code: bool = False
    name: str = "original"
    """The artifact's name in the recipe."""

    on_fallback: Callable[[MemoryFallback], None] = ignore_fallback
    """Called with each setting that is lowered because a server ran out of memory while loading."""

    @staticmethod
    def at(artifact: Path, logs: Path, progress: Progress, trust_remote_code: bool = False, name: str = "original") -> OpenContext:
        """Return the context of an artifact whose family is not resolved yet in this process.

        Raises:
            CheckpointError: its family is not known, and cannot be derived.
        """
        return OpenContext(artifact, logs, progress, family_at(artifact, trust_remote_code), trust_remote_code, name)


@dataclass(frozen=True)
class RunningServer:
    """A running OpenAI-compatible server and the model it serves."""

    url: str
    """The base URL, without `/v1`."""

    model: str
    """The served model's name."""

    key: str | None = field(default=None, repr=False)
    """The API key."""

    process: int | None = None
    """The id of the process that leads the server's process group, where it runs on this machine."""

    read_log: Callable[[], str] = str
    """Returns what the server has logged so far."""


class Runtime(Frozen, ABC):
    """One engine with its settings; the fields are the recipe's keys."""

    runtime: Any
    """The runtime's name: its key in the table `RUNTIMES`."""

    revision: ClassVar[int]
    """Raised whenever the same settings measure something else."""

    kl_definition: ClassVar[str]
    """What this runtime's per-token KL is, for the report: over the full vocabulary, or over the top tokens and one bucket."""

    not_in_key: ClassVar[frozenset[str]] = frozenset()
    """The fields that do not affect the measured accuracy, such as timeouts and ports; they are left out of the step's key."""

    speed_fields: ClassVar[frozenset[str]] = frozenset()
    """The fields of `not_in_key` that affect speed; they are in the key of a latency measurement."""

    formats: ClassVar[frozenset[str]]
    """The names of the export formats whose artifacts it runs. It takes checkpoints too, to measure the original."""

    opener: ClassVar[str]
    """The function `module:name` that opens a session: (runtime, context) → a context manager. It is loaded when an artifact is
    opened, as it imports the engine."""

    component_timer: ClassVar[str] = "compress.runtimes.components:measure_components"
    """The function `module:name` that times the model's components; see `time_components`. By default by transformers, with dense
    weights."""

    components_note: ClassVar[str] = "with dense weights"
    """How the components of `component_timer` run, for the report."""

    elsewhere: ClassVar[bool] = False
    """Whether it measures what others have deployed, not what the run has made."""

    offers: ClassVar[frozenset[Capability]] = frozenset({Generates, Scores})
    """What its sessions implement for some model and server; a session may have less."""

    @classmethod
    def runs(cls, export_format: str) -> bool:
        """Return whether it runs artifacts of a format."""
        return export_format in cls.formats

    def settings(self, name: str | None = None) -> dict[str, Any]:
        """Return the fields that affect what is measured, as JSON values; with `name`, those that concern that artifact."""
        del name
        return self.model_dump(mode="json", exclude=set(self.not_in_key))

    def loaded_with(self, name: str) -> str:
        """Return the engine and versions that load the artifact `name`, as text for its model card; may query a server.

        Raises:
            MissingError: the runtime is not installed, or a server does not answer.
        """
        del name
        return f"{self.runtime} ({', '.join(f'{library} {version}' for library, version in self.versions().items())})"

    def faults(self, artifacts: Sequence[str]) -> list[str]:
        """Return why it cannot measure artifacts of these names, one line each; empty where it can."""
        del artifacts
        return []

    def length_faults(self, config: Mapping[str, Any], longest: int) -> list[str]:
        """Return why it cannot serve a model of this config, or passages of up to `longest` tokens; empty where it can."""
        del config, longest
        return []

    def kernel_faults(self, kernel_kinds: Collection[KernelKind]) -> list[str]:
        """Return why this machine has no kernel for such matrix products, one line each; empty where it has."""
        del kernel_kinds
        return []

    def kernel_notes(self, kernel_kinds: Collection[KernelKind]) -> list[str]:
        """Return caveats about how this machine computes such matrix products, one line each."""
        del kernel_kinds
        return []

    def missing(self) -> dict[Capability, str]:
        """Return what of `offers` is not available here, each with the reason; may query a server.

        Raises:
            MissingError: a server does not answer.
        """
        return {}

    def component_device(self) -> str:
        """Return the device, or `auto`, on which the components are timed."""
        return "auto"

    def lowered(self, steps: Sequence[MemoryFallback]) -> Self:
        """Return the runtime with the settings that a server came up with after it ran out of memory."""
        del steps
        return self

    def latency_notes(self, *, components: bool) -> list[str]:
        """Return caveats about latencies that were measured with it, and with `components` about its components' times."""
        note = "The components are of the dense model: quantized weights are unpacked before they are timed."
        return [note] if components else []

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that affect what is measured; imports nothing heavy.

        Raises:
            MissingError: the runtime is not installed here.
        """

    def open(self, context: OpenContext) -> AbstractContextManager[Any]:
        """Load the artifact; the session is always released when the context ends. A server's log is among the context's logs.

        Raises:
            CheckpointError: the artifact cannot be read.
            MissingError: the runtime, a device or a kernel is not there.
            ServerError: the server did not start, or does not answer.
        """
        return cast("AbstractContextManager[Any]", load_attribute(self.opener)(self, context))

    def time_components(self, context: OpenContext, point: LoadPoint, prompt: Prompt, repeats: int) -> ComponentTable:
        """Return the time of each component of the model in this process, after a warm-up run; `prompt` is one of the load point's.

        Raises:
            CheckpointError: the artifact cannot be read.
            DataError: the model takes no such prompt.
        """
        return cast("ComponentTable", load_attribute(self.component_timer)(self, context, point, prompt, repeats))


class ServingRuntime(Runtime, ABC):
    """A runtime with a server that a load generator can measure."""

    server: ClassVar[str]
    """The function `module:name` that starts the server: (runtime, context) → a context manager."""

    def serve(self, context: OpenContext) -> AbstractContextManager[RunningServer]:
        """Start a server for the artifact, or connect to one; a started one is ended when the context ends.

        Raises:
            UsageError: the model generates no text.
            CheckpointError: the artifact cannot be read.
            MissingError: the runtime is not installed.
            ServerError: the server did not start, or does not answer.
        """
        return cast("AbstractContextManager[RunningServer]", load_attribute(self.server)(self, context))


def runtime_named(name: str) -> type[Runtime]:
    """Return the runtime of a name in the table `RUNTIMES`."""
    return cast("type[Runtime]", load_row(RUNTIMES, name))


def runtimes_that(fits: Callable[[type[Runtime]], bool]) -> list[str]:
    """Return the names of the runtimes that fit, for messages; those with servers elsewhere are the last."""
    # Elsewhere last: a message should propose what a reader can install before a server that someone must run.
    return sorted((name for name in RUNTIMES if fits(runtime_named(name))), key=lambda name: (runtime_named(name).elsewhere, name))


def runtimes_for(*formats: str) -> list[str]:
    """Return the names of the runtimes that run any of these formats, for messages; see `runtimes_that`."""
    return runtimes_that(lambda runtime: any(map(runtime.runs, formats)))


@dataclass(frozen=True)
class Environment:
    """A runtime's own virtual environment."""

    name: str
    python: Path
    versions: dict[str, str] = field(default_factory=lambda: dict[str, str]())


def passages_digest(passages: Sequence[Passage]) -> str:
    """Return a SHA-256 over the passages' tokens and prompts, in order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps([passage.id, passage.token_ids, passage.prompt and passage.prompt.text]).encode())
        for image in passage.prompt.images if passage.prompt else ():
            # A digest per image: bytes that run together could be split elsewhere.
            digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def scored_tokens(passage: Passage) -> tuple[int, ...]:
    """Return the tokens of a passage that are scored: all after a prompt, all but the first without one."""
    return passage.token_ids if passage.prompt is not None else passage.token_ids[1:]


UNSCORED = "the original could not be scored here, so that there is nothing to compare with"
"""The fault of a passage for which the original recorded no predictions."""


def unscored(name: str, fault: str | None, *, compared: bool) -> Score:
    """Return a score with empty arrays for the passage `name`: because of a fault, or because it has no token to score."""
    no_floats, no_bools = np.empty(0, dtype=np.float64), np.empty(0, dtype=np.bool_)
    return Score(name, no_floats, no_floats if compared else None, no_bools if compared else None, fault)
