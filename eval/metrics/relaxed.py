"""ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1): numbers within 5 %, other answers equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.eval.metrics.metric import Metric

_TOLERANCE = 0.05
"""The paper's relative tolerance for numbers."""


def relaxed(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where an answer is within 5 % of an accepted number, or equals another accepted answer up to case.

    As the evaluations in use read it (Pix2Struct, arXiv 2210.03347, and those after it): a percent sign divides by 100, years are
    numbers like others, and an accepted 0 is compared as a text.
    """
    return float(any(_agrees(answer.strip(), reference.strip()) for reference in accepted))


def _agrees(answer: str, reference: str) -> bool:
    value, expected = _number(answer), _number(reference)
    # A relative tolerance of 0 is 0: an accepted 0 is compared as text.
    if value is None or not expected:
        return answer.casefold() == reference.casefold()
    return abs(value - expected) / abs(expected) <= _TOLERANCE


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    # Python reads "nan" and "infinity" as floats; as answers they are words.
    return value if math.isfinite(value) else None


RELAXED = Metric(
    "relaxed",
    relaxed,
    kinds=("vqa",),
    note="share of questions{drawn} whose answer is within 5 % of an accepted number or equals an accepted text (ChartQA)",
)
