"""Sessions with a vLLM server: answers through the OpenAI API, scores through vLLM's own token endpoints."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.checkpoints.special_tokens import SpecialTokens
from compress.data.prompts import Prompt
from compress.errors import ServerError
from compress.progress import Progress
from compress.runtimes.openai_client import ItemError, ServedModel
from compress.runtimes.runtime import Answer, Passage, Score, scored_tokens
from compress.runtimes.server_session import ServerSession, ServerSettings, answer_text, messages, token_ids
from compress.runtimes.top_tokens import MAX_LOG_PROBABILITY, Position, TopRecord, position_of, score_top
from compress.untrusted.limits import limits


class ScoringSession(ServerSession):
    """An artifact loaded by a vLLM server that scores given tokens."""

    def __init__(self, endpoint: ServedModel, settings: ServerSettings, tokens: SpecialTokens) -> None:
        super().__init__(endpoint, settings)
        self._top = settings.top_logprobs
        self.whole_tokens = settings.whole_tokens
        self._stops = tokens.stops
        # -100 is the strongest bias of OpenAI's API, and vLLM clamps to it: a placeholder's logit is far below any other then.
        self._bias = {str(token): -100 for token in tokens.placeholders}

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages by vLLM's token endpoints; see `Scores.score`."""

        def predict(original: TopRecord | None) -> list[list[Position] | str]:
            del original
            with progress.task("score", sum(len(passage.token_ids) for passage in passages), "tokens") as advance:
                return self._each(
                    passages, self._positions, lambda passage, fault: fault, lambda passage, row: advance(len(passage.token_ids))
                )

        return score_top(passages, record, reference, self._top, predict)

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
            # One request alone first: a server that refuses whole distributions does so once, not hundreds of times.
            first = request(positions[0])
        except ItemError as error:
            progress.warn(
                f"{self.endpoint.address.url}: gives no whole distributions ({error}), so that KL is known from below alone; start "
                "the server with --max-logprobs -1"
            )
            return [None] * len(positions)
        with progress.task("whole vocabulary", len(positions), "tokens") as advance:
            advance(1)
            rest: list[NDArray[np.float32] | None] = self._each(
                positions[1:], request, lambda position, fault: None, lambda position, row: advance(1)
            )
        return [first, *rest]

    def _positions(self, passage: Passage) -> list[Position] | str:
        """Request the predictions of a passage's tokens, one per scored token; a fault instead if there are none."""
        # Without `detokenize: False` vLLM crashes on token ids that the vocabulary has and the tokenizer lacks.
        sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "prompt_logprobs": self._top, "detokenize": False}
        tokens = scored_tokens(passage)
        if not tokens:
            return []
        body = self._prefix_request(passage, len(tokens), sampling)

        def parse(content: dict[str, Any]) -> list[Position]:
            # From the end: before the scored tokens come the prompt's and its image tokens', which differ in number by model.
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
            # The first token is context: nothing predicts it.
            return body | {"token_ids": [*passage.token_ids[:1], *tokens]}
        rendering = self._body(1) | {"messages": messages(passage.prompt)}
        # Rendered by the server: its own tokens and image features, and the scored tokens appended to exactly those.
        ids, features = self._client.post("/v1/chat/completions/render", rendering, self._rendered)
        return body | {"token_ids": [*ids, *tokens], "features": features}

    def _distribution(self, passage: Passage, count: int) -> NDArray[np.float32]:
        """Request the distribution after the first `count` scored tokens of a passage."""
        # -1 asks for the whole vocabulary. With `ignore_eos` an end of sequence is a token like others, and has its distribution.
        sampling = {"max_tokens": 1, "temperature": 0.0, "seed": 0, "logprobs": -1, "detokenize": False, "ignore_eos": True}
        return self._client.post("/inference/v1/generate", self._prefix_request(passage, count, sampling), _full_distribution)

    def _rendered(self, content: dict[str, Any]) -> tuple[list[int], dict[str, Any] | None]:
        ids = token_ids(content["token_ids"], limits().answer_values)
        return ids, _trim_placeholders(content["features"], ids, self._bias)


class VllmSession(ScoringSession):
    """An artifact loaded by a vLLM server, which generates text and scores given tokens."""

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; see `Generates.answer`.

        Raises:
            ServerError: the server exited or has stopped answering, or many items in a row fail.
        """

        def request(prompt: Prompt) -> Answer:
            body = self._body(max_new_tokens) | {"messages": messages(prompt), "return_token_ids": True}
            if self._bias:
                body |= {"logit_bias": self._bias}
            if self._stops:
                # The same stops as in every other runtime, whatever the server reads from tokenizer and generation config.
                body |= {"stop_token_ids": list(self._stops), "ignore_eos": True}
            return self._client.post(
                "/v1/chat/completions", body, lambda content: self._parse_answer(prompt, content["choices"][0], max_new_tokens)
            )

        return self._answers(prompts, request, progress, on_answer)

    def _parse_answer(self, prompt: Prompt, choice: dict[str, Any], max_tokens: int) -> Answer:
        ids = token_ids(choice["token_ids"], max_tokens)
        end = next((index for index, token in enumerate(ids) if token in self._stops), len(ids))
        return Answer(id=prompt.id, text=answer_text(choice["message"]["content"], max_tokens), token_ids=tuple(ids[:end]))


def _full_distribution(content: dict[str, Any]) -> NDArray[np.float32]:
    """Return the log-probabilities [vocabulary] of one position from a response.

    Raises:
        ValueError: some are missing, or none are log-probabilities.
    """
    rows = cast("list[dict[str, Any]]", content["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
    ids = token_ids([row["token_id"] for row in rows], len(rows))
    logs = np.array([float(row["logprob"]) for row in rows])
    if not ids or sorted(ids) != list(range(len(ids))) or not np.isfinite(logs).all() or logs.max() > MAX_LOG_PROBABILITY:
        raise ValueError("the distribution is not over the whole vocabulary")
    # The rows come by probability; a copy, as indexed assignment reads what it overwrites.
    logs[ids] = logs.copy()
    return logs.astype(np.float32)


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
