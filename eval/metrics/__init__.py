"""How an answer is scored: one file per metric, a row of the table each, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

METRICS = {
    "exact_match": "compress.eval.normalize:exact_match",
    "relaxed": "compress.eval.metrics.relaxed:relaxed",
    "anls": "compress.eval.metrics.anls:anls",
    "vqa_vote": "compress.eval.metrics.vqa_vote:vqa_vote",
    "letter": "compress.eval.metrics.letter:letter",
    "yes_no": "compress.eval.metrics.yes_no:yes_no",
}
"""The metrics of one answer beside the accepted ones: name → the function that gives a score from 0 to 1."""

BINARY = frozenset({"exact_match", "relaxed", "letter", "yes_no"})
"""The metrics that say right (1) or wrong (0) and nothing between."""

FIGURES = {"yes_no": "compress.eval.metrics.yes_no:yes_no_figures"}
"""What a metric says of all items together, beside the mean of their scores: name → the function that gives it."""

Metric = Callable[[str, Sequence[str]], float]
"""Takes what was said and the accepted answers, and returns the score."""


def load_metric(name: str) -> Metric:
    """Return the function behind a name in the table."""
    return cast("Metric", _load(METRICS[name]))


def figures_of(name: str, answers: Sequence[tuple[str | None, Sequence[str]]]) -> Mapping[str, float]:
    """Return a metric's further figures over all items: what was said, None where there was no answer, and the accepted ones."""
    if name not in FIGURES:
        return {}
    return cast("Callable[[Sequence[tuple[str | None, Sequence[str]]]], Mapping[str, float]]", _load(FIGURES[name]))(answers)


def _load(row: str) -> object:
    module, _, function = row.partition(":")
    return getattr(importlib.import_module(module), function)
