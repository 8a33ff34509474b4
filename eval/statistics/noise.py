"""Tests of an artifact's KL and flips against the noise floor: the original's second run, in another order and in other batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compress.eval.results import AnyItem, ItemizedMeasurement, ScoredItem
from compress.eval.statistics.estimates import Excess, above_floor

ItemStatistic = Callable[[AnyItem], tuple[float, float] | None]
"""Returns an item's contribution to the sum and its weight, in tokens or items; None where it has none."""


def kl_above_noise(original: ItemizedMeasurement, artifact: ItemizedMeasurement, task: str, confidence: float) -> Excess | None:
    """Test whether an artifact's mean KL per token is above the noise floor; None where the original has no second run."""

    def kl(item: AnyItem) -> tuple[float, float] | None:
        item_kl, tokens = getattr(item, "kl", None), getattr(item, "tokens", 1)
        return None if item_kl is None or not tokens else (float(item_kl), float(tokens))

    return _excess(original, artifact.items[task], task, kl, confidence)


def flips_above_noise(original: ItemizedMeasurement, artifact: ItemizedMeasurement, task: str, confidence: float) -> Excess | None:
    """Test whether an artifact's share of flips is above the noise floor; None where the original has no second run."""
    scores = {item.id: item.score for item in original.scored(task)}

    def flipped(item: AnyItem) -> tuple[float, float] | None:
        return (float(item.score != scores[item.id]), 1.0) if isinstance(item, ScoredItem) and item.id in scores else None

    return _excess(original, artifact.items[task], task, flipped, confidence)


def _excess(
    original: ItemizedMeasurement, items: Sequence[AnyItem], task: str, statistic: ItemStatistic, confidence: float
) -> Excess | None:
    """Compare the artifact's mean over its items with the original's over the second run, clustered by image."""
    repeated: Mapping[str, AnyItem] = {item.id: item for item in original.repeated_items.get(task, ())}
    artifact_values = [statistic(item) or (0.0, 0.0) for item in items]
    # A weight of 0 keeps both arrays aligned with the artifact's items without counting what was not repeated.
    noise_values = [statistic(repeated[item.id]) or (0.0, 0.0) if item.id in repeated else (0.0, 0.0) for item in items]
    artifact, floor = np.array(artifact_values, dtype=np.float64), np.array(noise_values, dtype=np.float64)
    if not artifact.size or not artifact[:, 1].any() or not floor[:, 1].any():
        return None
    # Windows of a text have no cluster and are their own.
    clusters = np.unique([getattr(item, "cluster", item.id) for item in items], return_inverse=True)[1]
    excess = above_floor((artifact[:, 0], artifact[:, 1]), (floor[:, 0], floor[:, 1]), clusters, confidence)
    return excess if excess.interval is not None else None
