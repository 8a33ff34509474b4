"""How long each part of an ONNX artifact takes in this process: the vision encoder's graph, prefill and decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from compress.errors import DataError
from compress.eval.latency import LoadPoint
from compress.eval.latency_results import Component, ComponentTable
from compress.runtimes.components import DECODED, component_of
from compress.runtimes.inputs import Encoded
from compress.runtimes.onnxruntime_decoder import Decoding
from compress.runtimes.onnxruntime_inputs import Preparer
from compress.runtimes.onnxruntime_session import OnnxruntimeSettings, open_session
from compress.runtimes.runtime import OpenContext, Prompt

Result = TypeVar("Result")


def measure_components(
    context: OpenContext, settings: OnnxruntimeSettings, point: LoadPoint, prompt: Prompt, repeats: int
) -> ComponentTable:
    """Return the time of each part, after one run that does not count; a prompt without an image does not reach the vision encoder.

    The projector lies in the vision encoder's graph, and a token's embedding is looked up in its step of decoding.

    Raises:
        UsageError: the model writes no text.
        CheckpointError: the artifact cannot be read, or not exported.
        DataError: the model takes no such prompt.
    """
    with open_session(context, settings) as session:
        preparer, faults = session.preparer(), dict[int, str]()
        batches = list(preparer.encoder.prompts([prompt], DECODED + 1, faults))
        if not batches:
            raise DataError(f"{context.artifact}: the parts of the model cannot be timed: {faults[0]}")
        (batch,) = batches
        rows: list[dict[str, float]] = []
        with context.progress.task("time components", repeats, "repeats") as advance:
            for number in range(repeats + 1):
                row = _times(preparer, batch)
                if number:
                    rows.append(row)
                    advance(1)
        graph = preparer.graphs.decoder
        parts = ("vision", "prefill", "decode") if "vision" in rows[0] else ("prefill", "decode")
        components: list[Component] = [component_of(part, [row[part] for row in rows]) for part in parts]
        return ComponentTable(
            runtime="onnxruntime",
            device=graph.device,
            dtype=str(graph.inputs["inputs_embeds"].dtype),
            point=point,
            sequence_tokens=batch[0].length,
            components=tuple(components),
        )


def _times(preparer: Preparer, batch: Sequence[Encoded]) -> dict[str, float]:
    """Return the milliseconds of each part in one run."""
    found: dict[str, float] = {}
    features, seconds = _timed(lambda: preparer.features(batch))
    if features:
        found["vision"] = 1000 * seconds
    prepared = preparer.prepare(batch, features)
    decoding = Decoding(preparer.graphs, prepared, prepared.longest + DECODED)
    logits, seconds = _timed(decoding.begin)
    found["prefill"] = 1000 * seconds
    going, steps = np.ones(1, dtype=np.bool_), list[float]()
    for _ in range(DECODED):
        tokens = logits.argmax(axis=1)
        logits, seconds = _timed(lambda tokens=tokens: decoding.step(tokens, going))
        steps.append(seconds)
    found["decode"] = 1000 * statistics.fmean(steps)
    return found


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began
