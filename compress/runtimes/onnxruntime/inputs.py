"""Prepares a generative model's decoder inputs: token embeddings with image features in place of image tokens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.checkpoints.skeleton import build_skeleton
from compress.errors import CheckpointError
from compress.runtimes.inputs import Encoded, Encoder
from compress.runtimes.onnxruntime.graph import Engine, GraphSession

VISION, EMBED, DECODER = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
PAST, PRESENT = "past_key_values.", "present."
FEATURES, DEEPSTACK = "image_features", "deepstack_features"
DEEPSTACK_INPUT, CROSS_MASK = "deepstack_embeds", "cross_attention_mask"

_PIXELS = "pixel_values"
_PATCH_DIMS = 2
"""Dimensions of pixels that are the patches of all images in one sequence: [patches, pixels]."""

_MAX_PATCHES = 256
"""Patches in one run of the vision encoder: about one image of 224 × 224 (patches of 14); see `_groups`."""

_CPU = torch.device("cpu")

Rope = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""Returns a batch's M-RoPE positions [3, samples, tokens], and the offsets of its answers' positions [samples]."""


@dataclass(frozen=True)
class Graphs:
    """The three graphs of a generative model."""

    vision: GraphSession
    embed: GraphSession
    decoder: GraphSession

    @staticmethod
    def load(folder: Path, engine: Engine) -> Graphs:
        """Load an artifact's graphs.

        Raises:
            CheckpointError: one is missing, damaged, or has other inputs or outputs.
            MissingError: this ONNX Runtime lacks an opset, an operator or a provider.
        """
        graphs = Graphs(*(GraphSession(folder / name, engine) for name in (VISION, EMBED, DECODER)))
        graphs.embed.check_signature({"input_ids"}, {"inputs_embeds"})
        graphs.decoder.check_signature({"inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep"}, {"logits"})
        return graphs


@dataclass(frozen=True)
class Prepared:
    """A batch's decoder inputs, padded on the right."""

    lengths: NDArray[np.int64]
    """Tokens per sample [samples]."""

    embeds: NDArray[Any]
    """[samples, tokens, hidden]"""

    positions: NDArray[np.int64]
    """[samples, tokens], or [3, samples, tokens] for M-RoPE."""

    offsets: NDArray[np.int64]
    """What is added to a new token's index to give its position [samples]; not 0 for M-RoPE with images."""

    states: dict[str, NDArray[Any]]
    """Keys and values for cross-attention, by input name; empty where the decoder has none."""

    cross_mask: NDArray[np.int64] | None = None
    """Which image states each token attends to [samples, tokens, states]; None without cross-attention."""

    deepstack: NDArray[Any] | None = None
    """Image features that are added between blocks [levels, samples, tokens, hidden]; None where the decoder takes none."""

    @property
    def padded_length(self) -> int:
        """The number of tokens of the longest sample."""
        return self.embeds.shape[1]


