"""Sessions with an OpenAI-compatible server: connect, check the served model, query its capabilities, request answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
from numpy.typing import NDArray

from compress.checkpoints.checkpoint import read_config
from compress.errors import ServerError, UsageError
from compress.families import family_at
from compress.progress import Progress
from compress.runtimes.endpoint.runtime import Endpoint, EndpointModel, ServerCapabilities
from compress.runtimes.exchange import AnswerError, exchange, models_of
from compress.runtimes.openai_client import (
    Address,
    ItemError,
    RetryingClient,
    denied_message,
    error_message,
    excerpt,
    open_client,
    read_key,
)
from compress.runtimes.runtime import (
    Ability,
    Answer,
    Embeddings,
    Faults,
    ImageInput,
    OpenContext,
    Passage,
    Prompt,
    RunningServer,
    Score,
)
from compress.runtimes.vllm.server import stop_tokens
from compress.runtimes.vllm.session import (
    RequestBatch,
    RequestOrder,
    ServedModel,
    SpecialTokens,
    VllmSession,
    alternative_concurrency,
    answer_text,
    messages,
    retry_policy,
)

_DENIED = {401, 403}
_ABSENT = {404, 405, 501}
"""Statuses of a path that a server does not have; some proxies answer 405 or 501 for it."""

_LISTED_MODELS = 5
"""How many of a server's models a message lists."""

_NAME_CHARACTERS = 60
"""Characters of a server's model name or version in messages."""

_PLAIN = "OpenAI-compatible"
"""The version of a server that has no `/version`, as vLLM does."""


class EndpointSession:
    """A served model whose server has no API for log-probabilities of prompt tokens."""

    offers: frozenset[Ability] = frozenset({"text"})
    block: int | None = None

    def __init__(self, endpoint: ServedModel, settings: Endpoint) -> None:
        self.endpoint = endpoint
        self._concurrency = settings.concurrency
        self._order: RequestOrder | None = None
        self._client = RetryingClient(endpoint.client, endpoint.address, retry_policy(settings), endpoint.check)

    def close(self) -> None:
        """Abort the requests that are waiting for an answer."""
        self._client.close()

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; see `Session.answer`. The API does not return the answers' tokens.

        Raises:
            ServerError: the server has stopped answering, or many items in a row fail.
        """
        settings = {"model": self.endpoint.model, "max_tokens": max_new_tokens, "temperature": 0.0, "seed": 0}

        def request(prompt: Prompt) -> Answer:
            body = settings | {"messages": messages(prompt)}
            text = self._client.post("/v1/chat/completions", body, lambda content: _text(content, max_new_tokens))
            return Answer(id=prompt.id, text=text, token_ids=())

        return RequestBatch(self._client, self._concurrency, progress, self._order).answers(prompts, request, on_answer)

    def reordered(self) -> EndpointSession:
        """Return a session with the same server that sends requests in another order and at another concurrency."""
        other = copy(self)
        other._order, other._concurrency = RequestOrder.shuffled(), alternative_concurrency(self._concurrency)
        return other

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Not supported.

        Raises:
            UsageError: always; only vLLM has an API for scoring given tokens.
        """
        del passages, record, reference, progress
        raise UsageError(f"{self.endpoint.address.url}: gives no log-probabilities of given tokens; measure answers, or use vLLM")

    def classify(
        self, images: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Not supported.

        Raises:
            UsageError: always; the API has no zero-shot classification.
        """
        del images, classes, progress, faults
        raise UsageError("task zero-shot: cannot be measured with runtime: endpoint; set eval.runtime to transformers")

    def embed(
        self, images: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Not supported.

        Raises:
            UsageError: always; the API has no image embeddings.
        """
        del images, texts, progress, faults
        raise UsageError("task retrieval: cannot be measured with runtime: endpoint; set eval.runtime to transformers")


@contextmanager
def open_session(runtime: Endpoint, context: OpenContext) -> Generator[VllmSession | EndpointSession]:
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
        if capabilities.scores:
            config = read_config(context.artifact)
            special_tokens = SpecialTokens(
                stop_tokens(context.artifact), family_at(context.artifact, context.trust_remote_code).placeholders(config)
            )
            session = VllmSession(endpoint, runtime, special_tokens)
        else:
            session = EndpointSession(endpoint, runtime)
        if not runtime.images:
            session.offers -= {"text"}
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
    content = _get(endpoint.client, endpoint.address, "/version", runtime.request_seconds)
    version = cast("dict[str, Any]", content).get("version") if isinstance(content, dict) else None
    if not isinstance(version, str):
        _get(endpoint.client, endpoint.address, "/v1/models", runtime.request_seconds)
        return ServerCapabilities(_PLAIN, scores=False)
    with closing(RetryingClient(endpoint.client, endpoint.address, retry_policy(runtime), endpoint.check)) as client:
        scores = _supports_scores(client, endpoint.model, runtime.top_logprobs)
        return ServerCapabilities(f"vLLM {excerpt(version, _NAME_CHARACTERS)}", scores)


def _supports_scores(client: RetryingClient, model: str, top: int) -> bool:
    """Return whether a server has vLLM's token endpoints, and returns `prompt_logprobs` on a trial prompt."""
    prompt = Prompt("trial", "What is it?")
    sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "prompt_logprobs": top, "detokenize": False}
    try:
        rendering = {"model": model, "max_tokens": 1, "messages": messages(prompt)}
        ids = client.post("/v1/chat/completions/render", rendering, lambda content: [int(token) for token in content["token_ids"]])
        body = {"model": model, "sampling_params": sampling, "token_ids": ids}
        return client.post("/inference/v1/generate", body, lambda content: len(content["prompt_logprobs"] or ())) > 0
    except ItemError:
        return False


def _check_model(client: httpx.Client, address: Address, runtime: Endpoint, context: OpenContext) -> None:
    """Check that the server lists the model.

    Raises:
        ServerError: it serves another model, whose results would say nothing about the artifact.
    """
    model = runtime.served_model(context.name).model
    content = _get(client, address, "/v1/models", runtime.request_seconds)
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


def _get(client: httpx.Client, address: Address, path: str, seconds: float) -> object:
    """Return the JSON that a server answers at a path, None where it has no such path.

    Raises:
        ServerError: it cannot be reached, is too slow, refuses the key, or fails.
    """
    try:
        with exchange(client, "GET", path, seconds) as response:
            if response.status in _DENIED:
                raise ServerError(denied_message(address, str(response.status)))
            if response.status in _ABSENT:
                return None
            if httpx.codes.is_success(response.status):
                return cast("object", response.json())
            reason = excerpt(f"{response.status}: {error_message(response)}")
    except httpx.TimeoutException as error:
        raise ServerError(
            f"{address.url}: did not answer within {seconds:g} seconds; raise request_seconds, or see what it is busy with"
        ) from error
    except httpx.HTTPError as error:
        raise ServerError(f"{address.url}: no server answers there ({excerpt(str(error))}); start it, or correct url") from error
    except (AnswerError, ValueError, RecursionError) as error:
        reason = excerpt(str(error))
    raise ServerError(f"{address.url}: {path} cannot be read ({reason}); give the URL of an OpenAI-compatible server")


def _text(content: dict[str, Any], max_tokens: int) -> str:
    return answer_text(content["choices"][0]["message"]["content"], max_tokens)
