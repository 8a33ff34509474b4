"""Verify the graphs of an onnxruntime-genai folder against the checkpoint, with that library's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoints.checkpoint import open_checkpoint
from compress.export.format import VerifyContext
from compress.export.onnx_genai.config import DECODER, DECODER_OF_BUILDER, EMBEDDING, VISION
from compress.runtimes.onnxruntime.graph import GraphSession
from compress.runtimes.onnxruntime_genai.runtime import OnnxruntimeGenai
from compress.verification.graphs import Compared, logits, prompt_logits
from compress.verification.limits import ExportPrecision, limits_of
from compress.verification.reference import Reference
from compress.verification.results import Verification
from compress.verification.verify import Table, verify_graphs

if TYPE_CHECKING:
    from compress.export.onnx_genai.format import OnnxGenai

_EMBEDS, _DEEPSTACK = "inputs_embeds", "deepstack_embeds"


def verify_folder(export: OnnxGenai, context: VerifyContext) -> Verification:
    """Verify an artifact; see `OnnxGenai.verify`."""
    settings = ExportPrecision(export.dtype, export.accuracy_level, export.head_bits, export.embedding_bits)
    limits = limits_of(settings, open_checkpoint(context.source), context.family)
    decoder = DECODER_OF_BUILDER.removesuffix(".onnx") if export.decoder == "builder" else DECODER
    table: Table = {
        "vision encoder": (VISION, image_features, image_features),
        "embeddings": (EMBEDDING, embeddings, embeddings),
        "decoder": (decoder, decoder_prompt_logits, decoder_logits),
    }
    return verify_graphs(context, OnnxruntimeGenai(runtime="onnxruntime-genai"), limits, table)


def image_features(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Yield the vision encoder's outputs for each prompt's images, padded to the longest."""
    for reference in references:
        if reference.features:
            inputs = {"pixel_values": _padded(reference), "image_grid_thw": reference.images["image_grid_thw"]}
            yield Compared(reference.description, graph.run(inputs)["image_features"], _wide(reference))


def embeddings(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Yield the merged embeddings of each prompt's tokens and the checkpoint's image features."""
    width = int(graph.inputs["image_features"].shape[1])
    for reference in references:
        # Prompts without images are compared too: the scatter must then leave every row alone.
        features = _wide(reference) if reference.features else np.zeros((0, width), np.float32)
        expected = np.zeros((len(reference.ids), width), np.float32)
        expected[:, : reference.embeddings.shape[1]] = reference.embeddings
        expected[reference.image_mask] = features
        actual = graph.run({"input_ids": reference.ids[None], "image_features": features})[_EMBEDS][0]
        yield Compared(reference.description, actual, expected)


def decoder_logits(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Yield the decoder's logits of each prompt and its continuation; see `compress.verification.graphs.logits`."""
    return logits(_separate_inputs(graph, references), references)


def decoder_prompt_logits(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Yield the decoder's logits of each prompt."""
    return prompt_logits(_separate_inputs(graph, references), references)


def _wide(reference: Reference) -> NDArray[np.float32]:
    """Return the checkpoint's image features [tokens, width], with DeepStack features as further columns."""
    features = reference.features["image_features"].reshape(-1, reference.decoder_inputs.shape[1])
    deepstack = reference.features.get("deepstack_features")
    if deepstack is None:
        return features
    return np.concatenate([features, deepstack.transpose(1, 0, 2).reshape(len(features), -1)], axis=1)


def _padded(reference: Reference) -> NDArray[np.float32]:
    """Return a prompt's patches as onnxruntime-genai's image processor does: each image padded to the longest."""
    patches = reference.images["pixel_values"]
    counts = reference.images["image_grid_thw"].prod(axis=1)
    # NaN, not zero: a graph that reads a padded patch fails the comparison instead of passing by luck.
    padded = np.full((len(counts), int(counts.max()), patches.shape[1]), np.nan, np.float32)
    for index, image in enumerate(np.split(patches, np.cumsum(counts)[:-1])):
        padded[index, : len(image)] = image
    return padded.reshape(-1, patches.shape[1])


class _SeparateInputs:
    """Presents a decoder whose embeddings have DeepStack columns as one with a separate input for them."""

    def __init__(self, graph: GraphSession, levels: int) -> None:
        declared = graph.inputs[_EMBEDS]
        self._graph = graph
        self.inputs = {**graph.inputs, _DEEPSTACK: replace(declared, shape=(levels, *declared.shape))}
        self.outputs = graph.outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs from embeddings [batch, sequence, hidden] and features [levels, batch, sequence, hidden]."""
        deepstack: NDArray[Any] = feeds[_DEEPSTACK]
        columns: list[NDArray[Any]] = [feeds[_EMBEDS], *deepstack]
        others = {name: value for name, value in feeds.items() if name != _DEEPSTACK}
        return self._graph.run({**others, _EMBEDS: np.concatenate(columns, axis=-1)})


def _separate_inputs(graph: GraphSession, references: Sequence[Reference]) -> Any:
    levels = int(graph.inputs[_EMBEDS].shape[-1]) // references[0].decoder_inputs.shape[1] - 1
    return _SeparateInputs(graph, levels) if levels else graph
