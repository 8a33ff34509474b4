"""The graphs of a folder of onnxruntime-genai's beside the checkpoint they came from, fed as that runtime feeds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import open_checkpoint
from compress.export.format import VerifyContext
from compress.export.onnx_genai_config import DECODER, DECODER_OF_BUILDER, EMBEDDING, VISION
from compress.runtimes.onnxruntime_genai import OnnxruntimeGenai
from compress.runtimes.onnxruntime_graph import GraphSession
from compress.verification.graphs import Compared, logits, prompt_logits
from compress.verification.limits import ExportPrecision, limits_of
from compress.verification.reference import Reference
from compress.verification.results import Verification
from compress.verification.verify import Table, verify_graphs

if TYPE_CHECKING:
    from compress.export.onnx_genai import OnnxGenai

_EMBEDS, _DEEP = "inputs_embeds", "deepstack_embeds"


def verify_folder(export: OnnxGenai, context: VerifyContext) -> Verification:
    """Do what `OnnxGenai.verify` says."""
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
    """Give what the vision graph makes of each prompt's images, each filled up to the longest, beside the checkpoint's."""
    for reference in references:
        if reference.features:
            given = {"pixel_values": _filled(reference), "image_grid_thw": reference.images["image_grid_thw"]}
            yield Compared(reference.shown, graph.run(given)["image_features"], _wide(reference))


def embeddings(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Give what the embeddings make of each prompt's words and the checkpoint's features of its images."""
    width = int(graph.inputs["image_features"].shape[1])
    for reference in references:
        features = _wide(reference) if reference.features else np.zeros((0, width), np.float32)
        theirs = np.zeros((len(reference.ids), width), np.float32)
        theirs[:, : reference.embeddings.shape[1]] = reference.embeddings
        theirs[reference.seen] = features
        found = graph.run({"input_ids": reference.ids[None], "image_features": features})[_EMBEDS][0]
        yield Compared(reference.shown, found, theirs)


def decoder_logits(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Give the decoder's logits of each prompt, and of the tokens after it; see `compress.verification.graphs.logits`."""
    return logits(_apart(graph, references), references)


def decoder_prompt_logits(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Give the decoder's logits of each prompt."""
    return prompt_logits(_apart(graph, references), references)


def _wide(reference: Reference) -> NDArray[np.float32]:
    """Return the checkpoint's features of a prompt's images [tokens, width], those from within the tower as further columns."""
    own = reference.features["image_features"].reshape(-1, reference.entering.shape[1])
    deep = reference.features.get("deepstack_features")
    return own if deep is None else np.concatenate([own, deep.transpose(1, 0, 2).reshape(len(own), -1)], axis=1)


def _filled(reference: Reference) -> NDArray[np.float32]:
    """Return a prompt's patches as onnxruntime-genai's image processor gives them."""
    patches = reference.images["pixel_values"]
    counts = reference.images["image_grid_thw"].prod(axis=1)
    filled = np.full((len(counts), int(counts.max()), patches.shape[1]), np.nan, np.float32)
    for image, part in enumerate(np.split(patches, np.cumsum(counts)[:-1])):
        filled[image, : len(part)] = part
    return filled.reshape(-1, patches.shape[1])


class _Apart:
    """A decoder whose embeddings carry features from within the vision tower, seen as one that takes them apart from each other."""

    def __init__(self, graph: GraphSession, levels: int) -> None:
        declared = graph.inputs[_EMBEDS]
        self._graph = graph
        self.inputs = {**graph.inputs, _DEEP: replace(declared, shape=(levels, *declared.shape))}
        self.outputs = graph.outputs

    def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the outputs from embeddings [batch, sequence, hidden] and features [levels, batch, sequence, hidden]."""
        deep: NDArray[Any] = given[_DEEP]
        parts: list[NDArray[Any]] = [given[_EMBEDS], *deep]
        kept = {name: value for name, value in given.items() if name != _DEEP}
        return self._graph.run({**kept, _EMBEDS: np.concatenate(parts, axis=-1)})


def _apart(graph: GraphSession, references: Sequence[Reference]) -> Any:
    levels = int(graph.inputs[_EMBEDS].shape[-1]) // references[0].entering.shape[1] - 1
    return _Apart(graph, levels) if levels else graph
