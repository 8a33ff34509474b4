"""Which option of a multiple choice a free answer names, by the rules of MMMU (arXiv 2311.16502)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
"""The letters by which options are named, in their order."""

_EDGES = string.punctuation + string.whitespace
_MANY_WORDS = 5


def letter(said: str, accepted: Sequence[str]) -> float:
    """Return 1.0 where the last letter that an answer names is an accepted one."""
    named = _lettered(said, len(LETTERS))
    return float(named is not None and LETTERS[named] in {answer.strip().upper() for answer in accepted})


def named_option(said: str, options: Sequence[str]) -> int | None:
    """Return the place of the option that an answer names, None where it names none.

    In this order: the answer is a letter alone, also a small one; it is an option's text; it has a letter in brackets, `(B)`; it
    has a letter as a word of its own, `B`, `B.`, `B:`; it is longer than five words and contains an option's text. The last one
    named counts. Unlike in MMMU's script, nothing is drawn by lot where no option is named.
    """
    plain = said.strip(_EDGES).casefold()
    equal = [place for place, option in enumerate(options) if plain and option.strip(_EDGES).casefold() == plain]
    if len(equal) == 1 and _alone(said, len(options)) is None:
        return equal[0]
    named = _lettered(said, len(options))
    if named is not None or len(said.split()) <= _MANY_WORDS:
        return named
    places = [
        (said.casefold().rfind(option.strip().casefold()), len(option), place) for place, option in enumerate(options) if option
    ]
    last, _, place = max(places, default=(-1, 0, 0))
    return place if last >= 0 else None


def _lettered(said: str, count: int) -> int | None:
    """Return the place of the last letter that stands for an option: alone, in brackets, or as a word."""
    letters, alone = LETTERS[:count], _alone(said, count)
    if alone is not None:
        return alone
    for pattern in (rf"\(([{letters}])\)", rf"(?<![\w'])([{letters}])(?![\w'])"):
        found = re.findall(pattern, said)
        if found:
            return letters.index(found[-1])
    return None


def _alone(said: str, count: int) -> int | None:
    plain = said.strip(_EDGES).upper()
    return LETTERS.index(plain) if len(plain) == 1 and plain in LETTERS[:count] else None
