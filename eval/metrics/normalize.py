"""The answer normalization of VQA v2 (https://visualqa.org/evaluation.html)."""

from __future__ import annotations

import itertools
import re

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}

_CONTRACTIONS = (
    *("ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't", "hadn't've"),
    *("hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "i'd've", "i'm", "i've", "isn't", "it'd"),
    *("it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've", "needn't", "not've", "o'clock"),
    *("oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've", "somebody'd", "somebody'd've"),
    *("somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's", "something'd", "something'd've"),
    *("something'll", "that's", "there'd", "there'd've", "there're", "there's", "they'd", "they'd've", "they'll", "they're"),
    *("they've", "'twas", "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's"),
    *("where'd", "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll", "why're", "why's", "won't"),
    *("would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've"),
)


def _spellings(word: str) -> list[str]:
    """Return a contraction with every subset of its apostrophes: answers often lack some."""
    parts = word.split("'")
    return [
        "".join(map("".join, zip(parts, (*marks, ""), strict=True)))
        for marks in itertools.product(("", "'"), repeat=len(parts) - 1)
    ]


_APOSTROPHES = {spelling: word for word in _CONTRACTIONS for spelling in _spellings(word)}
"""Contractions with missing apostrophes → with all of them."""

# Before other punctuation: "1,000" must become 1000, not two words.
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
# The list of VQA v2's script; a period is punctuation only where no digit follows.
_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")


def normalize(answer: str) -> str:
    """Return an answer normalized for comparison.

    Lower case; commas between digits and periods that are no decimal point vanish; other punctuation but apostrophes and
    colons becomes a space (signs such as `$` and `%` mean something and stay); number words up to ten become digits;
    articles vanish; contractions get the apostrophes they lack; single spaces.
    """
    # Models write the typographic apostrophe, the reference answers the plain one.
    text = answer.lower().replace("\u2019", "'")
    text = _PUNCTUATION.sub(" ", _PERIOD.sub("", _THOUSANDS.sub("", text)))
    words = (_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(_APOSTROPHES.get(word, word) for word in words)
