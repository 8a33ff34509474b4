"""What every runtime offers the evaluation: an artifact is opened, asked questions, and scored on given tokens."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError
from compress.progress import Progress
from compress.quantization_config import Product
from compress.runtimes.vllm_ladder import LadderStep, ignore_step
from compress.schema import Frozen

if TYPE_CHECKING:
    from compress.eval.latency import LoadPoint
    from compress.eval.latency_results import ComponentTable

Ability = Literal["text", "scores", "comparison"]
"""What is offered of a model: it answers in text, it tells how likely given tokens are, or it compares images with texts."""


@dataclass(frozen=True)
class Prompt:
    """One user turn: encoded images (PNG, JPEG, …) first, then the text."""

    id: str
    text: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One encoded image (PNG, JPEG, …)."""

    id: str
    image: bytes


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt, greedily decoded, without special tokens.

    `token_ids` is empty where a server does not tell them. `fault` says, in a few words, why there is no answer; the text and the
    tokens are empty then.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    fault: str | None = None


@dataclass(frozen=True)
class Passage:
    """Tokens to be scored: after `prompt` (asked through the chat template) or, where there is none, from their own start."""

    id: str
    token_ids: tuple[int, ...]
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Score:
    """How a model, and how alike to the original, a passage's tokens were predicted.

    Each array has one float per scored token: all of the passage's after a prompt, all but the first without one.
    `negative_log_likelihood` in nats; `kl` is KL(original ‖ this model) in nats and `same_top` whether both put the same token
    first, both None where nothing was compared. `fault` says, in a few words, why there is no score; the arrays are empty then.
    """

    id: str
    negative_log_likelihood: NDArray[np.float64]
    kl: NDArray[np.float64] | None = None
    same_top: NDArray[np.bool_] | None = None
    fault: str | None = None
    at_least: bool = False
    """Whether `kl` is over some of the vocabulary's tokens and the rest as one, which bounds the whole vocabulary's from below."""

    whole: NDArray[np.float64] | None = None
    """KL over the whole vocabulary, nan at the tokens that were not drawn for it; None where none was."""

    weight: float = 1.0
    """For how many tokens each one that was drawn stands."""


@dataclass(frozen=True)
class Embeddings:
    """Images and texts in one space: directions of length one, float32 of [images, width] and [texts, width].

    How alike an image and a text are is `scale` times their cosine.
    """

    images: NDArray[np.float32]
    texts: NDArray[np.float32]
    scale: float


Faults = dict[int, str]
"""Why items could not be shown to a model, by their places among those that were given."""


