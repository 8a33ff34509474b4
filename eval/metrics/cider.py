"""CIDEr-D of captions (arXiv 1411.5726, equations 1 to 4), with the settings of the COCO caption evaluation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from compress.eval.metrics.metric import Metric
from compress.eval.statistics.power import AssumedChanges

_MAX_NGRAM = 4
"""CIDEr averages over n-grams of 1 to 4 words."""

_SIGMA = 6.0
"""The standard deviation of CIDEr-D's length penalty, in bigrams: the paper's σ, and the COCO evaluation's."""

_SCALE = 10.0
"""CIDEr-D is ten times the mean cosine: the COCO evaluation's factor."""

_TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)*|\w+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:-\w+)*|[^\w\s]",
)
# The COCO evaluation drops these tokens after tokenizing; the curly forms are what models write for them.
_PUNCTUATION = frozenset("'`\".?!,:-;()[]{}\u2026\u2018\u201c\u201d\u2013\u2014")

NGram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """The TF-IDF vector of a caption's n-grams of one length, and its Euclidean norm."""

    weights: dict[NGram, float]
    norm: float


@dataclass(frozen=True)
class _Caption:
    """A caption as TF-IDF vectors."""

    vectors: tuple[_Vector, ...]
    """One for each length of n-grams."""

    bigrams: int
    """The number of bigrams, by which the COCO evaluation measures a caption's length."""


class Cider:
    """CIDEr-D with the document frequencies of a set of images' reference captions."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """Count the images whose references contain each n-gram; `references` has one entry for each image."""
        self._frequency = Counter[NGram]()
        for captions in references:
            # A set: an image counts once, however many of its captions hold the n-gram.
            self._frequency.update({ngram for caption in captions for ngram in _ngrams(tokens(caption))})
        self._images = math.log(len(references)) if references else 0.0

    def score(self, text: str, references: Sequence[str]) -> float:
        """Return the CIDEr-D of one caption from 0 to 10: a usual figure of "120" is 1.2 here.

        It is ten times the mean, over n from 1 to 4 and over the references, of the cosine of the n-grams' weights (count times
        the log of images by images that have it), where no count exceeds the reference's, times a Gaussian of the difference of
        lengths with a deviation of 6. An image alone has no weights, and every score is 0.
        """
        caption = self._weigh(text)
        total = math.fsum(_similarity(caption, self._weigh(reference)) for reference in references)
        return _SCALE * total / len(references) if references else 0.0

    def _weigh(self, text: str) -> _Caption:
        counts = _ngrams(tokens(text))
        vectors = list[_Vector]()
        for length in range(1, _MAX_NGRAM + 1):
            weights = {
                # n-grams that no reference holds weigh as if one image had them, as in the COCO evaluation.
                ngram: count * (self._images - math.log(max(1, self._frequency[ngram])))
                for ngram, count in counts.items()
                if len(ngram) == length
            }
            vectors.append(_Vector(weights, math.sqrt(math.fsum(weight**2 for weight in weights.values()))))
        return _Caption(tuple(vectors), sum(count for ngram, count in counts.items() if len(ngram) == 2))


def tokens(text: str) -> list[str]:
    """Return a caption's lower-case tokens without punctuation, with clitics apart, as the Penn Treebank tokenizer does.

    The COCO evaluation runs Stanford's; plain captions come out the same, but its lists of abbreviations are not here.
    """
    matches: list[str] = _TOKEN.findall(text.lower().replace("\u2019", "'"))
    return [token for token in matches if token not in _PUNCTUATION]


def _ngrams(words: Sequence[str]) -> Counter[NGram]:
    return Counter(
        tuple(words[start : start + length]) for length in range(1, _MAX_NGRAM + 1) for start in range(len(words) - length + 1)
    )


def _similarity(caption: _Caption, reference: _Caption) -> float:
    """Return the mean clipped cosine over the lengths of n-grams, times the length penalty."""
    cosines = list[float]()
    for candidate_vector, reference_vector in zip(caption.vectors, reference.vectors, strict=True):
        common = candidate_vector.weights.keys() & reference_vector.weights.keys()
        shared = math.fsum(
            # Clipped: the D of CIDEr-D, against captions that repeat a word of great weight.
            min(candidate_vector.weights[ngram], reference_vector.weights[ngram]) * reference_vector.weights[ngram]
            for ngram in common
        )
        norms = candidate_vector.norm * reference_vector.norm
        cosines.append(shared / norms if norms else 0.0)
    penalty = math.exp(-((caption.bigrams - reference.bigrams) ** 2) / (2 * _SIGMA**2))
    return penalty * math.fsum(cosines) / _MAX_NGRAM


CIDER = Metric(
    "cider",
    fit=lambda accepted: Cider(accepted).score,
    kinds=("caption",),
    # Half of the captions come out in other words, and most of these are about as good; a good captioner's mean is 1.
    assumed=AssumedChanges(score=1.0, changed=0.5, step=0.4),
)
