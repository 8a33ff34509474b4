"""The metrics: one file and one table row each, imported on demand."""

from __future__ import annotations

import importlib
from functools import cache

from compress.eval.metrics.metric import Metric

METRICS = {
    "exact_match": "compress.eval.metrics.exact_match:EXACT_MATCH",
    "relaxed": "compress.eval.metrics.relaxed:RELAXED",
    "anls": "compress.eval.metrics.anls:ANLS",
    "vqa_vote": "compress.eval.metrics.vqa_vote:VQA_VOTE",
    "letter": "compress.eval.metrics.letter:NAMED_LETTER",
    "yes_no": "compress.eval.metrics.yes_no:YES_NO",
    "likelihood": "compress.eval.metrics.likelihood:LIKELIHOOD",
    "cider": "compress.eval.metrics.cider:CIDER",
    "accuracy": "compress.eval.metrics.accuracy:ACCURACY",
    "recall@1": "compress.eval.metrics.recall:RECALL",
    "perplexity": "compress.eval.metrics.perplexity:PERPLEXITY",
}
"""Name → the metric's record."""


@cache
def load_metric(name: str) -> Metric:
    """Return a metric by its name; one of another harness, which has no row, is taken for a share of right items."""
    if name not in METRICS:
        return Metric(name)
    module, _, record = METRICS[name].partition(":")
    metric: Metric = getattr(importlib.import_module(module), record)
    return metric


def metrics_of(kind: str) -> tuple[str, ...]:
    """Return the names of the metrics that definitions of a kind of task may name."""
    return tuple(name for name in METRICS if kind in load_metric(name).kinds)
