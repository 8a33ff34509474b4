"""Prompts and passages as a model's tensors, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.checkpoint import read_json_object
from compress.conversation import check_image_count, open_images, run_processor, write_prompt
from compress.errors import DataError, UsageError
from compress.families import Family
from compress.pictures import image_size
from compress.runtimes.runtime import Passage, Prompt, scored_tokens

_MASKS = "attention_mask"
_FRAMED = 2


@dataclass(frozen=True)
class Encoded:
    """One sample for the model: `sequences` hold [1, length, …] per key, `extras` what belongs to its images."""

    place: int
    sequences: dict[str, Tensor]
    extras: dict[str, Tensor]

    @property
    def length(self) -> int:
        """How many tokens it has, images' included."""
        return self.sequences["input_ids"].shape[1]

    @property
    def kind(self) -> tuple[frozenset[str], frozenset[tuple[str, tuple[int, ...]]]]:
        """What tells whether two samples can share a batch: the same inputs, of the same size beyond tokens and images."""
        sizes = {key: tuple(value.shape[2:]) for key, value in self.sequences.items()}
        sizes |= {key: tuple(value.shape[1:]) for key, value in self.extras.items()}
        return frozenset(self.sequences), frozenset(sizes.items())


@dataclass(frozen=True)
class Encoder:
    """Turns prompts and passages into tensors by the artifact's own processor and chat template.

    `longest` is how many tokens the model takes, None where its config does not say.
    """

    processor: Any
    family: Family
    pad_id: int
    tokens_per_batch: int
    longest: int | None = None

    def prompts(self, prompts: Sequence[Prompt], room: int, faults: dict[int, str]) -> Generator[list[Encoded]]:
        """Give batches of prompts of about the same length, longest first, with `room` for so many tokens more in each.

        One that the model does not take is left out, and why is put into `faults` under its place.
        """
        order = sorted(range(len(prompts)), key=lambda place: (*_extent(prompts[place]), place), reverse=True)
        return self._batches(_those_taken(order, lambda place: self._prompt(place, prompts[place], room=room), faults), room)

    def passages(self, passages: Sequence[Passage], faults: dict[int, str]) -> Generator[list[Encoded]]:
        """Give batches of passages of about the same length, longest first; what stands before a passage's tokens included.

        One that the model does not take is left out, and why is put into `faults` under its place.
        """

        def extent(place: int) -> tuple[int, ...]:
            passage = passages[place]
            return (*(_extent(passage.prompt) if passage.prompt else (0, 0)), len(passage.token_ids), place)

        order = sorted((place for place, passage in enumerate(passages) if scored_tokens(passage)), key=extent, reverse=True)
        return self._batches(_those_taken(order, lambda place: self._passage(place, passages[place]), faults), 0)

    def collate(self, batch: Sequence[Encoded], side: Literal["left", "right"], device: torch.device) -> dict[str, Tensor]:
        """Return a batch's tensors, sequences padded on that side to the longest, and masked there."""
        longest = max(sample.length for sample in batch)

        def padded(sample: Encoded, key: str) -> Tensor:
            missing, tensor = longest - sample.length, sample.sequences[key]
            value = self.pad_id if key == "input_ids" else 0
            inner = [0, 0] * (tensor.dim() - _FRAMED)
            return pad(tensor, [*inner, *((missing, 0) if side == "left" else (0, missing))], value=value)

        sequences = {key: torch.cat([padded(sample, key) for sample in batch]) for key in batch[0].sequences}
        extras = {key: torch.cat([sample.extras[key] for sample in batch]) for key in batch[0].extras}
        return {key: tensor.to(device) for key, tensor in (sequences | extras).items()}

    def _batches(self, samples: Generator[Encoded], room: int) -> Generator[list[Encoded]]:
        batch: list[Encoded] = []
        longest = 0
        for sample in samples:
            longest = max(longest, sample.length + room)
            if batch and (longest * (len(batch) + 1) > self.tokens_per_batch or sample.kind != batch[0].kind):
                yield batch
                batch, longest = [], sample.length + room
            batch.append(sample)
        if batch:
            yield batch

    def _prompt(self, place: int, prompt: Prompt, forced: tuple[int, ...] = (), room: int = 0) -> Encoded:
        check_image_count(self.family, prompt)
        text, images = write_prompt(self.processor, prompt), open_images(prompt) or None
        values = run_processor(
            self.processor, prompt.id, text=[text], images=images, add_special_tokens=False, truncation=False, return_tensors="pt"
        )
        length = values["input_ids"].shape[1]
        self._check_length(prompt, length, len(forced) + room)
        sequences = {key: value for key, value in values.items() if _runs_along(key, value, length)}
        extras = {key: value for key, value in values.items() if key not in sequences}
        if forced:
            sequences = {key: torch.cat([value, _tail(key, value, forced)], 1) for key, value in sequences.items()}
        return Encoded(place, sequences, extras)

    def _check_length(self, prompt: Prompt, length: int, room: int) -> None:
        if self.longest is not None and length + room > self.longest:
            answer = f" with {room} for its answer" if room else ""
            raise DataError(
                f"{prompt.id}: takes {length} tokens{answer}, and the model takes {self.longest}; leave it out, or shorten its "
                "text or use smaller images"
            )

    def _passage(self, place: int, passage: Passage) -> Encoded:
        if passage.prompt is not None:
            return self._prompt(place, passage.prompt, passage.token_ids)
        length = len(passage.token_ids)
        if self.longest is not None and length > self.longest:
            raise DataError(f"{passage.id}: takes {length} tokens, and the model takes {self.longest}; set a smaller window")
        ids = torch.tensor([passage.token_ids])
        return Encoded(place, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})


