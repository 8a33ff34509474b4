"""Sessions with an ONNX artifact in ONNX Runtime: answers and scores, or image and text embeddings."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.checkpoints.artifact import artifact_format
from compress.checkpoints.checkpoint import read_config
from compress.checkpoints.skeleton import load_config
from compress.data.prompts import load_processor, longest_input
from compress.errors import CheckpointError, DataError, StoreError
from compress.families import family_at
from compress.progress import Progress
from compress.runtimes.embedding import Embedder, Towers
from compress.runtimes.inputs import Encoded, Encoder, check_contrastive, check_generative, stops_and_pad
from compress.runtimes.onnxruntime.decoder import BatchDecoder
from compress.runtimes.onnxruntime.graph import Engine, GraphSession, choose_engine
from compress.runtimes.onnxruntime.inputs import PAST, Graphs, Preparer, find_rope
from compress.runtimes.onnxruntime.runtime import Provider
from compress.runtimes.runtime import (
    Ability,
    Answer,
    Embeddings,
    Faults,
    ImageInput,
    OpenContext,
    Passage,
    Prompt,
    Score,
    scored_tokens,
    unscored,
)
from compress.runtimes.top_tokens import Position, TopRecord, score_of, write_record

_IMAGES, _TEXTS = "vision_model.onnx", "text_model.onnx"
_SCALE = "logit_scale"
_MAX_LOGITS = 2**27
"""Logits of a scored batch in memory at once: 512 MiB in float32."""

_SOFTMAX_ROWS = 64
"""Rows of logits that are converted to float64 at once."""


@dataclass(frozen=True)
class OnnxruntimeSettings:
    """The fields of `runtime: onnxruntime`."""

    providers: tuple[Provider, ...] | None
    """None for auto."""

    threads: int | None
    dtype: str
    tokens_per_batch: int
    top_logprobs: int
    whole_tokens: int


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
def open_session(context: OpenContext, settings: OnnxruntimeSettings) -> Generator[OnnxruntimeSession]:
    """Load an artifact, or the graphs that a checkpoint is exported to; the memory is freed when the context ends.

    Raises:
        CheckpointError: it cannot be read or exported.
        MissingError: a provider, an opset or an operator is not available.
        StoreError: the disk is too full for the exported checkpoint.
    """
    engine = choose_engine(settings.providers, settings.threads)
    with graphs_of(context, settings, engine) as folder:
        session = load_session(folder, context, settings, engine)
    with closing(session):
        yield session


@contextmanager
def graphs_of(context: OpenContext, settings: OnnxruntimeSettings, engine: Engine) -> Generator[Path]:
    """Yield the folder of an artifact's graphs; a checkpoint is exported to a folder that is removed when the context ends.

    Raises:
        CheckpointError: the checkpoint cannot be exported.
        StoreError: the disk is too full for the export.
    """
    if artifact_format(context.artifact) == "onnx":
        yield context.artifact
        return
    from compress.export.format import ExportContext
    from compress.export.onnx.format import Onnx

    auto = "float32" if engine.device == "cpu" else "float16"
    export = Onnx.model_validate({"format": "onnx", "dtype": auto if settings.dtype == "auto" else settings.dtype})
    folder = context.logs / f"{context.name}.onnx-export"
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    try:
        folder.mkdir(parents=True)
        export.apply(
            ExportContext(context.artifact, folder, family_at(context.artifact, context.trust_remote_code), context.progress)
        )
        yield folder
    except OSError as error:
        raise StoreError(f"{folder}: {context.artifact} cannot be exported there ({error}); free space") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_session(folder: Path, context: OpenContext, settings: OnnxruntimeSettings, engine: Engine) -> OnnxruntimeSession:
    """Load an artifact with its graphs from the folder of `graphs_of`; raises as `open_session`."""
    artifact, trusted = context.artifact, context.trust_remote_code
    family = family_at(artifact, trusted)
    processor = load_processor(artifact, trusted)
    stops, pad_id = stops_and_pad(artifact, processor, load_config(artifact, trusted).get_text_config())
    encoder = Encoder(processor, family, pad_id, settings.tokens_per_batch, longest_input(artifact))
    if family.head is None:
        return OnnxruntimeSession(encoder, _towers(folder, engine), stops, settings)
    graphs = Graphs.load(folder, engine)
    cached = {value.dtype for name, value in graphs.decoder.inputs.items() if name.startswith(PAST)}
    if engine.device != "cpu" and np.dtype(np.float32) in cached:
        context.progress.warn(
            f"{artifact}: computes in float32, in which CUDA has no grouped-query attention: that runs on the CPU; export it with "
            "dtype: float16 for its speed"
        )
    rope = find_rope(artifact, graphs.decoder, trusted)
    preparer = Preparer(graphs, encoder, family.placeholders(read_config(artifact)), rope)
    return OnnxruntimeSession(encoder, preparer, stops, settings)


class OnnxruntimeSession:
    """An artifact whose graphs are loaded in this process: a generative model's three, or CLIP's two towers."""

    block: int | None = 64

    def __init__(self, encoder: Encoder, model: Preparer | Towers, stops: tuple[int, ...], settings: OnnxruntimeSettings) -> None:
        self._encoder = encoder
        self._model: Preparer | Towers | None = model
        self._stops = stops
        self._top = settings.top_logprobs
        self.whole_tokens = settings.whole_tokens

    @property
    def offers(self) -> frozenset[Ability]:
        """The model's abilities; see `Session.offers`."""
        return frozenset({"comparison"} if self._encoder.family.head is None else {"text", "scores"})

    def close(self) -> None:
        """Free the graphs."""
        self._model = None
        gc.collect()

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; the model's sampling settings and penalties are left out. See `Session.answer`.

        Placeholder tokens of images and videos are suppressed: an answer that has one could not be scored. A prompt that exceeds
        the model's context length or image count, or has an image that cannot be decoded, gives an answer with its fault.

        Raises:
            UsageError: the model generates no text.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        preparer = self.preparer()
        answers: dict[int, Answer] = {}
        faults: dict[int, str] = {}

        def add(index: int, answer: Answer) -> None:
            answers[index] = answer
            if on_answer is not None:
                on_answer(answer)

        with progress.task("answer", len(prompts), "prompts") as advance:
            for batch in self._encoder.prompts(prompts, max_new_tokens, faults):
                for sample, ids in zip(batch, self._generate(preparer, batch, max_new_tokens), strict=True):
                    add(sample.index, Answer(id=prompts[sample.index].id, text=self.decode(ids), token_ids=tuple(ids)))
                advance(len(batch))
            for index, fault in faults.items():
                add(index, Answer(id=prompts[index].id, text="", token_ids=(), fault=fault))
            advance(len(faults))
        return [answers[index] for index in range(len(prompts))]

    def stream(self, prompt: Prompt, max_new_tokens: int, *, ignore_eos: bool = False) -> StreamedAnswer:
        """Answer one prompt as `answer` does, token by token; with `ignore_eos`, end-of-sequence tokens do not end it.

        Raises:
            UsageError: the model generates no text.
            DataError: the prompt exceeds the context length or image count, or has an image that cannot be decoded.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        preparer, faults = self.preparer(), dict[int, str]()
        batches = list(self._encoder.prompts([prompt], max_new_tokens, faults))
        if not batches:
            raise DataError(faults[0])
        (batch,) = batches

        def generate() -> Generator[GeneratedToken]:
            steps = self._steps(preparer, batch, max_new_tokens, () if ignore_eos else self._stops)
            for count, (tokens, active) in enumerate(steps, 1):
                yield GeneratedToken(int(tokens[0]), "stop" if not active[0] else "length" if count == max_new_tokens else None)

        return StreamedAnswer(batch[0].length, generate())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens."""
        return str(self._encoder.processor.tokenizer.decode(token_ids, skip_special_tokens=True))

    @property
    def max_length(self) -> int | None:
        """The model's context length in tokens, None where its config has none."""
        return self._encoder.max_length

    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Session.score`. One that exceeds the model's context length gives a score with its fault.

        Raises:
            UsageError: `reference` was recorded on other passages, by another runtime, or with another `top_logprobs`; or the model
                generates no text.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
            StoreError: the record cannot be written.
        """
        preparer = self.preparer()
        original = TopRecord(reference, passages, self._top) if reference is not None else None
        recorded: dict[int, list[Position]] = {}
        scores = [score_of(passage.id, [], None if original is None else []) for passage in passages]
        faults: dict[int, str] = {}
        encoder = self._scoring_encoder(preparer)
        with progress.task("score", sum(len(scored_tokens(passage)) for passage in passages), "tokens") as advance:
            for batch in encoder.passages(passages, faults):
                for index, logits in _scored_logits(preparer, batch, passages):
                    original_positions = original.of(index) if original is not None else None
                    positions = self._positions(scored_tokens(passages[index]), logits, original_positions)
                    scores[index] = score_of(passages[index].id, positions, original_positions)
                    if record is not None:
                        recorded[index] = positions
                    advance(len(positions))
        if record is not None:
            write_record(record, passages, [recorded.get(index, []) for index in range(len(passages))], self._top)
        for index, fault in faults.items():
            scores[index] = unscored(passages[index].id, fault, compared=original is not None)
        return scores

    def distributions(
        self, passages: Sequence[Passage], positions: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return the distribution over the full vocabulary at each position; see `FullVocabularySession`.

        Raises:
            UsageError: the model generates no text.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        preparer = self.preparer()
        indices = list(dict.fromkeys(passage for passage, _ in positions))
        subset = [passages[index] for index in indices]
        distributions: dict[int, NDArray[np.float32]] = {}
        with progress.task("whole vocabulary", len(positions), "tokens") as advance:
            for batch in self._scoring_encoder(preparer).passages(subset, {}):
                for index, logits in _scored_logits(preparer, batch, subset):
                    requested = [(at, token) for at, (passage, token) in enumerate(positions) if passage == indices[index]]
                    rows = torch.from_numpy(logits[[token for _, token in requested]]).to(torch.float64).log_softmax(dim=1)
                    distributions |= {at: row.to(torch.float32).numpy() for (at, _), row in zip(requested, rows, strict=True)}
                    advance(len(requested))
        return [distributions.get(at) for at in range(len(positions))]

    def classify(
        self, images: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return the zero-shot log-probabilities [images, classes]; see `Session.classify`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text exceeds the model's context length, or an image cannot be decoded.
        """
        return self._embedder().classify(images, classes, progress, faults)

    def embed(
        self, images: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return the embeddings of images and texts; see `Session.embed`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text exceeds the model's context length, or an image cannot be decoded.
        """
        return self._embedder().embed(images, texts, progress, faults)

    def preparer(self) -> Preparer:
        """Return the preparer of the graphs' inputs.

        Raises:
            UsageError: the model generates no text.
        """
        check_generative(self._encoder.family)
        return cast("Preparer", self._model)

    def _scoring_encoder(self, preparer: Preparer) -> Encoder:
        """Return an encoder whose batches are small enough for the logits of all their tokens."""
        vocabulary = int(preparer.graphs.decoder.outputs["logits"].shape[2])
        return replace(self._encoder, tokens_per_batch=min(self._encoder.tokens_per_batch, _MAX_LOGITS // vocabulary))

    def _embedder(self) -> Embedder:
        check_contrastive(self._encoder.family)
        return Embedder(cast("Towers", self._model), self._encoder)

    def _generate(self, preparer: Preparer, batch: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, without its end-of-sequence token."""
        continuations: list[list[int]] = [[] for _ in batch]
        for tokens, active in self._steps(preparer, batch, max_new_tokens, self._stops):
            for row in np.flatnonzero(active):
                continuations[row].append(int(tokens[row]))
        return continuations

    def _steps(
        self, preparer: Preparer, batch: Sequence[Encoded], max_new_tokens: int, stops: Sequence[int]
    ) -> Generator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Yield per step the greedy token of each row [samples], and which rows are still active [samples]."""
        prepared = preparer.prepare(batch)
        decoder = BatchDecoder(preparer.graphs, prepared, prepared.padded_length + max_new_tokens)
        logits = decoder.begin()
        suppressed = [token for token in preparer.placeholders if token < logits.shape[1]]
        active = np.ones(len(batch), dtype=np.bool_)
        for count in range(1, max_new_tokens + 1):
            logits[:, suppressed] = -np.inf
            tokens = logits.argmax(axis=1)
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
