"""KL over the whole vocabulary, at tokens drawn by lot, where a runtime compares the likeliest tokens alone.

The likeliest tokens and one bucket for the rest bound KL from below, and no figure that the servers give with them bounds it from
above: a token that only the original finds likely may have any small probability with the artifact. So a sample of a task's tokens
is compared over all tokens of the vocabulary. What the whole adds to the lower bound is estimated from it, with an upper bound.

<measurement>/record/<name>@whole/record.json, distributions.npy     the original's, at the tokens drawn
<measurement>/journal/<name>/whole.npz                               what an artifact's comparison gave, if it is interrupted
"""

from __future__ import annotations

import io
import json
import math
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import read_json_object
from compress.errors import DataError
from compress.eval.results import WholeKl
from compress.eval.statistics import clustered_mean, student_quantile
from compress.files import telling_where, write_bytes, write_text
from compress.runtimes.runtime import FullVocabularySession, Passage, Score, passages_digest

if TYPE_CHECKING:
    from compress.eval.task import TaskContext

CONFIDENCE = 0.95
"""With which each bound holds."""

FEWEST = 30
"""From fewer tokens no bound is taken: Student's t, and its correction for skewness, need about so many."""

_RECORD = "record.json"
_DISTRIBUTIONS = "distributions.npy"

Floats = NDArray[np.float64]
Place = tuple[int, int]
"""A passage, and one of its scored tokens."""


def compare_whole(
    context: TaskContext, name: str, passages: Sequence[Passage], scores: Sequence[Score], parts: int = 1
) -> list[Score]:
    """Return the scores with KL over the whole vocabulary at tokens drawn by lot; the original's distributions there are recorded.

    The tokens are shared out evenly among `parts` that are asked apart. Scores stay as they are where KL is exact already, or
    where the runtime, the artifact's or the original's, gives no whole distributions.

    Raises:
        ServerError: the runtime does not answer any more.
        DataError: the original was recorded on other passages.
    """
    session = context.session
    if not isinstance(session, FullVocabularySession) or not session.whole_tokens:
        return list(scores)
    digest = passages_digest(passages)
    record = _RecordedDistributions((context.against or context.target) / "record" / f"{name}@whole")
    if context.against is None:
        if not record.holds(digest):
            places = draw(scores, math.ceil(session.whole_tokens / parts), digest)
            record.write(digest, places, session.distributions(passages, places, context.progress))
        return list(scores)
    if not record.is_there():
        return list(scores)
    places = record.places(digest)
    kept = context.target / "journal" / name / "whole.npz"
    found = _read(kept, digest)
    if found is None:
        found = record.compare(session.distributions(passages, places, context.progress))
        _write(kept, digest, found)
    return attach(scores, places, found)


def draw(scores: Sequence[Score], count: int, digest: str) -> list[Place]:
    """Draw so many scored tokens by lot, each as likely as any other, the same ones for the same passages."""
    every = [(place, token) for place, score in enumerate(scores) for token in range(len(score.negative_log_likelihood))]
    chance = np.random.default_rng(int(digest[:16], 16))
    return [every[at] for at in sorted(chance.choice(len(every), min(count, len(every)), replace=False).tolist())]


def attach(scores: Sequence[Score], places: Sequence[Place], found: Floats) -> list[Score]:
    """Return the scores with what was found at the places drawn, nan where nothing was, and for how many tokens each stands."""
    sizes = [0 if score.kl is None else len(score.kl) for score in scores]
    known = [(place, token, value) for (place, token), value in zip(places, found.tolist(), strict=True) if token < sizes[place]]
    answered = sum(not math.isnan(value) for _, _, value in known)
    if not answered:
        return list(scores)
    wholes = [np.full(size, np.nan) for size in sizes]
    for place, token, value in known:
        wholes[place][token] = value
    weight = sum(sizes) / answered
    return [
        score if score.kl is None else replace(score, whole=whole, weight=weight)
        for score, whole in zip(scores, wholes, strict=True)
    ]


