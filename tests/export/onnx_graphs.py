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

from compress.checkpoint import open_checkpoint
from compress.export.graphs.layer_builder import Source
from compress.export.graphs.write import Precision, write_graphs
from compress.families import family_at
from compress.progress import Silent

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """A prompt and what is to follow it: embeddings [tokens, hidden], and which images' tiles each token sees [tokens, tiles].

    `places` are its tokens' positions where there are several streams of them, [streams, tokens], and `deepstack` what is added
    to their states after the first blocks, [levels, tokens, hidden].
    """

    embeds: Array
    seen: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    places: NDArray[np.int64] | None = None
    deepstack: Array | None = None


@dataclass(frozen=True)
class Graphs:
    """A folder's sessions, by the names of their graphs."""

    folder: Path
    sessions: Mapping[str, Any]

    def run(self, name: str, **given: Array) -> dict[str, Array]:
        """Return a graph's outputs by their names."""
        session = self.sessions[name]
        return dict(zip((output.name for output in session.get_outputs()), session.run(None, given), strict=True))

    def embed(self, ids: Sequence[int]) -> Array:
        """Return the embeddings of tokens, [tokens, hidden]."""
        return self.run("embed_tokens", input_ids=np.array([ids], np.int64))["inputs_embeds"][0]

    def operators(self, name: str) -> list[str]:
        """Return the kinds of a graph's operators."""
        return [node.op_type for node in onnx.load(str(self.folder / f"{name}.onnx"), load_external_data=False).graph.node]

    def logits(self, rows: Sequence[Row], steps: int, crossed: Mapping[str, Array] | None = None) -> list[Array]:
        """Return the logits [tokens, vocabulary] of rows of a batch padded on the right; of each the last `steps` tokens are
        decoded with the cache, one by one. `crossed` are keys and values that do not grow."""
        declared: dict[str, Any] = {each.name: each for each in self.sessions["decoder_model_merged"].get_inputs()}
        dtype = np.float16 if declared["inputs_embeds"].type == "tensor(float16)" else np.float32
        given: dict[str, Array] = {name: value.astype(dtype) for name, value in (crossed or {}).items()}
        lengths = [len(row.embeds) - steps for row in rows]
        cache: dict[str, Array] = {
            name: np.zeros((len(rows), each.shape[1], 0, each.shape[3]), dtype)
            for name, each in declared.items()
            if name.startswith("past_key_values.") and name not in given
        }
        found: list[list[Array]] = [[] for _ in rows]
        past = 0
        for step in range(steps + 1):
            spans = [(length + step - 1, length + step) if step else (0, length) for length in lengths]
            inputs = _step(rows, spans, past, dtype)
            outputs = self.run(
                "decoder_model_merged", **given, **cache, **{name: inputs[name] for name in inputs if name in declared}
            )
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            past += inputs["inputs_embeds"].shape[1]
            for row, (start, end) in enumerate(spans):
                found[row].append(outputs["logits"][row, : end - start])
        return [np.concatenate(each) for each in found]


def _step(rows: Sequence[Row], spans: Sequence[tuple[int, int]], past: int, dtype: Any) -> dict[str, Array]:
    """Return a step's inputs: of each row the tokens of its span, after `past` cached places."""
    longest = max(end - start for start, end in spans)
    tiles = max(row.seen.shape[1] for row in rows)
    embeds = np.zeros((len(rows), longest, rows[0].embeds.shape[1]), dtype)
    mask = np.zeros((len(rows), past + longest), np.int64)
    streams = 1 if rows[0].places is None else len(rows[0].places)
    places = np.zeros((streams, len(rows), longest), np.int64)
    levels = 0 if rows[0].deepstack is None else len(rows[0].deepstack)
    deepstack = np.zeros((levels, *embeds.shape), dtype)
    seen = np.zeros((len(rows), longest, tiles), np.int64)
    for row, (start, end) in enumerate(spans):
        embeds[row, : end - start] = rows[row].embeds[start:end]
        mask[row, :end] = 1
        given = rows[row].places
        places[:, row, : end - start] = np.arange(start, end) if given is None else given[:, start:end]
        if (added := rows[row].deepstack) is not None:
            deepstack[:, row, : end - start] = added[:, start:end]
        own = rows[row].seen[start:end]
        seen[row, : len(own), : own.shape[1]] = own
    return {
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "position_ids": places[0] if rows[0].places is None else places,
        "deepstack_embeds": deepstack,
        "cross_attention_mask": seen,
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
