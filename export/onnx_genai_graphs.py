"""Graphs as onnxruntime-genai feeds them: the same architectures, emitted with other inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike

from compress.export.graphs.graph import Graph, Shape
from compress.export.graphs.parts import Parts


@dataclass
class GenaiGraph(Graph):
    """A graph whose inputs and outputs are those that onnxruntime-genai has, whoever emits it.

    It hands one tensor from vision to embeddings and from there to the decoder, so features of `levels` within the vision tower
    travel as further columns beside those that the tower ends with: [tokens, (1 + levels) · hidden]. Patches of images of several
    sizes come with each image filled up to the longest. How many logits to keep is no input: all.
    """

    levels: int = 0
    hidden: int = 0
    _ready: dict[str, str] = field(default_factory=lambda: dict[str, str](), repr=False)

    @property
    def width(self) -> int:
        """How wide the embeddings are that travel between graphs."""
        return (1 + self.levels) * self.hidden

    def input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """Declare an input, or what stands for it here."""
        match name:
            case "num_logits_to_keep":
                return self.const(0)
            case "pixel_values":
                return self._patches(dtype, shape)
            case "image_grid_thw":
                return name
            case "inputs_embeds" if self.levels:
                wide = super().input(name, dtype, [*shape[:-1], self.width])
                return self.slice(wide, 0, self.hidden, 2)
            case "deepstack_embeds":
                inner = self.reshape(self.slice("inputs_embeds", self.hidden, None, 2), [0, 0, self.levels, self.hidden])
                return self.transpose(inner, [2, 0, 1, 3])
            case _:
                return super().input(name, dtype, shape)

    def output(self, name: str, value: str, dtype: DTypeLike, shape: Shape, *, first: bool = False) -> None:
        """Give a value out; features from within the vision tower as further columns of `image_features`."""
        if not self.levels or name not in ("image_features", "deepstack_features"):
            super().output(name, value, dtype, shape, first=first)
            return
        if name == "deepstack_features":
            value = self.reshape(self.transpose(value, [1, 0, 2]), [0, self.levels * self.hidden])
        self._ready[name] = value
        if len(self._ready) > 1:
            whole = self.op("Concat", self._ready["image_features"], self._ready["deepstack_features"], axis=1)
            super().output("image_features", whole, dtype, ["tokens", self.width])

    def _patches(self, dtype: DTypeLike, shape: Shape) -> str:
        """Declare patches and grids, and return the images' own patches: without what fills each image up to the longest."""
        filled = super().input("pixel_values", dtype, ["filled_patches", shape[-1]])
        grids = super().input("image_grid_thw", np.int64, ["images", 3])
        counts = self.op("ReduceProd", grids, self.const([1]), keepdims=0)
        ends = self.op("CumSum", counts, self.const(0))
        places = self.arange(self.op("ReduceSum", counts, keepdims=1))
        passed = self.op(
            "GreaterOrEqual", self.op("Unsqueeze", places, self.const([1])), self.op("Unsqueeze", ends, self.const([0]))
        )
        image = self.op("ReduceSum", self.cast(passed, np.int64), self.const([1]), keepdims=0)
        first = self.op("Gather", self.op("Sub", ends, counts), image)
        longest = self.op("ReduceMax", counts, keepdims=0)
        rows = self.op("Add", self.op("Mul", image, longest), self.op("Sub", places, first))
        return self.op("Gather", filled, rows, axis=0)


def embedding(image_token: int) -> Callable[[Parts], None]:
    """Return what emits the embeddings: `input_ids` [batch, sequence] and `image_features` to `inputs_embeds`.

    Each image token's row is the next of the features; any other's is its own embedding, with zeros for the inner levels.
    """

    def emit(parts: Parts) -> None:
        graph = parts.graph
        assert isinstance(graph, GenaiGraph), "the width of what travels is the graph's"
        ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
        features = graph.input("image_features", graph.dtype, ["image_tokens", graph.width])
        found = parts.embed(ids, parts.source.family.embeddings)
        if graph.levels:
            found = graph.op("Pad", found, graph.const([0, 0, 0, 0, 0, graph.width - graph.hidden]))
        places = graph.transpose(graph.op("NonZero", graph.op("Equal", ids, graph.const(image_token))), [1, 0])
        whole = graph.op("ScatterND", found, places, features)
        graph.output("inputs_embeds", whole, graph.dtype, ["batch_size", "sequence_length", graph.width])

    return emit