def divergence(original: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return KL(original ‖ other) in nats from log-probabilities over one vocabulary.

    Both are brought to sum 1 first: servers give them as float32.
    """
    before, after = original.astype(np.float64), other.astype(np.float64)
    before -= np.logaddexp.reduce(before)
    after -= np.logaddexp.reduce(after)
    return max(float((np.exp(before) * (before - after)).sum()), 0.0)


def summarise(lower: Floats, whole: Floats, weights: Floats) -> WholeKl:
    """Estimate the mean KL over the whole vocabulary of all tokens from those drawn.

    `lower` are the lower bounds of all tokens, `whole` the KL of those drawn (nan elsewhere), which stand for `weights` tokens
    each. What the whole adds is estimated: the lower bounds' mean is known. Its upper bound is Student's t with Hall's first
    correction for skewness (Journal of the Royal Statistical Society B 54, 1992), for a few tokens add most; the lower one is t's,
    and never below what is known. The 99th percentile is bounded by an order statistic of the sample, where it holds enough tokens.
    """
    drawn = ~np.isnan(whole)
    values, added, weight = whole[drawn], (whole - lower)[drawn], weights[drawn]
    known, count = float(lower.mean()), int(drawn.sum())
    mean, error = clustered_mean(weight * added, weight)
    interval: tuple[float, float] | None = None
    if count >= FEWEST:
        t, skew = student_quantile(CONFIDENCE, count - 1), _skewness(weight * (added - mean))
        above = error * (t + max(skew, 0.0) * (1 + 2 * t**2) / (6 * math.sqrt(count)))
        interval = (max(known + mean - t * error, known), max(known + mean + above, known))
    return WholeKl(tokens=count, kl_mean=max(known + mean, 0.0), kl_interval=interval, kl_p99_at_most=_upper_percentile(values))


def _skewness(residuals: Floats) -> float:
    spread = float(residuals.std())
    return float((residuals**3).mean()) / spread**3 if spread > 0 else 0.0


def _upper_percentile(values: Floats) -> float | None:
    """Return the smallest value of a sample that the 99th percentile of all exceeds with a probability of at most 5 %."""
    from scipy.special import bdtr

    count = len(values)
    ranks = np.flatnonzero(bdtr(np.arange(count), count, 0.99) >= CONFIDENCE)
    return float(np.sort(values)[ranks[0]]) if len(ranks) else None


@dataclass(frozen=True)
class _RecordedDistributions:
    """The original's distributions at the tokens drawn; a token of which there was none is left out."""

    folder: Path

    def is_there(self) -> bool:
        return (self.folder / _RECORD).is_file()

    def holds(self, digest: str) -> bool:
        return self.is_there() and read_json_object(self.folder / _RECORD).get("passages") == digest

    def write(self, digest: str, places: Sequence[Place], found: Sequence[NDArray[np.float32] | None]) -> None:
        """Write what the original gave; nothing where it gave none."""
        known = [(place, logs) for place, logs in zip(places, found, strict=True) if logs is not None]
        if not known:
            return
        with telling_where(self.folder, making=True):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            np.save(self.folder / _DISTRIBUTIONS, np.stack([logs for _, logs in known]))
            content = {"passages": digest, "places": [place for place, _ in known]}
            write_text(self.folder / _RECORD, json.dumps(content))  # last: with it the record is whole

    def places(self, digest: str) -> list[Place]:
        """Return which tokens were drawn.

        Raises:
            DataError: they are of other passages.
        """
        content = read_json_object(self.folder / _RECORD)
        if content.get("passages") != digest:
            raise DataError(f"{self.folder}: was recorded on other passages than these; measure the original again with --fresh")
        return [(int(place), int(token)) for place, token in cast("list[list[int]]", content["places"])]

    def compare(self, found: Sequence[NDArray[np.float32] | None]) -> Floats:
        """Return KL at each token drawn, nan where the artifact gave no distribution, or one over another vocabulary."""
        original = cast("NDArray[np.float32]", np.load(self.folder / _DISTRIBUTIONS, mmap_mode="r"))
        return np.array(
            [
                math.nan if logs is None or logs.shape != before.shape else divergence(before, logs)
                for before, logs in zip(original, found, strict=True)
            ]
        )


def _read(path: Path, digest: str) -> Floats | None:
    try:
        with np.load(path) as arrays:
            return cast("Floats", arrays["kl"]) if str(arrays["digest"]) == digest else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, digest: str, found: Floats) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, kl=found, digest=np.array(digest))
    with telling_where(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getvalue())
