"""Accuracy of classification: the share of images whose likeliest class is the right one."""

from __future__ import annotations

from compress.eval.metrics.metric import Metric

ACCURACY = Metric("accuracy")
