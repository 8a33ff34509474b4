"""What every runtime offers the evaluation: an artifact is opened, asked questions, and scored on given tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.progress import Progress
from compress.schema import Frozen

Ability = Literal["text", "comparison"]
"""What a model does: it writes text, or compares images with texts."""


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
    """What a model said to one prompt, greedily decoded, without special tokens."""

    id: str
    text: str
    token_ids: tuple[int, ...]


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
    first, both None where nothing was compared.
    """

    id: str
    negative_log_likelihood: NDArray[np.float64]
    kl: NDArray[np.float64] | None = None
    same_top: NDArray[np.bool_] | None = None


class Session(Protocol):
    """An artifact that is loaded and answers."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress) -> list[Answer]:
        """Answer each prompt by greedy decoding, in the order given."""
        ...

    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Score the passages, in the order given.

        With `record`, what a later comparison needs is written to that new folder; with `against`, such a folder of the
        original's, each token's prediction is compared with the original's. The same passages in the same order must be given.
        """
        ...

    def classify(self, pictures: Sequence[Picture], classes: Sequence[Sequence[str]], progress: Progress) -> NDArray[np.float64]:
        """Return log-probabilities [pictures, classes] of a model that compares images with texts; a class has one or more."""
        ...


@dataclass(frozen=True)
class OpenContext:
    """What a runtime is given to open an artifact: its folder, where logs belong, and who watches."""

    artifact: Path
    logs: Path
    progress: Progress
    trust_remote_code: bool = False


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

    offers: ClassVar[frozenset[Ability]] = frozenset({"text"})
    """What models that it can measure do."""

    def settings(self) -> dict[str, Any]:
        """Return the fields that shape what is measured, as plain JSON values."""
        return self.model_dump(mode="json", exclude=set(self.incidental))

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


@dataclass(frozen=True)
class Environment:
    """A runtime's own virtual environment."""

    name: str
    python: Path
    versions: dict[str, str] = field(default_factory=lambda: dict[str, str]())
