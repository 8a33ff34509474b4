"""Latency of each component of an ONNX artifact in this process: the vision encoder's graph, prefill and decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from compress.data.prompts import Prompt
from compress.errors import DataError
from compress.eval.latency.results import Component, ComponentTable
from compress.eval.latency.settings import LoadPoint
from compress.runtimes.components import DECODED, component_of
from compress.runtimes.inputs import Encoded
from compress.runtimes.onnxruntime.decoder import BatchDecoder
from compress.runtimes.onnxruntime.inputs import Preparer
from compress.runtimes.onnxruntime.session import OnnxruntimeSession, open_session
from compress.runtimes.runtime import Generates, OpenContext, capable

if TYPE_CHECKING:
    from compress.runtimes.onnxruntime.runtime import Onnxruntime

Result = TypeVar("Result")


def measure_components(
    runtime: Onnxruntime, context: OpenContext, point: LoadPoint, prompt: Prompt, repeats: int
) -> ComponentTable:
    """Return the time of each component; a prompt without an image has no vision encoder row. See `Runtime.time_components`.

    The projector is in the vision encoder's graph; a decode step includes the lookup of the token's embedding.

    Raises:
        UsageError: the model generates no text.
        CheckpointError: the artifact cannot be read or exported.
        DataError: the model cannot take the prompt.
    """
    with open_session(runtime, context) as session:
        capable(session, Generates)
        assert isinstance(session, OnnxruntimeSession)
        preparer, faults = session.preparer, dict[int, str]()
        # Room for the same tokens as transformers' components are timed with: the two tables compare.
        batches = list(preparer.encoder.prompts([prompt], DECODED + 1, faults))
        if not batches:
            raise DataError(f"{context.artifact}: the parts of the model cannot be timed: {faults[0]}")
        (batch,) = batches
        rows: list[dict[str, float]] = []
        with context.progress.task("time components", repeats, "repeats") as advance:
            for repeat in range(repeats + 1):
                row = _times(preparer, batch)
                if repeat:
                    rows.append(row)
                    advance(1)
        graph = preparer.graphs.decoder
        names = ("vision", "prefill", "decode") if "vision" in rows[0] else ("prefill", "decode")
        components: list[Component] = [component_of(name, [row[name] for row in rows]) for name in names]
        return ComponentTable(
            runtime=runtime.runtime,
            device=graph.device,
            dtype=str(graph.inputs["inputs_embeds"].dtype),
            point=point,
            sequence_tokens=batch[0].length,
            components=tuple(components),
        )


def _times(preparer: Preparer, batch: Sequence[Encoded]) -> dict[str, float]:
    """Return the milliseconds of each component in one run."""
    milliseconds: dict[str, float] = {}
    # Timed apart and handed on, as `prepare` would compute them within the prefill's time.
    features, seconds = _timed(lambda: preparer.features(batch))
    if features:
        milliseconds["vision"] = 1000 * seconds
    prepared = preparer.prepare(batch, features)
    decoder = BatchDecoder(preparer.graphs, prepared, prepared.padded_length + DECODED)
    logits, seconds = _timed(decoder.begin)
    milliseconds["prefill"] = 1000 * seconds
    active, steps = np.ones(1, dtype=np.bool_), list[float]()
    for _ in range(DECODED):
        tokens = logits.argmax(axis=1)
        logits, seconds = _timed(lambda tokens=tokens: decoder.step(tokens, active))
        steps.append(seconds)
    milliseconds["decode"] = 1000 * statistics.fmean(steps)
    return milliseconds


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began
