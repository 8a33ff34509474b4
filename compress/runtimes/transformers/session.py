"""Sessions with a transformers model in this process: answers and scores, or image and text embeddings."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from compress.engine.recorder import ReachedError
from compress.families import Family
from compress.progress import Progress
from compress.runtimes.batched_session import BatchedSession
from compress.runtimes.embedding import EmbeddingSession, towers_of
from compress.runtimes.fidelity import Head, HeadCache, Predictions, Record, RecordWriter, predict
from compress.runtimes.inputs import Encoded, Encoder
from compress.runtimes.runtime import UNSCORED, OpenContext, Passage, Score, scored_tokens, unscored
from compress.runtimes.transformers.model import choose_device, choose_dtype, load_model
from compress.untrusted.reading import library_errors

if TYPE_CHECKING:
    from compress.runtimes.transformers.runtime import Transformers

ModelLoader = Callable[[OpenContext, torch.dtype, torch.device], Any]
"""Loads a dense model."""


@contextmanager
def open_session(
    runtime: Transformers, context: OpenContext, loader: ModelLoader = load_model
) -> Generator[TransformersSession | EmbeddingSession]:
    """Load an artifact with `loader`; its memory is freed when the context ends.

    Raises:
        CheckpointError: it cannot be read.
        MissingError: the device is not there.
    """
    device = choose_device(runtime.device)
    dtype = choose_dtype(runtime.dtype, context.artifact, device)
    encoder = Encoder.of(context, runtime.tokens_per_batch)
    model = loader(context, dtype, device)
    generates = context.family.head is not None
    session = TransformersSession(model, encoder, device) if generates else EmbeddingSession(towers_of(model, device), encoder)
    # The session holds the only reference, so that `close` frees the memory.
    del model
    try:
        if isinstance(session, TransformersSession):
            with library_errors(f"{context.artifact}/config.json: the model that it describes does not run"):
                session.try_out()
        yield session
    finally:
        session.close()
        # A model's modules and hooks are in reference cycles: before the cache is emptied, they must be collected.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class TransformersSession(BatchedSession):
    """A generative artifact loaded in this process."""

    def __init__(self, model: Any, encoder: Encoder, device: torch.device) -> None:
        super().__init__(encoder)
        self._model: Any = model
        self._device = device
        self._family: Family = encoder.family
        self._heads = HeadCache()
        # `generate` falls back to the model's own config for unset values: made neutral, as models ship sampling and penalties.
        neutral = GenerationConfig(eos_token_id=list(encoder.tokens.stops), pad_token_id=encoder.pad_id)
        for module in model.modules():
            if getattr(module, "generation_config", None) is not None:
                module.generation_config = neutral

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    def try_out(self) -> None:
        """Run the model on two text tokens: a config may describe a model that cannot run."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self._device)
        with torch.no_grad():
            self._head_input({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def close(self) -> None:
        """Free the model."""
        self._model = None
        self._heads = HeadCache()

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
        stops = self.encoder.tokens.stops
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stops),
            pad_token_id=self.encoder.pad_id,
            suppress_tokens=list(self.encoder.tokens.placeholders) or None,
        )
        # Left: `generate` appends to the last column of every row.
        inputs = self.encoder.collate(batch, "left", self._device)
        sequences = self._entry(inputs).generate(**inputs, generation_config=greedy)
        # One transfer for the batch: each `.item()` would wait for the device.
        new = cast("list[list[int]]", sequences[:, inputs["input_ids"].shape[1] :].tolist())
        return [list(itertools.takewhile(lambda token: token not in stops, ids)) for ids in new]

    @torch.inference_mode()
    def score(self, passages: Sequence[Passage], record: Path | None, reference: Path | None, progress: Progress) -> list[Score]:
        """Score the passages over the full vocabulary; see `Scores.score`.

        Raises:
            UsageError: `reference` was recorded on other passages, or by a model of another vocabulary.
            StoreError: the record cannot be written.
        """
        # Hidden states are recorded instead of logits: a few thousand numbers per token instead of 150,000.
        output = self._model.get_output_embeddings()
        head = Head(output.weight, getattr(output, "bias", None))
        original = Record(reference, passages, self._device, self._heads) if reference is not None else None
        recorder = RecordWriter(record, passages, head, self._heads) if record is not None else None
        compared = original is not None
        scores = [unscored(passage.id, None, compared=compared) for passage in passages]
        faults: dict[int, str] = {}
        try:
            with progress.task("score", sum(len(scored_tokens(passage)) for passage in passages), "tokens") as advance:
                for batch in self.encoder.passages(passages, faults):
                    hidden = self._hidden(batch, passages)
                    if recorder is not None:
                        recorder.add(hidden)
                    comparable = {index: states for index, states in hidden.items() if original is None or index in original}
                    # Only passages that both models scored are compared: otherwise their means would be over different tokens.
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

    def _entry(self, inputs: Mapping[str, Tensor]) -> Any:
        return self._model.get_submodule(self._family.entry(inputs))

    def _head_input(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output head's input [samples, tokens, hidden] of a forward pass, which is stopped there."""
        captured: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            captured.append(args[0])
            # The head over all positions of a batch would be the largest tensor of the pass: it is applied later, in pieces.
            raise ReachedError

        handle = self._model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            with suppress(ReachedError):
                # Scoring reads each token once: a cache would only take memory.
                self._entry(inputs)(**inputs, use_cache=False)
        finally:
            handle.remove()
        return captured[0]

    def _hidden(self, batch: Sequence[Encoded], passages: Sequence[Passage]) -> dict[int, Tensor]:
        """Return, by the passages' indices, the hidden states that predict their scored tokens."""
        # Right: positions then start at 0 in every row, whatever the model computes them from.
        inputs = self.encoder.collate(batch, "right", self._device)
        states = self._head_input(inputs)
        rows: dict[int, Tensor] = {}
        for row, sample in enumerate(batch):
            last = sample.length - 1
            # Up to the token before the last: a position predicts its successor.
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


def _score(passage: Passage, predictions: Predictions, span: slice) -> Score:
    return Score(
        id=passage.id,
        negative_log_likelihood=predictions.negative_log_likelihood[span],
        kl=None if predictions.kl is None else predictions.kl[span],
        same_top=None if predictions.same_top is None else predictions.same_top[span],
    )
