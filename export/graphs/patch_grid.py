"""Where each patch of a batch of images lies, worked out in the graph from the images' grids by whole-number arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.export.graphs.graph import Graph

CODES = 16
"""How many groups at most lie in one row."""


@dataclass(frozen=True)
class Groups:
    """Patches laid out in rows, [rows, places], so that those which attend to each other are in one; they have one code there.

    `patches` int64 [rows, places] is the patch in each place (the first where there is none), `filled` bool tells where there is
    one, and `places` int64 [patches] is where each patch lies among all. `codes` int64 [patches] is below `CODES`. `shape` is
    what rows and places are in shapes.
    """

    patches: str
    filled: str
    places: str
    codes: str
    shape: tuple[str, str | int]

    @staticmethod
    def of(graph: Graph, laid: tuple[str, str], extents: tuple[str, str], shape: tuple[str, str | int], codes: str = "") -> Groups:
        """Return the layout of patches whose rows and places in them are known; `extents` are how many of each there are, [1]."""
        row, place = laid
        places = graph.op("Add", graph.op("Mul", row, extents[1]), place)
        empty = graph.op("Expand", graph.const([-1]), graph.op("Mul", *extents))
        patches = graph.op("ScatterElements", empty, places, graph.arange(graph.extent(row, 0)), axis=0)
        patches = graph.op("Reshape", patches, graph.op("Concat", *extents, axis=0))
        filled = graph.op("GreaterOrEqual", patches, graph.const(0))
        codes = codes or graph.op("Mul", row, graph.const(0))
        return Groups(graph.op("Max", patches, graph.const(0)), filled, places, codes, shape)


@dataclass(frozen=True)
class PatchGrid:
    """The places of patches that lie one image after the other, frame by frame, in squares of `merge` by `merge`.

    Of each patch, int64 [patches]: its `image`, its frame in it and its place in that, its row and column; `heights` and
    `widths` of its frame, in patches. `grids` are the frames, rows and columns of each image, int64 [images].
    """

    graph: Graph
    grids: tuple[str, str, str]
    image: str
    frame: str
    place: str
    row: str
    column: str
    heights: str
    widths: str

    @staticmethod
    def of(graph: Graph, grids: str, count: str, merge: int) -> PatchGrid:
        """Return the places of `count` patches (int64 [1]) of images whose frames, rows and columns are `grids` [images, 3]."""
        frames, rows, columns = (graph.reshape(each, [-1]) for each in graph.split(grids, [1, 1, 1], axis=1))
        ends = graph.op("CumSum", graph.op("Mul", frames, graph.op("Mul", rows, columns)), graph.const(0))
        patch = graph.arange(count)
        passed = graph.op("GreaterOrEqual", graph.reshape(patch, [-1, 1]), graph.reshape(ends, [1, -1]))
        image = graph.op("ReduceSum", graph.cast(passed, np.int64), graph.const([1]), keepdims=0)
        heights, widths = (graph.op("Gather", each, image) for each in (rows, columns))
        start = graph.op("Gather", _before(graph, ends), image)
        frame, place = _divided(graph, graph.op("Sub", patch, start), graph.op("Mul", heights, widths))
        square, inside = _divided(graph, place, graph.const(merge * merge))
        square_row, square_column = _divided(graph, square, graph.op("Div", widths, graph.const(merge)))
        row, column = _divided(graph, inside, graph.const(merge))
        row = graph.op("Add", graph.op("Mul", square_row, graph.const(merge)), row)
        column = graph.op("Add", graph.op("Mul", square_column, graph.const(merge)), column)
        return PatchGrid(graph, (frames, rows, columns), image, frame, place, row, column, heights, widths)

    def frames(self) -> Groups:
        """Return the frames as groups. Small ones share a row: those that begin in one stretch as long as the largest.

        So a row is at most twice as long as the largest frame, and rows of frames of one size have no empty places.
        """
        graph, (frames, rows, columns) = self.graph, self.grids
        largest = graph.op("ReduceMax", graph.op("Mul", rows, columns), keepdims=1)
        number = graph.op("Add", self._numbered(frames)[0], self.frame)
        patch = graph.arange(graph.extent(self.place, 0))
        stretch = graph.op("Div", graph.op("Sub", patch, self.place), largest)
        former = graph.op("Concat", graph.const([-1]), graph.slice(stretch, 0, -1, 0), axis=0)
        codes = graph.op("Mod", number, graph.const(CODES))
        first_of_codes = graph.op("Equal", graph.op("Add", codes, self.place), graph.const(0))
        begins = graph.op("Or", graph.op("Not", graph.op("Equal", stretch, former)), first_of_codes)
        row = graph.op("Sub", graph.op("CumSum", graph.cast(begins, np.int64), graph.const(0)), graph.const(1))
        starts = graph.reshape(graph.op("NonZero", begins), [-1])
        place = graph.op("Sub", patch, graph.op("Gather", starts, row))
        longest = graph.op("Add", graph.op("ReduceMax", place, keepdims=1), graph.const(1))
        return Groups.of(graph, (row, place), (graph.extent(starts, 0), longest), ("frame_rows", "frame_places"), codes)

    def windows(self, side: int) -> Groups:
        """Return the windows of `side` by `side` patches as groups; those at the right and lower edge of a frame may be smaller."""
        graph, (frames, rows, columns), length = self.graph, self.grids, self.graph.const(side)
        down, across = (self._windows_along(each, side) for each in (rows, columns))
        window_row, row = _divided(graph, self.row, length)
        window_column, column = _divided(graph, self.column, length)
        number, count = self._numbered(graph.op("Mul", frames, graph.op("Mul", down, across)))
        above = graph.op("Add", graph.op("Mul", self.frame, self._windows_along(self.heights, side)), window_row)
        left = graph.op("Add", graph.op("Mul", above, self._windows_along(self.widths, side)), window_column)
        place = graph.op("Add", graph.op("Mul", row, length), column)
        laid = (graph.op("Add", number, left), place)
        return Groups.of(graph, laid, (count, graph.const([side * side])), ("windows", side * side))

    def _windows_along(self, extent: str, side: int) -> str:
        graph = self.graph
        return graph.op("Div", graph.op("Add", extent, graph.const(side - 1)), graph.const(side))

    def _numbered(self, counts: str) -> tuple[str, str]:
        """Return, where each image has so many groups, how many come before each patch's image, and how many there are, [1]."""
        graph = self.graph
        ends = graph.op("CumSum", counts, graph.const(0))
        return graph.op("Gather", _before(graph, ends), self.image), graph.slice(ends, -1, None, 0)


def _before(graph: Graph, ends: str) -> str:
    """Return sums up to but without each, given those that include it."""
    return graph.op("Concat", graph.const([0]), graph.slice(ends, 0, -1, 0), axis=0)


def _divided(graph: Graph, value: str, divisor: str) -> tuple[str, str]:
    return graph.op("Div", value, divisor), graph.op("Mod", value, divisor)
