"""Sessions with an ONNX artifact in ONNX Runtime: answers and scores, or image and text embeddings."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.prompts import Prompt
from compress.errors import CheckpointError, DataError
from compress.progress import Progress
from compress.runtimes.batched_session import BatchedSession
from compress.runtimes.embedding import EmbeddingSession, Towers
from compress.runtimes.exported import in_format_of
from compress.runtimes.inputs import Encoded, Encoder
from compress.runtimes.onnxruntime.decoder import BatchDecoder
from compress.runtimes.onnxruntime.graph import Engine, GraphSession, choose_engine
from compress.runtimes.onnxruntime.inputs import PAST, Graphs, Preparer, find_rope
from compress.runtimes.runtime import OpenContext, Passage, Score, scored_tokens
from compress.runtimes.top_tokens import Position, TopRecord, score_top

if TYPE_CHECKING:
    from compress.runtimes.onnxruntime.runtime import Onnxruntime

_IMAGES, _TEXTS = "vision_model.onnx", "text_model.onnx"
_SCALE = "logit_scale"
_MAX_LOGITS = 2**27
"""Logits of a scored batch in memory at once: 512 MiB in float32."""

_SOFTMAX_ROWS = 64
"""Rows of logits that are converted to float64 at once: 78 MB for a vocabulary of 152,000."""


class GeneratedToken(NamedTuple):
    """One token of a streamed answer."""

    token: int
    finish: Literal["stop", "length"] | None
    """Why it is the last: an end-of-sequence token, which is no part of the answer, or the length limit."""


@dataclass(frozen=True)
class StreamedAnswer:
    """An answer that is being generated."""

    prompt_tokens: int
    """The number of tokens in the prompt."""

    tokens: Generator[GeneratedToken]
    """Yields each token as soon as it is generated."""


@contextmanager
def open_session(runtime: Onnxruntime, context: OpenContext) -> Generator[OnnxruntimeSession | EmbeddingSession]:
    """Load an artifact, or the graphs that a checkpoint is exported to; the memory is freed when the context ends.

    Raises:
        CheckpointError: it cannot be read or exported.
        MissingError: a provider, an opset or an operator is not available.
        StoreError: the disk is too full for the exported checkpoint.
    """
    engine = engine_of(runtime)
    with graphs_of(runtime, context, engine) as folder:
        session = load_session(runtime, context, folder)
    try:
        yield session
    finally:
        session.close()
        # Sessions are in reference cycles: without it the next artifact would be loaded beside this one.
        gc.collect()


def engine_of(runtime: Onnxruntime) -> Engine:
    """Return the engine by a runtime's fields; raises as `choose_engine`."""
    return choose_engine(None if runtime.providers == "auto" else runtime.providers, runtime.threads)


