"""The onnxruntime-genai worker: a script for that library's environment, `worker.py FOLDER SOCKET`.

It connects to SOCKET and sends `{"loaded": true}`, or `{"failed": …}` if the folder cannot be loaded. Each line it receives is a
request (`GenaiRequest` of `onnxruntime_genai_session`), each line it sends a reply: `tokens`, `positions`, `distributions` (base64
of little-endian float32), or a `fault`. It exits when the client closes the socket. Nothing of this package is imported: the
environment has its own versions.
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
_GREEDY_OPTIONS = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    # genai_config.json carries the model's own penalties and sampling: each is set to neutral, or it would apply here.
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
}
"""Search options for greedy decoding, over those in the model's own config."""

# What the library's binding makes of C++ exceptions: a prompt that fails must not end the worker.
_FAULTS = (RuntimeError, ValueError, IndexError)


class PromptError(ValueError):
    """A prompt that the model cannot take."""


class LoadedModel:
    """A model loaded from a folder."""

    def __init__(self, folder: Path) -> None:
        self.context = int(json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"])
        config = _GENAI.Config(str(folder))
        if not _GENAI.is_cuda_available():
            config.clear_providers()  # an artifact exported for GPUs runs on the CPU too
        self.model = _GENAI.Model(config)
        self.processor = self.model.create_multimodal_processor()

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a request."""
        try:
            if request["kind"] == "answer":
                return {"tokens": self.answer(request)}
            if request["kind"] == "whole":
                return {"distributions": self.whole(request)}
            return {"positions": self.score(request)}
        except _FAULTS as error:
            return {"fault": str(error)}

    def answer(self, request: dict[str, Any]) -> list[int]:
        """Return a prompt's greedy continuation, without forbidden tokens."""
        inputs, length = self._inputs(request)
        new_tokens = int(request["max_new_tokens"])
        self._check_length(length, new_tokens)
        generator = self._generator(inputs, length + new_tokens)
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
        """Return per scored token its log-probability and the top tokens: [token, value, [[token, value], …]]."""
        tokens = cast("list[int]", request["tokens"])
        logits = self._logits(request, tokens)
        targets = tokens[len(tokens) - len(logits) :]
        return [_position(row, token, int(request["top"])) for row, token in zip(logits, targets, strict=True)]

    def whole(self, request: dict[str, Any]) -> list[str]:
        """Return the full distributions (log-probabilities) at the requested scored tokens."""
        logits = self._logits(request, cast("list[int]", request["tokens"]))
        return [base64.b64encode(_log_softmax(logits[index]).astype("<f4").tobytes()).decode() for index in request["whole"]]

    def _logits(self, request: dict[str, Any], tokens: list[int]) -> np.ndarray[Any, Any]:
        """Return the logits [scored tokens, vocabulary] of given tokens: all after a prompt, all but the first without one."""
        inputs, length = self._inputs(request)
        prompt = inputs["input_ids"].as_numpy() if request["text"] is not None else np.empty((1, 0), np.int32)
        length = prompt.shape[1]
        self._check_length(length, len(tokens))
        sequence = np.concatenate([prompt, np.array([tokens], dtype=prompt.dtype)], axis=1)
        inputs["input_ids"] = _GENAI.Tensor(np.ascontiguousarray(sequence))
        # Room for one token more: the library refuses a prompt as long as max_length.
        logits = self._generator(inputs, sequence.shape[1] + 1).get_output("logits")[0].astype(np.float64)
        # Position i predicts token i + 1: the last position predicts nothing that was given.
        return logits[length - 1 if length else 0 : -1]

    def _inputs(self, request: dict[str, Any]) -> tuple[Any, int]:
        """Return a prompt's model inputs, and its number of tokens."""
        text, images = request["text"] or "", cast("list[str]", request["images"])
        inputs = self.processor(text, images=_GENAI.Images.open(*images)) if images else self.processor(text)
        return inputs, int(inputs["input_ids"].shape()[-1])

    def _check_length(self, length: int, new_tokens: int) -> None:
        if length + new_tokens > self.context:
            raise PromptError(
                f"takes {length} tokens with {new_tokens} more, and the model takes {self.context}; leave it out, or shorten its "
                "text or use smaller images"
            )

    def _generator(self, inputs: Any, max_length: int) -> Any:
        parameters = _GENAI.GeneratorParams(self.model)
        parameters.set_search_options(max_length=max_length, **_GREEDY_OPTIONS)
        generator = _GENAI.Generator(self.model, parameters)
        generator.set_inputs(inputs)
        return generator


def _position(row: np.ndarray[Any, Any], token: int, top: int) -> list[Any]:
    logs = _log_softmax(row)
    # Stable: equal log-probabilities keep the order of their ids, whatever the sort's algorithm.
    top_ids = np.argsort(-logs, kind="stable")[:top]
    return [token, float(logs[token]), [[int(top_id), float(logs[top_id])] for top_id in top_ids]]


def _log_softmax(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    logs = row - row.max()
    return logs - np.log(np.exp(logs).sum())


def main(folder: str, address: str) -> None:
    """Load the folder and answer requests until the client closes the socket."""
    _GENAI.disable_telemetry_events()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        stream = connection.makefile("rw", encoding="utf-8", newline="\n")

        def send(value: dict[str, Any]) -> None:
            stream.write(json.dumps(value) + "\n")
            stream.flush()

        try:
            # After connecting: a model that cannot be loaded is a reply, not a process that is waited for in vain.
            worker = LoadedModel(Path(folder))
        except (OSError, LookupError, *_FAULTS) as error:
            send({"failed": str(error)})
            return
        send({"loaded": True})
        for line in stream:
            send(worker.reply(json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