@dataclass(frozen=True)
class Preparer:
    """Prepares decoder inputs from encoded samples."""

    graphs: Graphs
    encoder: Encoder
    rope: Rope | None

    def prepare(self, batch: Sequence[Encoded], features: Mapping[str, NDArray[Any]] | None = None) -> Prepared:
        """Return a batch's decoder inputs; its images' `features` are computed unless given.

        Raises:
            CheckpointError: the graphs do not match each other, or the processor.
        """
        inputs = self.encoder.collate(batch, "right", _CPU)
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        features = self.features(batch) if features is None else features
        image_features = features.get(FEATURES)
        image_mask = np.zeros_like(ids, dtype=np.bool_)
        if image_features is not None:
            # Without the padding, whose id may be a placeholder's.
            image_mask = np.isin(ids, self.encoder.tokens.placeholders) & (mask > 0)
        text_ids = np.where(image_mask, self.encoder.pad_id, ids)  # the embedding matrix may have no row for an image token
        embeds: NDArray[Any] = self.graphs.embed.run({"input_ids": text_ids})["inputs_embeds"]
        if image_features is not None:
            self._insert(embeds, image_mask, image_features)
        positions, offsets = self._positions(inputs)
        return Prepared(
            lengths=mask.sum(axis=1, dtype=np.int64),
            embeds=embeds,
            positions=positions,
            offsets=offsets,
            states=self._states(features, len(batch)),
            cross_mask=self._cross_mask(inputs),
            deepstack=self._deepstack(embeds, image_mask, features.get(DEEPSTACK)),
        )

    def features(self, batch: Sequence[Encoded]) -> dict[str, NDArray[Any]]:
        """Return the vision encoder's outputs for a batch's images, in order; empty without images."""
        if _PIXELS not in batch[0].extras:
            return {}
        outputs: list[dict[str, NDArray[Any]]] = []
        for group in _groups(batch):
            extras = {key: torch.cat([sample.extras[key] for sample in group]) for key in group[0].extras}
            if missing := self.graphs.vision.inputs.keys() - extras.keys():
                raise CheckpointError(
                    f"{self.graphs.vision.path}: wants {', '.join(sorted(missing))}, which the processor does not give"
                )
            outputs.append(self.graphs.vision.run({name: extras[name].numpy() for name in self.graphs.vision.inputs}))
        return {name: _concatenated(name, [output[name] for output in outputs]) for name in outputs[0]}

    def _insert(self, embeds: NDArray[Any], image_mask: NDArray[np.bool_], features: NDArray[Any]) -> None:
        """Replace the embeddings of image tokens with image features."""
        flat = features.reshape(-1, embeds.shape[2])
        # numpy would raise for most mismatches and broadcast a single row over all image tokens.
        if len(flat) != image_mask.sum():
            raise CheckpointError(
                f"{self.graphs.vision.path}: gives {len(flat)} features for {image_mask.sum()} image tokens; its processor does "
                "not fit: export it again"
            )
        embeds[image_mask] = flat

    def _positions(self, inputs: Mapping[str, Tensor]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        samples, tokens = inputs["input_ids"].shape
        indices = np.broadcast_to(np.arange(tokens, dtype=np.int64), (samples, tokens))
        no_offsets = np.zeros(samples, dtype=np.int64)
        if self.rope is None:
            return indices, no_offsets
        if _PIXELS not in inputs:
            # Text has the same position on all three axes.
            return np.broadcast_to(indices, (3, samples, tokens)), no_offsets
        positions, offsets = self.rope(inputs)
        return positions.numpy(), offsets.reshape(samples).to(torch.int64).numpy()

    def _states(self, features: Mapping[str, NDArray[Any]], samples: int) -> dict[str, NDArray[Any]]:
        """Return cross-attention's keys and values; without images, one state that no token attends to."""
        decoder = self.graphs.decoder
        cached = {name.replace(PRESENT, PAST, 1) for name in decoder.outputs if name.startswith(PRESENT)}
        names = [name for name in decoder.inputs if name.startswith(PAST) and name not in cached]
        if features:
            return {name: features[name] for name in names}
        empty: dict[str, NDArray[Any]] = {}
        for name in names:
            _, heads, _, width = decoder.inputs[name].shape
            # One state, not none: attention over no keys would divide by a sum of zero. The mask hides it.
            empty[name] = np.zeros((samples, int(heads), 1, int(width)), decoder.inputs[name].dtype)
        return empty

    def _cross_mask(self, inputs: Mapping[str, Tensor]) -> NDArray[np.int64] | None:
        if CROSS_MASK not in self.graphs.decoder.inputs:
            return None
        samples, tokens = inputs["input_ids"].shape
        if CROSS_MASK not in inputs:
            return np.zeros((samples, tokens, 1), dtype=np.int64)
        return inputs[CROSS_MASK].reshape(samples, tokens, -1).to(torch.int64).numpy()

    def _deepstack(self, embeds: NDArray[Any], image_mask: NDArray[np.bool_], features: NDArray[Any] | None) -> NDArray[Any] | None:
        if DEEPSTACK_INPUT not in self.graphs.decoder.inputs:
            return None
        declared = self.graphs.decoder.inputs[DEEPSTACK_INPUT]
        # Zeros at text tokens: the graph adds the levels to all positions.
        levels = np.zeros((int(declared.shape[0]), *embeds.shape), declared.dtype)
        if features is not None:
            levels[:, image_mask] = features
        return levels


def find_rope(folder: Path, decoder: GraphSession, trust_remote_code: bool) -> Rope | None:
    """Return the function for a model's M-RoPE positions, from the model's own code; None where positions are one axis.

    Raises:
        CheckpointError: config.json describes another model than the graph.
    """
    # By the graph, not by the family: the graph is what is run.
    if len(decoder.inputs["position_ids"].shape) == 2:
        return None
    model = build_skeleton(folder, torch.float32, _CPU, trust_remote_code)
    owner: Any = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if owner is None:
        raise CheckpointError(f"{folder}: {decoder.path.name} has positions in three streams, the model of config.json has not")

    def positions(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        # The model's own code, as positions of images follow rules that differ between Qwen-VL's generations.
        return owner.get_rope_index(**{key: inputs[key] for key in keys})

    return positions


def _groups(batch: Sequence[Encoded]) -> Generator[list[Encoded]]:
    """Yield the samples whose images are encoded in one run.

    Where the patches of all images are one sequence, the graph computes attention between all of them and masks it between images:
    its cost is quadratic, so that runs with few images are cheaper.
    """
    group: list[Encoded] = []
    patches = 0
    for sample in batch:
        pixels = sample.extras[_PIXELS]
        more = len(pixels) if pixels.dim() == _PATCH_DIMS else 0
        if group and patches + more > _MAX_PATCHES:
            yield group
            group, patches = [], 0
        group.append(sample)
        patches += more
    yield group


def _concatenated(name: str, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays, axis=1 if name == DEEPSTACK else 0)
