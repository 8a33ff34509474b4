"""Sessions with a vLLM server: answers through the OpenAI API, scores through vLLM's own token endpoints."""

from __future__ import annotations

import base64
from collections.abc import Callable, Container, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import httpx
import numpy as np
from numpy.typing import NDArray

from compress.data.images import media_type
from compress.errors import ServerError, UsageError
from compress.progress import Progress
from compress.runtimes.openai_client import Address, Item, ItemError, Result, RetryingClient, RetryPolicy
from compress.runtimes.runtime import Ability, Answer, Embeddings, Faults, ImageInput, Passage, Prompt, Score, scored_tokens
from compress.runtimes.top_tokens import Position, TopRecord, position_of, scores_of, write_record
from compress.untrusted.limits import limits
from compress.untrusted.redaction import redact_answer

_TOKEN_LIMIT = 1 << 31
"""The bound on token ids: records store them as 32-bit integers."""

_MAX_LOG_PROBABILITY = 1e-3
"""How far above 0 rounding may put a log-probability."""

_ALTERNATIVE_CONCURRENCY = 8
"""The concurrency of a reordered session where the original one is 1: enough that requests share batches."""


@dataclass(frozen=True)
class ServedModel:
    """A model on a server, and the client to reach it."""

    client: httpx.Client
    model: str
    """The served model's name."""

    check: Callable[[], None]
    """Raises ServerError if the server's process is known to have exited."""

    address: Address


class ServerSettings(Protocol):
    """The fields of a runtime that configure requests to its server."""

    @property
    def concurrency(self) -> int: ...  # noqa: D102
    @property
    def top_logprobs(self) -> int: ...  # noqa: D102
    @property
    def whole_tokens(self) -> int: ...  # noqa: D102
    @property
    def request_seconds(self) -> int: ...  # noqa: D102
    @property
    def startup_seconds(self) -> int: ...  # noqa: D102


