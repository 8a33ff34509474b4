"""How far an artifact lies above the original's own noise: the original is asked again in another order and in other batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compress.eval.results import AnyItem, ItemizedMeasurement, ScoredItem
from compress.eval.statistics import Excess, above_floor

Value = Callable[[AnyItem], tuple[float, float] | None]
"""What an item adds to a sum, and for how many tokens or items it counts; None where nothing is known of it."""


def kl_above_noise(original: ItemizedMeasurement, artifact: ItemizedMeasurement, task: str, confidence: float) -> Excess | None:
    """Tell whether an artifact's mean KL per token is shown to be above the original's own; None where it was not asked again."""

    def kl(item: AnyItem) -> tuple[float, float] | None:
        found, tokens = getattr(item, "kl", None), getattr(item, "tokens", 1)
        return None if found is None or not tokens else (float(found), float(tokens))

    return _above(original, artifact.items[task], task, kl, confidence)


def flips_above_noise(original: ItemizedMeasurement, artifact: ItemizedMeasurement, task: str, confidence: float) -> Excess | None:
    """Tell whether an artifact's share of flips is shown to be above the original's own; None where it was not asked again."""
    scores = {item.id: item.score for item in original.scored(task)}

    def flipped(item: AnyItem) -> tuple[float, float] | None:
        return (float(item.score != scores[item.id]), 1.0) if isinstance(item, ScoredItem) and item.id in scores else None

    return _above(original, artifact.items[task], task, flipped, confidence)


def _above(original: ItemizedMeasurement, items: Sequence[AnyItem], task: str, value: Value, confidence: float) -> Excess | None:
    """Compare an artifact's mean over its items with the original's over those asked again; items of one image may depend."""
    repeated: Mapping[str, AnyItem] = {item.id: item for item in original.repeated_items.get(task, ())}
    own = [value(item) or (0.0, 0.0) for item in items]
    noise = [value(repeated[item.id]) or (0.0, 0.0) if item.id in repeated else (0.0, 0.0) for item in items]
    artifact, floor = np.array(own, dtype=np.float64), np.array(noise, dtype=np.float64)
    if not artifact.size or not artifact[:, 1].any() or not floor[:, 1].any():
        return None
    clusters = np.unique([getattr(item, "cluster", item.id) for item in items], return_inverse=True)[1]
    found = above_floor((artifact[:, 0], artifact[:, 1]), (floor[:, 0], floor[:, 1]), clusters, confidence)
    return found if found.interval is not None else None
