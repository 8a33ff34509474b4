"""Sessions with an OpenAI-compatible server: connect, check the served model, query its capabilities, request answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import httpx

from compress.checkpoints.special_tokens import special_tokens
from compress.data.prompts import Prompt
from compress.errors import ServerError
from compress.progress import Progress
from compress.runtimes.exchange import models_of
from compress.runtimes.openai_client import (
    Address,
    ItemError,
    RetryingClient,
    ServedModel,
    excerpt,
    get_json,
    open_client,
    read_key,
)
from compress.runtimes.runtime import Answer, OpenContext, RunningServer
from compress.runtimes.server_session import ServerSession, answer_text, messages, retry_policy
from compress.runtimes.vllm.session import ScoringSession, VllmSession

if TYPE_CHECKING:
    from compress.runtimes.endpoint.runtime import Endpoint, EndpointModel

_LISTED_MODELS = 5
"""How many of a server's models a message lists."""

_NAME_CHARACTERS = 60
"""Characters of a server's model name or version in messages."""

_PLAIN = "OpenAI-compatible"
"""The version of a server that has no `/version`, as vLLM does."""


@dataclass(frozen=True)
class ServerCapabilities:
    """A server's version and what its API supports."""

    version: str
    scores: bool
    """Whether it returns log-probabilities of prompt tokens."""


class EndpointSession(ServerSession):
    """A served model whose server has no API for log-probabilities of prompt tokens."""

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; see `Generates.answer`. The API does not return the answers' tokens.

        Raises:
            ServerError: the server has stopped answering, or many items in a row fail.
        """

        def request(prompt: Prompt) -> Answer:
            body = self._body(max_new_tokens) | {"messages": messages(prompt)}
            text = self._client.post("/v1/chat/completions", body, lambda content: _text(content, max_new_tokens))
            return Answer(id=prompt.id, text=text, token_ids=())

        return self._answers(prompts, request, progress, on_answer)


@contextmanager
def open_session(runtime: Endpoint, context: OpenContext) -> Generator[ServerSession]:
    """Connect to the server of the original or the artifact that the context names, and check that it serves that model.

    Raises:
        UsageError: no server is named for it.
        MissingError: the key is not there.
        ServerError: nothing answers there, it wants another key, or serves another model.
    """
    served = runtime.served_model(context.name)
    address = _address(runtime, served)
    with open_client(address, runtime.concurrency) as client:
        _check_model(client, address, runtime, context)
        endpoint = ServedModel(client, served.model, lambda: None, address)
        capabilities = _capabilities(runtime, endpoint)
        # A server that takes text alone is sent no prompts: what it can do else is left.
        if capabilities.scores:
            tokens = special_tokens(context.artifact, context.family)
            session = (VllmSession if runtime.images else ScoringSession)(endpoint, runtime, tokens)
        else:
            session = (EndpointSession if runtime.images else ServerSession)(endpoint, runtime)
        if not capabilities.scores and capabilities.version != _PLAIN:
            context.progress.warn(
                f"{address.url}: is a server of {capabilities.version} without its token endpoints: only answers are measured "
                "there; start it with --enable-scale-out for perplexity and KL"
            )
        with closing(session):
            yield session


@contextmanager
def serve(runtime: Endpoint, context: OpenContext) -> Generator[RunningServer]:
    """Check the server as `open_session` does, and yield it for a load generator."""
    served = runtime.served_model(context.name)
    address = _address(runtime, served)
    with open_client(address, 1) as client:
        _check_model(client, address, runtime, context)
    # No process: memory and load of a server elsewhere cannot be read from here.
    yield RunningServer(address.url.rstrip("/").removesuffix("/v1"), served.model, address.key)


def query_capabilities(runtime: Endpoint, name: str) -> ServerCapabilities:
    """Query the capabilities of the server of the original or an artifact.

    Raises:
        MissingError: the key is not there, or the server does not answer.
    """
    served = runtime.served_model(name)
    address = _address(runtime, served)
    with open_client(address, 1) as client:
        return _capabilities(runtime, ServedModel(client, served.model, lambda: None, address))


def _address(runtime: Endpoint, served: EndpointModel) -> Address:
    return Address(served.url, read_key(runtime.key_variable, served.url), runtime.key_variable)


def _capabilities(runtime: Endpoint, endpoint: ServedModel) -> ServerCapabilities:
    content = get_json(endpoint.client, endpoint.address, "/version", runtime.request_seconds)
    version = cast("dict[str, Any]", content).get("version") if isinstance(content, dict) else None
    # OpenAI's API has no /version. The list of models is asked for too: a wrong URL or key fails here, not at the first item.
    if not isinstance(version, str):
        get_json(endpoint.client, endpoint.address, "/v1/models", runtime.request_seconds)
        return ServerCapabilities(_PLAIN, scores=False)
    with closing(RetryingClient(endpoint.client, endpoint.address, retry_policy(runtime), endpoint.check)) as client:
        scores = _supports_scores(client, endpoint.model, runtime.top_logprobs)
        return ServerCapabilities(f"vLLM {excerpt(version, _NAME_CHARACTERS)}", scores)


def _supports_scores(client: RetryingClient, model: str, top: int) -> bool:
    """Return whether a server has vLLM's token endpoints, and returns `prompt_logprobs` on a trial prompt."""
    prompt = Prompt("trial", "What is it?")
    # `top` of the recipe: a server whose --max-logprobs is lower refuses this one request instead of every passage.
    sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "prompt_logprobs": top, "detokenize": False}
    try:
        rendering = {"model": model, "max_tokens": 1, "messages": messages(prompt)}
        ids = client.post("/v1/chat/completions/render", rendering, lambda content: [int(token) for token in content["token_ids"]])
        body = {"model": model, "sampling_params": sampling, "token_ids": ids}
        return client.post("/inference/v1/generate", body, lambda content: len(content["prompt_logprobs"] or ())) > 0
    # A refusal means that the endpoints are off or missing: such a server still generates.
    except ItemError:
        return False


def _check_model(client: httpx.Client, address: Address, runtime: Endpoint, context: OpenContext) -> None:
    """Check that the server lists the model.

    Raises:
        ServerError: it serves another model, whose results would say nothing about the artifact.
    """
    model = runtime.served_model(context.name).model
    content = get_json(client, address, "/v1/models", runtime.request_seconds)
    # Some gateways hide /v1/models: there is nothing to compare with, and the recipe names the model.
    if content is None:
        context.progress.warn(f"{address.url}: does not tell which models it serves; that it serves {model} is taken on trust")
        return
    try:
        names = [str(row["id"]) for row in models_of(content)]
    except ValueError as error:
        raise ServerError(
            f"{address.url}: its list of models cannot be read; give the URL of an OpenAI-compatible server"
        ) from error
    if model not in names:
        names_listed = ", ".join(excerpt(name, _NAME_CHARACTERS) for name in names[:_LISTED_MODELS])
        names_listed += f" and {len(names) - _LISTED_MODELS} more" if len(names) > _LISTED_MODELS else ""
        raise ServerError(
            f"{address.url} serves {names_listed or 'no model'}, not {model}, which the recipe names for {context.name}; correct "
            "model, or start the server with that one"
        )


def _text(content: dict[str, Any], max_tokens: int) -> str:
    return answer_text(content["choices"][0]["message"]["content"], max_tokens)
