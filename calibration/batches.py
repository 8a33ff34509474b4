"""Batches of model inputs from the samples of a calibration folder; imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import numpy as tensors

from compress.data.prompts import Prompt, check_image_count, longest_input, open_images, run_processor, write_prompt
from compress.data.prompts import load_processor as load_any_processor
from compress.data.samples import QUESTIONS, WINDOWS
from compress.errors import CheckpointError, DataError
from compress.families import Family
from compress.families.resolve import family_at


class Batch(Protocol):
    """Samples whose inputs are computed when needed."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The samples' ids, in the order of the rows."""
        ...

    @property
    def tokens(self) -> int:
        """The number of positions, rows times columns, padding included."""
        ...

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward, on the CPU; padding is at the right and has attention_mask 0."""
        ...


@dataclass(frozen=True)
class WindowBatch:
    """Windows of text of one length."""

    ids: tuple[str, ...]

    token_ids: NDArray[np.int32]
    """[rows, tokens]."""

    token_types: bool
    """Whether the model takes `mm_token_type_ids`, the modality of each token."""

    special_tokens: tuple[int, int] | None = None
    """The tokens at the start and end of every text, for models that require them (CLIP)."""

    @property
    def tokens(self) -> int:
        """The number of positions."""
        return int(self.token_ids.size) + 2 * len(self.token_ids) * (self.special_tokens is not None)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return token ids and masks, int64 of rows × tokens."""
        token_ids = torch.from_numpy(self.token_ids.astype(np.int64))
        if self.special_tokens is not None:
            # CLIP pools a text at its end token: windows of running text have none of their own
            first, last = (torch.full_like(token_ids[:, :1], token) for token in self.special_tokens)
            token_ids = torch.cat([first, token_ids, last], dim=1)
        # windows have one length, so nothing is padded
        inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
        return inputs | ({"mm_token_type_ids": torch.zeros_like(token_ids)} if self.token_types else {})


@dataclass(frozen=True)
class Exchange:
    """A question and its answer."""

    prompt: Prompt

    answer: str | None
    """None for a question without an answer."""

    length: int = 0
    """The number of tokens of both."""


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of similar length; their images are decoded and processed when the inputs are needed."""

    exchanges: tuple[Exchange, ...]
    processor: Any = field(repr=False)

    @property
    def ids(self) -> tuple[str, ...]:
        """The questions' ids."""
        return tuple(exchange.prompt.id for exchange in self.exchanges)

    @property
    def tokens(self) -> int:
        """The number of positions, padding included."""
        return len(self.exchanges) * max(exchange.length for exchange in self.exchanges)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the outputs of the checkpoint's processor for the conversations and images."""
        return process(self.processor, self.exchanges)


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """All samples of a calibration folder in a fixed order: text windows first, then questions by length."""

    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self.batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def tokens(self) -> int:
        """The number of positions of all batches, padding included."""
        return sum(batch.tokens for batch in self.batches)


def load_batches(folder: Path, model: Path, tokens_per_batch: int, trust_remote_code: bool = False) -> Batches:
    """Open the samples that `collect` wrote to `folder` for the checkpoint at `model`.

    A batch has at most `tokens_per_batch` positions, or one sample. Nothing is truncated, and the processor is never saved.

    Raises:
        DataError: the folder cannot be read, is empty, or a question is longer than the model takes or has too many images.
        CheckpointError: the checkpoint has no processor or chat template that can be loaded.
    """
    processor = load_processor(model, trust_remote_code)
    family = family_at(model, trust_remote_code)
    batches = list[Batch](_window_batches(folder, processor, tokens_per_batch, family))
    batches += _question_batches(_checked_exchanges(folder, processor, family, longest_input(model)), processor, tokens_per_batch)
    if not batches:
        raise DataError(f"{folder}: holds no calibration samples; run again with --fresh to collect them anew")
    return Batches(tuple(batches))


