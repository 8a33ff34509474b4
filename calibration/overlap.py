"""The check that nothing a stage was calibrated on is asked in the evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as tensors

from compress.calibration.collect import SHINGLES, read_manifest
from compress.calibration.identity import SHINGLE, Looks, WordHashes, alike, looks_of, shingles, words_of
from compress.calibration.questions import Question
from compress.calibration.texts import Document, pieces
from compress.errors import DataError

_REMEDY = "use another split or file for one of the two, or remove the sample from one"

_SHARE, _RUN = 0.8, 50
"""From which share of a paragraph's words, or how many words in a row, a text is the other's.

Texts by one grammar, such as the demo's, share up to 72 % of a paragraph and 23 words in a row; wikitext-2's validation and test
texts none and 15. One word changed in a paragraph of 27 or more leaves all the others.
"""

_WORDS_AT_ONCE = 1_000_000
"""About how many words of the evaluation's text are compared at once."""

Samples = Sequence[dict[str, Any]]


def check_overlap(folder: Path, questions: Iterable[Question], documents: Iterable[Document]) -> list[str]:
    """Compare the evaluation's questions and text with the calibration samples of a folder that `collect` wrote.

    A question stands in both where its words are the same, but for case, punctuation and what is not seen, and an image is, pixel
    by pixel; one without images where its words are. A paragraph does where at least 80 % of its words, or 50 words in a row,
    stand in runs of 13 words that are calibration text.

    Returns one line for each image that stands in both with different questions, or looks like one of the other: allowed, but worth
    knowing.

    Raises:
        DataError: a question or a paragraph stands in both; names the sample and both origins.
    """
    samples = cast("list[dict[str, Any]]", read_manifest(folder)["samples"])
    asked = [sample for sample in samples if sample["kind"] == "question"]
    warnings = _check_questions(asked, questions) if asked else []
    if len(asked) < len(samples):
        _check_text(folder, samples, documents)
    return warnings


def _check_questions(asked: Samples, questions: Iterable[Question]) -> list[str]:
    by_words: dict[str, list[dict[str, Any]]] = {}
    for sample in asked:
        by_words.setdefault(sample["words"], []).append(sample)
    by_pixels = {look["pixels"]: sample for sample in asked for look in sample["looks"]}
    hashes = [(np.frombuffer(bytes.fromhex(look["hash"]), dtype=np.uint8), sample) for sample in asked for look in sample["looks"]]
    every = np.stack([hashed for hashed, _ in hashes]) if hashes else None
    known = dict[str, Looks]()
    warnings = list[str]()
    for question in questions:
        looks = [_looks(question, place, known) for place in range(len(question.images))]
        pixels, words = {look.pixels for look in looks}, " ".join(words_of(question.question))
        for sample in by_words.get(words, ()):
            theirs = {look["pixels"] for look in sample["looks"]}
            if pixels & theirs or not (pixels or theirs):
                raise DataError(
                    f"question {question.id} ({question.origin}) of the evaluation is calibration sample {sample['id']} "
                    f"({sample['origin']}): a measurement on it proves nothing; {_REMEDY}"
                )
        for look in looks:
            same = by_pixels.get(look.pixels)
            near = None if same or every is None else next(iter(np.flatnonzero(alike(look.hashed, every))), None)
            if same is not None or near is not None:
                sample, how = (same, "is also") if same is not None else (hashes[int(cast("int", near))][1], "looks like")
                which = "the same" if sample["words"] == words else "another"
                warnings.append(
                    f"an image of question {question.id} ({question.origin}) of the evaluation {how} calibration sample "
                    f"{sample['id']}'s ({sample['origin']}), with {which} question"
                )
    return warnings


def _looks(question: Question, place: int, known: dict[str, Looks]) -> Looks:
    """Return what an image shows; many questions may be about one, which is decoded once."""
    digest = question.image_digests[place]
    if digest not in known:
        known[digest] = looks_of(question.images[place], f"{question.origin}: image {place} of question {question.id}")
    return known[digest]


@dataclass(frozen=True)
class _Passage:
    """Lines of the evaluation's text, each with its origin, where each one's words end, and the hashes of all words in a row."""

    lines: Sequence[tuple[str, str]]
    ends: NDArray[np.int64]
    words: NDArray[np.uint64]


def _check_text(folder: Path, samples: Samples, documents: Iterable[Document]) -> None:
    hashes, owners = _read_shingles(folder)
    if not len(hashes):
        return
    for passage in _passages(documents):
        held = shingles(passage.words)
        places = np.minimum(np.searchsorted(hashes, held), len(hashes) - 1)
        hits = hashes[places] == held
        shared = _spread(hits, len(passage.words))
        line = _leaked(passage.ends, shared)
        if line is not None:
            text, origin = passage.lines[line]
            sample = samples[int(owners[places[np.flatnonzero(hits[: passage.ends[line]])[-1]]])]
            raise DataError(
                f"a paragraph of the evaluation's text ({origin}: {_excerpt(text)}) is part of calibration sample "
                f"{sample['id']} ({sample['origin']}): a measurement on it proves nothing; {_REMEDY}"
            )


def _leaked(ends: NDArray[np.int64], shared: NDArray[np.bool_]) -> int | None:
    """Return the first line that is the calibration's by its share of shared words, or ends a run of them that is."""
    before = np.concatenate([[0], shared.cumsum()])
    first = np.concatenate([[0], ends[:-1]])
    sizes, counts = ends - first, before[ends] - before[first]
    whole = (sizes >= SHINGLE) & (counts >= _SHARE * sizes)
    gaps = np.concatenate([[-1], np.flatnonzero(~shared), [len(shared)]])
    runs = np.flatnonzero(np.diff(gaps) - 1 >= _RUN)
    found = [int(np.flatnonzero(whole)[0])] if whole.any() else []
    if len(runs):
        found.append(int(np.searchsorted(ends, gaps[runs[0]] + 1, side="right")))
    return min(found, default=None)


def _passages(documents: Iterable[Document]) -> Iterator[_Passage]:
    """Yield some documents at once, all their words in a row."""
    hashes = WordHashes()
    lines, ends, words = list[tuple[str, str]](), list[int](), list[str]()
    for document in documents:
        for piece in pieces(document):
            words += words_of(piece.text)
            lines.append((piece.text, piece.origin))
            ends.append(len(words))
        if len(words) >= _WORDS_AT_ONCE:
            yield _Passage(lines, np.array(ends), hashes.of(words))
            lines, ends, words = [], [], []
    if lines:
        yield _Passage(lines, np.array(ends), hashes.of(words))


def _read_shingles(folder: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    path = folder / SHINGLES
    try:
        held = tensors.load_file(path)
        return cast("NDArray[np.uint64]", held["hashes"]), cast("NDArray[np.int64]", held["samples"])
    except (OSError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run again with --fresh to collect the samples anew") from error


def _spread(hits: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Return which words stand in a run that is in both, by the first word of each."""
    steps = np.zeros(count + 1, dtype=np.int64)
    first = np.flatnonzero(hits)
    np.add.at(steps, first, 1)
    np.add.at(steps, first + SHINGLE, -1)
    return steps[:count].cumsum() > 0


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
