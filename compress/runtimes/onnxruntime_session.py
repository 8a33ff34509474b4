"""An ONNX artifact that answers, scores, or compares images with texts, in ONNX Runtime."""

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

from compress.artifact import artifact_format
from compress.calibration.collect import longest_input
from compress.checkpoint import read_config
from compress.conversation import load_processor
from compress.errors import CheckpointError, DataError, StoreError
from compress.families import family_at
from compress.progress import Progress
from compress.runtimes.embedding import Embedder, Towers
from compress.runtimes.inputs import Encoded, Encoder, check_compares, check_writes, stops_and_pad
from compress.runtimes.onnxruntime import Provider
from compress.runtimes.onnxruntime_decoder import Decoding
from compress.runtimes.onnxruntime_graph import Engine, GraphSession, choose_engine
from compress.runtimes.onnxruntime_inputs import PAST, Graphs, Preparer, find_rope
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
from compress.skeleton import load_config

_IMAGES, _TEXTS = "vision_model.onnx", "text_model.onnx"
_SCALE = "logit_scale"
_LOGITS_AT_ONCE = 2**27
"""How many of them, in float32, are held at once where a batch is scored."""
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class OnnxruntimeSettings:
    """A runtime's fields, as the recipe gives them; `providers` None where they are chosen by what is here."""

    providers: tuple[Provider, ...] | None
    threads: int | None
    dtype: str
    tokens_per_batch: int
    top_logprobs: int
    whole_tokens: int


class Spoken(NamedTuple):
    """A token as it is made, and why it is the last: it ends the answer and is none of its words, or there is room for no more."""

    token: int
    finish: Literal["stop", "length"] | None


@dataclass(frozen=True)
class Streamed:
    """An answer that is being made: how many tokens its prompt has, and its own, each as soon as it is known."""

    prompt_tokens: int
    tokens: Generator[Spoken]


@contextmanager
def open_session(context: OpenContext, settings: OnnxruntimeSettings) -> Generator[OnnxruntimeSession]:
    """Load an artifact, or what a checkpoint is exported to; its memory is free again when the context ends.

    Raises:
        CheckpointError: it cannot be read or exported.
        MissingError: a provider, an opset or an operator is not there.
        StoreError: there is no room for the exported checkpoint.
    """
    engine = choose_engine(settings.providers, settings.threads)
    with graphs_of(context, settings, engine) as folder:
        session = load(folder, context, settings, engine)
    with closing(session):
        yield session


@contextmanager
def graphs_of(context: OpenContext, settings: OnnxruntimeSettings, engine: Engine) -> Generator[Path]:
    """Give the folder to load graphs from: the artifact or, of a checkpoint that has none, one that is there only so long.

    Raises:
        CheckpointError: the checkpoint cannot be exported.
        StoreError: there is no room for what it is exported to.
    """
    if artifact_format(context.artifact) == "onnx":
        yield context.artifact
        return
    from compress.export.format import ExportContext
    from compress.export.onnx import Onnx

    auto = "float32" if engine.device == "cpu" else "float16"
    export = Onnx.model_validate({"format": "onnx", "dtype": auto if settings.dtype == "auto" else settings.dtype})
    folder = context.logs / f"{context.name}.onnx-export"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
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


