"""Runs the decoder's graph over a batch, token by token, with a preallocated KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.runtimes.onnxruntime.inputs import CROSS_MASK, DEEPSTACK_INPUT, PAST, PRESENT, Graphs, Prepared

_LOGITS = "logits"
_EMBEDS = "inputs_embeds"


class BatchDecoder:
    """One batch and its KV cache.

    The cache has `capacity` tokens per row and is never copied: the decoder writes new keys and values into the buffers it reads.
    Each row's next token follows its own last one, so rows differ in length.
    """

    def __init__(self, graphs: Graphs, prepared: Prepared, capacity: int) -> None:
        self._graphs = graphs
        self._prepared = prepared
        self._lengths = prepared.lengths.copy()
        decoder = graphs.decoder
        cache: dict[str, Any] = {}
        for name in decoder.outputs:
            if name.startswith(PRESENT):
                declared = decoder.inputs[name.replace(PRESENT, PAST, 1)]
                _, heads, _, width = declared.shape
                # Zeros, not empty memory: a NaN in an unused slot times a weight of 0 is NaN.
                cache[name] = decoder.to_device(np.zeros((len(self._lengths), int(heads), capacity, int(width)), declared.dtype))
        cache_inputs = {name.replace(PRESENT, PAST, 1): value for name, value in cache.items()}
        cache_inputs |= {
            name: decoder.to_device(value.astype(decoder.inputs[name].dtype)) for name, value in prepared.states.items()
        }
        # One buffer is input and output: GroupQueryAttention writes in place when the two are the same memory.
        self._bound = decoder.bind(cache_inputs, cache)

    def begin(self) -> NDArray[np.float32]:
        """Prefill the batch and return the logits of each row's next token [samples, vocabulary]."""
        logits = self.prefill(1)[:, 0]
        prepared, rows, ends = self._prepared, np.arange(len(self._lengths)), self._lengths - 1
        if (ends + 1 == prepared.padded_length).all():
            return logits
        # Rows end at different positions. Logits for all of them would take much memory: each row's last token is run again.
        feeds = {_EMBEDS: prepared.embeds[rows, ends][:, None], "position_ids": prepared.positions[..., rows, ends][..., None]}
        if prepared.deepstack is not None:
            feeds[DEEPSTACK_INPUT] = prepared.deepstack[:, rows, ends][:, :, None]
        return self._append(feeds, ends)

    def prefill(self, keep: int) -> NDArray[np.float32]:
        """Prefill the batch and return the logits of the last `keep` positions, padding included [samples, keep, vocabulary]."""
        prepared = self._prepared
        feeds: dict[str, Any] = {
            _EMBEDS: prepared.embeds,
            # Ones on the left: GroupQueryAttention reads each row's number of tokens from the sum alone.
            "attention_mask": np.arange(prepared.padded_length) < prepared.lengths[:, None],
            "position_ids": prepared.positions,
        }
        if prepared.cross_mask is not None:
            feeds[CROSS_MASK] = prepared.cross_mask
        if prepared.deepstack is not None:
            feeds[DEEPSTACK_INPUT] = prepared.deepstack
        return self._run(feeds, keep)

    def step(self, tokens: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Append a token to each active row and return the logits of the next [samples, vocabulary]; others are meaningless."""
        prepared, indices = self._prepared, self._lengths
        # With images M-RoPE's positions run behind the index: an image of many tokens advances them by its longer side only.
        positions = (indices + prepared.offsets)[:, None]
        feeds: dict[str, Any] = {
            _EMBEDS: self._graphs.embed.run({"input_ids": tokens[:, None]}, on_device=(_EMBEDS,))[_EMBEDS],
            "position_ids": np.broadcast_to(positions, (*prepared.positions.shape[:-1], 1)),
        }
        if prepared.deepstack is not None:
            # New tokens are text, to which no image feature is added.
            feeds[DEEPSTACK_INPUT] = np.zeros_like(prepared.deepstack[:, :, :1])
        # A finished row keeps its length: its further tokens overwrite one slot, and the buffer cannot overflow.
        self._lengths = indices + active
        return self._append(feeds, indices)

    def _append(self, feeds: dict[str, Any], indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one token per row, at its index in the row [samples], and return the logits of the next."""
        prepared = self._prepared
        feeds["attention_mask"] = np.arange(indices.max() + 1) <= indices[:, None]
        if prepared.cross_mask is not None:
            # A new token sees the images that the prompt's last token saw, as in transformers.
            feeds[CROSS_MASK] = prepared.cross_mask[np.arange(len(indices)), prepared.lengths - 1][:, None]
        return self._run(feeds, 1)[:, 0]

    def _run(self, feeds: dict[str, Any], keep: int) -> NDArray[np.float32]:
        feeds["num_logits_to_keep"] = np.array(keep, dtype=np.int64)
        return self._graphs.decoder.run(feeds, self._bound)[_LOGITS]
