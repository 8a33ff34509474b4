"""A server with an OpenAI-compatible API: reached, asked what it serves and what it can be asked, and then for answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import read_config
from compress.errors import ServerError, UsageError
from compress.families import family_at
from compress.progress import Progress
from compress.runtimes.endpoint import Place, Told
from compress.runtimes.endpoint import ServedModel as Settings
from compress.runtimes.exchange import AnswerError, exchange, models_of
from compress.runtimes.openai_client import Address, Asker, ItemError, denied, open_client, read_key, refusal_of, shown
from compress.runtimes.runtime import Ability, Answer, Embeddings, Faults, OpenContext, Passage, Picture, Prompt, Score, Served
from compress.runtimes.vllm_server import stop_tokens
from compress.runtimes.vllm_session import (
    Asking,
    Order,
    ServedModel,
    Tokens,
    VllmSession,
    answer_text,
    messages,
    other_concurrency,
    patience_of,
)

_DENIED = {401, 403}
_ABSENT = {404, 405, 501}
_SHOWN = 5
_LONGEST = 60
_PLAIN = "OpenAI-compatible"


class EndpointSession:
    """A model that a server answers for; it gives no log-probabilities of tokens that it is given."""

    offers: frozenset[Ability] = frozenset({"text"})
    block: int | None = None

    def __init__(self, endpoint: ServedModel, settings: Settings) -> None:
        self.endpoint = endpoint
        self._concurrency = settings.concurrency
        self._order: Order | None = None
        self._asker = Asker(endpoint.client, endpoint.address, patience_of(settings), endpoint.check)

    def close(self) -> None:
        """Make what still waits for an answer give up."""
        self._asker.close()

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, each: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; see `Session.answer`. The answers' tokens are not known.

        Raises:
            ServerError: the server does not answer any more, or items fail one after the other.
        """
        settings = {"model": self.endpoint.model, "max_tokens": max_new_tokens, "temperature": 0.0, "seed": 0}

        def ask(prompt: Prompt) -> Answer:
            body = settings | {"messages": messages(prompt)}
            text = self._asker.post("/v1/chat/completions", body, lambda content: _text(content, max_new_tokens))
            return Answer(id=prompt.id, text=text, token_ids=())

        return Asking(self._asker, self._concurrency, progress, self._order).answers(prompts, ask, each)

    def otherwise(self) -> EndpointSession:
        """Return a session that asks the same server in another order and with another number of requests at once."""
        other = copy(self)
        other._order, other._concurrency = Order.drawn(), other_concurrency(self._concurrency)
        return other

    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Refuse to score given tokens.

        Raises:
            UsageError: always; only vLLM has an API for it.
        """
        del passages, record, against, progress
        raise UsageError(f"{self.endpoint.address.url}: gives no log-probabilities of given tokens; measure answers, or use vLLM")

    def classify(
        self, pictures: Sequence[Picture], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Refuse to tell which of some texts an image shows.

        Raises:
            UsageError: always; the API has nothing for it.
        """
        del pictures, classes, progress, faults
        raise UsageError("task zero-shot: cannot be measured with runtime: endpoint; set eval.runtime to transformers")

    def embed(
        self, pictures: Sequence[Picture], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Refuse to place images and texts in one space.

        Raises:
            UsageError: always; the API has nothing for it.
        """
        del pictures, texts, progress, faults
        raise UsageError("task retrieval: cannot be measured with runtime: endpoint; set eval.runtime to transformers")


@contextmanager
def open_session(runtime: Settings, context: OpenContext) -> Generator[VllmSession | EndpointSession]:
    """Reach the server of the original or the artifact that the context names, and see that it serves the model asked for.

    Raises:
        UsageError: no server is named for it.
        MissingError: the key is not there.
        ServerError: nothing answers there, it wants another key, or serves another model.
    """
    place = runtime.place(context.name)
    address = _address(runtime, place)
    with open_client(address, runtime.concurrency) as client:
        _check_model(client, address, runtime, context)
        endpoint = ServedModel(client, place.model, lambda: None, address)
        told = _ask(runtime, endpoint)
        if told.scores:
            config = read_config(context.artifact)
            tokens = Tokens(
                stop_tokens(context.artifact), family_at(context.artifact, context.trust_remote_code).placeholders(config)
            )
            session = VllmSession(endpoint, runtime, tokens)
        else:
            session = EndpointSession(endpoint, runtime)
        if not runtime.images:
            session.offers -= {"text"}
        if not told.scores and told.version != _PLAIN:
            context.progress.warn(
                f"{address.url}: is a server of {told.version} without its token endpoints: only answers are measured there; start "
                "it with --enable-scale-out for perplexity and KL"
            )
        with closing(session):
            yield session


@contextmanager
def serve(runtime: Settings, context: OpenContext) -> Generator[Served]:
    """Reach the server as `open_session` does, for others to put load on."""
    place = runtime.place(context.name)
    address = _address(runtime, place)
    with open_client(address, 1) as client:
        _check_model(client, address, runtime, context)
    yield Served(address.url.rstrip("/").removesuffix("/v1"), place.model, address.key)


def ask_about(runtime: Settings, name: str) -> Told:
    """Return what the server of the original or an artifact says of itself.

    Raises:
        MissingError: the key is not there, or the server does not answer.
    """
    place = runtime.place(name)
    address = _address(runtime, place)
    with open_client(address, 1) as client:
        return _ask(runtime, ServedModel(client, place.model, lambda: None, address))


def _address(runtime: Settings, place: Place) -> Address:
    return Address(place.url, read_key(runtime.key_variable, place.url), runtime.key_variable)


def _ask(runtime: Settings, endpoint: ServedModel) -> Told:
    content = _get(endpoint.client, endpoint.address, "/version", runtime.request_seconds)
    version = cast("dict[str, Any]", content).get("version") if isinstance(content, dict) else None
    if not isinstance(version, str):
        _get(endpoint.client, endpoint.address, "/v1/models", runtime.request_seconds)
        return Told(_PLAIN, scores=False)
    with closing(Asker(endpoint.client, endpoint.address, patience_of(runtime), endpoint.check)) as asker:
        return Told(f"vLLM {shown(version, _LONGEST)}", scores=_gives_scores(asker, endpoint.model, runtime.top_logprobs))


def _gives_scores(asker: Asker, model: str, top: int) -> bool:
    """Return whether a server takes a prompt apart into tokens, and says how likely each of them is."""
    prompt = Prompt("trial", "What is it?")
    sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "prompt_logprobs": top, "detokenize": False}
    try:
        rendering = {"model": model, "max_tokens": 1, "messages": messages(prompt)}
        ids = asker.post("/v1/chat/completions/render", rendering, lambda content: [int(token) for token in content["token_ids"]])
        body = {"model": model, "sampling_params": sampling, "token_ids": ids}
        return asker.post("/inference/v1/generate", body, lambda content: len(content["prompt_logprobs"] or ())) > 0
    except ItemError:
        return False


def _check_model(client: httpx.Client, address: Address, runtime: Settings, context: OpenContext) -> None:
    """See that the server says that it serves the model.

    Raises:
        ServerError: it serves something else; measuring that would say nothing of the artifact.
    """
    model = runtime.place(context.name).model
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
        listed = ", ".join(shown(name, _LONGEST) for name in names[:_SHOWN])
        listed += f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ServerError(
            f"{address.url} serves {listed or 'no model'}, not {model}, which the recipe names for {context.name}; correct "
            "model, or start the server with that one"
        )


def _get(client: httpx.Client, address: Address, path: str, seconds: float) -> object:
    """Return what a server says at a path, None where it has no such path.

    Raises:
        ServerError: it cannot be reached, is too slow, refuses the key, or fails.
    """
    try:
        with exchange(client, "GET", path, seconds) as answer:
            if answer.status in _DENIED:
                raise ServerError(denied(address, str(answer.status)))
            if answer.status in _ABSENT:
                return None
            if httpx.codes.is_success(answer.status):
                return cast("object", answer.json())
            words = shown(f"{answer.status}: {refusal_of(answer)}")
    except httpx.TimeoutException as error:
        raise ServerError(
            f"{address.url}: did not answer within {seconds:g} seconds; raise request_seconds, or see what it is busy with"
        ) from error
    except httpx.HTTPError as error:
        raise ServerError(f"{address.url}: no server answers there ({shown(str(error))}); start it, or correct url") from error
    except (AnswerError, ValueError, RecursionError) as error:
        words = shown(str(error))
    raise ServerError(f"{address.url}: {path} cannot be read ({words}); give the URL of an OpenAI-compatible server")


def _text(content: dict[str, Any], tokens: int) -> str:
    return answer_text(content["choices"][0]["message"]["content"], tokens)
