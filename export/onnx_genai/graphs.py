"""Graphs for onnxruntime-genai: the same architectures, emitted with that library's inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike

from compress.export.onnx.graphs.graph import Graph, Shape
from compress.export.onnx.graphs.layer_builder import LayerBuilder


@dataclass
class GenaiGraph(Graph):
    """A graph that replaces the inputs and outputs of `format: onnx` by onnxruntime-genai's.

    onnxruntime-genai passes one tensor from vision to embeddings and on to the decoder, so the DeepStack features of `levels` are
    further columns beside the image features: [tokens, (1 + levels) · hidden]. Patches come with each image padded to the longest.
    All logits are computed: there is no input for how many to keep.
    """

    levels: int = 0
    """The number of DeepStack levels."""

    hidden: int = 0
    """The decoder's hidden size."""

    _features: dict[str, str] = field(default_factory=lambda: dict[str, str](), repr=False)
    """Outputs that wait to be concatenated."""

    @property
    def width(self) -> int:
        """The width of the embeddings between graphs: (1 + levels) · hidden."""
        return (1 + self.levels) * self.hidden

    def input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """Declare an input, or emit its replacement."""
        match name:
            case "num_logits_to_keep":
                # 0 keeps all logits: the library slices the last position itself.
                return self.const(0)
            case "pixel_values":
                return self._patches(dtype, shape)
            case "image_grid_thw":
                # Declared by `_patches`, together with the padded patches.
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
        """Declare an output; DeepStack features become further columns of `image_features`."""
        if not self.levels or name not in ("image_features", "deepstack_features"):
            super().output(name, value, dtype, shape, first=first)
            return
        if name == "deepstack_features":
            value = self.reshape(self.transpose(value, [1, 0, 2]), [0, self.levels * self.hidden])
        self._features[name] = value
        if len(self._features) > 1:
            wide = self.op("Concat", self._features["image_features"], self._features["deepstack_features"], axis=1)
            super().output("image_features", wide, dtype, ["tokens", self.width])

    def _patches(self, dtype: DTypeLike, shape: Shape) -> str:
        """Declare padded patches and grids, and return the patches without padding."""
        padded = super().input("pixel_values", dtype, ["filled_patches", shape[-1]])
        grids = super().input("image_grid_thw", np.int64, ["images", 3])
        counts = self.op("ReduceProd", grids, self.const([1]), keepdims=0)
        ends = self.op("CumSum", counts, self.const(0))
        indices = self.arange(self.op("ReduceSum", counts, keepdims=1))
        passed = self.op(
            "GreaterOrEqual", self.op("Unsqueeze", indices, self.const([1])), self.op("Unsqueeze", ends, self.const([0]))
        )
        image = self.op("ReduceSum", self.cast(passed, np.int64), self.const([1]), keepdims=0)
        first = self.op("Gather", self.op("Sub", ends, counts), image)
        # The library's image processor pads each image to the batch's longest, and tells nothing but the grids.
        longest = self.op("ReduceMax", counts, keepdims=0)
        rows = self.op("Add", self.op("Mul", image, longest), self.op("Sub", indices, first))
        return self.op("Gather", padded, rows, axis=0)


def embedding(image_token: int) -> Callable[[LayerBuilder], None]:
    """Return the emitter of the embeddings: `input_ids` [batch, sequence] and `image_features` to `inputs_embeds`.

    Image tokens get the rows of the features in order; text tokens their embedding, with zeros in the DeepStack columns.
    """

    def emit(builder: LayerBuilder) -> None:
        graph = builder.graph
        assert isinstance(graph, GenaiGraph), "only a GenaiGraph has the width"
        ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
        features = graph.input("image_features", graph.dtype, ["image_tokens", graph.width])
        embeds = builder.embed(ids, builder.source.family.embeddings)
        if graph.levels:
            # Pads are begins, then ends, per axis: only the end of the last axis grows.
            embeds = graph.op("Pad", embeds, graph.const([0, 0, 0, 0, 0, graph.width - graph.hidden]))
        image_indices = graph.transpose(graph.op("NonZero", graph.op("Equal", ids, graph.const(image_token))), [1, 0])
        # Rows of `features` in the order of the image tokens, which NonZero returns row by row.
        merged = graph.op("ScatterND", embeds, image_indices, features)
        graph.output("inputs_embeds", merged, graph.dtype, ["batch_size", "sequence_length", graph.width])

    return emit
