"""What the sessions with OpenAI-compatible servers share: how requests are sent, and how answers are read."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import numpy as np

from compress.data.images import media_type
from compress.data.prompts import Prompt
from compress.progress import Progress
from compress.runtimes.openai_client import Item, Result, RetryingClient, RetryPolicy, ServedModel
from compress.runtimes.runtime import Answer
from compress.runtimes.top_tokens import TOKEN_LIMIT
from compress.untrusted.limits import limits
from compress.untrusted.redaction import redact_answer

_ALTERNATIVE_CONCURRENCY = 8
"""The concurrency of a reordered session where the original one is 1: enough that requests share batches."""


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
    # Batch composition changes the shapes of matrix products and with them the order of sums: that is the noise to be measured.
    return 1 if concurrency > 1 else _ALTERNATIVE_CONCURRENCY


class ServerSession:
    """A served model, and how requests are sent to it: the base of those that answer or score."""

    block: int | None = None

    def __init__(self, endpoint: ServedModel, settings: ServerSettings) -> None:
        self.endpoint = endpoint
        self._concurrency = settings.concurrency
        self._order: RequestOrder | None = None  # None for the items' own order
        # One client per session and its copies: an outage that one thread has seen is an outage for all.
        self._client = RetryingClient(endpoint.client, endpoint.address, retry_policy(settings), endpoint.check)

    def close(self) -> None:
        """Abort the requests that are waiting for an answer."""
        self._client.close()

    def reordered(self) -> Self:
        """Return a session with the same server that sends requests in another order and at another concurrency."""
        other = copy(self)
        other._order, other._concurrency = RequestOrder.shuffled(), alternative_concurrency(self._concurrency)
        return other

    def _body(self, max_tokens: int) -> dict[str, Any]:
        # Temperature 0 is greedy decoding in vLLM; the seed is for servers that only promise to try.
        return {"model": self.endpoint.model, "max_tokens": max_tokens, "temperature": 0.0, "seed": 0}

    def _each(
        self,
        items: Sequence[Item],
        call: Callable[[Item], Result],
        on_failure: Callable[[Item, str], Result],
        on_result: Callable[[Item, Result], None],
    ) -> list[Result]:
        """Send each item, and return the results in the items' own order; see `RetryingClient.each`."""
        order = list(range(len(items))) if self._order is None else self._order.of(len(items))
        results = self._client.each([items[index] for index in order], call, on_failure, self._concurrency, on_result)
        # Results are put back in the items' order, so that two sessions compare item by item.
        by_index = dict(zip(order, results, strict=True))
        return [by_index[index] for index in range(len(items))]

    def _answers(
        self,
        prompts: Sequence[Prompt],
        call: Callable[[Prompt], Answer],
        progress: Progress,
        on_answer: Callable[[Answer], None] | None,
    ) -> list[Answer]:
        """Send each prompt, and return the answers in their order; `on_answer` is called with every answer as it arrives."""
        with progress.task("answer", len(prompts), "prompts") as advance:

            def on_result(prompt: Prompt, answer: Answer) -> None:
                del prompt
                if on_answer is not None:
                    on_answer(answer)
                advance(1)

            return self._each(prompts, call, _failed_answer, on_result)


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
    # A server could answer with any amount of text, which would be scored, journalled and shown.
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
    if not all(isinstance(token, int) and 0 <= token < TOKEN_LIMIT for token in ids):
        raise ValueError("it holds what is no token")
    return cast("list[int]", ids)


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt in the OpenAI API's format: one user turn, images first, as data URIs, then the text."""
    images = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in prompt.images]
    # Images first, as `write_prompt` renders them in process: the same tokens in every runtime.
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt.text}]}]


def _data_uri(image: bytes) -> str:
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"