@contextmanager
def graphs_of(runtime: Onnxruntime, context: OpenContext, engine: Engine) -> Generator[Path]:
    """Yield the folder of an artifact's graphs; a checkpoint is exported to a folder that is removed when the context ends.

    Raises:
        CheckpointError: the checkpoint cannot be exported.
        StoreError: the disk is too full for the export.
    """
    auto = "float32" if engine.device == "cpu" else "float16"
    settings = {"format": "onnx", "dtype": auto if runtime.dtype == "auto" else runtime.dtype}
    folder = context.logs / f"{context.name}.onnx-export"
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    try:
        yield in_format_of(runtime, context, settings, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_session(runtime: Onnxruntime, context: OpenContext, folder: Path) -> OnnxruntimeSession | EmbeddingSession:
    """Load an artifact with its graphs from the folder of `graphs_of`; raises as `open_session`."""
    artifact, engine, encoder = context.artifact, engine_of(runtime), Encoder.of(context, runtime.tokens_per_batch)
    if context.family.head is None:
        return EmbeddingSession(_towers(folder, engine), encoder)
    graphs = Graphs.load(folder, engine)
    # The type of the cache is that of the graph, which config.json does not tell.
    cached = {value.dtype for name, value in graphs.decoder.inputs.items() if name.startswith(PAST)}
    if engine.device != "cpu" and np.dtype(np.float32) in cached:
        context.progress.warn(
            f"{artifact}: computes in float32, in which CUDA has no grouped-query attention: that runs on the CPU; export it with "
            "dtype: float16 for its speed"
        )
    rope = find_rope(artifact, graphs.decoder, context.trust_remote_code)
    return OnnxruntimeSession(Preparer(graphs, encoder, rope), runtime)


class OnnxruntimeSession(BatchedSession):
    """A generative artifact whose three graphs are loaded in this process."""

    def __init__(self, preparer: Preparer, runtime: Onnxruntime) -> None:
        super().__init__(preparer.encoder)
        self._preparer: Preparer | None = preparer
        self._top = runtime.top_logprobs
        self.whole_tokens = runtime.whole_tokens

    @property
    def preparer(self) -> Preparer:
        """The preparer of the graphs' inputs."""
        assert self._preparer is not None, "the session is closed"
        return self._preparer

    def close(self) -> None:
        """Free the graphs."""
        self._preparer = None

    def stream(self, prompt: Prompt, max_new_tokens: int, *, ignore_eos: bool = False) -> StreamedAnswer:
        """Answer one prompt as `answer` does, token by token; with `ignore_eos`, end-of-sequence tokens do not end it.

        Raises:
            DataError: the prompt exceeds the context length or image count, or has an image that cannot be decoded.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        faults = dict[int, str]()
        batches = list(self.encoder.prompts([prompt], max_new_tokens, faults))
        if not batches:
            # Before anything is generated, so that the server can still answer with a status.
            raise DataError(faults[0])
        (batch,) = batches

        def generate() -> Generator[GeneratedToken]:
            steps = self._steps(batch, max_new_tokens, () if ignore_eos else self.encoder.tokens.stops)
            for count, (tokens, active) in enumerate(steps, 1):
                yield GeneratedToken(int(tokens[0]), "stop" if not active[0] else "length" if count == max_new_tokens else None)

        return StreamedAnswer(batch[0].length, generate())

    @property
    def max_length(self) -> int | None:
        """The model's context length in tokens, None where its config has none."""
        return self.encoder.max_length

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages by their top tokens; one that exceeds the model's context length has a fault. See `Scores.score`.

        Raises:
            UsageError: `reference` was recorded on other passages, by another runtime, or with another `top_logprobs`.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
            StoreError: the record cannot be written.
        """

        def predict(original: TopRecord | None) -> list[list[Position] | str]:
            predictions: list[list[Position] | str] = [[] for _ in passages]
            faults: dict[int, str] = {}
            with progress.task("score", sum(len(scored_tokens(passage)) for passage in passages), "tokens") as advance:
                for batch in self._scoring_encoder().passages(passages, faults):
                    for index, logits in _scored_logits(self.preparer, batch, passages):
                        original_positions = original.of(index) if original is not None else None
                        positions = self._positions(scored_tokens(passages[index]), logits, original_positions)
                        predictions[index] = positions
                        advance(len(positions))
            for index, fault in faults.items():
                predictions[index] = fault
            return predictions

        return score_top(passages, record, reference, self._top, predict)

    def distributions(
        self, passages: Sequence[Passage], positions: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return the distribution over the full vocabulary at each position; see `FullVocabularySession`.

        Raises:
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        indices = list(dict.fromkeys(passage for passage, _ in positions))
        subset = [passages[index] for index in indices]
        distributions: dict[int, NDArray[np.float32]] = {}
        with progress.task("whole vocabulary", len(positions), "tokens") as advance:
            for batch in self._scoring_encoder().passages(subset, {}):
                for index, logits in _scored_logits(self.preparer, batch, subset):
                    requested = [(at, token) for at, (passage, token) in enumerate(positions) if passage == indices[index]]
                    # float64: KL is a small difference of large sums, and a float32 softmax's error would enter each term.
                    rows = torch.from_numpy(logits[[token for _, token in requested]]).to(torch.float64).log_softmax(dim=1)
                    distributions |= {at: row.to(torch.float32).numpy() for (at, _), row in zip(requested, rows, strict=True)}
                    advance(len(requested))
        return [distributions.get(at) for at in range(len(positions))]

    def _scoring_encoder(self) -> Encoder:
        """Return an encoder whose batches are small enough for the logits of all their tokens."""
        vocabulary = int(self.preparer.graphs.decoder.outputs["logits"].shape[2])
        return replace(self.encoder, tokens_per_batch=min(self.encoder.tokens_per_batch, _MAX_LOGITS // vocabulary))

    def _generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
        continuations: list[list[int]] = [[] for _ in batch]
        for tokens, active in self._steps(batch, max_new_tokens, self.encoder.tokens.stops):
            for row in np.flatnonzero(active):
                continuations[row].append(int(tokens[row]))
        return continuations

    def _steps(
        self, batch: Sequence[Encoded], max_new_tokens: int, stops: Sequence[int]
    ) -> Generator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Yield per step the greedy token of each row [samples], and which rows are still active [samples]."""
        prepared = self.preparer.prepare(batch)
        decoder = BatchDecoder(self.preparer.graphs, prepared, prepared.padded_length + max_new_tokens)
        logits = decoder.begin()
        # A head may have fewer rows than the tokenizer has tokens (mllama's image token has none).
        suppressed = [token for token in self.encoder.tokens.placeholders if token < logits.shape[1]]
        active = np.ones(len(batch), dtype=np.bool_)
        for count in range(1, max_new_tokens + 1):
            logits[:, suppressed] = -np.inf
            tokens = logits.argmax(axis=1)
            # The stop token is no part of the answer, so a row is inactive in the step that generates it.
            active = active & ~np.isin(tokens, stops)
            yield tokens, active
            if count == max_new_tokens or not active.any():
                break
            logits = decoder.step(tokens, active)

    def _positions(self, tokens: Sequence[int], logits: NDArray[np.float32], original: Sequence[Position] | None) -> list[Position]:
        """Return the predictions of tokens from logits [tokens, vocabulary]: the top tokens, and the original's top tokens."""
        positions: list[Position] = []
        for first in range(0, len(tokens), _SOFTMAX_ROWS):
            rows = torch.from_numpy(logits[first : first + _SOFTMAX_ROWS]).to(torch.float64)
            logs = rows.log_softmax(dim=1).to(torch.float32)
            best = logs.topk(min(self._top, logs.shape[1]), dim=1)
            for row, (ids, values) in enumerate(zip(_rows(best.indices), _rows(best.values), strict=True)):
                top = dict(zip(map(int, ids), values, strict=True))
                # This model's log-probabilities of the original's top tokens, wherever it ranks them: the rest's bucket is smaller.
                for token, _ in original[first + row].top if original else ():
                    if token < logs.shape[1]:
                        top.setdefault(token, float(logs[row, token]))
                token = tokens[first + row]
                positions.append(Position(token, float(logs[row, token]), tuple(top.items())))
        return positions


def _rows(values: Tensor) -> list[list[float]]:
    return cast("list[list[float]]", values.tolist())


def _scored_logits(
    preparer: Preparer, batch: Sequence[Encoded], passages: Sequence[Passage]
) -> Generator[tuple[int, NDArray[np.float32]]]:
    """Yield, by the passages' indices, the logits [tokens, vocabulary] that predict their scored tokens."""
    prepared = preparer.prepare(batch)
    counts = [len(scored_tokens(passages[sample.index])) for sample in batch]
    firsts = [sample.length - 1 - count for sample, count in zip(batch, counts, strict=True)]
    start = min(firsts)
    # Only from the first scored position on: the head is not computed for prompts, image tokens included.
    logits = BatchDecoder(preparer.graphs, prepared, prepared.padded_length).prefill(prepared.padded_length - start)
    for row, (sample, first, count) in enumerate(zip(batch, firsts, counts, strict=True)):
        yield sample.index, logits[row, first - start : first - start + count]


def _towers(folder: Path, engine: Engine) -> Towers:
    """Load the two encoders of CLIP.

    Raises:
        CheckpointError: one is missing or damaged, or neither has the logit scale in its metadata.
        MissingError: this ONNX Runtime lacks an opset, an operator or a provider.
    """
    images, texts = GraphSession(folder / _IMAGES, engine), GraphSession(folder / _TEXTS, engine)
    images.check_signature({"pixel_values"}, {"image_embeds"})
    texts.check_signature({"input_ids", "attention_mask"}, {"text_embeds"})
    scale = images.metadata.get(_SCALE) or texts.metadata.get(_SCALE)
    if scale is None:
        raise CheckpointError(f"{images.path}: does not say what cosines are scaled by (metadata {_SCALE}); export it again")

    def from_texts(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(texts.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["text_embeds"])

    def from_images(pixels: Tensor) -> Tensor:
        return torch.from_numpy(images.run({"pixel_values": pixels.numpy()})["image_embeds"])

    return Towers(from_texts, from_images, float(scale))
