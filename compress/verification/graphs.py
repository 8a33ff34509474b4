"""The graphs of an ONNX artifact, each given what the checkpoint's own part was given, so that one's fault is not another's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.runtimes.onnxruntime_graph import GraphSession
from compress.verification.reference import Array, Reference, ReferenceTowers

_PAST = "past_key_values."
_AT_ONCE = 3
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Compared:
    """One output of a graph beside the checkpoint's; `told` says of what input."""

    told: str
    ours: Array
    theirs: Array


def largest(compared: Iterator[Compared]) -> tuple[int, float, float, str]:
    """Return of how many outputs, by how much, by which share of the checkpoint's largest magnitude and where outputs differ most.

    They differ infinitely where one has another shape, or is not a number.
    """
    inputs, worst = 0, (-1.0, 0.0, "")
    for inputs, each in enumerate(compared, 1):  # noqa: B007 - it is counted too
        if each.ours.shape == each.theirs.shape:
            absolute = float(np.abs(each.ours.astype(np.float32) - each.theirs).max(initial=0.0))
            absolute = absolute if math.isfinite(absolute) else math.inf
            relative, told = absolute / max(float(np.abs(each.theirs).max(initial=0.0)), _TINY), each.told
        else:
            absolute = relative = math.inf
            told = f"{each.told}: {list(each.ours.shape)} numbers where the checkpoint has {list(each.theirs.shape)}"
        worst = max(worst, (relative, absolute, told))
    relative, absolute, told = worst
    return inputs, absolute, relative, told


