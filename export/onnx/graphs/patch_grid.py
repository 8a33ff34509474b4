"""The coordinates of each patch of a batch of images, computed in the graph from the images' grids by integer arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.export.onnx.graphs.graph import Graph

CODES = 16
"""The most groups in one row: a group's code is an index below this. Each bit of it costs two channels of every query and key."""


@dataclass(frozen=True)
class Groups:
    """Attention groups: patches arranged in rows of slots, so that patches that attend to each other share a row and a code."""

    patches: str
    """The patch in each slot, int64 [rows, slots]; 0 in empty slots."""

    filled: str
    """Which slots have a patch, bool [rows, slots]."""

    slots: str
    """Each patch's index among all slots, int64 [patches]."""

    codes: str
    """Each patch's code, int64 [patches], below `CODES`; the groups of one row differ in it."""

    shape: tuple[str, str | int]
    """Rows and slots as dimensions in declared shapes."""

    @staticmethod
    def of(
        graph: Graph, position: tuple[str, str], extents: tuple[str, str], shape: tuple[str, str | int], codes: str = ""
    ) -> Groups:
        """Return the groups for each patch's row and slot (`position`); `extents` are the numbers of rows and slots, [1] each."""
        row, slot = position
        slots = graph.op("Add", graph.op("Mul", row, extents[1]), slot)
        # -1 marks a slot that no patch was scattered to; it becomes patch 0, so that Gather has a valid index, and is masked.
        empty = graph.op("Expand", graph.const([-1]), graph.op("Mul", *extents))
        patches = graph.op("ScatterElements", empty, slots, graph.arange(graph.extent(row, 0)), axis=0)
        patches = graph.op("Reshape", patches, graph.op("Concat", *extents, axis=0))
        filled = graph.op("GreaterOrEqual", patches, graph.const(0))
        codes = codes or graph.op("Mul", row, graph.const(0))
        return Groups(graph.op("Max", patches, graph.const(0)), filled, slots, codes, shape)