def stops_and_pad(artifact: Path, processor: Any, text: Any) -> tuple[tuple[int, ...], int]:
    """Return the tokens that end an answer, and the one to pad with, by generation_config.json, the text's config or tokenizer."""
    path = artifact / "generation_config.json"
    generation = read_json_object(path) if path.is_file() else {}
    tokenizer = processor.tokenizer
    candidates = (generation.get("eos_token_id"), getattr(text, "eos_token_id", None), tokenizer.eos_token_id)
    chosen = next((value for value in candidates if value is not None), None)
    stops = tuple(cast("list[int]", chosen)) if isinstance(chosen, list) else (() if chosen is None else (int(chosen),))
    pads = (generation.get("pad_token_id"), tokenizer.pad_token_id, *stops, 0)
    return stops, int(next(value for value in pads if value is not None))


def check_writes(family: Family) -> None:
    """Check that a model writes text.

    Raises:
        UsageError: it compares images with texts.
    """
    if family.head is None:
        raise UsageError(
            f"{family.name} compares images with texts and writes none: measure it with task: zero-shot instead of "
            "vqa or perplexity"
        )


def check_compares(family: Family) -> None:
    """Check that a model compares images with texts.

    Raises:
        UsageError: it writes text.
    """
    if family.head is not None:
        raise UsageError(
            f"{family.name} writes text and compares no images with texts: measure it with task: vqa instead of "
            "zero-shot or retrieval"
        )


def _those_taken(order: Sequence[int], encode: Callable[[int], Encoded], faults: dict[int, str]) -> Generator[Encoded]:
    for place in order:
        try:
            yield encode(place)
        except DataError as error:
            faults[place] = str(error)


def _runs_along(key: str, value: Tensor, length: int) -> bool:
    """Return whether a processor's tensor has an entry for each token: of numbers, or, of a mask, of more than one number each."""
    return value.shape[:2] == (1, length) and (value.dim() == _FRAMED or key.endswith(_MASKS))


def _tail(key: str, value: Tensor, forced: tuple[int, ...]) -> Tensor:
    """Return what follows in a sequence where given tokens follow the prompt; they see the images as its last token does."""
    if key == "input_ids":
        return torch.tensor([forced]).to(value)
    if key.endswith(_MASKS):
        return value[:, -1:].expand(-1, len(forced), *value.shape[2:])
    return torch.zeros(1, len(forced)).to(value)


def _extent(prompt: Prompt) -> tuple[int, int]:
    """Return what a prompt's length in tokens grows with: its images' area and its text's length."""
    area = 0
    for data in prompt.images:
        try:
            width, height = image_size(data, prompt.id)
        except DataError:
            continue  # reported with the prompt's name when it is decoded
        area += width * height
    return area, len(prompt.text)
