"""A vLLM server that answers and scores, through the OpenAI API and, for answers given as tokens, vLLM's own token endpoints."""

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

from compress.errors import ServerError, UsageError
from compress.limits import limits
from compress.pictures import media_type
from compress.progress import Progress
from compress.redaction import redact_answer
from compress.runtimes.openai_client import Address, Asker, Item, ItemError, Patience, Result
from compress.runtimes.runtime import Ability, Answer, Embeddings, Faults, Passage, Picture, Prompt, Score, scored_tokens
from compress.runtimes.top_tokens import Position, TopRecord, position_of, scores_of, write_record

_TOKENS = 1 << 31
"""More than any vocabulary has: tokens are written as 32-bit integers."""

_ROUNDING = 1e-3
"""How far above 0 a log-probability may lie by rounding."""

_TOGETHER = 8
"""How many requests at once another batch is made of where each was asked alone."""


@dataclass(frozen=True)
class ServedModel:
    """Where a server is asked: under which model name, and what to call to see that it still runs."""

    client: httpx.Client
    model: str
    check: Callable[[], None]
    address: Address


class ServerSettings(Protocol):
    """The fields of a runtime that say how its server is asked."""

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


def patience_of(settings: ServerSettings) -> Patience:
    """Return how long a server is waited for."""
    return Patience(request_seconds=settings.request_seconds, away_seconds=settings.startup_seconds)


@dataclass(frozen=True)
class Tokens:
    """The tokens that end an answer, and those that none may hold: they stand for images and videos."""

    stops: tuple[int, ...]
    placeholders: tuple[int, ...] = ()


