"""Encodes prompts and passages as a model's input tensors, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.checkpoints.special_tokens import SpecialTokens, read_if_there, special_tokens
from compress.data.images import image_size
from compress.data.prompts import (
    Prompt,
    check_image_count,
    load_processor,
    longest_input,
    open_images,
    run_processor,
    write_prompt,
)
from compress.errors import DataError
from compress.families import Family
from compress.runtimes.runtime import OpenContext, Passage, scored_tokens

_MASKS = "attention_mask"
_SEQUENCE_DIMS = 2
"""Dimensions of a plain sequence input: [samples, tokens]."""


@dataclass(frozen=True)
class Encoded:
    """One sample for the model."""

    index: int
    """The index of its prompt or passage."""

    sequences: dict[str, Tensor]
    """The inputs with an entry per token, by name: [1, tokens, …]."""

    extras: dict[str, Tensor]
    """All other inputs by name: those of its images."""

    @property
    def length(self) -> int:
        """The number of tokens, image tokens included."""
        return self.sequences["input_ids"].shape[1]

    @property
    def kind(self) -> tuple[frozenset[str], frozenset[tuple[str, tuple[int, ...]]]]:
        """Equal for samples that can share a batch: the same inputs, of the same sizes apart from tokens and images."""
        sizes = {key: tuple(value.shape[2:]) for key, value in self.sequences.items()}
        sizes |= {key: tuple(value.shape[1:]) for key, value in self.extras.items()}
        return frozenset(self.sequences), frozenset(sizes.items())


_NO_TOKENS = SpecialTokens(())


@dataclass(frozen=True)
class Encoder:
    """Turns prompts and passages into tensors by the artifact's own processor and chat template."""

    processor: Any
    family: Family
    pad_id: int
    tokens_per_batch: int
    max_length: int | None = None
    """The model's context length in tokens, None where its config has none."""

    tokens: SpecialTokens = _NO_TOKENS

    @staticmethod
    def of(context: OpenContext, tokens_per_batch: int) -> Encoder:
        """Return the encoder of an artifact.

        Raises:
            CheckpointError: its processor or a config cannot be read.
        """
        folder, tokens = context.artifact, special_tokens(context.artifact, context.family)
        processor = load_processor(folder, context.trust_remote_code, context.family)
        generation = read_if_there(folder, "generation_config.json")
        # Padding is masked, so that any id serves; 0 is in every vocabulary.
        pads = (generation.get("pad_token_id"), processor.tokenizer.pad_token_id, *tokens.stops, 0)
        pad_id = int(next(value for value in pads if value is not None))
        return Encoder(processor, context.family, pad_id, tokens_per_batch, longest_input(folder), tokens)

    def prompts(self, prompts: Sequence[Prompt], new_tokens: int, faults: dict[int, str]) -> Generator[list[Encoded]]:
        """Yield batches of prompts of similar length, longest first; each sample leaves room for `new_tokens` more.

        A prompt that the model cannot take is left out, with its fault in `faults` under its index.
        """
        # Longest first: a batch that does not fit into memory fails at once, not after hours. The index decides ties.
        order = sorted(range(len(prompts)), key=lambda index: (*_length_key(prompts[index]), index), reverse=True)
        samples = _encodable(order, lambda index: self._prompt(index, prompts[index], new_tokens=new_tokens), faults)
        return self._batches(samples, new_tokens)

    def passages(self, passages: Sequence[Passage], faults: dict[int, str]) -> Generator[list[Encoded]]:
        """Yield batches of passages with their prompts, of similar length, longest first.

        A passage that the model cannot take is left out, with its fault in `faults` under its index.
        """

        def length_key(index: int) -> tuple[int, ...]:
            passage = passages[index]
            return (*(_length_key(passage.prompt) if passage.prompt else (0, 0)), len(passage.token_ids), index)

        order = sorted((index for index, passage in enumerate(passages) if scored_tokens(passage)), key=length_key, reverse=True)
        return self._batches(_encodable(order, lambda index: self._passage(index, passages[index]), faults), 0)

    def collate(self, batch: Sequence[Encoded], side: Literal["left", "right"], device: torch.device) -> dict[str, Tensor]:
        """Return a batch's tensors on `device`, with sequences padded on `side` to the longest; the padding is masked."""
        longest = max(sample.length for sample in batch)

        def padded(sample: Encoded, key: str) -> Tensor:
            missing, tensor = longest - sample.length, sample.sequences[key]
            value = self.pad_id if key == "input_ids" else 0
            inner = [0, 0] * (tensor.dim() - _SEQUENCE_DIMS)
            return pad(tensor, [*inner, *((missing, 0) if side == "left" else (0, missing))], value=value)

        sequences = {key: torch.cat([padded(sample, key) for sample in batch]) for key in batch[0].sequences}
        extras = {key: torch.cat([sample.extras[key] for sample in batch]) for key in batch[0].extras}
        return {key: tensor.to(device) for key, tensor in (sequences | extras).items()}

    def _batches(self, samples: Generator[Encoded], new_tokens: int) -> Generator[list[Encoded]]:
        batch: list[Encoded] = []
        longest = 0
        for sample in samples:
            longest = max(longest, sample.length + new_tokens)
            # Padded size, not the sum of lengths: memory is taken by the padding too.
            if batch and (longest * (len(batch) + 1) > self.tokens_per_batch or sample.kind != batch[0].kind):
                yield batch
                batch, longest = [], sample.length + new_tokens
            batch.append(sample)
        if batch:
            yield batch

    def _prompt(self, index: int, prompt: Prompt, continuation: tuple[int, ...] = (), new_tokens: int = 0) -> Encoded:
        check_image_count(self.family, prompt)
        text, images = write_prompt(self.processor, prompt), open_images(prompt) or None
        # The chat template writes special tokens: a second BOS would change every answer. Truncation would cut image tokens.
        values = run_processor(
            self.processor, prompt.id, text=[text], images=images, add_special_tokens=False, truncation=False, return_tensors="pt"
        )
        length = values["input_ids"].shape[1]
        self._check_length(prompt, length, len(continuation) + new_tokens)
        sequences = {key: value for key, value in values.items() if _is_sequence(key, value, length)}
        extras = {key: value for key, value in values.items() if key not in sequences}
        if continuation:
            sequences = {key: torch.cat([value, _continuation(key, value, continuation)], 1) for key, value in sequences.items()}
        return Encoded(index, sequences, extras)

    def _check_length(self, prompt: Prompt, length: int, new_tokens: int) -> None:
        if self.max_length is not None and length + new_tokens > self.max_length:
            answer = f" with {new_tokens} for its answer" if new_tokens else ""
            raise DataError(
                f"{prompt.id}: takes {length} tokens{answer}, and the model takes {self.max_length}; leave it out, or shorten its "
                "text or use smaller images"
            )

    def _passage(self, index: int, passage: Passage) -> Encoded:
        if passage.prompt is not None:
            return self._prompt(index, passage.prompt, passage.token_ids)
        length = len(passage.token_ids)
        if self.max_length is not None and length > self.max_length:
            raise DataError(f"{passage.id}: takes {length} tokens, and the model takes {self.max_length}; set a smaller window")
        ids = torch.tensor([passage.token_ids])
        return Encoded(index, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})


