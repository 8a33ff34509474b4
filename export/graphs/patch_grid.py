"""Where each patch of a batch of images lies, worked out in the graph from the images' grids by whole-number arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.export.graphs.graph import Graph


@dataclass(frozen=True)
class PatchGrid:
    """The places of patches that lie one image after the other, each frame in squares of `merge` by `merge`, int64 [patches].

    `frame` is the first patch of the frame that a patch belongs to; `heights` and `widths` are those of its frame, in patches.
    """

    graph: Graph
    frame: str
    row: str
    column: str
    heights: str
    widths: str

    @staticmethod
    def of(graph: Graph, grids: str, count: str, merge: int) -> PatchGrid:
        """Return the places of `count` patches (int64 [1]) of images whose frames, rows and columns are `grids` [images, 3]."""
        frames, rows, columns = (graph.reshape(each, [-1]) for each in graph.split(grids, [1, 1, 1], axis=1))
        ends = graph.op("CumSum", graph.op("Mul", frames, graph.op("Mul", rows, columns)), graph.const(0))
        starts = graph.op("Concat", graph.const([0]), graph.slice(ends, 0, -1, 0), axis=0)
        patch = graph.arange(count)
        begun = graph.op("GreaterOrEqual", graph.reshape(patch, [-1, 1]), graph.reshape(ends, [1, -1]))
        image = graph.op("ReduceSum", graph.cast(begun, np.int64), graph.const([1]), keepdims=0)
        heights, widths, start = (graph.op("Gather", each, image) for each in (rows, columns, starts))
        local = graph.op("Sub", patch, start)
        within = graph.op("Mod", local, graph.op("Mul", heights, widths))
        square, inside = _divided(graph, within, graph.const(merge * merge))
        square_row, square_column = _divided(graph, square, graph.op("Div", widths, graph.const(merge)))
        row, column = _divided(graph, inside, graph.const(merge))
        return PatchGrid(
            graph,
            frame=graph.op("Sub", patch, within),
            row=graph.op("Add", graph.op("Mul", square_row, graph.const(merge)), row),
            column=graph.op("Add", graph.op("Mul", square_column, graph.const(merge)), column),
            heights=heights,
            widths=widths,
        )

    def windows(self, side: int) -> str:
        """Return a number for the window of `side` by `side` patches that each patch lies in, different in each frame."""
        graph = self.graph
        length = graph.const(side)
        across = graph.op("Div", graph.op("Add", self.widths, graph.const(side - 1)), length)
        above = graph.op("Mul", graph.op("Div", self.row, length), across)
        return graph.op("Add", self.frame, graph.op("Add", above, graph.op("Div", self.column, length)))


def _divided(graph: Graph, value: str, divisor: str) -> tuple[str, str]:
    return graph.op("Div", value, divisor), graph.op("Mod", value, divisor)
