"""Sessions with a transformers model in this process: answers and scores, or image and text embeddings."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationConfig

from compress.data.prompts import load_processor, longest_input
from compress.engine.recorder import ReachedError
from compress.families import Family, family_at
from compress.progress import Progress
from compress.runtimes.embedding import Embedder, towers_of
from compress.runtimes.fidelity import Head, HeadCache, Predictions, Record, RecordWriter, predict
from compress.runtimes.inputs import Encoded, Encoder, check_contrastive, check_generative, stops_and_pad
from compress.runtimes.runtime import (
    UNSCORED,
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
from compress.runtimes.transformers.model import choose_device, choose_dtype, load_model
from compress.untrusted.reading import foreign

ModelLoader = Callable[[Path, torch.dtype, torch.device, Progress, bool], Any]
"""Loads a dense model: (folder, dtype, device, progress, trust_remote_code) → model."""


@dataclass(frozen=True)
class TransformersSettings:
    """The fields of `runtime: transformers`."""

    dtype: str
    device: str
    tokens_per_batch: int


@contextmanager
def open_session(
    context: OpenContext, settings: TransformersSettings, loader: ModelLoader = load_model
) -> Generator[TransformersSession]:
    """Load an artifact with `loader`; its memory is freed when the context ends.

    Raises:
        CheckpointError: it cannot be read.
        MissingError: the device is not there.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, context.artifact, device)
    processor = load_processor(context.artifact, context.trust_remote_code)
    model = loader(context.artifact, dtype, device, context.progress, context.trust_remote_code)
    stops, pad_id = stops_and_pad(context.artifact, processor, model.config.get_text_config())
    family = family_at(context.artifact, context.trust_remote_code)
    encoder = Encoder(processor, family, pad_id, settings.tokens_per_batch, longest_input(context.artifact))
    session = TransformersSession(model, encoder, device, stops)
    del model
    try:
        with foreign(f"{context.artifact}/config.json: the model that it describes does not run"):
            session.try_out()
        yield session
    finally:
        session.close()


