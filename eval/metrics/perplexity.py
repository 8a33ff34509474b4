"""Perplexity: exp of the mean negative log-likelihood over all scored tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compress.eval.metrics.metric import Metric
from compress.eval.statistics.estimates import bounded_exp


def perplexity(windows: Sequence[Any]) -> float:
    """Return the perplexity of windows with their tokens and summed negative log-likelihoods `nll`, in nats."""
    return bounded_exp(math.fsum(window.nll for window in windows) / sum(window.tokens for window in windows))


PERPLEXITY = Metric("perplexity", aggregate=perplexity, assumed=None, percent=False, larger_is_better=False)
