"""A checkpoint that sees, in transformers and as graphs, given the same pictures and prompts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from compress.export.onnx.graphs.write import Precision
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.export.onnx_graphs import Array, Graphs, Row, written
from tests.tiny import Sizes as Weights
from tests.tiny import picture
from tests.tiny.parts import fill

Sizes = Sequence[tuple[int, int]]
"""The width and height of each picture."""

MARKS = {"internvl3": "<IMG_CONTEXT>\n", "llava": "<image>\n", "llava-next": "<image>\n"}
"""What a prompt has for an image, by family."""

PROMPTS: tuple[tuple[str, Sizes], ...] = (
    ("How many circles are there?", [(200, 90), (57, 300)]),
    ("Is there a red square?", []),
    ("What colour is the largest shape?", [(56, 56)]),
)
"""Questions with two pictures, none and one."""


@dataclass(frozen=True)
class Seeing:
    """A model and its processor, as transformers has them, and its graphs; `mark` is what a prompt has for an image."""

    model: Any
    processor: Any
    graphs: Graphs
    mark: str

    @property
    def dtype(self) -> Any:
        """The type of the graphs' floating-point numbers."""
        return np.float16 if self.graphs.sessions["vision_encoder"].get_inputs()[0].type == "tensor(float16)" else np.float32

    def features(self, pixels: Mapping[str, Any]) -> Array:
        """Return the graphs' image features [tokens, hidden]."""
        names = [value.name for value in self.graphs.sessions["vision_encoder"].get_inputs()]
        feeds = {name: pixels[name].numpy() for name in names}
        feeds["pixel_values"] = feeds["pixel_values"].astype(self.dtype)
        features = self.graphs.run("vision_encoder", **feeds)["image_features"]
        return features.reshape(-1, features.shape[-1])

    @torch.no_grad()
    def expected_features(self, pixels: Mapping[str, Any]) -> Array:
        """Return transformers' image features [tokens, hidden]."""
        images = self.model.get_image_features(**pixels).pooler_output
        return torch.cat([image.reshape(-1, image.shape[-1]) for image in images]).numpy()

    def pixels(self, sizes: Sizes) -> dict[str, Any]:
        """Return what the processor makes of pictures."""
        names = ("pixel_values", "image_sizes")
        outputs = self.processor.image_processor(_pictures(sizes), return_tensors="pt")
        return {name: outputs[name] for name in names if name in outputs}

    def inputs(self, question: str, sizes: Sizes) -> dict[str, Any]:
        """Return what the processor makes of a prompt with pictures before the question."""
        text = f"{self.mark * len(sizes)} {question}"
        return dict(self.processor(text=text, images=_pictures(sizes) or None, return_tensors="pt"))

    def row(self, question: str, sizes: Sizes) -> Row:
        """Return the embeddings of a prompt, with image features in place of image tokens."""
        inputs = self.inputs(question, sizes)
        ids = inputs["input_ids"][0].numpy()
        embeds = self.graphs.embed(ids.tolist())
        if sizes:
            image_mask = ids == self.model.config.image_token_id
            features = self.features(inputs)
            assert image_mask.sum() == len(features)
            embeds[image_mask] = features
        return Row(embeds)

    @torch.no_grad()
    def expected_logits(self, question: str, sizes: Sizes) -> Array:
        """Return transformers' logits of a prompt, [tokens, vocabulary]."""
        return self.model(**self.inputs(question, sizes)).logits[0].numpy()


def seeing(folder: Path, target: Path, mark: str, precision: Precision | None = None) -> Seeing:
    """Write a checkpoint's graphs to `target` and open both them and the checkpoint."""
    model = load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))
    return Seeing(model, AutoProcessor.from_pretrained(folder), written(folder, target, precision), mark)


@torch.no_grad()
def rebuilt(source: Path, target: Path, config: Any) -> Path:
    """Write the model that a changed `config` describes, its weights drawn anew, with the processor of `source`."""
    model: Any = cast("Any", AutoModelForImageTextToText).from_config(config)
    fill(model, Weights())
    model.save_pretrained(target)
    for file in source.glob("*"):
        if not (target / file.name).exists():
            file.rename(target / file.name)
    return target


def difference(actual: Array, expected: Array) -> float:
    """Return by how much two arrays of one shape differ at most."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


def _pictures(sizes: Sizes) -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture(seed, *size))) for seed, size in enumerate(sizes)]