def retry_policy(settings: ServerSettings) -> RetryPolicy:
    """Return the retry policy for a runtime's fields."""
    return RetryPolicy(request_seconds=settings.request_seconds, away_seconds=settings.startup_seconds)


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens with a role in generation."""

    stops: tuple[int, ...]
    """The end-of-sequence tokens."""

    placeholders: tuple[int, ...] = ()
    """The tokens that stand for images and videos in a prompt, which no answer may contain."""


class VllmSession:
    """An artifact loaded by a vLLM server."""

    offers: frozenset[Ability] = frozenset({"text", "scores"})
    block: int | None = None

    def __init__(self, endpoint: ServedModel, settings: ServerSettings, tokens: SpecialTokens) -> None:
        self.endpoint = endpoint
        self._concurrency = settings.concurrency
        self._top = settings.top_logprobs
        self._order: RequestOrder | None = None
        self.whole_tokens = settings.whole_tokens
        self._stops = tokens.stops
        self._bias = {str(token): -100 for token in tokens.placeholders}
        self._client = RetryingClient(endpoint.client, endpoint.address, retry_policy(settings), endpoint.check)

    def close(self) -> None:
        """Abort the requests that are waiting for an answer."""
        self._client.close()

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; the model's sampling settings and penalties are left out. See `Session.answer`.

        Placeholder tokens of images and videos are suppressed: an answer that has one could not be scored.

        Raises:
            ServerError: the server exited or has stopped answering, or many items in a row fail.
        """

        def request(prompt: Prompt) -> Answer:
            body = self._body(max_new_tokens) | {"messages": messages(prompt), "return_token_ids": True}
            if self._bias:
                body |= {"logit_bias": self._bias}
            if self._stops:
                body |= {"stop_token_ids": list(self._stops), "ignore_eos": True}
            return self._client.post(
                "/v1/chat/completions", body, lambda content: self._parse_answer(prompt, content["choices"][0], max_new_tokens)
            )

        return RequestBatch(self._client, self._concurrency, progress, self._order).answers(prompts, request, on_answer)

    def reordered(self) -> VllmSession:
        """Return a session with the same server that sends requests in another order and at another concurrency."""
        other = copy(self)
        other._order, other._concurrency = RequestOrder.shuffled(), alternative_concurrency(self._concurrency)
        return other

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Session.score`.

        Raises:
            ServerError: the server exited or has stopped answering, or many items in a row fail.
            UsageError: `reference` was recorded on other passages, by another runtime, or with another `top_logprobs`.
            StoreError: the record cannot be written.
        """
        original = TopRecord(reference, passages, self._top) if reference is not None else None
        with progress.task("score", sum(len(passage.token_ids) for passage in passages), "tokens") as advance:
            batch = RequestBatch(self._client, self._concurrency, progress, self._order)
            positions: list[list[Position] | str] = batch.each(
                passages, self._positions, lambda passage, fault: fault, lambda passage, row: advance(len(passage.token_ids))
            )
        if record is not None:
            write_record(record, passages, [[] if isinstance(row, str) else row for row in positions], self._top)
        return scores_of(passages, positions, original)

    def distributions(
        self, passages: Sequence[Passage], positions: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return the distribution over the full vocabulary at each position; see `FullVocabularySession`.

        One request per position: everything before it is the prompt, and one token is generated. `prompt_logprobs` would return
        full distributions for all tokens of the prompt at once, image tokens included.

        Raises:
            ServerError: the server exited or has stopped answering, or many items in a row fail.
        """
        if not positions:
            return []

        def request(position: tuple[int, int]) -> NDArray[np.float32]:
            return self._distribution(passages[position[0]], position[1])

        try:
            first = request(positions[0])
        except ItemError as error:
            progress.warn(
                f"{self.endpoint.address.url}: gives no whole distributions ({error}), so that KL is known from below alone; start "
                "the server with --max-logprobs -1"
            )
            return [None] * len(positions)
        with progress.task("whole vocabulary", len(positions), "tokens") as advance:
            advance(1)
            batch = RequestBatch(self._client, self._concurrency, progress)
            rest: list[NDArray[np.float32] | None] = batch.each(
                positions[1:], request, lambda position, fault: None, lambda position, row: advance(1)
            )
        return [first, *rest]

    def classify(
        self, images: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Not supported.

        Raises:
            UsageError: always; vLLM's embeddings are not offered here.
        """
        del images, classes, progress, faults
        raise UsageError("task zero-shot: cannot be measured with runtime: vllm; set eval.runtime to transformers")

    def embed(
        self, images: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Not supported.

        Raises:
            UsageError: always; vLLM's embeddings are not offered here.
        """
        del images, texts, progress, faults
        raise UsageError("task retrieval: cannot be measured with runtime: vllm; set eval.runtime to transformers")

    def _parse_answer(self, prompt: Prompt, choice: dict[str, Any], max_tokens: int) -> Answer:
        ids = token_ids(choice["token_ids"], max_tokens)
        end = next((index for index, token in enumerate(ids) if token in self._stops), len(ids))
        return Answer(id=prompt.id, text=answer_text(choice["message"]["content"], max_tokens), token_ids=tuple(ids[:end]))

    def _positions(self, passage: Passage) -> list[Position] | str:
        """Request the predictions of a passage's tokens, one per scored token; a fault instead if there are none."""
        # Without `detokenize: False` vLLM crashes on token ids that the vocabulary has and the tokenizer lacks.
        sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "prompt_logprobs": self._top, "detokenize": False}
        tokens = scored_tokens(passage)
        if not tokens:
            return []
        body = self._prefix_request(passage, len(tokens), sampling)

        def parse(content: dict[str, Any]) -> list[Position]:
            rows = cast("list[dict[str, Any] | None]", content["prompt_logprobs"] or [])[-len(tokens) :]
            if len(rows) != len(tokens):
                raise ServerError(f"{passage.id}: vLLM gave no log-probabilities of its tokens; this version cannot score")
            return [position_of(passage.id, token, row, self._top) for token, row in zip(tokens, rows, strict=True)]

        return self._client.post("/inference/v1/generate", body, parse)

    def _prefix_request(self, passage: Passage, count: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """Return a request whose prompt ends with the first `count` scored tokens of a passage."""
        body: dict[str, Any] = {"model": self.endpoint.model, "sampling_params": sampling}
        tokens = scored_tokens(passage)[:count]
        if passage.prompt is None:
            return body | {"token_ids": [*passage.token_ids[:1], *tokens]}
        rendering = self._body(1) | {"messages": messages(passage.prompt)}
        ids, features = self._client.post("/v1/chat/completions/render", rendering, self._rendered)
        return body | {"token_ids": [*ids, *tokens], "features": features}

    def _distribution(self, passage: Passage, count: int) -> NDArray[np.float32]:
        """Request the distribution after the first `count` scored tokens of a passage."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "logprobs": -1, "detokenize": False, "ignore_eos": True}
        return self._client.post("/inference/v1/generate", self._prefix_request(passage, count, sampling), _full_distribution)

    def _rendered(self, content: dict[str, Any]) -> tuple[list[int], dict[str, Any] | None]:
        ids = token_ids(content["token_ids"], limits().answer_values)
        return ids, _trim_placeholders(content["features"], ids, self._bias)

    def _body(self, max_tokens: int) -> dict[str, Any]:
        return {"model": self.endpoint.model, "max_tokens": max_tokens, "temperature": 0.0, "seed": 0}


@dataclass(frozen=True)
class RequestOrder:
    """A random order of requests, the same for the same seed."""

    seed: int

    @classmethod
    def shuffled(cls) -> RequestOrder:
        """Return the order of a reordered session."""
        return cls(1)

    def of(self, count: int) -> list[int]:
        """Return the indices of `count` items in this order."""
        return np.random.default_rng(self.seed).permutation(count).tolist()


def alternative_concurrency(concurrency: int) -> int:
    """Return a concurrency at which the server computes other batches, and so by other kernels."""
    return 1 if concurrency > 1 else _ALTERNATIVE_CONCURRENCY


@dataclass(frozen=True)
class RequestBatch:
    """How a sequence of items is sent to a server."""

    client: RetryingClient
    concurrency: int
    progress: Progress
    order: RequestOrder | None = None
    """None for the items' own order."""

    def each(
        self,
        items: Sequence[Item],
        call: Callable[[Item], Result],
        on_failure: Callable[[Item, str], Result],
        on_result: Callable[[Item, Result], None],
    ) -> list[Result]:
        """Send each item, and return the results in the items' own order; see `RetryingClient.each`."""
        order = list(range(len(items))) if self.order is None else self.order.of(len(items))
        results = self.client.each([items[index] for index in order], call, on_failure, self.concurrency, on_result)
        by_index = dict(zip(order, results, strict=True))
        return [by_index[index] for index in range(len(items))]

    def answers(
        self, prompts: Sequence[Prompt], call: Callable[[Prompt], Answer], on_answer: Callable[[Answer], None] | None
    ) -> list[Answer]:
        """Send each prompt, and return the answers in their order; `on_answer` is called with every answer as it arrives."""
        with self.progress.task("answer", len(prompts), "prompts") as advance:

            def on_result(prompt: Prompt, answer: Answer) -> None:
                del prompt
                if on_answer is not None:
                    on_answer(answer)
                advance(1)

            return self.each(prompts, call, _failed_answer, on_result)


def _failed_answer(prompt: Prompt, fault: str) -> Answer:
    return Answer(id=prompt.id, text="", token_ids=(), fault=fault)


def answer_text(content: object, max_tokens: int) -> str:
    """Return the answer's text from a response, redacted, with lone surrogates replaced so that it can be written as UTF-8.

    Raises:
        TypeError: it is no text.
        ValueError: it is longer than `max_tokens` tokens can be.
    """
    if content is not None and not isinstance(content, str):
        raise TypeError("the answer is no text")
    text = content or ""
    if len(text) > max_tokens * limits().answer_characters:
        raise ValueError(
            f"it has {len(text):,} characters where {max_tokens:,} tokens were asked for ({limits().set_by('answer_characters')})"
        )
    return redact_answer(text).encode("utf-8", "replace").decode()


def token_ids(content: object, limit: int) -> list[int]:
    """Return the token ids from a response.

    Raises:
        TypeError: they are no list.
        ValueError: there are more than `limit`, or one is no valid token id.
    """
    if not isinstance(content, list):
        raise TypeError("its tokens are no list")
    ids = cast("list[object]", content)
    if len(ids) > limit:
        raise ValueError(f"it has {len(ids):,} tokens where {limit:,} were asked for")
    if not all(isinstance(token, int) and 0 <= token < _TOKEN_LIMIT for token in ids):
        raise ValueError("it holds what is no token")
    return cast("list[int]", ids)


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt in the OpenAI API's format: one user turn, images first, as data URIs, then the text."""
    images = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in prompt.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt.text}]}]


def _full_distribution(content: dict[str, Any]) -> NDArray[np.float32]:
    """Return the log-probabilities [vocabulary] of one position from a response.

    Raises:
        ValueError: some are missing, or none are log-probabilities.
    """
    rows = cast("list[dict[str, Any]]", content["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
    ids = token_ids([row["token_id"] for row in rows], len(rows))
    logs = np.array([float(row["logprob"]) for row in rows])
    if not ids or sorted(ids) != list(range(len(ids))) or not np.isfinite(logs).all() or logs.max() > _MAX_LOG_PROBABILITY:
        raise ValueError("the distribution is not over the whole vocabulary")
    logs[ids] = logs.copy()
    return logs.astype(np.float32)


def _data_uri(image: bytes) -> str:
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"


def _trim_placeholders(
    features: dict[str, Any] | None, token_ids: Sequence[int], placeholders: Container[str]
) -> dict[str, Any] | None:
    """Return a rendered prompt's image features with ranges that cover placeholder tokens alone.

    A range may include start and end tokens, as InternVL's does. The request format cannot mark which of its tokens are
    placeholders, and the server would expect an embedding for each.
    """
    if not features:
        return features

    def trim(span: dict[str, int]) -> dict[str, int]:
        start, stop = span["offset"], span["offset"] + span["length"]
        indices = [index for index in range(start, stop) if str(token_ids[index]) in placeholders] or [start, stop - 1]
        return {"offset": indices[0], "length": indices[-1] - indices[0] + 1}

    modalities = cast("dict[str, list[dict[str, int]]]", features["mm_placeholders"])
    return {**features, "mm_placeholders": {name: [trim(span) for span in spans] for name, spans in modalities.items()}}
