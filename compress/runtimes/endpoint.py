"""The endpoint runtime: servers with an OpenAI-compatible API that run elsewhere, one for each artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from compress.errors import UsageError
from compress.runtimes.runtime import WHOLE_TOKENS, Ability, OpenContext, Runtime, Served, Session
from compress.runtimes.vllm import Vllm
from compress.schema import Frozen

ORIGINAL = "original"


class Place(Frozen):
    """Where one model is served, and under which name; a key does not belong into the URL."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$")]
    model: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Told:
    """What a server says of itself: its version, and whether it gives the log-probabilities of tokens that it is given."""

    version: str
    scores: bool


class Endpoint(Runtime):
    """Greedy answers of servers that run already, by the OpenAI API; where they are vLLM with its token endpoints, scores too.

    `original` and `artifacts`, by the names of the recipe's exports, say where each is served: what is deployed there is measured,
    whatever the run has made here. The key is in the environment variable `key_variable`. `images: false` is for a server that
    takes text alone: questions about images are not asked there. A request may take `request_seconds`; a server that does not
    answer at all is waited for `startup_seconds`. `top_logprobs` and `whole_tokens` are as in `vllm`.
    """

    revision: ClassVar[int] = 2
    kl_definition: ClassVar[str] = Vllm.kl_definition
    incidental: ClassVar[frozenset[str]] = frozenset({"startup_seconds", "request_seconds", "key_variable"})
    serves: ClassVar[bool] = True
    asks_server: ClassVar[bool] = True

    runtime: Literal["endpoint"]
    original: Place
    artifacts: Mapping[str, Place]
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    images: bool = True
    concurrency: PositiveInt = 8
    request_seconds: PositiveInt = 120
    startup_seconds: PositiveInt = 300
    top_logprobs: PositiveInt = 20
    whole_tokens: NonNegativeInt = WHOLE_TOKENS

    @model_validator(mode="after")
    def _check_names(self) -> Endpoint:
        if ORIGINAL in self.artifacts:
            raise ValueError("artifacts holds original: name it beside artifacts, as original: {url: …, model: …}")
        return self

    @property
    def places(self) -> dict[str, Place]:
        """Where the original and each artifact is served, by name."""
        return {ORIGINAL: self.original, **self.artifacts}

    def place(self, name: str) -> Place:
        """Return where the original or an artifact is served.

        Raises:
            UsageError: nothing is said of it.
        """
        if name not in self.places:
            raise UsageError(self._unknown(name))
        return self.places[name]

    def settings(self, name: str | None = None) -> dict[str, Any]:
        """Return the fields that shape what is measured; with `name`, only that artifact's server."""
        fields = super().settings()
        if name is None:
            return fields
        kept = {key: value for key, value in fields.items() if key not in ("original", "artifacts")}
        return kept | self.place(name).model_dump()

    def faults(self, artifacts: Sequence[str]) -> list[str]:
        """Return which of a recipe's artifacts have no server, and which servers are of none of them."""
        lacking = [self._unknown(name) for name in artifacts if name not in self.artifacts]
        superfluous = [
            f"artifacts.{name}: the recipe exports no artifact of that name, only {', '.join(artifacts)}; correct the name"
            for name in self.artifacts
            if name not in artifacts
        ]
        return lacking + superfluous

    def missing(self) -> dict[Ability, str]:
        """Return what these servers do not offer, and why; asks them.

        Raises:
            MissingError: a key is not there, or a server does not answer.
        """
        found: dict[Ability, str] = {}
        if not self.images:
            found["text"] = "images is false"
        mute = [f"{self.places[name].url} ({name})" for name, told in self.told.items() if not told.scores]
        if mute:
            found["scores"] = f"{', '.join(mute)} gives no log-probabilities of given tokens"
        return found

    def versions(self) -> dict[str, str]:
        """Return what each server says that it is.

        Raises:
            MissingError: a key is not there, or a server does not answer.
        """
        return {name: f"{told.version}{', with scores' if told.scores else ''}" for name, told in self.told.items()}

    def loaded_with(self, name: str) -> str:
        """Return what the artifact's server says that it is, in words for its model card.

        Raises:
            MissingError: a key is not there, or a server does not answer.
        """
        return f"{self.runtime} ({self.versions()[name]})"

    @cached_property
    def told(self) -> dict[str, Told]:
        """What each server says of itself, by the artifact's name; it is asked once."""
        from compress.runtimes.endpoint_session import ask_about

        return {name: ask_about(self, name) for name in self.places}

    def open(self, context: OpenContext) -> AbstractContextManager[Session]:
        """Reach the server of the original or the artifact that the context names.

        Raises:
            UsageError: no server is named for it.
            MissingError: the key is not there.
            ServerError: nothing answers there, it wants another key, or serves another model.
        """
        from compress.runtimes.endpoint_session import open_session

        return open_session(self, context)

    def serve(self, context: OpenContext) -> AbstractContextManager[Served]:
        """Reach the server of the original or the artifact that the context names, for others to put load on; raises as `open`."""
        from compress.runtimes.endpoint_session import serve

        return serve(self, context)

    def _unknown(self, name: str) -> str:
        return f"no server is named for {name}; add {name}: {{url: …, model: …}} to the artifacts of runtime: endpoint"
