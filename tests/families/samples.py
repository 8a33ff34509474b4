"""Prompts for a tiny model of any family, as tensors of its own processor; and what transformers alone makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoProcessor

from compress.checkpoints.checkpoint import open_checkpoint
from compress.data.images import decode_image
from compress.data.prompts import Prompt, messages
from compress.engine.host import map_tensors
from compress.engine.products import float32_products
from compress.families import Family
from compress.families.resolve import family_at
from tests.tiny import picture

SHORT, LONG = "What?", "How many circles, squares and triangles are there in the picture?"
ONE_IMAGE = {"blip-2", "clip"}
"""The families whose models see one image at a time."""

NESTED = {"mllama"}
"""The families whose processors want to be told which images go with which text."""


@dataclass(frozen=True)
class Fixed:
    """A batch whose tensors are there already."""

    tensors: dict[str, Tensor]

    def inputs(self) -> dict[str, Tensor]:
        return dict(self.tensors)


def load_processor(folder: Path) -> Any:
    processor = cast("Any", AutoProcessor).from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    return processor


def load_plain(folder: Path, dtype: str = "auto", **settings: Any) -> Any:
    """Return the checkpoint as transformers itself loads it; `settings` are `from_pretrained`'s own."""
    name = open_checkpoint(folder).config["architectures"][0]
    model = getattr(cast("Any", transformers), name)
    return model.from_pretrained(folder, dtype=dtype, **settings).eval()


def written(processor: Any, family: Family, question: str, images: int) -> str:
    """Return a question about images as text for the processor."""
    if family.head is None:
        return question
    template = {} if getattr(processor, "chat_template", None) else {"chat_template": family.chat_template}
    turns = messages(Prompt("sample", question, (b"",) * images))
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **template)


def encode(folder: Path, questions: Sequence[str], pictures: Sequence[Sequence[bytes]]) -> Fixed:
    """Return questions, each about its own pictures, as one padded batch."""
    family, processor = family_at(folder), load_processor(folder)
    texts = [written(processor, family, text, len(of_prompt)) for text, of_prompt in zip(questions, pictures, strict=True)]
    nested = [[decode_image(data, "picture") for data in of_prompt] for of_prompt in pictures]
    flat = [image for of_prompt in nested for image in of_prompt]
    images = nested if family.name in NESTED else flat
    return Fixed(dict(processor(text=texts, images=images if flat else None, padding=True, return_tensors="pt")))


def batches(folder: Path) -> list[Fixed]:
    """Text alone; one image; two images, in one prompt where the family can; two prompts of unlike length and images, padded."""
    family = family_at(folder)
    seen = [picture(1), picture(2, 140, 84)]
    pair = encode(folder, [LONG], [seen]) if family.name not in ONE_IMAGE else encode(folder, [LONG] * 2, [[one] for one in seen])
    return [
        encode(folder, [LONG, SHORT], [[], []]),
        encode(folder, [SHORT], [[picture(3)]]),
        pair,
        encode(folder, [SHORT, LONG], [[seen[0]], [seen[1]]]),
    ]


def tensors_of(output: Any) -> list[Tensor]:
    actual: list[Tensor] = []
    map_tensors(output, actual.append)
    return actual


def plain_outputs(folder: Path, calibration: Sequence[Fixed], names: Sequence[str]) -> dict[str, list[list[Tensor]]]:
    """Return what parts of the model return at each of their calls in plain forwards, by transformers alone."""
    family, model = family_at(folder), load_plain(folder)
    outputs: dict[str, list[list[Tensor]]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            outputs[name].append(tensors_of(output))

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad(), float32_products("cpu"):  # the kernels that the walk takes here
        for batch in calibration:
            inputs = batch.inputs()
            model.get_submodule(family.entry(inputs))(**inputs, use_cache=False)
    return outputs
