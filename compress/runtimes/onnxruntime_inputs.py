"""What the graphs of a model that writes text are given: embedded prompts with the images' features in their places."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CheckpointError
from compress.runtimes.inputs import Encoded, Encoder
from compress.runtimes.onnxruntime_graph import Engine, GraphSession
from compress.skeleton import build_skeleton

VISION, EMBED, DECODER = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
PAST, PRESENT = "past_key_values.", "present."
FEATURES, LEVELS = "image_features", "deepstack_features"
LEVELS_IN, SEEN = "deepstack_embeds", "cross_attention_mask"

_PIXELS = "pixel_values"
_PATCHES = 2
"""How many axes pixels have that are patches of all images in one sequence."""
_PATCHES_AT_ONCE = 256
_CPU = torch.device("cpu")

Rope = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""Gives positions [3, samples, tokens] of a batch, and by how much those of its answers differ from their places [samples]."""


@dataclass(frozen=True)
class Graphs:
    """The three graphs of a model that writes text."""

    vision: GraphSession
    embed: GraphSession
    decoder: GraphSession

    @staticmethod
    def load(folder: Path, engine: Engine) -> Graphs:
        """Load an artifact's graphs.

        Raises:
            CheckpointError: one is missing, damaged, or of another make.
            MissingError: this ONNX Runtime lacks what one needs.
        """
        graphs = Graphs(*(GraphSession(folder / name, engine) for name in (VISION, EMBED, DECODER)))
        graphs.embed.expect({"input_ids"}, {"inputs_embeds"})
        graphs.decoder.expect({"inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep"}, {"logits"})
        return graphs


@dataclass(frozen=True)
class Prepared:
    """A batch as the decoder reads it, padded on the right.

    `embeds` [samples, tokens, hidden]; `positions` [samples, tokens], or three of them; `offsets` [samples] are what positions in
    an answer are more than places. `seen` says which of the images' states each token reads [samples, tokens, states] and
    `states` are these, by the decoder's inputs; `levels` [levels, samples, tokens, hidden] is what is added between blocks. Each
    is None, or empty, where the decoder has no such input.
    """

    lengths: NDArray[np.int64]
    embeds: NDArray[Any]
    positions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    states: dict[str, NDArray[Any]]
    seen: NDArray[np.int64] | None = None
    levels: NDArray[Any] | None = None

    @property
    def longest(self) -> int:
        """How many tokens the longest sample has."""
        return self.embeds.shape[1]


