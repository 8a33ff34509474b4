"""Prompts and passages as a model's tensors, in batches of bounded size."""

from __future__ import annotations

import io
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoProcessor

from compress.conversation import check_template, messages, open_images
from compress.errors import CheckpointError
from compress.runtimes.runtime import Passage, Prompt

_AUTO_PROCESSOR: Any = AutoProcessor


@dataclass(frozen=True)
class Encoded:
    """One sample for the model: `sequences` hold one row [1, length] per key, `extras` what belongs to its images."""

    place: int
    sequences: dict[str, Tensor]
    extras: dict[str, Tensor]

    @property
    def length(self) -> int:
        """How many tokens it has, images' included."""
        return self.sequences["input_ids"].shape[1]

    @property
    def keys(self) -> frozenset[str]:
        """What tells whether two samples can share a batch."""
        return frozenset(self.sequences) | frozenset(self.extras)


@dataclass(frozen=True)
class Encoder:
    """Turns prompts and passages into tensors by the artifact's own processor and chat template."""

    processor: Any
    pad_id: int
    tokens_per_batch: int

    def prompts(self, prompts: Sequence[Prompt], room: int) -> Generator[list[Encoded]]:
        """Give batches of prompts of about the same length, longest first, with `room` for so many tokens more in each."""
        order = sorted(range(len(prompts)), key=lambda place: (*_extent(prompts[place]), place), reverse=True)
        return self._batches((self._prompt(place, prompts[place]) for place in order), room)

    def passages(self, passages: Sequence[Passage]) -> Generator[list[Encoded]]:
        """Give batches of passages of about the same length, longest first; what stands before a passage's tokens included."""

        def extent(place: int) -> tuple[int, ...]:
            passage = passages[place]
            return (*(_extent(passage.prompt) if passage.prompt else (0, 0)), len(passage.token_ids), place)

        order = sorted((place for place, passage in enumerate(passages) if scored_tokens(passage)), key=extent, reverse=True)
        return self._batches((self._passage(place, passages[place]) for place in order), 0)

    def collate(self, batch: Sequence[Encoded], side: Literal["left", "right"], device: torch.device) -> dict[str, Tensor]:
        """Return a batch's tensors, sequences padded on that side to the longest, and masked there."""
        longest = max(sample.length for sample in batch)

        def padded(sample: Encoded, key: str) -> Tensor:
            missing = longest - sample.length
            value = self.pad_id if key == "input_ids" else 0
            return pad(sample.sequences[key], (missing, 0) if side == "left" else (0, missing), value=value)

        sequences = {key: torch.cat([padded(sample, key) for sample in batch]) for key in batch[0].sequences}
        extras = {key: torch.cat([sample.extras[key] for sample in batch]) for key in batch[0].extras}
        return {key: tensor.to(device) for key, tensor in (sequences | extras).items()}

    def _batches(self, samples: Generator[Encoded], room: int) -> Generator[list[Encoded]]:
        batch: list[Encoded] = []
        longest = 0
        for sample in samples:
            longest = max(longest, sample.length + room)
            if batch and (longest * (len(batch) + 1) > self.tokens_per_batch or sample.keys != batch[0].keys):
                yield batch
                batch, longest = [], sample.length + room
            batch.append(sample)
        if batch:
            yield batch

    def _prompt(self, place: int, prompt: Prompt, forced: tuple[int, ...] = ()) -> Encoded:
        text = self.processor.apply_chat_template(messages(prompt), add_generation_prompt=True, tokenize=False)
        images = open_images(prompt) or None
        values = self.processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        length = values["input_ids"].shape[1]
        sequences = {key: value for key, value in values.items() if value.shape == (1, length)}
        extras = {key: value for key, value in values.items() if key not in sequences}
        if forced:
            tail = {"input_ids": torch.tensor([forced]), "attention_mask": torch.ones(1, len(forced), dtype=torch.int64)}
            nothing = torch.zeros(1, len(forced), dtype=torch.int64)
            sequences = {key: torch.cat([value, tail.get(key, nothing).to(value)], 1) for key, value in sequences.items()}
        return Encoded(place, sequences, extras)

    def _passage(self, place: int, passage: Passage) -> Encoded:
        if passage.prompt is not None:
            return self._prompt(place, passage.prompt, passage.token_ids)
        ids = torch.tensor([passage.token_ids])
        return Encoded(place, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})


def load_processor(artifact: Path, trust_remote_code: bool) -> Any:
    """Return the artifact's processor.

    Raises:
        CheckpointError: its files are missing or cannot be used.
    """
    try:
        processor = _AUTO_PROCESSOR.from_pretrained(artifact, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{artifact}: its processor cannot be loaded ({error}); fetch or export it again") from error
    if getattr(processor, "chat_template", None) is not None:  # without one, text can be scored all the same
        check_template(processor, artifact)
    return processor


def scored_tokens(passage: Passage) -> tuple[int, ...]:
    """Return the tokens of a passage that are predicted: all after a prompt, all but the first without one."""
    return passage.token_ids if passage.prompt is not None else passage.token_ids[1:]


def _extent(prompt: Prompt) -> tuple[int, int]:
    """Return what a prompt's length in tokens grows with: its images' area and its text's length."""
    area = 0
    for data in prompt.images:
        try:
            with Image.open(io.BytesIO(data)) as image:
                area += image.width * image.height
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # reported with the prompt's name when it is decoded
    return area, len(prompt.text)
