"""Runs a folder of onnxruntime-genai's: a script for that project's environment, `onnxruntime_genai_worker.py FOLDER SOCKET`.

It connects to SOCKET and says `{"loaded": true}`, or `{"failed": …}` where the folder cannot be loaded. Each line that comes then
is a request (`Request` of `onnxruntime_genai_session`), each line that goes back what came of it: `tokens`, `positions`,
`distributions` (base64 of little-endian float32), or a `fault`. It ends when the other side closes the socket. Nothing of this
package is imported: it has versions of its own.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime_genai  # pyright: ignore[reportMissingImports]

_GENAI: Any = onnxruntime_genai
_NEUTRAL = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
}
"""What a model's own settings may not change: decoding is greedy."""

_FAULTS = (RuntimeError, ValueError, IndexError)


class PromptError(ValueError):
    """A prompt that the model does not take."""


class LoadedModel:
    """A loaded folder."""

    def __init__(self, folder: Path) -> None:
        self.context = int(json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"])
        config = _GENAI.Config(str(folder))
        if not _GENAI.is_cuda_available():
            config.clear_providers()  # a folder for GPUs runs without one too
        self.model = _GENAI.Model(config)
        self.processor = self.model.create_multimodal_processor()

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what came of a request."""
        try:
            if request["kind"] == "answer":
                return {"tokens": self.answer(request)}
            if request["kind"] == "whole":
                return {"distributions": self.whole(request)}
            return {"positions": self.score(request)}
        except _FAULTS as error:
            return {"fault": str(error)}

    def answer(self, request: dict[str, Any]) -> list[int]:
        """Return the tokens that follow a prompt, the likeliest each time, none of those that are forbidden."""
        inputs, length = self._inputs(request)
        room = int(request["max_new_tokens"])
        self._check_length(length, room)
        generator = self._generator(inputs, length + room)
        forbidden = cast("list[int]", request["forbidden"])
        while not generator.is_done():
            if forbidden:
                logits = generator.get_logits()
                if int(logits[0, -1].argmax()) in forbidden:
                    logits[..., forbidden] = np.finfo(logits.dtype).min
                    generator.set_logits(logits)
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[length:]]

    def score(self, request: dict[str, Any]) -> list[list[Any]]:
        """Return each given token with its log-probability, and the likeliest with theirs: [token, value, [[token, value], …]]."""
        tokens = cast("list[int]", request["tokens"])
        logits = self._logits(request, tokens)
        targets = tokens[len(tokens) - len(logits) :]
        return [_position(row, token, int(request["top"])) for row, token in zip(logits, targets, strict=True)]

    def whole(self, request: dict[str, Any]) -> list[str]:
        """Return how the scored tokens of the numbers asked for are predicted: the whole vocabulary's log-probabilities."""
        logits = self._logits(request, cast("list[int]", request["tokens"]))
        return [base64.b64encode(_log_softmax(logits[place]).astype("<f4").tobytes()).decode() for place in request["whole"]]

    def _logits(self, request: dict[str, Any], tokens: list[int]) -> np.ndarray[Any, Any]:
        """Return the logits [scored tokens, vocabulary] of given tokens: all after a prompt, all but the first without one."""
        inputs, length = self._inputs(request)
        given = inputs["input_ids"].as_numpy() if request["text"] is not None else np.empty((1, 0), np.int32)
        length = given.shape[1]
        self._check_length(length, len(tokens))
        whole = np.concatenate([given, np.array([tokens], dtype=given.dtype)], axis=1)
        inputs["input_ids"] = _GENAI.Tensor(np.ascontiguousarray(whole))
        logits = self._generator(inputs, whole.shape[1] + 1).get_output("logits")[0].astype(np.float64)
        return logits[length - 1 if length else 0 : -1]

    def _inputs(self, request: dict[str, Any]) -> tuple[Any, int]:
        """Return what the model reads of a prompt, and how many tokens that is."""
        text, images = request["text"] or "", cast("list[str]", request["images"])
        inputs = self.processor(text, images=_GENAI.Images.open(*images)) if images else self.processor(text)
        return inputs, int(inputs["input_ids"].shape()[-1])

    def _check_length(self, length: int, room: int) -> None:
        if length + room > self.context:
            raise PromptError(
                f"takes {length} tokens with {room} more, and the model takes {self.context}; leave it out, or shorten its text or "
                "use smaller images"
            )

    def _generator(self, inputs: Any, longest: int) -> Any:
        parameters = _GENAI.GeneratorParams(self.model)
        parameters.set_search_options(max_length=longest, **_NEUTRAL)
        generator = _GENAI.Generator(self.model, parameters)
        generator.set_inputs(inputs)
        return generator


def _position(row: np.ndarray[Any, Any], token: int, top: int) -> list[Any]:
    logs = _log_softmax(row)
    likeliest = np.argsort(-logs, kind="stable")[:top]
    return [token, float(logs[token]), [[int(place), float(logs[place])] for place in likeliest]]


def _log_softmax(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logs = row - row.max()
    return logs - np.log(np.exp(logs).sum())


def main(folder: str, address: str) -> None:
    """Load the folder and serve the socket until its other side is closed."""
    _GENAI.disable_telemetry_events()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        stream = connection.makefile("rw", encoding="utf-8", newline="\n")

        def say(value: dict[str, Any]) -> None:
            stream.write(json.dumps(value) + "\n")
            stream.flush()

        try:
            worker = LoadedModel(Path(folder))
        except (OSError, LookupError, *_FAULTS) as error:
            say({"failed": str(error)})
            return
        say({"loaded": True})
        for line in stream:
            say(worker.reply(json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
