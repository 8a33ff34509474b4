"""A vLLM server that answers and scores, through the OpenAI API and, for answers given as tokens, vLLM's own token endpoints."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import numpy as np
from numpy.typing import NDArray

from compress.errors import ServerError, UsageError
from compress.progress import Progress
from compress.runtimes.runtime import Answer, Passage, Picture, Prompt, Score
from compress.runtimes.top_tokens import Position, TopRecord, position_of, score_of, write_record
from compress.runtimes.vllm import Vllm

_ATTEMPTS = 4
_TOO_MANY = 429
_PAUSE = 0.5
"""Seconds before the second attempt; doubled before each further one."""
_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp", b"BM": "image/bmp"}

Item = TypeVar("Item", Prompt, Passage)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Endpoint:
    """Where a server is asked: under which model name, and what to call to see that it still runs."""

    client: httpx.Client
    model: str
    check: Callable[[], None]


@dataclass(frozen=True)
class Tokens:
    """The tokens that end an answer, and those that none may hold: they stand for images and videos."""

    stops: tuple[int, ...]
    placeholders: tuple[int, ...] = ()


class VllmSession:
    """An artifact that a vLLM server has loaded."""

    def __init__(self, endpoint: Endpoint, runtime: Vllm, tokens: Tokens) -> None:
        self.endpoint = endpoint
        self._concurrency = runtime.concurrency
        self._top = runtime.top_logprobs
        self._stops = tokens.stops
        self._bias = {str(token): -100 for token in tokens.placeholders}
        self._ending = threading.Event()

    def close(self) -> None:
        """Make what still waits for an answer give up."""
        self._ending.set()

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress) -> list[Answer]:
        """Answer each prompt by greedy decoding, in the order given; the model's sampling settings and penalties are left out.

        Tokens that stand for images and videos are kept out of answers: no model could read such an answer back.

        Raises:
            ServerError: the server ended, or an item failed again and again; it is named.
        """

        def ask(prompt: Prompt) -> Answer:
            body = self._body(max_new_tokens) | {"messages": messages(prompt), "return_token_ids": True}
            if self._bias:
                body |= {"logit_bias": self._bias}
            if self._stops:
                body |= {"stop_token_ids": list(self._stops), "ignore_eos": True}
            choice = self._post(prompt.id, "/v1/chat/completions", body)["choices"][0]
            ids = cast("list[int]", choice["token_ids"])
            end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
            return Answer(id=prompt.id, text=choice["message"]["content"] or "", token_ids=tuple(ids[:end]))

        return self._each(prompts, ask, lambda prompt: 1, ("answer", "prompts"), progress)

    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Score the passages, in the order given.

        Raises:
            ServerError: the server ended, or an item failed again and again; it is named.
            UsageError: `against` was recorded on other passages, by another runtime, or with another `top_logprobs`.
            StoreError: the record cannot be written.
        """
        original = TopRecord(against, passages, self._top) if against is not None else None
        positions = self._each(passages, self._positions, lambda passage: len(passage.token_ids), ("score", "tokens"), progress)
        if record is not None:
            write_record(record, passages, positions, self._top)
        return [
            score_of(passage.id, row, original.of(place) if original is not None else None)
            for place, (passage, row) in enumerate(zip(passages, positions, strict=True))
        ]

    def classify(self, pictures: Sequence[Picture], classes: Sequence[Sequence[str]], progress: Progress) -> NDArray[np.float64]:
        """Refuse to tell which of some texts an image shows.

        Raises:
            UsageError: always; vLLM's embeddings are not offered here.
        """
        del pictures, classes, progress
        raise UsageError("task zero-shot: cannot be measured with runtime: vllm; set eval.runtime to transformers")

    def _positions(self, passage: Passage) -> list[Position]:
        """Ask how each of a passage's tokens was predicted; one entry per scored token."""
        # A vocabulary may have more rows than the tokenizer has tokens, and vLLM ends when it is to spell such a one.
        sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "prompt_logprobs": self._top, "detokenize": False}
        body: dict[str, Any] = {"model": self.endpoint.model, "sampling_params": sampling}
        if passage.prompt is None:
            tokens = passage.token_ids[1:]
            body["token_ids"] = list(passage.token_ids)
        else:
            rendering = self._body(1) | {"messages": messages(passage.prompt)}
            rendered = self._post(passage.id, "/v1/chat/completions/render", rendering)
            tokens = passage.token_ids
            features = _embedded(rendered["features"], rendered["token_ids"], self._bias)
            body |= {"token_ids": [*rendered["token_ids"], *tokens], "features": features}
        if not tokens:
            return []
        rows: Any = self._post(passage.id, "/inference/v1/generate", body)["prompt_logprobs"]
        found = cast("list[dict[str, Any]]", rows or [])[-len(tokens) :]
        if len(found) != len(tokens):
            raise ServerError(f"{passage.id}: vLLM gave no log-probabilities of its tokens; this version cannot score")
        return [position_of(passage.id, token, row, self._top) for token, row in zip(tokens, found, strict=True)]

    def _body(self, max_tokens: int) -> dict[str, Any]:
        return {"model": self.endpoint.model, "max_tokens": max_tokens, "temperature": 0.0, "seed": 0}

    def _each(
        self,
        items: Sequence[Item],
        call: Callable[[Item], Result],
        count: Callable[[Item], int],
        words: tuple[str, str],
        progress: Progress,
    ) -> list[Result]:
        """Call for each item, a bounded number at once; the first failure ends the whole."""
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            with progress.task(words[0], sum(count(item) for item in items), words[1]) as advance:
                futures = {pool.submit(call, item): item for item in items}
                for future in as_completed(futures):
                    future.result()
                    advance(count(futures[future]))
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _post(self, name: str, path: str, body: dict[str, Any]) -> Any:
        """Ask once, and again where the server could not be reached or failed.

        Raises:
            ServerError: it ended, refused the item, or failed each time.
        """
        content, fault = json.dumps(body).encode(), ""
        for attempt in range(_ATTEMPTS):
            if attempt and self._ending.wait(_PAUSE * 2 ** (attempt - 1)):
                break
            try:
                answer = self.endpoint.client.post(path, content=content, headers={"Content-Type": "application/json"})
            except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
                fault = f"{type(error).__name__}: {error}"
                self.endpoint.check()
                continue
            if answer.is_success:
                return answer.json()
            fault = f"{answer.status_code}: {_message(answer)}"
            if answer.status_code < 500 and answer.status_code != _TOO_MANY:
                break
            self.endpoint.check()
        remedy = "start the server with --enable-scale-out; " if "scale-out" in fault.lower() else ""
        raise ServerError(
            f"{name}: vLLM did not answer {path} ({fault}); {remedy}leave the item out, or look into the server's log"
        )


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as the OpenAI API takes it: one user turn, images first, as data, then the text."""
    images = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in prompt.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt.text}]}]


def _data_uri(image: bytes) -> str:
    kind = next((kind for start, kind in _SIGNATURES.items() if image.startswith(start)), "image/png")
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def _message(answer: httpx.Response) -> str:
    """The server's own words on a failure, at most a few lines."""
    try:
        content: Any = answer.json()
        text = str(content["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return text.strip()[:500]


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
