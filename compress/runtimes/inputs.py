"""Encodes prompts and passages as a model's input tensors, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.checkpoints.checkpoint import read_json_object
from compress.data.images import image_size
from compress.data.prompts import check_image_count, open_images, run_processor, write_prompt
from compress.errors import DataError, UsageError
from compress.families import Family
from compress.runtimes.runtime import Passage, Prompt, scored_tokens

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


@dataclass(frozen=True)
class Encoder:
    """Turns prompts and passages into tensors by the artifact's own processor and chat template."""

    processor: Any
    family: Family
    pad_id: int
    tokens_per_batch: int
    max_length: int | None = None
    """The model's context length in tokens, None where its config has none."""

    def prompts(self, prompts: Sequence[Prompt], new_tokens: int, faults: dict[int, str]) -> Generator[list[Encoded]]:
        """Yield batches of prompts of similar length, longest first; each sample leaves room for `new_tokens` more.

        A prompt that the model cannot take is left out, with its fault in `faults` under its index.
        """
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
            if batch and (longest * (len(batch) + 1) > self.tokens_per_batch or sample.kind != batch[0].kind):
                yield batch
                batch, longest = [], sample.length + new_tokens
            batch.append(sample)
        if batch:
            yield batch

    def _prompt(self, index: int, prompt: Prompt, continuation: tuple[int, ...] = (), new_tokens: int = 0) -> Encoded:
        check_image_count(self.family, prompt)
        text, images = write_prompt(self.processor, prompt), open_images(prompt) or None
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


def stops_and_pad(artifact: Path, processor: Any, text: Any) -> tuple[tuple[int, ...], int]:
    """Return the end-of-sequence tokens and the padding token: from generation_config.json, the text config or the tokenizer."""
    path = artifact / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    tokenizer = processor.tokenizer
    candidates = (generation.get("eos_token_id"), getattr(text, "eos_token_id", None), tokenizer.eos_token_id)
    eos = next((value for value in candidates if value is not None), None)
    stops = tuple(cast("list[int]", eos)) if isinstance(eos, list) else (() if eos is None else (int(eos),))
    pads = (generation.get("pad_token_id"), tokenizer.pad_token_id, *stops, 0)
    return stops, int(next(value for value in pads if value is not None))


def check_generative(family: Family) -> None:
    """Check that a model generates text.

    Raises:
        UsageError: it compares images with texts (CLIP).
    """
    if family.head is None:
        raise UsageError(
            f"{family.name} compares images with texts and writes none: measure it with task: zero-shot instead of "
            "vqa or perplexity"
        )


def check_contrastive(family: Family) -> None:
    """Check that a model compares images with texts (CLIP).

    Raises:
        UsageError: it generates text.
    """
    if family.head is not None:
        raise UsageError(
            f"{family.name} writes text and compares no images with texts: measure it with task: vqa instead of "
            "zero-shot or retrieval"
        )


def _encodable(order: Sequence[int], encode: Callable[[int], Encoded], faults: dict[int, str]) -> Generator[Encoded]:
    for index in order:
        try:
            yield encode(index)
        except DataError as error:
            faults[index] = str(error)


def _is_sequence(key: str, value: Tensor, length: int) -> bool:
    """Return whether a processor's tensor has an entry per token: [1, tokens], or a mask [1, tokens, …]."""
    return value.shape[:2] == (1, length) and (value.dim() == _SEQUENCE_DIMS or key.endswith(_MASKS))


def _continuation(key: str, value: Tensor, continuation: tuple[int, ...]) -> Tensor:
    """Return an input's entries for tokens that continue the prompt; they attend to the images as its last token does."""
    if key == "input_ids":
        return torch.tensor([continuation]).to(value)
    if key.endswith(_MASKS):
        return value[:, -1:].expand(-1, len(continuation), *value.shape[2:])
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