def _encodable(order: Sequence[int], encode: Callable[[int], Encoded], faults: dict[int, str]) -> Generator[Encoded]:
    for index in order:
        try:
            yield encode(index)
        except DataError as error:
            faults[index] = str(error)


def _is_sequence(key: str, value: Tensor, length: int) -> bool:
    """Return whether a processor's tensor has an entry per token: [1, tokens], or a mask [1, tokens, …]."""
    # By shape: processors name these inputs differently. Only masks have a third dimension (mllama's cross-attention); pixels may
    # happen to be as long as the prompt.
    return value.shape[:2] == (1, length) and (value.dim() == _SEQUENCE_DIMS or key.endswith(_MASKS))


def _continuation(key: str, value: Tensor, continuation: tuple[int, ...]) -> Tensor:
    """Return an input's entries for tokens that continue the prompt; they attend to the images as its last token does."""
    if key == "input_ids":
        return torch.tensor([continuation]).to(value)
    if key.endswith(_MASKS):
        return value[:, -1:].expand(-1, len(continuation), *value.shape[2:])
    # Token types: 0 is text in every family's `token_type_ids` and `mm_token_type_ids`.
    return torch.zeros(1, len(continuation)).to(value)


def _length_key(prompt: Prompt) -> tuple[int, int]:
    """Return a sort key that grows with a prompt's token count: its images' area in pixels, and its text's length."""
    area = 0
    for data in prompt.images:
        try:
            width, height = image_size(data, prompt.id)
        except DataError:
            continue  # reported with the prompt's name when it is decoded
        area += width * height
    return area, len(prompt.text)