@dataclass(frozen=True)
class PatchGrid:
    """The coordinates of patches, which are ordered by image, frame and squares of `merge` by `merge`; each int64 [patches]."""

    graph: Graph
    grids: tuple[str, str, str]
    """The frames, rows and columns of each image, int64 [images]."""

    image: str
    frame: str
    """The frame's index in the image."""

    index: str
    """The patch's index in the frame."""

    row: str
    column: str
    heights: str
    """The rows of the patch's frame."""

    widths: str
    """The columns of the patch's frame."""

    @staticmethod
    def of(graph: Graph, grids: str, count: str, merge: int) -> PatchGrid:
        """Return the coordinates of `count` patches (int64 [1]) of images with frames, rows and columns `grids` [images, 3]."""
        frames, rows, columns = (graph.reshape(axis, [-1]) for axis in graph.split(grids, [1, 1, 1], axis=1))
        ends = graph.op("CumSum", graph.op("Mul", frames, graph.op("Mul", rows, columns)), graph.const(0))
        patch = graph.arange(count)
        # How many images end at or before a patch is its image's index: ONNX has no operator for a sorted search.
        passed = graph.op("GreaterOrEqual", graph.reshape(patch, [-1, 1]), graph.reshape(ends, [1, -1]))
        image = graph.op("ReduceSum", graph.cast(passed, np.int64), graph.const([1]), keepdims=0)
        heights, widths = (graph.op("Gather", size, image) for size in (rows, columns))
        start = graph.op("Gather", _exclusive(graph, ends), image)
        frame, index = _divmod(graph, graph.op("Sub", patch, start), graph.op("Mul", heights, widths))
        # The processor orders patches by squares of `merge` by `merge`, so that the merger reads neighbours: undone here.
        square, inside = _divmod(graph, index, graph.const(merge * merge))
        square_row, square_column = _divmod(graph, square, graph.op("Div", widths, graph.const(merge)))
        row, column = _divmod(graph, inside, graph.const(merge))
        row = graph.op("Add", graph.op("Mul", square_row, graph.const(merge)), row)
        column = graph.op("Add", graph.op("Mul", square_column, graph.const(merge)), column)
        return PatchGrid(graph, (frames, rows, columns), image, frame, index, row, column, heights, widths)

    def frames(self) -> Groups:
        """Return the frames as groups; small frames share a row if they begin within one stretch as long as the largest.

        A row is then at most twice as long as the largest frame, and rows of frames of one size have no empty slots.
        """
        graph, (frames, rows, columns) = self.graph, self.grids
        largest = graph.op("ReduceMax", graph.op("Mul", rows, columns), keepdims=1)
        number = graph.op("Add", self._offsets(frames)[0], self.frame)
        patch = graph.arange(graph.extent(self.index, 0))
        stretch = graph.op("Div", graph.op("Sub", patch, self.index), largest)
        # A row begins where a patch lies in another stretch than the one before it.
        former = graph.op("Concat", graph.const([-1]), graph.slice(stretch, 0, -1, 0), axis=0)
        codes = graph.op("Mod", number, graph.const(CODES))
        # Also at the first patch of every 16th frame, where codes start again: two frames of one code may not share a row.
        first_of_codes = graph.op("Equal", graph.op("Add", codes, self.index), graph.const(0))
        begins = graph.op("Or", graph.op("Not", graph.op("Equal", stretch, former)), first_of_codes)
        row = graph.op("Sub", graph.op("CumSum", graph.cast(begins, np.int64), graph.const(0)), graph.const(1))
        starts = graph.reshape(graph.op("NonZero", begins), [-1])
        index = graph.op("Sub", patch, graph.op("Gather", starts, row))
        longest = graph.op("Add", graph.op("ReduceMax", index, keepdims=1), graph.const(1))
        return Groups.of(graph, (row, index), (graph.extent(starts, 0), longest), ("frame_rows", "frame_places"), codes)

    def windows(self, side: int) -> Groups:
        """Return the windows of `side` by `side` patches as groups; at the right and lower edge of a frame they may be smaller."""
        graph, (frames, rows, columns), length = self.graph, self.grids, self.graph.const(side)
        down, across = (self._windows_along(size, side) for size in (rows, columns))
        window_row, row = _divmod(graph, self.row, length)
        window_column, column = _divmod(graph, self.column, length)
        first, count = self._offsets(graph.op("Mul", frames, graph.op("Mul", down, across)))
        above = graph.op("Add", graph.op("Mul", self.frame, self._windows_along(self.heights, side)), window_row)
        left = graph.op("Add", graph.op("Mul", above, self._windows_along(self.widths, side)), window_column)
        index = graph.op("Add", graph.op("Mul", row, length), column)
        position = (graph.op("Add", first, left), index)
        # A row per window: all have the same number of slots, and with one group to a row no codes are needed.
        return Groups.of(graph, position, (count, graph.const([side * side])), ("windows", side * side))

    def _windows_along(self, extent: str, side: int) -> str:
        graph = self.graph
        return graph.op("Div", graph.op("Add", extent, graph.const(side - 1)), graph.const(side))

    def _offsets(self, counts: str) -> tuple[str, str]:
        """Return the index of the first group of each patch's image, and the number of all groups [1], from counts per image."""
        graph = self.graph
        ends = graph.op("CumSum", counts, graph.const(0))
        return graph.op("Gather", _exclusive(graph, ends), self.image), graph.slice(ends, -1, None, 0)


def _exclusive(graph: Graph, ends: str) -> str:
    """Return the exclusive cumulative sums for inclusive ones."""
    return graph.op("Concat", graph.const([0]), graph.slice(ends, 0, -1, 0), axis=0)


def _divmod(graph: Graph, value: str, divisor: str) -> tuple[str, str]:
    return graph.op("Div", value, divisor), graph.op("Mod", value, divisor)
