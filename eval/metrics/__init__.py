"""The metrics of generated answers: one file and one table row each, imported on demand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

METRICS = {
    "exact_match": "compress.eval.metrics.normalize:exact_match",
    "relaxed": "compress.eval.metrics.relaxed:relaxed",
    "anls": "compress.eval.metrics.anls:anls",
    "vqa_vote": "compress.eval.metrics.vqa_vote:vqa_vote",
    "letter": "compress.eval.metrics.letter:letter",
    "yes_no": "compress.eval.metrics.yes_no:yes_no",
}
"""Name → the function that scores an answer against the accepted ones, from 0 to 1."""

BINARY = frozenset({"exact_match", "relaxed", "letter", "yes_no"})
"""The metrics whose score is 0 or 1."""

FIGURES = {"yes_no": "compress.eval.metrics.yes_no:yes_no_figures"}
"""Name → the function that returns a metric's further figures over all items, beside the mean score."""

Metric = Callable[[str, Sequence[str]], float]
"""Takes an answer and the accepted answers, and returns the score."""


def load_metric(name: str) -> Metric:
    """Return a metric by its name."""
    return cast("Metric", _load(METRICS[name]))


def figures_of(name: str, answers: Sequence[tuple[str | None, Sequence[str]]]) -> Mapping[str, float]:
    """Return a metric's further figures over all items: each an answer, None where it failed, and the accepted answers."""
    if name not in FIGURES:
        return {}
    return cast("Callable[[Sequence[tuple[str | None, Sequence[str]]]], Mapping[str, float]]", _load(FIGURES[name]))(answers)


def _load(row: str) -> object:
    module, _, function = row.partition(":")
    return getattr(importlib.import_module(module), function)
