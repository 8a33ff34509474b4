"""Parsing the option that a generated answer to a multiple choice names, as MMMU does (arXiv 2311.16502)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from compress.eval.metrics.metric import Metric

LETTERS = string.ascii_uppercase
"""The options' letters, in order."""

_EDGES = string.punctuation + string.whitespace
"""Stripped from an answer before it is compared with a letter or an option: models answer `B.`, `(B)` or `B `."""

_SHORT_ANSWER_WORDS = 5
"""MMMU's limit: only longer answers are searched for an option's text."""


def letter(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where the last letter that an answer names is an accepted one."""
    named = _named_letter(answer, len(LETTERS))
    return float(named is not None and LETTERS[named] in {reference.strip().upper() for reference in accepted})


def named_option(answer: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that an answer names, None where it names none.

    In this order: the answer is a letter alone, also a small one; it is an option's text; it has a letter in brackets, `(B)`; it
    has a letter as a word of its own, `B`, `B.`, `B:`; it is longer than five words and contains an option's text. The last one
    named counts. Unlike in MMMU's script, no option is picked at random where none is named.
    """
    plain = answer.strip(_EDGES).casefold()
    equal = [index for index, option in enumerate(options) if plain and option.strip(_EDGES).casefold() == plain]
    if len(equal) == 1 and _single_letter(answer, len(options)) is None:
        return equal[0]
    named = _named_letter(answer, len(options))
    if named is not None or len(answer.split()) <= _SHORT_ANSWER_WORDS:
        return named
    positions = [
        (answer.casefold().rfind(option.strip().casefold()), len(option), index) for index, option in enumerate(options) if option
    ]
    position, _, index = max(positions, default=(-1, 0, 0))
    return index if position >= 0 else None


def _named_letter(answer: str, count: int) -> int | None:
    """Return the index of the last letter that names an option: alone, in brackets, or as a word."""
    letters, single = LETTERS[:count], _single_letter(answer, count)
    if single is not None:
        return single
    # Brackets first: "A photo shows (C)" names C. Capitals alone, as "a" is an article; none after an apostrophe, as in "I'D".
    for pattern in (rf"\(([{letters}])\)", rf"(?<![\w'])([{letters}])(?![\w'])"):
        matches = re.findall(pattern, answer)
        if matches:
            # The last: models reason before they conclude.
            return letters.index(matches[-1])
    return None


def _single_letter(answer: str, count: int) -> int | None:
    plain = answer.strip(_EDGES).upper()
    return LETTERS.index(plain) if len(plain) == 1 and plain in LETTERS[:count] else None


NAMED_LETTER = Metric(
    "letter", letter, kinds=("vqa", "choice"), note="share of questions{drawn} whose answer names the accepted letter"
)