class TransformersSession:
    """An artifact loaded in this process."""

    block: int | None = 64

    def __init__(self, model: Any, encoder: Encoder, device: torch.device, stops: tuple[int, ...]) -> None:
        self._model: Any = model
        self._encoder = encoder
        self._device = device
        self._stops = stops
        self._family: Family = encoder.family
        self._heads = HeadCache()
        self._placeholders = self._family.placeholders(model.config.to_dict())
        # `generate` falls back to the model's own config for unset values: made neutral, as models ship sampling and penalties.
        neutral = GenerationConfig(eos_token_id=list(stops), pad_token_id=encoder.pad_id)
        for module in model.modules():
            if getattr(module, "generation_config", None) is not None:
                module.generation_config = neutral

    @property
    def offers(self) -> frozenset[Ability]:
        """The model's abilities; see `Session.offers`."""
        return frozenset({"comparison"} if self._family.head is None else {"text", "scores"})

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    @property
    def encoder(self) -> Encoder:
        """Turns prompts into the model's inputs."""
        return self._encoder

    def try_out(self) -> None:
        """Run a generative model on two text tokens: a config may describe a model that cannot run."""
        if self._family.head is not None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self._device)
            with torch.no_grad():
                self._head_input({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def close(self) -> None:
        """Free the model."""
        self._model = None
        self._heads = HeadCache()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; the model's sampling settings and penalties are left out. See `Session.answer`.

        Placeholder tokens of images and videos are suppressed: an answer that has one could not be scored. A prompt that exceeds
        the model's context length or image count, or has an image that cannot be decoded, gives an answer with its fault.

        Raises:
            UsageError: the model generates no text.
        """
        check_generative(self._family)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._stops),
            pad_token_id=self._encoder.pad_id,
            suppress_tokens=list(self._placeholders) or None,
        )
        answers: dict[int, Answer] = {}
        faults: dict[int, str] = {}
        with progress.task("answer", len(prompts), "prompts") as advance:
            for batch in self._encoder.prompts(prompts, max_new_tokens, faults):
                inputs = self._encoder.collate(batch, "left", self._device)
                sequences = self._entry(inputs).generate(**inputs, generation_config=greedy)
                new = cast("list[list[int]]", sequences[:, inputs["input_ids"].shape[1] :].tolist())
                for sample, ids in zip(batch, new, strict=True):
                    answers[sample.index] = self._decode(prompts[sample.index], ids)
                    if on_answer is not None:
                        on_answer(answers[sample.index])
                advance(len(batch))
            for index, fault in faults.items():
                answers[index] = Answer(id=prompts[index].id, text="", token_ids=(), fault=fault)
                if on_answer is not None:
                    on_answer(answers[index])
            advance(len(faults))
        return [answers[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Session.score`. One that exceeds the model's context length gives a score with its fault.

        Raises:
            UsageError: `reference` was recorded on other passages, or by a model of another vocabulary; or the model generates no
                text.
            StoreError: the record cannot be written.
        """
        check_generative(self._family)
        output = self._model.get_output_embeddings()
        head = Head(output.weight, getattr(output, "bias", None))
        original = Record(reference, passages, self._device, self._heads) if reference is not None else None
        recorder = RecordWriter(record, passages, head, self._heads) if record is not None else None
        compared = original is not None
        scores = [unscored(passage.id, None, compared=compared) for passage in passages]
        faults: dict[int, str] = {}
        try:
            with progress.task("score", sum(len(scored_tokens(passage)) for passage in passages), "tokens") as advance:
                for batch in self._encoder.passages(passages, faults):
                    hidden = self._hidden(batch, passages)
                    if recorder is not None:
                        recorder.add(hidden)
                    comparable = {index: states for index, states in hidden.items() if original is None or index in original}
                    faults |= dict.fromkeys(hidden.keys() - comparable.keys(), UNSCORED)
                    for index, score in self._scores(comparable, passages, head, original):
                        scores[index] = score
                    advance(sum(len(states) for states in hidden.values()))
            if recorder is not None:
                recorder.finish()
        finally:
            if recorder is not None:
                recorder.discard()
        for index, fault in faults.items():
            scores[index] = unscored(passages[index].id, fault, compared=compared)
        return scores

    @torch.inference_mode()
    def classify(
        self, images: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return the zero-shot log-probabilities [images, classes]; see `Session.classify`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text exceeds the model's context length, or an image cannot be decoded.
        """
        return self._embedder().classify(images, classes, progress, faults)

    @torch.inference_mode()
    def embed(
        self, images: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return the embeddings of images and texts; see `Session.embed`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text is longer than the model takes, or an image cannot be decoded.
        """
        return self._embedder().embed(images, texts, progress, faults)

    def _embedder(self) -> Embedder:
        check_contrastive(self._family)
        return Embedder(towers_of(self._model, self._device), self._encoder)

    def _entry(self, inputs: Mapping[str, Tensor]) -> Any:
        return self._model.get_submodule(self._family.entry(inputs))

    def _head_input(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output head's input [samples, tokens, hidden] of a forward pass, which is stopped there."""
        captured: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            captured.append(args[0])
            raise ReachedError

        handle = self._model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            with suppress(ReachedError):
                self._entry(inputs)(**inputs, use_cache=False)
        finally:
            handle.remove()
        return captured[0]

    def _hidden(self, batch: Sequence[Encoded], passages: Sequence[Passage]) -> dict[int, Tensor]:
        """Return, by the passages' indices, the hidden states that predict their scored tokens."""
        inputs = self._encoder.collate(batch, "right", self._device)
        states = self._head_input(inputs)
        rows: dict[int, Tensor] = {}
        for row, sample in enumerate(batch):
            last = sample.length - 1
            rows[sample.index] = states[row, last - len(scored_tokens(passages[sample.index])) : last]
        return rows

    def _scores(
        self, hidden: dict[int, Tensor], passages: Sequence[Passage], head: Head, original: Record | None
    ) -> Generator[tuple[int, Score]]:
        """Yield the scores of passages by index, from the hidden states that predict their tokens."""
        if not hidden:
            return
        tokens = [token for index in hidden for token in scored_tokens(passages[index])]
        reference = None
        if original is not None:
            reference = (torch.cat([original.hidden(index) for index in hidden]), original.head)
        states = torch.cat(list(hidden.values()))
        predictions = predict(states, head, torch.tensor(tokens, device=self._device), reference)
        first = 0
        for index, states in hidden.items():
            span = slice(first, first := first + len(states))
            yield index, _score(passages[index], predictions, span)

    def _decode(self, prompt: Prompt, ids: list[int]) -> Answer:
        end = next((index for index, token in enumerate(ids) if token in self._stops), len(ids))
        text = self._encoder.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(id=prompt.id, text=text, token_ids=tuple(ids[:end]))


def _score(passage: Passage, predictions: Predictions, span: slice) -> Score:
    return Score(
        id=passage.id,
        negative_log_likelihood=predictions.negative_log_likelihood[span],
        kl=None if predictions.kl is None else predictions.kl[span],
        same_top=None if predictions.same_top is None else predictions.same_top[span],
    )