@dataclass(frozen=True)
class Preparer:
    """Makes of encoded samples what the decoder reads."""

    graphs: Graphs
    encoder: Encoder
    placeholders: tuple[int, ...]
    rope: Rope | None

    def prepare(self, batch: Sequence[Encoded], features: Mapping[str, NDArray[Any]] | None = None) -> Prepared:
        """Return a batch as the decoder reads it; `features`, of its images, are made where they are not given.

        Raises:
            CheckpointError: the graphs do not fit each other, or the processor.
        """
        inputs = self.encoder.collate(batch, "right", _CPU)
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        features = self.features(batch) if features is None else features
        found = features.get(FEATURES)
        places = np.zeros_like(ids, dtype=np.bool_) if found is None else np.isin(ids, self.placeholders) & (mask > 0)
        known = np.where(places, self.encoder.pad_id, ids)  # the embeddings may have no row for an image's token
        embeds: NDArray[Any] = self.graphs.embed.run({"input_ids": known})["inputs_embeds"]
        if found is not None:
            self._fill(embeds, places, found)
        positions, offsets = self._positions(inputs)
        return Prepared(
            lengths=mask.sum(axis=1, dtype=np.int64),
            embeds=embeds,
            positions=positions,
            offsets=offsets,
            states=self._states(features, len(batch)),
            seen=self._seen(inputs),
            levels=self._levels(embeds, places, features.get(LEVELS)),
        )

    def features(self, batch: Sequence[Encoded]) -> dict[str, NDArray[Any]]:
        """Return what the vision graph makes of a batch's images, in their order; empty where there are none."""
        if _PIXELS not in batch[0].extras:
            return {}
        parts: list[dict[str, NDArray[Any]]] = []
        for group in _groups(batch):
            extras = {key: torch.cat([sample.extras[key] for sample in group]) for key in group[0].extras}
            if lacking := self.graphs.vision.inputs.keys() - extras.keys():
                raise CheckpointError(
                    f"{self.graphs.vision.path}: wants {', '.join(sorted(lacking))}, which the processor does not give"
                )
            parts.append(self.graphs.vision.run({name: extras[name].numpy() for name in self.graphs.vision.inputs}))
        return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}

    def _fill(self, embeds: NDArray[Any], places: NDArray[np.bool_], features: NDArray[Any]) -> None:
        flat = features.reshape(-1, embeds.shape[2])
        if len(flat) != places.sum():
            raise CheckpointError(
                f"{self.graphs.vision.path}: gives {len(flat)} features for {places.sum()} image tokens; its processor does not "
                "fit: export it again"
            )
        embeds[places] = flat

    def _positions(self, inputs: Mapping[str, Tensor]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        samples, tokens = inputs["input_ids"].shape
        plain = np.broadcast_to(np.arange(tokens, dtype=np.int64), (samples, tokens))
        none = np.zeros(samples, dtype=np.int64)
        if self.rope is None:
            return plain, none
        if _PIXELS not in inputs:
            return np.broadcast_to(plain, (3, samples, tokens)), none
        positions, offsets = self.rope(inputs)
        return positions.numpy(), offsets.reshape(samples).to(torch.int64).numpy()

    def _states(self, features: Mapping[str, NDArray[Any]], samples: int) -> dict[str, NDArray[Any]]:
        """Return what cross-attention reads: of a prompt without images, one state that no token sees."""
        decoder = self.graphs.decoder
        kept = {name.replace(PRESENT, PAST, 1) for name in decoder.outputs if name.startswith(PRESENT)}
        names = [name for name in decoder.inputs if name.startswith(PAST) and name not in kept]
        if features:
            return {name: features[name] for name in names}
        found: dict[str, NDArray[Any]] = {}
        for name in names:
            _, heads, _, width = decoder.inputs[name].shape
            found[name] = np.zeros((samples, int(heads), 1, int(width)), decoder.inputs[name].dtype)
        return found

    def _seen(self, inputs: Mapping[str, Tensor]) -> NDArray[np.int64] | None:
        if SEEN not in self.graphs.decoder.inputs:
            return None
        samples, tokens = inputs["input_ids"].shape
        if SEEN not in inputs:
            return np.zeros((samples, tokens, 1), dtype=np.int64)
        return inputs[SEEN].reshape(samples, tokens, -1).to(torch.int64).numpy()

    def _levels(self, embeds: NDArray[Any], places: NDArray[np.bool_], features: NDArray[Any] | None) -> NDArray[Any] | None:
        if LEVELS_IN not in self.graphs.decoder.inputs:
            return None
        declared = self.graphs.decoder.inputs[LEVELS_IN]
        levels = np.zeros((int(declared.shape[0]), *embeds.shape), declared.dtype)
        if features is not None:
            levels[:, places] = features
        return levels


def find_rope(folder: Path, decoder: GraphSession, trust_remote_code: bool) -> Rope | None:
    """Return what gives a model's positions in three streams, by the model's own code, None where it has one stream.

    Raises:
        CheckpointError: config.json describes another model than the graph is of.
    """
    if len(decoder.inputs["position_ids"].shape) == 2:
        return None
    model = build_skeleton(folder, torch.float32, _CPU, trust_remote_code)
    owner: Any = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if owner is None:
        raise CheckpointError(f"{folder}: {decoder.path.name} has positions in three streams, the model of config.json has not")

    def positions(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return owner.get_rope_index(**{key: inputs[key] for key in keys})

    return positions


def _groups(batch: Sequence[Encoded]) -> Generator[list[Encoded]]:
    """Give the samples whose images are computed together.

    Where patches of all images are one sequence, attention is computed between all of them, though no image attends to another:
    a few at a time take less.
    """
    group: list[Encoded] = []
    patches = 0
    for sample in batch:
        pixels = sample.extras[_PIXELS]
        more = len(pixels) if pixels.dim() == _PATCHES else 0
        if group and patches + more > _PATCHES_AT_ONCE:
            yield group
            group, patches = [], 0
        group.append(sample)
        patches += more
    yield group


def _joined(name: str, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts, axis=1 if name == LEVELS else 0)
