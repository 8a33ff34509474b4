"""A model in this process that answers and scores, or, where it writes no text, tells which of some texts an image shows."""

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

from compress.calibration.collect import longest_input
from compress.conversation import load_processor
from compress.engine.recorder import ReachedError
from compress.families import Family, family_at
from compress.progress import Progress
from compress.runtimes.embedding import Embedder, towers_of
from compress.runtimes.fidelity import Head, Heads, Predictions, Record, RecordWriter, predict
from compress.runtimes.inputs import Encoded, Encoder, check_compares, check_writes, stops_and_pad
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
from compress.runtimes.transformers_model import choose_device, choose_dtype, load_model
from compress.untrusted import foreign

Load = Callable[[Path, torch.dtype, torch.device, Progress, bool], Any]
"""Returns a folder's model, dense, computed in a type on a device; the last argument is `trust_remote_code`."""


@dataclass(frozen=True)
class TransformersSettings:
    """A runtime's fields, as the recipe gives them."""

    dtype: str
    device: str
    tokens_per_batch: int


@contextmanager
def open_session(context: OpenContext, settings: TransformersSettings, load: Load = load_model) -> Generator[TransformersSession]:
    """Load an artifact, with `load`; its memory is free again when the context ends.

    Raises:
        CheckpointError: it cannot be read.
        MissingError: the device is not there.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, context.artifact, device)
    processor = load_processor(context.artifact, context.trust_remote_code)
    model = load(context.artifact, dtype, device, context.progress, context.trust_remote_code)
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
    """An artifact that is loaded in this process."""

    block: int | None = 64

    def __init__(self, model: Any, encoder: Encoder, device: torch.device, stops: tuple[int, ...]) -> None:
        self._model: Any = model
        self._encoder = encoder
        self._device = device
        self._stops = stops
        self._family: Family = encoder.family
        self._heads = Heads()
        self._placeholders = self._family.placeholders(model.config.to_dict())
        # What generate takes from here, though it is given its own settings, must be neutral: models ship sampling and penalties.
        neutral = GenerationConfig(eos_token_id=list(stops), pad_token_id=encoder.pad_id)
        for module in model.modules():
            if getattr(module, "generation_config", None) is not None:
                module.generation_config = neutral

    @property
    def offers(self) -> frozenset[Ability]:
        """What the model does; see `Session.offers`."""
        return frozenset({"comparison"} if self._family.head is None else {"text", "scores"})

    @property
    def model(self) -> Any:
        """The model, as transformers has it."""
        return self._model

    @property
    def encoder(self) -> Encoder:
        """What turns prompts into its inputs."""
        return self._encoder

    def try_out(self) -> None:
        """Run the model on two tokens of text, if it writes any: a config may describe one that cannot run."""
        if self._family.head is not None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self._device)
            with torch.no_grad():
                self._head_input({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def close(self) -> None:
        """Let go of the model."""
        self._model = None
        self._heads = Heads()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress, each: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Answer each prompt by greedy decoding; the model's sampling settings and penalties are left out. See `Session.answer`.

        Tokens that stand for images and videos are never said: no model could read such an answer back. A prompt that is longer
        than the model takes, has more images, or one that cannot be decoded, gives an answer with its fault.

        Raises:
            UsageError: the model writes no text.
        """
        check_writes(self._family)
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
                    answers[sample.place] = self._finish(prompts[sample.place], ids)
                    if each is not None:
                        each(answers[sample.place])
                advance(len(batch))
            for place, words in faults.items():
                answers[place] = Answer(id=prompts[place].id, text="", token_ids=(), fault=words)
                if each is not None:
                    each(answers[place])
            advance(len(faults))
        return [answers[place] for place in range(len(prompts))]

    @torch.inference_mode()
    def score(self, passages: Sequence[Passage], record: Path | None, against: Path | None, progress: Progress) -> list[Score]:
        """Score the passages; see `Session.score`. One that is longer than the model takes gives a score with its fault.

        Raises:
            UsageError: `against` was recorded on other passages, or by a model of another vocabulary; or the model writes no text.
            StoreError: the record cannot be written.
        """
        check_writes(self._family)
        output = self._model.get_output_embeddings()
        head = Head(output.weight, getattr(output, "bias", None))
        original = Record(against, passages, self._device, self._heads) if against is not None else None
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
                    kept = {place: states for place, states in hidden.items() if original is None or original.holds(place)}
                    faults |= dict.fromkeys(hidden.keys() - kept.keys(), UNSCORED)
                    for place, score in self._scores(kept, passages, head, original):
                        scores[place] = score
                    advance(sum(len(states) for states in hidden.values()))
            if recorder is not None:
                recorder.finish()
        finally:
            if recorder is not None:
                recorder.discard()
        for place, words in faults.items():
            scores[place] = unscored(passages[place].id, words, compared=compared)
        return scores

    @torch.inference_mode()
    def classify(
        self, pictures: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return how likely the model finds each class for each picture; see `Session.classify`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text is longer than the model takes, or an image cannot be decoded.
        """
        return self._embedder().classify(pictures, classes, progress, faults)

    @torch.inference_mode()
    def embed(
        self, pictures: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return where the model puts each picture and each text; see `Session.embed`.

        Raises:
            UsageError: the model compares no images with texts.
            DataError: a text is longer than the model takes, or an image cannot be decoded.
        """
        return self._embedder().embed(pictures, texts, progress, faults)

    def _embedder(self) -> Embedder:
        check_compares(self._family)
        return Embedder(towers_of(self._model, self._device), self._encoder)

    def _entry(self, inputs: Mapping[str, Tensor]) -> Any:
        return self._model.get_submodule(self._family.entry(inputs))

    def _head_input(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what a forward gives the output head [samples, tokens, hidden], which is not computed."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            found.append(args[0])
            raise ReachedError

        handle = self._model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            with suppress(ReachedError):
                self._entry(inputs)(**inputs, use_cache=False)
        finally:
            handle.remove()
        return found[0]

    def _hidden(self, batch: Sequence[Encoded], passages: Sequence[Passage]) -> dict[int, Tensor]:
        """Return, by the passages' places, the hidden states that their scored tokens are predicted from."""
        inputs = self._encoder.collate(batch, "right", self._device)
        states = self._head_input(inputs)
        rows: dict[int, Tensor] = {}
        for row, sample in enumerate(batch):
            last = sample.length - 1
            rows[sample.place] = states[row, last - len(scored_tokens(passages[sample.place])) : last]
        return rows

    def _scores(
        self, hidden: dict[int, Tensor], passages: Sequence[Passage], head: Head, original: Record | None
    ) -> Generator[tuple[int, Score]]:
        """Give the scores of the passages at these places, from the hidden states that their tokens are predicted from."""
        if not hidden:
            return
        tokens = [token for place in hidden for token in scored_tokens(passages[place])]
        reference = None
        if original is not None:
            reference = (torch.cat([original.hidden(place) for place in hidden]), original.head)
        states = torch.cat(list(hidden.values()))
        found = predict(states, head, torch.tensor(tokens, device=self._device), reference)
        first = 0
        for place, states in hidden.items():
            part = slice(first, first := first + len(states))
            yield place, _score(passages[place], found, part)

    def _finish(self, prompt: Prompt, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
        text = self._encoder.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(id=prompt.id, text=text, token_ids=tuple(ids[:end]))


def _score(passage: Passage, predictions: Predictions, part: slice) -> Score:
    return Score(
        id=passage.id,
        negative_log_likelihood=predictions.negative_log_likelihood[part],
        kl=None if predictions.kl is None else predictions.kl[part],
        same_top=None if predictions.same_top is None else predictions.same_top[part],
    )