def load_processor(model: Path, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's processor and set it to pad at the right; it must not be saved.

    Raises:
        CheckpointError: it cannot be loaded, or has no image processor or no chat template.
    """
    processor = load_any_processor(model, trust_remote_code)
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{model}: has no image processor; add its preprocessor_config.json, or use a vision-language model")
    if processor.chat_template is None and family_at(model, trust_remote_code).head is not None:
        raise CheckpointError(f"{model}: has no chat template; use an instruction-tuned checkpoint, or add chat_template.jinja")
    tokenizer = processor.tokenizer
    # tokens then have the positions that they have alone; at the left every batch would shift them
    tokenizer.padding_side = "right"
    # any token would do: padding is masked, and never counts in statistics
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def process(processor: Any, exchanges: Sequence[Exchange]) -> dict[str, torch.Tensor]:
    """Return the model's inputs for conversations, padded at the right to the longest.

    Raises:
        DataError: an image cannot be decoded.
        RefusedError: the processor refuses a conversation.
    """
    images = [open_images(exchange.prompt) for exchange in exchanges]
    encoded = run_processor(
        processor,
        ", ".join(exchange.prompt.id for exchange in exchanges),
        text=[write_prompt(processor, exchange.prompt, exchange.answer) for exchange in exchanges],
        images=images if any(images) else None,
        padding=True,
        # a cut prompt may lose image tokens, whose number then differs from that of the image's features
        truncation=False,
        add_special_tokens=processor.chat_template is None,  # a chat template adds them itself
        return_tensors="pt",
    )
    return {str(name): value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def _window_batches(folder: Path, processor: Any, tokens_per_batch: int, family: Family) -> Iterator[WindowBatch]:
    if not (folder / WINDOWS).is_file():
        return
    token_types = "mm_token_type_ids" in processor.model_input_names
    tokenizer = processor.tokenizer
    special_tokens = None if family.head is not None else (int(tokenizer.bos_token_id), int(tokenizer.eos_token_id))
    # by name: the order of samples shapes float32 sums, so it must not depend on that of the file
    for name, windows in sorted(tensors.load_file(folder / WINDOWS).items()):
        rows = max(1, tokens_per_batch // windows.shape[1])
        for start in range(0, len(windows), rows):
            chunk = windows[start : start + rows]
            yield WindowBatch(tuple(f"{name}:{start + row}" for row in range(len(chunk))), chunk, token_types, special_tokens)


def _checked_exchanges(folder: Path, processor: Any, family: Family, longest: int | None) -> list[Exchange]:
    exchanges: list[Exchange] = []
    for exchange in _read_exchanges(folder):
        check_image_count(family, replace(exchange.prompt, id=f"calibration question {exchange.prompt.id}"))
        exchanges.append(_with_length(exchange, processor))
        length = exchanges[-1].length
        if longest is not None and length > longest:
            raise DataError(
                f"calibration question {exchange.prompt.id}: takes {length} tokens, and the model takes {longest}; "
                "leave it out, or shorten its text or use smaller images"
            )
    return exchanges


def _question_batches(exchanges: Iterable[Exchange], processor: Any, tokens_per_batch: int) -> Iterator[QuestionBatch]:
    batch = list[Exchange]()
    # processors differ in how they pad a row without images among rows with some, so these have separate batches
    for exchange in sorted(exchanges, key=lambda exchange: (bool(exchange.prompt.images), exchange.length)):
        mixed = bool(batch) and bool(batch[0].prompt.images) != bool(exchange.prompt.images)
        if batch and (mixed or (len(batch) + 1) * exchange.length > tokens_per_batch):
            yield QuestionBatch(tuple(batch), processor)
            batch = []
        batch.append(exchange)
    if batch:
        yield QuestionBatch(tuple(batch), processor)


def _read_exchanges(folder: Path) -> list[Exchange]:
    path = folder / QUESTIONS
    if not path.is_file():
        return []
    try:
        # not splitlines: it also breaks at U+2028 and others, which JSON allows within a text
        rows = [cast("dict[str, Any]", json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [
            Exchange(
                prompt=Prompt(
                    id=row["id"], text=row["prompt"], images=tuple((folder / name).read_bytes() for name in row["images"])
                ),
                answer=row["answer"],
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run again with --fresh to collect the samples anew") from error


def _with_length(exchange: Exchange, processor: Any) -> Exchange:
    # the processor is asked: the number of an image's tokens depends on its size
    return replace(exchange, length=int(process(processor, [exchange])["attention_mask"].sum()))
