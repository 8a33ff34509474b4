"""A decoder's graph over a batch, token by token, with keys and values that stay in one place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.runtimes.onnxruntime_inputs import LEVELS_IN, PAST, PRESENT, SEEN, Graphs, Prepared

_LOGITS = "logits"
_EMBEDS = "inputs_embeds"


class Decoding:
    """One batch while it is read and written.

    Keys and values have room for `room` tokens a row from the start and never move: what the decoder appends, it writes into the
    very memory that it is given to read. Row b's next token takes the place after its own last one, so rows differ in length.
    """

    def __init__(self, graphs: Graphs, prepared: Prepared, room: int) -> None:
        self._graphs = graphs
        self._prepared = prepared
        self._lengths = prepared.lengths.copy()
        decoder = graphs.decoder
        cache: dict[str, Any] = {}
        for name in decoder.outputs:
            if name.startswith(PRESENT):
                declared = decoder.inputs[name.replace(PRESENT, PAST, 1)]
                _, heads, _, width = declared.shape
                cache[name] = decoder.hold(np.zeros((len(self._lengths), int(heads), room, int(width)), declared.dtype))
        read = {name.replace(PRESENT, PAST, 1): value for name, value in cache.items()}
        read |= {name: decoder.hold(value.astype(decoder.inputs[name].dtype)) for name, value in prepared.states.items()}
        self._kept = decoder.keep(read, cache)

    def begin(self) -> NDArray[np.float32]:
        """Read the whole batch and return the logits of each row's first token to come [samples, vocabulary]."""
        logits = self.prefill(1)[:, 0]
        prepared, rows, ends = self._prepared, np.arange(len(self._lengths)), self._lengths - 1
        if (ends + 1 == prepared.longest).all():
            return logits
        # Logits for every place at which a row may end would take much memory: the rows' last tokens are read once more instead.
        given = {_EMBEDS: prepared.embeds[rows, ends][:, None], "position_ids": prepared.positions[..., rows, ends][..., None]}
        if prepared.levels is not None:
            given[LEVELS_IN] = prepared.levels[:, rows, ends][:, :, None]
        return self._append(given, ends)

    def prefill(self, keep: int) -> NDArray[np.float32]:
        """Read the whole batch and return the logits of the last `keep` places, padding included, [samples, keep, vocabulary]."""
        prepared = self._prepared
        given: dict[str, Any] = {
            _EMBEDS: prepared.embeds,
            "attention_mask": np.arange(prepared.longest) < prepared.lengths[:, None],
            "position_ids": prepared.positions,
        }
        if prepared.seen is not None:
            given[SEEN] = prepared.seen
        if prepared.levels is not None:
            given[LEVELS_IN] = prepared.levels
        return self._run(given, keep)

    def step(self, tokens: NDArray[np.int64], going: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Append a token to each row and return the logits of the next [samples, vocabulary].

        Those of rows that are not `going` mean nothing: such a row stays as long as it is.
        """
        prepared, places = self._prepared, self._lengths
        positions = (places + prepared.offsets)[:, None]
        given: dict[str, Any] = {
            _EMBEDS: self._graphs.embed.run({"input_ids": tokens[:, None]}, staying=(_EMBEDS,))[_EMBEDS],
            "position_ids": np.broadcast_to(positions, (*prepared.positions.shape[:-1], 1)),
        }
        if prepared.levels is not None:
            given[LEVELS_IN] = np.zeros_like(prepared.levels[:, :, :1])
        self._lengths = places + going
        return self._append(given, places)

    def _append(self, given: dict[str, Any], places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read one token a row, at the place where each stands, and return the logits of the next."""
        prepared = self._prepared
        given["attention_mask"] = np.arange(places.max() + 1) <= places[:, None]
        if prepared.seen is not None:
            given[SEEN] = prepared.seen[np.arange(len(places)), prepared.lengths - 1][:, None]
        return self._run(given, 1)[:, 0]

    def _run(self, given: dict[str, Any], keep: int) -> NDArray[np.float32]:
        given["num_logits_to_keep"] = np.array(keep, dtype=np.int64)
        return self._graphs.decoder.run(given, self._kept)[_LOGITS]
