"""Compare an ONNX artifact's graphs with the checkpoint, each fed with the checkpoint's inputs, so that errors do not add up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.runtimes.onnxruntime.graph import GraphSession
from compress.verification.reference import Array, Reference, ReferenceTowers

_PAST = "past_key_values."
_BATCH_SIZE = 3
"""How many of the first prompts the decoder runs as one batch."""

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Compared:
    """One output of a graph and the checkpoint's."""

    description: str
    """The input, for messages."""

    actual: Array
    expected: Array


def largest_difference(compared: Iterator[Compared]) -> tuple[int, float, float, str]:
    """Return the number of outputs and the largest difference: absolute, relative to the checkpoint's largest magnitude, and where.

    The difference is infinite where shapes differ, or an output is NaN.
    """
    count, worst = 0, (-1.0, 0.0, "")
    for count, output in enumerate(compared, 1):  # noqa: B007 - it is returned
        if output.actual.shape == output.expected.shape:
            absolute = float(np.abs(output.actual.astype(np.float32) - output.expected).max(initial=0.0))
            # NaN would lose every comparison with `max`, and a broken output would pass
            absolute = absolute if math.isfinite(absolute) else math.inf
            # to the largest magnitude of the output: a relative difference of numbers near zero says nothing
            relative = absolute / max(float(np.abs(output.expected).max(initial=0.0)), _TINY)
            description = output.description
        else:
            absolute = relative = math.inf
            shapes = f"{list(output.actual.shape)} numbers where the checkpoint has {list(output.expected.shape)}"
            description = f"{output.description}: {shapes}"
        worst = max(worst, (relative, absolute, description))
    relative, absolute, description = worst
    return count, absolute, relative, description


