"""Recall@1 of retrieval, an image's score being the mean of both directions."""

from __future__ import annotations

from compress.eval.metrics.metric import Metric
from compress.eval.statistics.power import AssumedChanges

# One direction that flips moves the mean by half. Either may, so twice as many items change as with one right or wrong answer.
RECALL = Metric("recall@1", assumed=AssumedChanges(changed=0.1, step=0.5))