def image_features(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Give what a vision encoder makes of each prompt's images, beside what entered the checkpoint's decoder for them."""
    for reference in references:
        if not reference.features:
            continue
        found = graph.run({name: reference.images[name] for name in graph.inputs})
        for name, theirs in reference.features.items():
            ours = found[name][0] if name.startswith(_PAST) else found[name]
            told = reference.shown if name == "image_features" else f"{reference.shown}, {name}"
            yield Compared(told, _joined(ours, theirs), theirs)


def _joined(ours: Array, theirs: Array) -> Array:
    """Return features whose tokens are apart by image as one row of tokens, where they are as many as the checkpoint's."""
    return ours.reshape(theirs.shape) if ours.size == theirs.size and ours.shape[-1] == theirs.shape[-1] else ours


def embeddings(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Give the embeddings of each prompt's words, beside the checkpoint's; those of tokens that stand for images are not used."""
    for reference in references:
        found = graph.run({"input_ids": reference.ids[None]})["inputs_embeds"][0]
        yield Compared(reference.shown, found[~reference.seen], reference.embeddings[~reference.seen])


def logits(graph: GraphSession, references: Sequence[Reference], *, decoding: bool = True) -> Iterator[Compared]:
    """Give a decoder's logits at the end of each prompt and, with `decoding`, at the tokens after it, one by one with its cache.

    What enters it is the checkpoint's own. The first three prompts are computed together, the others each on its own.
    """
    groups = [references[:_AT_ONCE], *([reference] for reference in references[_AT_ONCE:])]
    for group in groups:
        found = _decode(graph, group, decoding=decoding)
        for reference, ours in zip(group, found, strict=True):
            told = f"{reference.shown}, in a batch of {len(group)}" if len(group) > 1 else reference.shown
            middle = reference.prompt_length - reference.first
            yield Compared(told, ours[:middle], reference.logits[:middle])
            if decoding:
                yield Compared(f"{told}, decoding with its cache", ours[middle:], reference.logits[middle:])


def prompt_logits(graph: GraphSession, references: Sequence[Reference]) -> Iterator[Compared]:
    """Give a decoder's logits at the end of each prompt; see `logits`."""
    return logits(graph, references, decoding=False)


def _decode(graph: GraphSession, group: Sequence[Reference], *, decoding: bool) -> list[NDArray[np.float32]]:
    """Return the logits [tokens from `first` on, vocabulary] of each prompt of a batch."""
    lengths = [reference.prompt_length for reference in group]
    cache, crossing = _empty_cache(graph, len(group)), _crossing(graph, group)
    spans = [(0, length) for length in lengths]
    found = graph.run({**_inputs(graph, group, spans), **crossing, **cache})
    rows = [[found["logits"][row, each.first : each.prompt_length]] for row, each in enumerate(group)]
    steps = min(len(each.ids) - each.prompt_length for each in group) if decoding else 0
    for step in range(steps):
        cache = {name: found[name.replace("past_key_values", "present", 1)] for name in cache}
        spans = [(length + step, length + step + 1) for length in lengths]
        found = graph.run({**_inputs(graph, group, spans, max(lengths) + step), **crossing, **cache})
        for row in range(len(group)):
            rows[row].append(found["logits"][row, :1])
    return [np.concatenate(parts) for parts in rows]


def _inputs(graph: GraphSession, group: Sequence[Reference], spans: Sequence[tuple[int, int]], past: int = 0) -> dict[str, Array]:
    """Return a step's inputs beside its cache: of each row the tokens of its span, padded on the right, after `past` cached ones.

    The mask has as many ones as a row has tokens by now; where they stand is not read.
    """
    longest = max(end - start for start, end in spans)
    rows, hidden = len(group), group[0].entering.shape[1]
    entering = np.zeros((rows, longest, hidden), np.float32)
    mask = np.zeros((rows, past + longest), np.int64)
    axes = graph.inputs["position_ids"].shape[:-2]
    positions = np.zeros((*(int(extent) for extent in axes), rows, longest), np.int64)
    levels = int(graph.inputs["deepstack_embeds"].shape[0]) if "deepstack_embeds" in graph.inputs else 0
    deep = np.zeros((levels, rows, longest, hidden), np.float32)
    tiles = max((_tiles(reference).shape[1] for reference in group), default=0)
    crossed = np.zeros((rows, longest, tiles), np.int64)
    for row, (reference, (start, end)) in enumerate(zip(group, spans, strict=True)):
        entering[row, : end - start] = reference.entering[start:end]
        mask[row, :end] = 1
        positions[..., row, : end - start] = reference.positions[..., start:end]
        own = _tiles(reference)
        crossed[row, : end - start, : own.shape[1]] = own[start:end]
        if levels and start == 0 and "deepstack_features" in reference.features:
            deep[:, row, np.flatnonzero(reference.seen)] = reference.features["deepstack_features"]
    given: dict[str, Array] = {
        "inputs_embeds": entering,
        "attention_mask": mask,
        "position_ids": positions,
        "num_logits_to_keep": np.array(0, np.int64),
        "deepstack_embeds": deep,
        "cross_attention_mask": crossed,
    }
    return {name: value for name, value in given.items() if name in graph.inputs}


def _tiles(reference: Reference) -> NDArray[np.int64]:
    """Return which images' tiles each token sees, [tokens, images · tiles]; of no images without any."""
    mask = reference.cross_mask
    return np.zeros((len(reference.ids), 0), np.int64) if mask is None else mask.reshape(len(mask), -1)


def _empty_cache(graph: GraphSession, rows: int) -> dict[str, Array]:
    """Return the cache before the first token, of every block that gives back what it has cached."""
    return {
        name: np.zeros((rows, int(declared.shape[1]), 0, int(declared.shape[3])), declared.dtype)
        for name, declared in graph.inputs.items()
        if name.startswith(_PAST) and name.replace("past_key_values", "present", 1) in graph.outputs
    }


def _crossing(graph: GraphSession, group: Sequence[Reference]) -> dict[str, Array]:
    """Return the keys and values that cross-attention reads, as the checkpoint has them, rows with fewer images padded."""
    given: dict[str, Array] = {}
    for name, declared in graph.inputs.items():
        if name.startswith(_PAST) and name.replace("past_key_values", "present", 1) not in graph.outputs:
            own: list[Array | None] = [reference.features.get(name) for reference in group]
            states = max((each.shape[1] for each in own if each is not None), default=0)
            value = np.zeros((len(group), int(declared.shape[1]), states, int(declared.shape[3])), np.float32)
            for row, each in enumerate(own):
                if each is not None:
                    value[row, :, : each.shape[1]] = each
            given[name] = value
    return given


def image_embeds(graph: GraphSession, towers: ReferenceTowers) -> Iterator[Compared]:
    """Give what an image encoder makes of each picture, all computed together."""
    found = graph.run({"pixel_values": towers.pixels})["image_embeds"]
    for told, ours, theirs in zip(towers.images, found, towers.image_embeds, strict=True):
        yield Compared(told, ours, theirs)


def text_embeds(graph: GraphSession, towers: ReferenceTowers) -> Iterator[Compared]:
    """Give what a text encoder makes of each text, all computed together and padded."""
    given: Mapping[str, Any] = {name: value for name, value in towers.texts.items() if name in graph.inputs}
    found = graph.run(given)["text_embeds"]
    for told, ours, theirs in zip(towers.captions, found, towers.text_embeds, strict=True):
        yield Compared(f"the text {told!r}", ours, theirs)