def load(folder: Path, context: OpenContext, settings: OnnxruntimeSettings, engine: Engine) -> OnnxruntimeSession:
    """Load an artifact, its graphs from the folder that `graphs_of` gives; raises as `open_session` does."""
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
    """An artifact whose graphs are loaded in this process: those of a model that writes, or the two towers of one that compares."""

    block: int | None = 64

    def __init__(self, encoder: Encoder, model: Preparer | Towers, stops: tuple[int, ...], settings: OnnxruntimeSettings) -> None:
        self._encoder = encoder
        self._model: Preparer | Towers | None = model
        self._stops = stops
        self._top = settings.top_logprobs
        self.whole_tokens = settings.whole_tokens

    @property
    def offers(self) -> frozenset[Ability]:
        """What the model does; see `Session.offers`."""
        return frozenset({"comparison"} if self._encoder.family.head is None else {"text", "scores"})

    def close(self) -> None:
        """Let go of the graphs."""
        self._model = None
        gc.collect()

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, each: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; the model's sampling settings and penalties are left out. See `Session.answer`.

        Tokens that stand for images and videos are never said: no model could read such an answer back. A prompt that is longer
        than the model takes, has more images, or one that cannot be decoded, gives an answer with its fault.

        Raises:
            UsageError: the model writes no text.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        preparer = self.preparer()
        answers: dict[int, Answer] = {}
        faults: dict[int, str] = {}

        def tell(place: int, answer: Answer) -> None:
            answers[place] = answer
            if each is not None:
                each(answer)

        with progress.task("answer", len(prompts), "prompts") as advance:
            for batch in self._encoder.prompts(prompts, max_new_tokens, faults):
                for sample, ids in zip(batch, self._continue(preparer, batch, max_new_tokens), strict=True):
                    tell(sample.place, Answer(id=prompts[sample.place].id, text=self.words(ids), token_ids=tuple(ids)))
                advance(len(batch))
            for place, words in faults.items():
                tell(place, Answer(id=prompts[place].id, text="", token_ids=(), fault=words))
            advance(len(faults))
        return [answers[place] for place in range(len(prompts))]

    def stream(self, prompt: Prompt, max_new_tokens: int, *, ignore_eos: bool = False) -> Streamed:
        """Answer one prompt as `answer` does, token by token; with `ignore_eos`, no token ends it.

        Raises:
            UsageError: the model writes no text.
            DataError: the prompt is longer than the model takes, has more images, or one that cannot be decoded.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        preparer, faults = self.preparer(), dict[int, str]()
        batches = list(self._encoder.prompts([prompt], max_new_tokens, faults))
        if not batches:
            raise DataError(faults[0])
        (batch,) = batches

        def spoken() -> Generator[Spoken]:
            steps = self._steps(preparer, batch, max_new_tokens, () if ignore_eos else self._stops)
            for count, (tokens, going) in enumerate(steps, 1):
                yield Spoken(int(tokens[0]), "stop" if not going[0] else "length" if count == max_new_tokens else None)

        return Streamed(batch[0].length, spoken())

    def words(self, token_ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens."""
        return str(self._encoder.processor.tokenizer.decode(token_ids, skip_special_tokens=True))

    @property
    def longest(self) -> int | None:
        """How many tokens the model takes, None where its config does not say."""
        return self._encoder.longest

    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Session.score`. One that is longer than the model takes gives a score with its fault.

        Raises:
            UsageError: `against` was recorded on other passages, by another runtime, or with another `top_logprobs`; or the model
                writes no text.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
            StoreError: the record cannot be written.
        """
        preparer = self.preparer()
        original = TopRecord(against, passages, self._top) if against is not None else None
        recorded: dict[int, list[Position]] = {}
        scores = [score_of(passage.id, [], None if original is None else []) for passage in passages]
        faults: dict[int, str] = {}
        encoder = self._for_scores(preparer)
        with progress.task("score", sum(len(scored_tokens(passage)) for passage in passages), "tokens") as advance:
            for batch in encoder.passages(passages, faults):
                for place, logits in _scored_logits(preparer, batch, passages):
                    known = original.of(place) if original is not None else None
                    positions = self._positions(scored_tokens(passages[place]), logits, known)
                    scores[place] = score_of(passages[place].id, positions, known)
                    if record is not None:
                        recorded[place] = positions
                    advance(len(positions))
        if record is not None:
            write_record(record, passages, [recorded.get(place, []) for place in range(len(passages))], self._top)
        for place, words in faults.items():
            scores[place] = unscored(passages[place].id, words, compared=original is not None)
        return scores

    def distributions(
        self, passages: Sequence[Passage], places: Sequence[tuple[int, int]], progress: Progress
    ) -> list[NDArray[np.float32] | None]:
        """Return how each place is predicted over the whole vocabulary; see `WholeVocabulary`.

        Raises:
            UsageError: the model writes no text.
            CheckpointError: the graphs cannot be run.
            MissingError: there is too little memory.
        """
        preparer = self.preparer()
        chosen = list(dict.fromkeys(passage for passage, _ in places))
        own = [passages[place] for place in chosen]
        found: dict[int, NDArray[np.float32]] = {}
        with progress.task("whole vocabulary", len(places), "tokens") as advance:
            for batch in self._for_scores(preparer).passages(own, {}):
                for place, logits in _scored_logits(preparer, batch, own):
                    wanted = [(at, token) for at, (passage, token) in enumerate(places) if passage == chosen[place]]
                    rows = torch.from_numpy(logits[[token for _, token in wanted]]).to(torch.float64).log_softmax(dim=1)
                    found |= {at: row.to(torch.float32).numpy() for (at, _), row in zip(wanted, rows, strict=True)}
                    advance(len(wanted))
        return [found.get(place) for place in range(len(places))]

    def classify(
        self, pictures: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return how likely the model finds each class for each picture; see `Session.classify`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text is longer than the model takes, or an image cannot be decoded.
        """
        return self._embedder().classify(pictures, classes, progress, faults)

    def embed(
        self, pictures: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return where the model puts each picture and each text; see `Session.embed`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text is longer than the model takes, or an image cannot be decoded.
        """
        return self._embedder().embed(pictures, texts, progress, faults)

    def preparer(self) -> Preparer:
        """Return what makes of encoded samples what the graphs read.

        Raises:
            UsageError: the model writes no text.
        """
        check_writes(self._encoder.family)
        return cast("Preparer", self._model)

    def _for_scores(self, preparer: Preparer) -> Encoder:
        """Return what makes batches of passages small enough for the logits of all their tokens."""
        vocabulary = int(preparer.graphs.decoder.outputs["logits"].shape[2])
        return replace(self._encoder, tokens_per_batch=min(self._encoder.tokens_per_batch, _LOGITS_AT_ONCE // vocabulary))

    def _embedder(self) -> Embedder:
        check_compares(self._encoder.family)
        return Embedder(cast("Towers", self._model), self._encoder)

    def _continue(self, preparer: Preparer, batch: Sequence[Encoded], most: int) -> list[list[int]]:
        """Return the likeliest continuation of each prompt: at most so many tokens, without the one that ends it."""
        said: list[list[int]] = [[] for _ in batch]
        for tokens, going in self._steps(preparer, batch, most, self._stops):
            for row in np.flatnonzero(going):
                said[row].append(int(tokens[row]))
        return said

    def _steps(
        self, preparer: Preparer, batch: Sequence[Encoded], most: int, stops: Sequence[int]
    ) -> Generator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Give, step by step, the likeliest token of each prompt's continuation, and which rows it does not end [samples]."""
        prepared = preparer.prepare(batch)
        decoding = Decoding(preparer.graphs, prepared, prepared.longest + most)
        logits = decoding.begin()
        never = [token for token in preparer.placeholders if token < logits.shape[1]]
        going = np.ones(len(batch), dtype=np.bool_)
        for count in range(1, most + 1):
            logits[:, never] = -np.inf
            tokens = logits.argmax(axis=1)
            going = going & ~np.isin(tokens, stops)
            yield tokens, going
            if count == most or not going.any():
                break
            logits = decoding.step(tokens, going)

    def _positions(self, tokens: Sequence[int], logits: NDArray[np.float32], known: Sequence[Position] | None) -> list[Position]:
        """Return how tokens were predicted from logits [tokens, vocabulary], at those known of the original too."""
        found: list[Position] = []
        for first in range(0, len(tokens), _ROWS_AT_ONCE):
            exact = torch.from_numpy(logits[first : first + _ROWS_AT_ONCE]).to(torch.float64)
            logs = exact.log_softmax(dim=1).to(torch.float32)
            best = logs.topk(min(self._top, logs.shape[1]), dim=1)
            for row, (ids, values) in enumerate(zip(_rows(best.indices), _rows(best.values), strict=True)):
                top = dict(zip(map(int, ids), values, strict=True))
                for token, _ in known[first + row].top if known else ():
                    if token < logs.shape[1]:
                        top.setdefault(token, float(logs[row, token]))
                token = tokens[first + row]
                found.append(Position(token, float(logs[row, token]), tuple(top.items())))
        return found


def _rows(values: Tensor) -> list[list[float]]:
    return cast("list[list[float]]", values.tolist())


def _scored_logits(
    preparer: Preparer, batch: Sequence[Encoded], passages: Sequence[Passage]
) -> Generator[tuple[int, NDArray[np.float32]]]:
    """Give, by the passages' places, the logits [tokens, vocabulary] that their scored tokens are predicted by."""
    prepared = preparer.prepare(batch)
    counts = [len(scored_tokens(passages[sample.place])) for sample in batch]
    firsts = [sample.length - 1 - count for sample, count in zip(batch, counts, strict=True)]
    before = min(firsts)
    logits = Decoding(preparer.graphs, prepared, prepared.longest).prefill(prepared.longest - before)
    for row, (sample, first, count) in enumerate(zip(batch, firsts, counts, strict=True)):
        yield sample.place, logits[row, first - before : first - before + count]


def _towers(folder: Path, engine: Engine) -> Towers:
    """Load the two encoders of a model that compares images with texts.

    Raises:
        CheckpointError: one is missing or damaged, or says nothing of what the cosines are scaled by.
        MissingError: this ONNX Runtime lacks what one needs.
    """
    images, texts = GraphSession(folder / _IMAGES, engine), GraphSession(folder / _TEXTS, engine)
    images.expect({"pixel_values"}, {"image_embeds"})
    texts.expect({"input_ids", "attention_mask"}, {"text_embeds"})
    scale = images.notes.get(_SCALE) or texts.notes.get(_SCALE)
    if scale is None:
        raise CheckpointError(f"{images.path}: does not say what cosines are scaled by (metadata {_SCALE}); export it again")

    def from_texts(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(texts.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["text_embeds"])

    def from_images(pixels: Tensor) -> Tensor:
        return torch.from_numpy(images.run({"pixel_values": pixels.numpy()})["image_embeds"])

    return Towers(from_texts, from_images, float(scale))