def image_features(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Yield the vision encoder's outputs for each prompt's images."""
    for reference in references:
        if not reference.features:
            continue
        outputs = graph.run({name: reference.images[name] for name in graph.inputs})
        for name, expected in reference.features.items():
            actual = outputs[name][0] if name.startswith(_PAST) else outputs[name]
            description = reference.description if name == "image_features" else f"{reference.description}, {name}"
            yield Compared(description, _flattened(actual, expected), expected)


def _flattened(actual: Array, expected: Array) -> Array:
    """Return features [images, tokens, width] as [tokens, width], if that is the expected shape."""
    same = actual.size == expected.size and actual.shape[-1] == expected.shape[-1]
    return actual.reshape(expected.shape) if same else actual


def embeddings(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Yield the embeddings of each prompt's text tokens; those of image tokens are not used."""
    for reference in references:
        embeds = graph.run({"input_ids": reference.ids[None]})["inputs_embeds"][0]
        text = ~reference.image_mask
        yield Compared(reference.description, embeds[text], reference.embeddings[text])


def logits(graph: GraphSession, references: Sequence[Reference], *, decoding: bool = True) -> Iterator[Compared]:
    """Yield the decoder's logits at the end of each prompt and, with `decoding`, at each token that continues it, using its cache.

    The inputs are the checkpoint's. The first three prompts are one batch, the others a batch each.
    """
    batches = [references[:_BATCH_SIZE], *([reference] for reference in references[_BATCH_SIZE:])]
    for batch in batches:
        rows = _decode(graph, batch, decoding=decoding)
        for reference, actual in zip(batch, rows, strict=True):
            single = len(batch) == 1
            description = reference.description if single else f"{reference.description}, in a batch of {len(batch)}"
            end = reference.prompt_length - reference.first
            yield Compared(description, actual[:end], reference.logits[:end])
            if decoding:
                yield Compared(f"{description}, decoding with its cache", actual[end:], reference.logits[end:])


def prompt_logits(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Yield the decoder's logits at the end of each prompt; see `logits`."""
    return logits(graph, references, decoding=False)


def _decode(graph: GraphSession, batch: Sequence[Reference], *, decoding: bool) -> list[NDArray[np.float32]]:
    """Return the logits [tokens from `first` on, vocabulary] of each prompt of a batch."""
    lengths = [reference.prompt_length for reference in batch]
    cache, cross_states = _empty_cache(graph, len(batch)), _cross_states(graph, batch)
    spans = [(0, length) for length in lengths]
    outputs = graph.run({**_inputs(graph, batch, spans), **cross_states, **cache})
    rows = [[outputs["logits"][row, reference.first : reference.prompt_length]] for row, reference in enumerate(batch)]
    # rows of a batch decode together, so as many steps as the shortest continuation has
    steps = min(len(reference.ids) - reference.prompt_length for reference in batch) if decoding else 0
    for step in range(steps):
        cache = {name: outputs[name.replace("past_key_values", "present", 1)] for name in cache}
        # each row's own position: rows of different lengths share a step, not a position
        spans = [(length + step, length + step + 1) for length in lengths]
        outputs = graph.run({**_inputs(graph, batch, spans, max(lengths) + step), **cross_states, **cache})
        for row in range(len(batch)):
            rows[row].append(outputs["logits"][row, :1])
    return [np.concatenate(steps) for steps in rows]


def _inputs(graph: GraphSession, batch: Sequence[Reference], spans: Sequence[tuple[int, int]], past: int = 0) -> dict[str, Array]:
    """Return a step's inputs without the cache: each row's tokens of its span, padded on the right, after `past` cached ones.

    The graphs read only the number of ones in a row of the mask, not their positions.
    """
    longest = max(end - start for start, end in spans)
    rows, hidden = len(batch), batch[0].decoder_inputs.shape[1]
    embeds = np.zeros((rows, longest, hidden), np.float32)
    mask = np.zeros((rows, past + longest), np.int64)
    axes = graph.inputs["position_ids"].shape[:-2]
    positions = np.zeros((*(int(extent) for extent in axes), rows, longest), np.int64)
    levels = int(graph.inputs["deepstack_embeds"].shape[0]) if "deepstack_embeds" in graph.inputs else 0
    deepstack = np.zeros((levels, rows, longest, hidden), np.float32)
    tiles = max((_tiles(reference).shape[1] for reference in batch), default=0)
    # rows with fewer tiles see none of the padded ones
    cross_mask = np.zeros((rows, longest, tiles), np.int64)
    for row, (reference, (start, end)) in enumerate(zip(batch, spans, strict=True)):
        embeds[row, : end - start] = reference.decoder_inputs[start:end]
        mask[row, :end] = 1
        positions[..., row, : end - start] = reference.positions[..., start:end]
        visible = _tiles(reference)
        cross_mask[row, : end - start, : visible.shape[1]] = visible[start:end]
        if levels and start == 0 and "deepstack_features" in reference.features:
            deepstack[:, row, np.flatnonzero(reference.image_mask)] = reference.features["deepstack_features"]
    inputs: dict[str, Array] = {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions,
        "num_logits_to_keep": np.array(0, np.int64),
        "deepstack_embeds": deepstack,
        "cross_attention_mask": cross_mask,
    }
    return {name: value for name, value in inputs.items() if name in graph.inputs}


def _tiles(reference: Reference) -> NDArray[np.int64]:
    """Return which image tiles each token attends to [tokens, images · tiles]; without images, [tokens, 0]."""
    mask = reference.cross_mask
    return np.zeros((len(reference.ids), 0), np.int64) if mask is None else mask.reshape(len(mask), -1)


def _empty_cache(graph: GraphSession, rows: int) -> dict[str, Array]:
    """Return the empty KV cache of every block with self-attention."""
    return {
        name: np.zeros((rows, int(declared.shape[1]), 0, int(declared.shape[3])), declared.dtype)
        for name, declared in graph.inputs.items()
        if name.startswith(_PAST) and name.replace("past_key_values", "present", 1) in graph.outputs
    }


def _cross_states(graph: GraphSession, batch: Sequence[Reference]) -> dict[str, Array]:
    """Return the checkpoint's keys and values for cross-attention; rows with fewer images are padded."""
    inputs: dict[str, Array] = {}
    for name, declared in graph.inputs.items():
        if name.startswith(_PAST) and name.replace("past_key_values", "present", 1) not in graph.outputs:
            features: list[Array | None] = [reference.features.get(name) for reference in batch]
            states = max((row.shape[1] for row in features if row is not None), default=0)
            value = np.zeros((len(batch), int(declared.shape[1]), states, int(declared.shape[3])), np.float32)
            for index, row in enumerate(features):
                if row is not None:
                    value[index, :, : row.shape[1]] = row
            inputs[name] = value
    return inputs


def image_embeds(graph: GraphSession, towers: ReferenceTowers) -> Iterator[Compared]:
    """Yield the image encoder's embeddings, computed as one batch."""
    embeds = graph.run({"pixel_values": towers.pixels})["image_embeds"]
    for description, actual, expected in zip(towers.images, embeds, towers.image_embeds, strict=True):
        yield Compared(description, actual, expected)


def text_embeds(graph: GraphSession, towers: ReferenceTowers) -> Iterator[Compared]:
    """Yield the text encoder's embeddings, computed as one padded batch."""
    inputs: Mapping[str, Any] = {name: value for name, value in towers.texts.items() if name in graph.inputs}
    embeds = graph.run(inputs)["text_embeds"]
    for caption, actual, expected in zip(towers.captions, embeds, towers.text_embeds, strict=True):
        yield Compared(f"the text {caption!r}", actual, expected)