class VllmSession:
    """An artifact that a vLLM server has loaded."""

    offers: frozenset[Ability] = frozenset({"text", "scores"})
    block: int | None = None

    def __init__(self, endpoint: ServedModel, settings: ServerSettings, tokens: Tokens) -> None:
        self.endpoint = endpoint
        self._concurrency = settings.concurrency
        self._top = settings.top_logprobs
        self._order: Order | None = None
        self.whole_tokens = settings.whole_tokens
        self._stops = tokens.stops
        self._bias = {str(token): -100 for token in tokens.placeholders}
        self._asker = Asker(endpoint.client, endpoint.address, patience_of(settings), endpoint.check)

    def close(self) -> None:
        """Make what still waits for an answer give up."""
        self._asker.close()

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, each: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; the model's sampling settings and penalties are left out. See `Session.answer`.

        Tokens that stand for images and videos are kept out of answers: no model could read such an answer back.

        Raises:
            ServerError: the server ended or does not answer any more, or items fail one after the other.
        """

        def ask(prompt: Prompt) -> Answer:
            body = self._body(max_new_tokens) | {"messages": messages(prompt), "return_token_ids": True}
            if self._bias:
                body |= {"logit_bias": self._bias}
            if self._stops:
                body |= {"stop_token_ids": list(self._stops), "ignore_eos": True}
            return self._asker.post(
                "/v1/chat/completions", body, lambda content: self._read(prompt, content["choices"][0], max_new_tokens)
            )

        return Asking(self._asker, self._concurrency, progress, self._order).answers(prompts, ask, each)

    def otherwise(self) -> VllmSession:
        """Return a session that asks the same server in another order and with another number of requests at once."""
        other = copy(self)
        other._order, other._concurrency = Order.drawn(), other_concurrency(self._concurrency)
        return other

    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Session.score`.

        Raises:
            ServerError: the server ended or does not answer any more, or items fail one after the other.
            UsageError: `against` was recorded on other passages, by another runtime, or with another `top_logprobs`.
            StoreError: the record cannot be written.
        """
        original = TopRecord(against, passages, self._top) if against is not None else None
        with progress.task("score", sum(len(passage.token_ids) for passage in passages), "tokens") as advance:
            asking = Asking(self._asker, self._concurrency, progress, self._order)
            found: list[list[Position] | str] = asking.each(
                passages, self._positions, lambda passage, words: words, lambda passage, row: advance(len(passage.token_ids))
            )
        if record is not None:
            write_record(record, passages, [[] if isinstance(row, str) else row for row in found], self._top)
        return scores_of(passages, found, original)

    def distributions(
        self, passages: Sequence[Passage], places: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return how each place is predicted over the whole vocabulary; see `WholeVocabulary`.

        All that stands before a place is the prompt, and the distribution that of the one token that follows: a prompt's own
        log-probabilities could only be had of all its tokens at once, image tokens included.

        Raises:
            ServerError: the server ended or does not answer any more, or items fail one after the other.
        """
        if not places:
            return []

        def ask(place: tuple[int, int]) -> NDArray[np.float32]:
            return self._distribution(passages[place[0]], place[1])

        try:
            first = ask(places[0])
        except ItemError as error:
            progress.warn(
                f"{self.endpoint.address.url}: gives no whole distributions ({error}), so that KL is known from below alone; start "
                "the server with --max-logprobs -1"
            )
            return [None] * len(places)
        with progress.task("whole vocabulary", len(places), "tokens") as advance:
            advance(1)
            asking = Asking(self._asker, self._concurrency, progress)
            rest: list[NDArray[np.float32] | None] = asking.each(
                places[1:], ask, lambda place, words: None, lambda place, row: advance(1)
            )
        return [first, *rest]

    def classify(
        self, pictures: Sequence[Picture], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Refuse to tell which of some texts an image shows.

        Raises:
            UsageError: always; vLLM's embeddings are not offered here.
        """
        del pictures, classes, progress, faults
        raise UsageError("task zero-shot: cannot be measured with runtime: vllm; set eval.runtime to transformers")

    def embed(
        self, pictures: Sequence[Picture], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Refuse to say where images and texts lie.

        Raises:
            UsageError: always; vLLM's embeddings are not offered here.
        """
        del pictures, texts, progress, faults
        raise UsageError("task retrieval: cannot be measured with runtime: vllm; set eval.runtime to transformers")

    def _read(self, prompt: Prompt, choice: dict[str, Any], most: int) -> Answer:
        ids = token_ids(choice["token_ids"], most)
        end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
        return Answer(id=prompt.id, text=answer_text(choice["message"]["content"], most), token_ids=tuple(ids[:end]))

    def _positions(self, passage: Passage) -> list[Position] | str:
        """Ask how each of a passage's tokens was predicted; one entry per scored token."""
        # A vocabulary may have more rows than the tokenizer has tokens, and vLLM ends when it is to spell such a one.
        sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "prompt_logprobs": self._top, "detokenize": False}
        tokens = scored_tokens(passage)
        if not tokens:
            return []
        body = self._given(passage, len(tokens), sampling)

        def read(content: dict[str, Any]) -> list[Position]:
            rows = cast("list[dict[str, Any] | None]", content["prompt_logprobs"] or [])[-len(tokens) :]
            if len(rows) != len(tokens):
                raise ServerError(f"{passage.id}: vLLM gave no log-probabilities of its tokens; this version cannot score")
            return [position_of(passage.id, token, row, self._top) for token, row in zip(tokens, rows, strict=True)]

        return self._asker.post("/inference/v1/generate", body, read)

    def _given(self, passage: Passage, count: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """Return a request for what stands before a passage's scored tokens and the first `count` of these."""
        body: dict[str, Any] = {"model": self.endpoint.model, "sampling_params": sampling}
        tokens = scored_tokens(passage)[:count]
        if passage.prompt is None:
            return body | {"token_ids": [*passage.token_ids[:1], *tokens]}
        rendering = self._body(1) | {"messages": messages(passage.prompt)}
        ids, features = self._asker.post("/v1/chat/completions/render", rendering, self._rendered)
        return body | {"token_ids": [*ids, *tokens], "features": features}

    def _distribution(self, passage: Passage, place: int) -> NDArray[np.float32]:
        sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "logprobs": -1, "detokenize": False, "ignore_eos": True}
        return self._asker.post("/inference/v1/generate", self._given(passage, place, sampling), _whole)

    def _rendered(self, content: dict[str, Any]) -> tuple[list[int], dict[str, Any] | None]:
        ids = token_ids(content["token_ids"], limits().answer_values)
        return ids, _embedded(content["features"], ids, self._bias)

    def _body(self, max_tokens: int) -> dict[str, Any]:
        return {"model": self.endpoint.model, "max_tokens": max_tokens, "temperature": 0.0, "seed": 0}


@dataclass(frozen=True)
class Order:
    """In which order items are asked: by lot, and each time alike."""

    seed: int

    @classmethod
    def drawn(cls) -> Order:
        """Return the order in which the original is asked again."""
        return cls(1)

    def of(self, count: int) -> list[int]:
        """Return the places of so many items in this order."""
        return np.random.default_rng(self.seed).permutation(count).tolist()


def other_concurrency(concurrency: int) -> int:
    """Return another number of requests at once, at which a server computes in other batches and by other kernels."""
    return 1 if concurrency > 1 else _TOGETHER


@dataclass(frozen=True)
class Asking:
    """How items are asked of a server: so many at once, in which order (None: as they stand), and who watches."""

    asker: Asker
    concurrency: int
    progress: Progress
    order: Order | None = None

    def each(
        self,
        items: Sequence[Item],
        call: Callable[[Item], Result],
        failed: Callable[[Item, str], Result],
        told: Callable[[Item, Result], None],
    ) -> list[Result]:
        """Ask each item, and return the results in the items' own order; see `Asker.each`."""
        places = list(range(len(items))) if self.order is None else self.order.of(len(items))
        found = self.asker.each([items[place] for place in places], call, failed, self.concurrency, told)
        by_place = dict(zip(places, found, strict=True))
        return [by_place[place] for place in range(len(items))]

    def answers(
        self, prompts: Sequence[Prompt], ask: Callable[[Prompt], Answer], each: Callable[[Answer], None] | None
    ) -> list[Answer]:
        """Ask each prompt, and return the answers in their order; `each` is told of every answer as it comes."""
        with self.progress.task("answer", len(prompts), "prompts") as advance:

            def told(prompt: Prompt, answer: Answer) -> None:
                del prompt
                if each is not None:
                    each(answer)
                advance(1)

            return self.each(prompts, ask, _unanswered, told)


def _unanswered(prompt: Prompt, words: str) -> Answer:
    """Return what stands for the answer to a prompt that failed."""
    return Answer(id=prompt.id, text="", token_ids=(), fault=words)


def answer_text(content: object, tokens: int) -> str:
    """Return a model's answer as a server gives it, without secrets, and so that it can be written as UTF-8.

    Raises:
        TypeError: it is no text.
        ValueError: it is longer than so many tokens can be.
    """
    if content is not None and not isinstance(content, str):
        raise TypeError("the answer is no text")
    text = content or ""
    if len(text) > tokens * limits().answer_characters:
        raise ValueError(
            f"it has {len(text):,} characters where {tokens:,} tokens were asked for ({limits().set_by('answer_characters')})"
        )
    return redact_answer(text).encode("utf-8", "replace").decode()


def token_ids(content: object, most: int) -> list[int]:
    """Return tokens as a server gives them.

    Raises:
        TypeError: they are no list of tokens.
        ValueError: there are more, or one is none that a vocabulary can have.
    """
    if not isinstance(content, list):
        raise TypeError("its tokens are no list")
    ids = cast("list[object]", content)
    if len(ids) > most:
        raise ValueError(f"it has {len(ids):,} tokens where {most:,} were asked for")
    if not all(isinstance(token, int) and 0 <= token < _TOKENS for token in ids):
        raise ValueError("it holds what is no token")
    return cast("list[int]", ids)


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as the OpenAI API takes it: one user turn, images first, as data, then the text."""
    images = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in prompt.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt.text}]}]


def _whole(content: dict[str, Any]) -> NDArray[np.float32]:
    """Read the log-probabilities of a whole vocabulary, by the tokens' ids.

    Raises:
        ValueError: some are missing, or none are log-probabilities.
    """
    rows = cast("list[dict[str, Any]]", content["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
    ids = token_ids([row["token_id"] for row in rows], len(rows))
    logs = np.array([float(row["logprob"]) for row in rows])
    if not ids or sorted(ids) != list(range(len(ids))) or not np.isfinite(logs).all() or logs.max() > _ROUNDING:
        raise ValueError("the distribution is not over the whole vocabulary")
    logs[ids] = logs.copy()
    return logs.astype(np.float32)


def _data_uri(image: bytes) -> str:
    return f"data:{media_type(image)};base64,{base64.b64encode(image).decode()}"


def _embedded(features: dict[str, Any] | None, token_ids: Sequence[int], placeholders: Container[str]) -> dict[str, Any] | None:
    """Return a rendered prompt's images with places that hold what stands for an image alone.

    A place may begin and end with tokens of its own, as InternVL's does, and what the server is told has no way to say which
    of them are the image's: it would look for too many embeddings.
    """
    if not features:
        return features

    def place(given: dict[str, int]) -> dict[str, int]:
        start, stop = given["offset"], given["offset"] + given["length"]
        own = [number for number in range(start, stop) if str(token_ids[number]) in placeholders] or [start, stop - 1]
        return {"offset": own[0], "length": own[-1] - own[0] + 1}

    kinds = cast("dict[str, list[dict[str, int]]]", features["mm_placeholders"])
    return {**features, "mm_placeholders": {kind: [place(given) for given in ranges] for kind, ranges in kinds.items()}}
