"""The check that calibration samples and the evaluation's data do not overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as tensors

from compress.data.identity import SHINGLE, ImageFingerprint, WordHashes, are_similar, fingerprint_of, shingles, words_of
from compress.data.questions import Question
from compress.data.samples import SHINGLES, read_manifest
from compress.data.texts import Document, pieces
from compress.errors import DataError

_REMEDY = "use another split or file for one of the two, or remove the sample from one"

_SHARE, _RUN = 0.8, 50
"""A paragraph overlaps from this share of its words, or this many consecutive words, in common shingles.

Texts by one grammar, such as the demo's, share up to 72 % of a paragraph and 23 words in a row; wikitext-2's validation and test
texts none and 15. One word changed in a paragraph of 27 or more leaves all the others.
"""

_CHUNK_WORDS = 1_000_000
"""About how many words of the evaluation's text are compared at once."""

Samples = Sequence[dict[str, Any]]


def check_overlap(folder: Path, questions: Iterable[Question], documents: Iterable[Document]) -> list[str]:
    """Compare the evaluation's questions and text with the calibration samples of a folder that `collect` wrote.

    A question overlaps where its normalized words and the pixels of an image are equal; one without images where its words are. A
    paragraph overlaps where at least 80 % of its words, or 50 consecutive ones, are in 13-word shingles of calibration text.

    Returns a warning for each image that is in both with different questions, or is similar to one: allowed, but worth knowing.

    Raises:
        DataError: a question or a paragraph overlaps; the message names the sample and both origins.
    """
    samples = cast("list[dict[str, Any]]", read_manifest(folder)["samples"])
    questions_seen = [sample for sample in samples if sample["kind"] == "question"]
    warnings = _check_questions(questions_seen, questions) if questions_seen else []
    if len(questions_seen) < len(samples):
        _check_text(folder, samples, documents)
    return warnings


def _check_questions(calibration: Samples, questions: Iterable[Question]) -> list[str]:
    by_words: dict[str, list[dict[str, Any]]] = {}
    for sample in calibration:
        by_words.setdefault(sample["words"], []).append(sample)
    images = [(image, sample) for sample in calibration for image in sample["looks"]]
    by_pixels = {image["pixels"]: sample for image, sample in images}
    hashes = [(np.frombuffer(bytes.fromhex(image["hash"]), dtype=np.uint8), sample) for image, sample in images]
    stacked = np.stack([hashed for hashed, _ in hashes]) if hashes else None
    cache = dict[str, ImageFingerprint]()
    warnings = list[str]()
    for question in questions:
        fingerprints = [_fingerprint(question, index, cache) for index in range(len(question.images))]
        pixels, words = {image.pixels for image in fingerprints}, " ".join(words_of(question.question))
        for sample in by_words.get(words, ()):
            sample_pixels = {image["pixels"] for image in sample["looks"]}
            # equal words with another image are another question ("What is this?")
            if pixels & sample_pixels or not (pixels or sample_pixels):
                raise DataError(
                    f"question {question.id} ({question.origin}) of the evaluation is calibration sample {sample['id']} "
                    f"({sample['origin']}): a measurement on it proves nothing; {_REMEDY}"
                )
        for image in fingerprints:
            same = by_pixels.get(image.pixels)
            near = None if same or stacked is None else next(iter(np.flatnonzero(are_similar(image.hashed, stacked))), None)
            if same is not None or near is not None:
                sample, relation = (same, "is also") if same is not None else (hashes[int(cast("int", near))][1], "looks like")
                which = "the same" if sample["words"] == words else "another"
                warnings.append(
                    f"an image of question {question.id} ({question.origin}) of the evaluation {relation} calibration sample "
                    f"{sample['id']}'s ({sample['origin']}), with {which} question"
                )
    return warnings


