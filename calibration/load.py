"""A calibration folder's samples as batches of the model's own inputs; imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import numpy as tensors

from compress.calibration.collect import QUESTIONS, WINDOWS, longest_input
from compress.conversation import check_template, messages, open_images
from compress.errors import CheckpointError, DataError
from compress.runtimes.runtime import Prompt


class Batch(Protocol):
    """Some samples whose inputs are made when they are asked for."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The samples' ids, in the order of the rows."""
        ...

    @property
    def tokens(self) -> int:
        """The number of positions, rows times columns, padding included."""
        ...

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what the model's forward takes, on the CPU; padding stands at the right and has attention_mask 0."""
        ...


@dataclass(frozen=True)
class WindowBatch:
    """Windows of text of one length; `typed` where the model also takes each token's modality."""

    ids: tuple[str, ...]
    token_ids: NDArray[np.int32]
    typed: bool

    @property
    def tokens(self) -> int:
        """The number of positions."""
        return int(self.token_ids.size)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return token ids and masks, int64 of rows × tokens."""
        token_ids = torch.from_numpy(self.token_ids.astype(np.int64))
        inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
        return inputs | ({"mm_token_type_ids": torch.zeros_like(token_ids)} if self.typed else {})


@dataclass(frozen=True)
class Exchange:
    """A question as the model is asked it, its answer if there is one, and how many tokens both take."""

    prompt: Prompt
    answer: str | None
    length: int = 0


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of like length; their images are decoded and processed when the inputs are asked for."""

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
        """Return what the checkpoint's own processor makes of the conversations and images."""
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
        DataError: the folder cannot be read, is empty, or a question is longer than the model takes (names it).
        CheckpointError: the checkpoint has no processor or chat template that can be loaded.
    """
    processor = load_processor(model, trust_remote_code)
    batches = list[Batch](_window_batches(folder, processor, tokens_per_batch))
    batches += _question_batches(folder, processor, tokens_per_batch, longest_input(model))
    if not batches:
        raise DataError(f"{folder}: holds no calibration samples; run again with --fresh to collect them anew")
    return Batches(tuple(batches))


def load_processor(model: Path, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's processor, set to pad at the right; it is for use in memory only.

    Raises:
        CheckpointError: it cannot be loaded, or has no image processor or no chat template that works.
    """
    from transformers import AutoProcessor

    try:
        processor = cast("Any", AutoProcessor).from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{model}: its processor cannot be loaded ({error}); fetch the checkpoint again") from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{model}: has no image processor; add its preprocessor_config.json, or use a vision-language model")
    if getattr(processor, "chat_template", None) is None:
        raise CheckpointError(f"{model}: has no chat template; use an instruction-tuned checkpoint, or add chat_template.jinja")
    check_template(processor, model)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def process(processor: Any, exchanges: Sequence[Exchange]) -> dict[str, torch.Tensor]:
    """Return the model's inputs for some conversations, padded at the right to the longest.

    Raises:
        DataError: an image cannot be decoded.
    """
    texts = [
        processor.apply_chat_template(
            messages(exchange.prompt, exchange.answer), tokenize=False, add_generation_prompt=exchange.answer is None
        )
        for exchange in exchanges
    ]
    images = [open_images(exchange.prompt) for exchange in exchanges]
    encoded = processor(
        text=texts,
        images=images if any(images) else None,
        padding=True,
        truncation=False,
        add_special_tokens=False,  # the chat template has written them
        return_tensors="pt",
    )
    return {str(name): value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def _window_batches(folder: Path, processor: Any, tokens_per_batch: int) -> Iterator[WindowBatch]:
    if not (folder / WINDOWS).is_file():
        return
    typed = "mm_token_type_ids" in processor.model_input_names
    for name, windows in sorted(tensors.load_file(folder / WINDOWS).items()):
        rows = max(1, tokens_per_batch // windows.shape[1])
        for start in range(0, len(windows), rows):
            part = windows[start : start + rows]
            yield WindowBatch(tuple(f"{name}:{start + row}" for row in range(len(part))), part, typed)


def _question_batches(folder: Path, processor: Any, tokens_per_batch: int, longest: int | None) -> Iterator[QuestionBatch]:
    exchanges = [_measured(exchange, processor) for exchange in _read_exchanges(folder)]
    for exchange in exchanges:
        if longest is not None and exchange.length > longest:
            raise DataError(
                f"calibration question {exchange.prompt.id}: takes {exchange.length} tokens, and the model takes {longest}; "
                "leave it out, or use smaller images"
            )
    batch = list[Exchange]()
    for exchange in sorted(exchanges, key=lambda exchange: exchange.length):
        if batch and (len(batch) + 1) * exchange.length > tokens_per_batch:
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


def _measured(exchange: Exchange, processor: Any) -> Exchange:
    length = int(process(processor, [exchange])["attention_mask"].sum())
    return Exchange(prompt=exchange.prompt, answer=exchange.answer, length=length)
