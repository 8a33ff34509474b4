"""Accuracy of multiple choice where the option with the highest log-likelihood counts as chosen."""

from __future__ import annotations

from compress.eval.metrics.metric import Metric

LIKELIHOOD = Metric("likelihood")
