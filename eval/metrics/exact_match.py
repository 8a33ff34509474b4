"""Exact match after the answer normalization of VQA v2."""

from __future__ import annotations

from collections.abc import Sequence

from compress.eval.metrics.metric import Metric
from compress.eval.metrics.normalize import normalize


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where an answer equals an accepted one after normalization."""
    normalized = normalize(answer)
    return float(any(normalized == normalize(reference) for reference in accepted))


EXACT_MATCH = Metric(
    "exact_match",
    exact_match,
    kinds=("vqa",),
    note="share of questions{drawn} whose answer equals an accepted one after VQA v2's normalization",
)
