"""The graphs of a model that writes, run by ONNX Runtime alone: embeddings, a prompt in one step, further tokens one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from compress.checkpoints.checkpoint import open_checkpoint
from compress.export.onnx.graphs.layer_builder import Source
from compress.export.onnx.graphs.write import Precision, write_graphs
from compress.families.resolve import family_at
from compress.progress import Silent

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """A prompt and its continuation: embeddings [tokens, hidden], and the image tiles each token attends to [tokens, tiles].

    `positions` are its tokens' positions where there are several streams of them, [streams, tokens], and `deepstack` what is added
    to their states after the first blocks, [levels, tokens, hidden].
    """

    embeds: Array
    cross_mask: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    positions: NDArray[np.int64] | None = None
    deepstack: Array | None = None


@dataclass(frozen=True)
class Graphs:
    """A folder's sessions, by the names of their graphs."""

    folder: Path
    sessions: Mapping[str, Any]

    def run(self, name: str, **feeds: Array) -> dict[str, Array]:
        """Return a graph's outputs by their names."""
        session = self.sessions[name]
        return dict(zip((output.name for output in session.get_outputs()), session.run(None, feeds), strict=True))

    def embed(self, ids: Sequence[int]) -> Array:
        """Return the embeddings of tokens, [tokens, hidden]."""
        return self.run("embed_tokens", input_ids=np.array([ids], np.int64))["inputs_embeds"][0]

    def operators(self, name: str) -> list[str]:
        """Return the kinds of a graph's operators."""
        return [node.op_type for node in onnx.load(str(self.folder / f"{name}.onnx"), load_external_data=False).graph.node]

    def logits(self, rows: Sequence[Row], steps: int, states: Mapping[str, Array] | None = None) -> list[Array]:
        """Return the logits [tokens, vocabulary] of rows of a batch padded on the right; of each the last `steps` tokens are
        decoded with the cache, one by one. `states` are the keys and values of cross-attention."""
        declared: dict[str, Any] = {value.name: value for value in self.sessions["decoder_model_merged"].get_inputs()}
        dtype = np.float16 if declared["inputs_embeds"].type == "tensor(float16)" else np.float32
        cross_states: dict[str, Array] = {name: value.astype(dtype) for name, value in (states or {}).items()}
        lengths = [len(row.embeds) - steps for row in rows]
        cache: dict[str, Array] = {
            name: np.zeros((len(rows), value.shape[1], 0, value.shape[3]), dtype)
            for name, value in declared.items()
            if name.startswith("past_key_values.") and name not in cross_states
        }
        rows_logits: list[list[Array]] = [[] for _ in rows]
        past = 0
        for step in range(steps + 1):
            spans = [(length + step - 1, length + step) if step else (0, length) for length in lengths]
            inputs = _step(rows, spans, past, dtype)
            outputs = self.run(
                "decoder_model_merged", **cross_states, **cache, **{name: inputs[name] for name in inputs if name in declared}
            )
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            past += inputs["inputs_embeds"].shape[1]
            for row, (start, end) in enumerate(spans):
                rows_logits[row].append(outputs["logits"][row, : end - start])
        return [np.concatenate(steps_logits) for steps_logits in rows_logits]


def _step(rows: Sequence[Row], spans: Sequence[tuple[int, int]], past: int, dtype: Any) -> dict[str, Array]:
    """Return a step's inputs: of each row the tokens of its span, after `past` cached tokens."""
    longest = max(end - start for start, end in spans)
    tiles = max(row.cross_mask.shape[1] for row in rows)
    embeds = np.zeros((len(rows), longest, rows[0].embeds.shape[1]), dtype)
    mask = np.zeros((len(rows), past + longest), np.int64)
    streams = 1 if rows[0].positions is None else len(rows[0].positions)
    positions = np.zeros((streams, len(rows), longest), np.int64)
    levels = 0 if rows[0].deepstack is None else len(rows[0].deepstack)
    deepstack = np.zeros((levels, *embeds.shape), dtype)
    cross_mask = np.zeros((len(rows), longest, tiles), np.int64)
    for row, (start, end) in enumerate(spans):
        embeds[row, : end - start] = rows[row].embeds[start:end]
        mask[row, :end] = 1
        row_positions = rows[row].positions
        positions[:, row, : end - start] = np.arange(start, end) if row_positions is None else row_positions[:, start:end]
        if (added := rows[row].deepstack) is not None:
            deepstack[:, row, : end - start] = added[:, start:end]
        visible = rows[row].cross_mask[start:end]
        cross_mask[row, : len(visible), : visible.shape[1]] = visible
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": positions[0] if rows[0].positions is None else positions,
        "deepstack_embeds": deepstack,
        "cross_attention_mask": cross_mask,
        "num_logits_to_keep": np.array(0, np.int64),
    }


def written(folder: Path, target: Path, precision: Precision | None = None) -> Graphs:
    """Write a checkpoint's graphs and open them, each checked with full shape inference."""
    target.mkdir()
    source = Source.of(open_checkpoint(folder), family_at(folder))
    runtime: Any = onnxruntime
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions: dict[str, Any] = {}
    for path in write_graphs(source, precision or Precision("float32"), target, Silent()):
        onnx.checker.check_model(str(path), full_check=True)
        sessions[path.stem] = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Graphs(target, sessions)
