"""CIDEr-D of captions (arXiv 1411.5726, equations 1 to 4), with the settings of the COCO caption evaluation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST = 4
_SIGMA = 6.0
_SCALE = 10.0
_TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)*|\w+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:-\w+)*|[^\w\s]",
)
_PUNCTUATION = frozenset("'`\".?!,:-;()[]{}\u2026\u2018\u201c\u201d\u2013\u2014")

NGram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """A caption's n-grams of one length with their weights, and the length of that vector."""

    weights: dict[NGram, float]
    norm: float


@dataclass(frozen=True)
class _Caption:
    """A caption: a vector for each length of n-grams, and how many pairs of words it has, which measures its length."""

    vectors: tuple[_Vector, ...]
    pairs: int


class Cider:
    """The score of captions beside a set of images' reference captions, by which the n-grams are weighed."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """Count in how many images' references each n-gram stands; `references` has one entry for each image."""
        self._frequency = Counter[NGram]()
        for captions in references:
            self._frequency.update({ngram for caption in captions for ngram in _ngrams(tokens(caption))})
        self._images = math.log(len(references)) if references else 0.0

    def score(self, said: str, references: Sequence[str]) -> float:
        """Return the CIDEr-D of one caption from 0 to 10: a usual figure of "120" is 1.2 here.

        It is ten times the mean, over n from 1 to 4 and over the references, of the cosine of the n-grams' weights (count times
        the log of images by images that have it), where no count exceeds the reference's, times a Gaussian of the difference of
        lengths with a deviation of 6. An image alone has no weights, and every score is 0.
        """
        caption = self._weigh(said)
        total = math.fsum(_similarity(caption, self._weigh(reference)) for reference in references)
        return _SCALE * total / len(references) if references else 0.0

    def _weigh(self, text: str) -> _Caption:
        counts = _ngrams(tokens(text))
        vectors = list[_Vector]()
        for length in range(1, _LONGEST + 1):
            weights = {
                ngram: count * (self._images - math.log(max(1, self._frequency[ngram])))
                for ngram, count in counts.items()
                if len(ngram) == length
            }
            vectors.append(_Vector(weights, math.sqrt(math.fsum(weight**2 for weight in weights.values()))))
        return _Caption(tuple(vectors), sum(count for ngram, count in counts.items() if len(ngram) == 2))


def tokens(text: str) -> list[str]:
    """Return a caption's words in lower case, clitics apart and punctuation left out, as the Penn Treebank tokenizer gives them.

    The COCO evaluation runs Stanford's; plain captions come out the same, but its lists of abbreviations are not here.
    """
    found: list[str] = _TOKEN.findall(text.lower().replace("\u2019", "'"))
    return [token for token in found if token not in _PUNCTUATION]


def _ngrams(words: Sequence[str]) -> Counter[NGram]:
    return Counter(
        tuple(words[start : start + length]) for length in range(1, _LONGEST + 1) for start in range(len(words) - length + 1)
    )


def _similarity(caption: _Caption, reference: _Caption) -> float:
    """Return the mean over the lengths of n-grams of the clipped cosine, less the more the captions' lengths differ."""
    cosines = list[float]()
    for ours, theirs in zip(caption.vectors, reference.vectors, strict=True):
        common = ours.weights.keys() & theirs.weights.keys()
        shared = math.fsum(min(ours.weights[ngram], theirs.weights[ngram]) * theirs.weights[ngram] for ngram in common)
        norms = ours.norm * theirs.norm
        cosines.append(shared / norms if norms else 0.0)
    penalty = math.exp(-((caption.pairs - reference.pairs) ** 2) / (2 * _SIGMA**2))
    return penalty * math.fsum(cosines) / _LONGEST