def _fingerprint(question: Question, index: int, cache: dict[str, ImageFingerprint]) -> ImageFingerprint:
    """Return an image's fingerprint, cached because many questions may share an image."""
    digest = question.image_digests[index]
    if digest not in cache:
        cache[digest] = fingerprint_of(question.images[index], f"{question.origin}: image {index} of question {question.id}")
    return cache[digest]


@dataclass(frozen=True)
class _Passage:
    """Consecutive lines of the evaluation's text."""

    lines: Sequence[tuple[str, str]]
    """Each line's text and origin."""

    ends: NDArray[np.int64]
    """The index after each line's last word."""

    words: NDArray[np.uint64]
    """The hashes of all words."""


def _check_text(folder: Path, samples: Samples, documents: Iterable[Document]) -> None:
    hashes, owners = _read_shingles(folder)
    if not len(hashes):
        return
    for passage in _passages(documents):
        passage_hashes = shingles(passage.words)
        # clipped: a hash beyond the last has its place behind the end
        indices = np.minimum(np.searchsorted(hashes, passage_hashes), len(hashes) - 1)
        hits = hashes[indices] == passage_hashes
        shared = _covered_words(hits, len(passage.words))
        line = _first_overlap(passage.ends, shared)
        if line is not None:
            text, origin = passage.lines[line]
            sample = samples[int(owners[indices[np.flatnonzero(hits[: passage.ends[line]])[-1]]])]
            raise DataError(
                f"a paragraph of the evaluation's text ({origin}: {_excerpt(text)}) is part of calibration sample "
                f"{sample['id']} ({sample['origin']}): a measurement on it proves nothing; {_REMEDY}"
            )


def _first_overlap(ends: NDArray[np.int64], shared: NDArray[np.bool_]) -> int | None:
    """Return the first line that overlaps by its share of common words, or contains the end of a long run of them."""
    cumulative = np.concatenate([[0], shared.cumsum()])
    first = np.concatenate([[0], ends[:-1]])
    sizes, counts = ends - first, cumulative[ends] - cumulative[first]
    # a shorter line contains no whole shingle of its own
    mostly_shared = (sizes >= SHINGLE) & (counts >= _SHARE * sizes)
    # sentinels before the first and after the last word, so that runs at either end count
    gaps = np.concatenate([[-1], np.flatnonzero(~shared), [len(shared)]])
    runs = np.flatnonzero(np.diff(gaps) - 1 >= _RUN)
    lines = [int(np.flatnonzero(mostly_shared)[0])] if mostly_shared.any() else []
    if len(runs):
        lines.append(int(np.searchsorted(ends, gaps[runs[0]] + 1, side="right")))
    return min(lines, default=None)


def _passages(documents: Iterable[Document]) -> Iterator[_Passage]:
    """Yield documents in chunks of about `_CHUNK_WORDS` words."""
    hashes = WordHashes()
    lines, ends, words = list[tuple[str, str]](), list[int](), list[str]()
    for document in documents:
        for piece in pieces(document):
            words += words_of(piece.text)
            lines.append((piece.text, piece.origin))
            ends.append(len(words))
        if len(words) >= _CHUNK_WORDS:
            yield _Passage(lines, np.array(ends), hashes.of(words))
            lines, ends, words = [], [], []
    if lines:
        yield _Passage(lines, np.array(ends), hashes.of(words))


def _read_shingles(folder: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    path = folder / SHINGLES
    try:
        arrays = tensors.load_file(path)
        return cast("NDArray[np.uint64]", arrays["hashes"]), cast("NDArray[np.int64]", arrays["samples"])
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run again with --fresh to collect the samples anew") from error


def _covered_words(hits: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Return which words are in a common shingle, from the hits of the shingles by first word."""
    steps = np.zeros(count + 1, dtype=np.int64)
    first = np.flatnonzero(hits)
    # a difference array: +1 where a shingle begins, -1 behind it; the running sum is the number of shingles over a word
    np.add.at(steps, first, 1)
    np.add.at(steps, first + SHINGLE, -1)
    return steps[:count].cumsum() > 0


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