class Session(Protocol):
    """An artifact that is loaded and answers."""

    @property
    def offers(self) -> frozenset[Ability]:
        """What can be asked of this very artifact here."""
        ...

    @property
    def block(self) -> int | None:
        """How many prompts are computed together, so that only the same ones asked together give the same answers to the bit.

        None where each is asked on its own.
        """
        ...

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, each: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding, in the order given; `each` is told of every answer as it comes.

        A prompt that cannot be answered gives an answer with its fault.

        Raises:
            ServerError: the runtime as a whole does not answer any more.
        """
        ...

    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Score the passages, in the order given; one that cannot be scored, or compared, gives a score with its fault.

        With `record`, what a later comparison needs is written to that new folder; with `against`, such a folder of the
        original's, each token's prediction is compared with the original's. The same passages in the same order must be given.

        Raises:
            ServerError: the runtime as a whole does not answer any more.
        """
        ...

    def classify(
        self, pictures: Sequence[Picture], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return log-probabilities [pictures, classes] of a model that compares images with texts; a class has one or more.

        A picture that cannot be shown has NaN in its row, and why is put into `faults` under its place.

        Raises:
            DataError: there is such a picture, and no `faults`.
        """
        ...

    def embed(
        self, pictures: Sequence[Picture], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return where a model that compares images with texts puts each; see `classify` for pictures that cannot be shown."""
        ...


@runtime_checkable
class WholeVocabulary(Protocol):
    """A session whose `score` compares a few tokens of the vocabulary, and which tells all of them where it is asked to."""

    @property
    def whole_tokens(self) -> int:
        """At how many of a task's tokens it is to be asked."""
        ...

    def distributions(
        self, passages: Sequence[Passage], places: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return the log-probabilities [vocabulary], in nats, of the predictions at each place: (passage, its scored token).

        None stands where it cannot be told, everywhere where the runtime refuses to, of which who watches is warned.

        Raises:
            ServerError: the runtime as a whole does not answer any more.
        """
        ...


@runtime_checkable
class AskedOtherwise(Protocol):
    """A session of a server, whose numbers depend on what it computes together."""

    def otherwise(self) -> Session:
        """Return the same model, asked in another order and in other batches; ended with this session."""
        ...


@dataclass(frozen=True)
class OpenContext:
    """What a runtime is given to open an artifact: its folder, where logs belong, who watches, and what the recipe calls it."""

    artifact: Path
    logs: Path
    progress: Progress
    trust_remote_code: bool = False
    name: str = "original"
    lowered: Callable[[LadderStep], None] = ignore_step
    """Told of everything that was lowered because a server ran out of memory while it loaded."""


@dataclass(frozen=True)
class Served:
    """A server that answers at `url` (without `/v1`) for a model of that name.

    `key` is what it asks for, `process` the id of the one that leads it where it runs here; `said` gives what it has logged.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    process: int | None = None
    said: Callable[[], str] = str


class Runtime(Frozen, ABC):
    """One engine with its settings; the fields are the recipe's keys."""

    runtime: Any
    """The row it stands for in the table of runtimes."""

    revision: ClassVar[int]
    """Raised whenever the same settings measure something else."""

    kl_definition: ClassVar[str]
    """What this runtime's per-token KL is, for the report: over the whole vocabulary, or the top tokens and the rest."""

    incidental: ClassVar[frozenset[str]] = frozenset()
    """The fields that shape how it is run, but nothing of what is measured."""

    pace: ClassVar[frozenset[str]] = frozenset()
    """Those of the incidental fields that shape how fast it is."""

    serves: ClassVar[bool] = False
    """Whether it has a server of a model that load can be put on."""

    asks_server: ClassVar[bool] = False
    """Whether its sessions ask a server, which others can ask too, and which may answer otherwise when it is asked again."""

    offers: ClassVar[frozenset[Ability]] = frozenset({"text", "scores"})
    """What can be asked of the models that it runs; of a single one a session may offer less."""

    def settings(self, name: str | None = None) -> dict[str, Any]:
        """Return the fields that shape what is measured, as plain JSON values; with `name`, those that concern that artifact."""
        del name
        return self.model_dump(mode="json", exclude=set(self.incidental))

    def loaded_with(self, name: str) -> str:
        """Return what loads the artifact `name` to measure it, with versions, in words for its model card; may ask a server.

        Raises:
            MissingError: it is not here, or a server does not answer.
        """
        del name
        return f"{self.runtime} ({', '.join(f'{part} {version}' for part, version in self.versions().items())})"

    def faults(self, artifacts: Sequence[str]) -> list[str]:
        """Return why it cannot measure a recipe's artifacts of these names, one line each; empty where it can."""
        del artifacts
        return []

    def length_faults(self, config: Mapping[str, Any], longest: int) -> list[str]:
        """Return why it cannot take a model of this config, or passages of up to `longest` tokens; empty where it can."""
        del config, longest
        return []

    def kernel_faults(self, products: Collection[Product]) -> list[str]:
        """Return why it cannot compute such products on this machine, one line each; empty where it can."""
        del products
        return []

    def kernel_notes(self, products: Collection[Product]) -> list[str]:
        """Return what one should know of how it computes such products on this machine."""
        del products
        return []

    def missing(self) -> dict[Ability, str]:
        """Return what of what it offers cannot be asked for here, and why; may ask a server.

        Raises:
            MissingError: a server does not answer.
        """
        return {}

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the versions, by distribution, that shape what is measured; imports nothing heavy.

        Raises:
            MissingError: the runtime is not installed here.
        """

    @abstractmethod
    def open(self, context: OpenContext) -> AbstractContextManager[Session]:
        """Load the artifact; it is released when the context ends, in every case.

        Raises:
            MissingError: the runtime is not installed, or its server died while loading.
        """

    def serve(self, context: OpenContext) -> AbstractContextManager[Served]:
        """Bring up a server for the artifact alone, for others to put load on; it is ended when the context is left.

        Raises:
            UsageError: this runtime has no server.
            MissingError: the runtime is not installed, or its server died while loading.
        """
        raise UsageError(
            f"{context.artifact}: latency is measured of a server, and runtime: {self.runtime} has none; set runtime: vllm, "
            "or leave out eval.latency"
        )

    def time_components(self, context: OpenContext, point: LoadPoint, prompt: Prompt, repeats: int) -> ComponentTable:
        """Return how long each part of the model takes in this process: by transformers, with dense weights.

        Raises:
            CheckpointError: the artifact cannot be read.
            DataError: the model takes no such prompt.
        """
        from compress.runtimes.components import Timed, measure_components

        return measure_components(Timed(context.artifact, point, prompt, repeats, context.trust_remote_code), context.progress)


@dataclass(frozen=True)
class Environment:
    """A runtime's own virtual environment."""

    name: str
    python: Path
    versions: dict[str, str] = field(default_factory=lambda: dict[str, str]())


def passages_digest(passages: Sequence[Passage]) -> str:
    """Return a SHA-256 over the passages' tokens and prompts, in their order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps([passage.id, passage.token_ids, passage.prompt and passage.prompt.text]).encode())
        for image in passage.prompt.images if passage.prompt else ():
            digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def scored_tokens(passage: Passage) -> tuple[int, ...]:
    """Return the tokens of a passage that are predicted: all after a prompt, all but the first without one."""
    return passage.token_ids if passage.prompt is not None else passage.token_ids[1:]


WHOLE_TOKENS = 320
"""How many tokens of a task are drawn to be compared over the whole vocabulary: from 299 on, the largest of them bounds the 99th
percentile of all with 95 % confidence (0.99 ** 299 < 0.05)."""

LOWER_BOUND = (
    "Merging tokens only lowers KL: such a figure is a lower bound, told as `at least`. At tokens drawn by lot (320 of each task "
    "unless whole_tokens says otherwise) it is taken over the whole vocabulary too, where the runtime gives that"
)
"""What reports say of a KL over the likeliest tokens alone."""

UNSCORED = "the original could not be scored here, so that there is nothing to compare with"


def unscored(name: str, fault: str | None, *, compared: bool) -> Score:
    """Return the score of the passage `name`, of which no token was scored: because of a fault, or because it has none."""
    nothing, none = np.empty(0, dtype=np.float64), np.empty(0, dtype=np.bool_)
    return Score(name, nothing, nothing if compared else None, none if compared else None, fault)
