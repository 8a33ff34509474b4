"""Training batches: scenes with several questions each in one sequence, and running text."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scenes
import torch
from torch import Tensor
from transformers import Qwen2_5_VLProcessor

GRID = scenes.SIZE // 14  # patches along an edge
IMAGE_TOKENS = (GRID // 2) ** 2
SEGMENT = 16  # tokens of a question with its answer at most
IGNORED = -100
ASKED: tuple[scenes.Topic, ...] = (*scenes.TOPICS, "yes/no", "yes/no")  # of each scene; yes or no is the hardest to learn


@dataclass(frozen=True)
class Layout:
    """How a sequence is laid out: a shared prefix with the image, then segments that see the prefix but not each other."""

    before: list[int]
    after: list[int]
    segments: int

    @property
    def prefix(self) -> int:
        """Tokens before the first segment, the image's included."""
        return len(self.before) + IMAGE_TOKENS + len(self.after)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.prefix + self.segments * SEGMENT

    def mask(self) -> Tensor:
        """True where a token (row) may look at another (column): bool [1, 1, length, length]."""
        place = torch.arange(self.length)
        segment = (place - self.prefix).div(SEGMENT, rounding_mode="floor").clamp(min=-1)
        causal = place[:, None] >= place[None, :]
        shared = (segment[None, :] == -1) | (segment[None, :] == segment[:, None])
        return (causal & shared)[None, None]

    def positions(self) -> Tensor:
        """Temporal, height and width positions as the model's own, each segment right behind the image: [3, 1, length]."""
        edge = GRID // 2
        start = len(self.before)
        text_before = torch.arange(start).expand(3, -1)
        row = torch.arange(edge).repeat_interleave(edge)
        image = torch.stack([torch.zeros_like(row), row, torch.arange(edge).repeat(edge)]) + start
        tail = torch.arange(len(self.after) + SEGMENT).expand(3, -1) + start + edge
        after, segment = tail[:, : len(self.after)], tail[:, len(self.after) :]
        return torch.cat([text_before, image, after, segment.repeat(1, self.segments)], dim=1)[:, None]


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as patches, their attributes as classes, and the questions' tokens.

    patches: float [scenes, 64, 1176]; tokens and labels: int [scenes, questions, SEGMENT]; matches: int of the same shape,
    in questions answered yes or no whether the colour, kind or number that ends here is the scene's; colours: int [scenes];
    cells: int [scenes, 16], for each image token 0 where no shape has its centre, otherwise the kind counted from 1.
    """

    patches: Tensor
    tokens: Tensor
    labels: Tensor
    matches: Tensor
    colours: Tensor
    cells: Tensor


def to_patches(pixels: Tensor, processor: Qwen2_5_VLProcessor) -> Tensor:
    """What the image processor makes of uint8 pixels [batch, 112, 112, 3]: float [batch, 64, 1176]."""
    mean = torch.tensor(processor.image_processor.image_mean)
    deviation = torch.tensor(processor.image_processor.image_std)
    values = (pixels.float() / 255.0 - mean) / deviation
    half = GRID // 2
    # batch, merged row, row in it, pixel row, merged column, column in it, pixel column, channel
    blocks = values.view(-1, half, 2, 14, half, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    frames = blocks.reshape(-1, GRID * GRID, 3, 1, 14 * 14).expand(-1, -1, -1, 2, -1)
    return frames.reshape(-1, GRID * GRID, 3 * 2 * 14 * 14)


def cells(scene: scenes.Scene) -> Tensor:
    """For each image token 0 where no shape has its centre, otherwise the kind counted from 1: int [16]."""
    edge = scenes.SIZE // (GRID // 2)  # pixels
    found = torch.zeros(IMAGE_TOKENS, dtype=torch.long)
    for placement in scene.placements:
        found[int(placement.y) // edge * (GRID // 2) + int(placement.x) // edge] = scenes.KINDS.index(scene.kind) + 1
    return found


class Batches:
    """Fresh scenes and text without end, the same for the same seed."""

    def __init__(self, processor: Qwen2_5_VLProcessor, seed: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.rng = random.Random(f"batches {seed}")
        self.source = scenes.scenes("train", seed)
        self.known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.ends: dict[str, list[tuple[int, str]]] = {}
        self.pad: int = self.tokenizer.pad_token_id
        self.layout = Layout(
            before=self.encode("<|im_start|>user\n<|vision_start|>"),
            after=self.encode("<|vision_end|>"),
            segments=len(ASKED),
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return self.tokenizer(text, verbose=False).input_ids

    def scenes(self, count: int) -> SceneBatch:
        """`count` scenes with their questions."""
        found = [next(self.source) for _ in range(count)]
        pixels = torch.from_numpy(np.stack([np.asarray(scenes.render(scene)) for scene in found]))
        colours = tuple(scenes.COLOURS)
        asked = [[scenes.ask(self.rng, scene, topic) for topic in ASKED] for scene in found]
        pairs = [[self._segment(question) for question in row] for row in asked]
        matches = [[self._matches(question, scene) for question in row] for row, scene in zip(asked, found, strict=True)]
        return SceneBatch(
            patches=to_patches(pixels, self.processor),
            tokens=torch.tensor([[tokens for tokens, _ in row] for row in pairs]),
            labels=torch.tensor([[labels for _, labels in row] for row in pairs]),
            matches=torch.tensor(matches),
            colours=torch.tensor([colours.index(scene.colour) for scene in found]),
            cells=torch.stack([cells(scene) for scene in found]),
        )

    def _segment(self, question: scenes.Question) -> tuple[list[int], list[int]]:
        """Tokens and next-token labels of a question and its answer; only the answer and its end are labelled."""
        key = (question.text, question.answer)
        if key not in self.known:
            asked = self.encode(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = self.encode(f"{question.answer}<|im_end|>")
            padding = SEGMENT - len(asked) - len(answer)
            if padding < 0:
                raise ValueError(f"{question.text!r} has {SEGMENT - padding} tokens with its answer, {SEGMENT} are planned")
            tokens = asked + answer + [self.pad] * padding
            labels = [IGNORED] * (len(asked) - 1) + answer + [IGNORED] * (padding + 1)
            self.known[key] = (tokens, labels)
        return self.known[key]

    def _matches(self, question: scenes.Question, scene: scenes.Scene) -> list[int]:
        """For each token of a yes-or-no question 1 or 0 where it ends a colour, kind or number that is or is not the scene's."""
        found = [IGNORED] * SEGMENT
        if question.topic == "yes/no":
            true = {scene.colour, scene.kind, scenes.PLURALS[scene.kind], scenes.NUMBERS[scene.count - 1]}
            for place, word in self._attributes(question.text):
                found[place] = int(word in true)
        return found

    def _attributes(self, text: str) -> list[tuple[int, str]]:
        """The colours, kinds and numbers of a question, each with the place of its last token."""
        if text not in self.ends:
            offsets = self.tokenizer(text, return_offsets_mapping=True).offset_mapping
            last = {end: place for place, (_, end) in enumerate(offsets)}
            words = [*scenes.COLOURS, *scenes.KINDS, *scenes.PLURALS.values(), *scenes.NUMBERS]
            spans = re.finditer(rf"\b({'|'.join(words)})\b", text)
            self.ends[text] = [(last[span.end()], span.group()) for span in spans]
        return self.ends[text]


def text_batches(streams: list[list[int]], rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless windows of text, int [rows, length + 1]; the streams take turns."""
    rng = random.Random(f"windows {seed}")
    tensors = [torch.tensor(stream) for stream in streams]
    while True:
        windows: list[Tensor] = []
        for row in range(rows):
            stream = tensors[row % len(tensors)]
            start = rng.randrange(len(stream) - length - 1)
            windows.append(stream[start : start + length + 1])
        yield torch.stack(windows)
