"""The endpoint runtime: servers with an OpenAI-compatible API that run elsewhere, one for each artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, PositiveInt, model_validator

from compress.errors import UsageError
from compress.recipe.schema import Frozen, load_attribute
from compress.runtimes.runtime import CAPABILITIES, Capability, Generates, Scores, Served, ServingRuntime
from compress.runtimes.top_tokens_runtime import TopTokensRuntime

if TYPE_CHECKING:
    from compress.runtimes.endpoint.session import ServerCapabilities

# The original is named like an artifact in keys, logs and reports, so that no artifact may have its name.
ORIGINAL = "original"


class EndpointModel(Frozen):
    """One served model."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$")]
    """The server's base URL, with or without `/v1`. No user info or query: a key must not be in a recipe."""

    model: Annotated[str, Field(min_length=1)]
    """The name under which the server lists the model."""


class Endpoint(ServingRuntime, TopTokensRuntime):
    """Greedy answers from servers that are already running, by the OpenAI API; from vLLM with its token endpoints, scores too.

    What is deployed there is measured, whatever the run has exported here.
    """

    revision: ClassVar[int] = 2
    formats: ClassVar[frozenset[str]] = frozenset({"onnx", "vllm"})
    elsewhere: ClassVar[bool] = True
    # `concurrency` is in the key: it decides how the server batches, and batching moves the last bits of logits.
    not_in_key: ClassVar[frozenset[str]] = frozenset({"startup_seconds", "request_seconds", "key_variable"})
    opener: ClassVar[str] = "compress.runtimes.endpoint.session:open_session"
    server: ClassVar[str] = "compress.runtimes.endpoint.session:serve"
    offers: ClassVar[frozenset[Capability]] = frozenset({Generates, Scores, Served})

    runtime: Literal["endpoint"]
    original: EndpointModel
    artifacts: Mapping[str, EndpointModel]
    """The served artifacts, by the names of the recipe's exports."""

    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """The environment variable that holds the API key."""

    images: bool = True
    """False for a server that takes text alone: prompts with images are not sent to it."""

    concurrency: PositiveInt = 8
    """How many requests are in flight at once."""

    request_seconds: PositiveInt = 120
    """The timeout of one request."""

    startup_seconds: PositiveInt = 300
    """How long an unreachable server is waited for."""

    @model_validator(mode="after")
    def _check_names(self) -> Endpoint:
        if ORIGINAL in self.artifacts:
            raise ValueError("artifacts holds original: name it beside artifacts, as original: {url: …, model: …}")
        return self

    @property
    def models(self) -> dict[str, EndpointModel]:
        """The served original and artifacts, by name."""
        return {ORIGINAL: self.original, **self.artifacts}

    def served_model(self, name: str) -> EndpointModel:
        """Return the served original or artifact of this name.

        Raises:
            UsageError: the recipe names no server for it.
        """
        if name not in self.models:
            raise UsageError(self._no_server(name))
        return self.models[name]

    def settings(self, name: str | None = None) -> dict[str, Any]:
        """Return the fields that affect what is measured; with `name`, only that artifact's server."""
        fields = super().settings()
        if name is None:
            return fields
        shared = {key: value for key, value in fields.items() if key not in ("original", "artifacts")}
        # Only this artifact's server: another URL for one of them must not measure the others again.
        return shared | self.served_model(name).model_dump()

    def faults(self, artifacts: Sequence[str]) -> list[str]:
        """Return the recipe's artifacts without a server, and the servers without an artifact, one line each."""
        without_server = [self._no_server(name) for name in artifacts if name not in self.artifacts]
        without_artifact = [
            f"artifacts.{name}: the recipe exports no artifact of that name, only {', '.join(artifacts)}; correct the name"
            for name in self.artifacts
            if name not in artifacts
        ]
        return without_server + without_artifact

    def missing(self) -> dict[Capability, str]:
        """Return what these servers lack, each with the reason; queries them.

        Raises:
            MissingError: a key is not there, or a server does not answer.
        """
        reasons: dict[Capability, str] = {}
        if not self.images:
            reasons[Generates] = "images is false"
        servers = [f"{self.models[name].url} ({name})" for name, server in self.capabilities.items() if not server.scores]
        if servers:
            reasons[Scores] = f"{', '.join(servers)} gives no {CAPABILITIES[Scores]}"
        return reasons

    def versions(self) -> dict[str, str]:
        """Return each server's reported version, by the artifact's name.

        Raises:
            MissingError: a key is not there, or a server does not answer.
        """
        return {name: f"{server.version}{', with scores' if server.scores else ''}" for name, server in self.capabilities.items()}

    def loaded_with(self, name: str) -> str:
        """Return the artifact's server and its version, as text for the model card.

        Raises:
            MissingError: a key is not there, or a server does not answer.
        """
        return f"{self.runtime} ({self.versions()[name]})"

    # Plan and run ask for versions, capabilities and notes: without the cache each would query every server anew.
    @cached_property
    def capabilities(self) -> dict[str, ServerCapabilities]:
        """Each server's capabilities, by the artifact's name; queried once."""
        query = load_attribute("compress.runtimes.endpoint.session:query_capabilities")
        return {name: cast("ServerCapabilities", query(self, name)) for name in self.models}

    def _no_server(self, name: str) -> str:
        return f"no server is named for {name}; add {name}: {{url: …, model: …}} to the artifacts of runtime: endpoint"
