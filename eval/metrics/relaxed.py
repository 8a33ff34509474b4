"""ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1): numbers may be 5 % off, everything else must be the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

_TOLERANCE = 0.05


def relaxed(said: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where what was said is within 5 % of an accepted number, or, of other answers, equals one but for case.

    As the evaluations in use read it (Pix2Struct, arXiv 2210.03347, and those after it): a percent sign divides by 100, years are
    numbers like others, and an accepted 0 is compared as a text.
    """
    return float(any(_agrees(said.strip(), answer.strip()) for answer in accepted))


def _agrees(said: str, accepted: str) -> bool:
    spoken, wanted = _number(said), _number(accepted)
    if spoken is None or not wanted:
        return said.casefold() == accepted.casefold()
    return abs(spoken - wanted) / abs(wanted) <= _TOLERANCE


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
