"""KL over the full vocabulary at a random sample of tokens, for runtimes that return the top tokens' log-probabilities only.

KL over the top tokens with the rest merged into one outcome bounds the exact KL from below, and nothing that a server returns with
the top tokens bounds it from above: a token that is likely under the original alone may have any small probability under the
artifact. So the distributions of a sample of a task's tokens are compared over the full vocabulary, and the difference of this
KL from the lower bound is estimated from the sample, with an upper confidence bound.

<measurement>/record/<name>@whole/record.json, distributions.npy     the original's distributions at the sampled positions
<measurement>/journal/<name>/whole.npz                               an artifact's KL there, for a measurement that is interrupted
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

from compress.checkpoints.checkpoint import read_json_object
from compress.errors import DataError
from compress.eval.results import WholeKl
from compress.eval.statistics.estimates import clustered_mean, student_quantile
from compress.files import disk_errors, write_bytes, write_text
from compress.runtimes.runtime import FullVocabularySession, Passage, Score, passages_digest

if TYPE_CHECKING:
    from compress.eval.tasks.task import TaskContext

CONFIDENCE = 0.95
"""The confidence of each bound: `WholeKl.interval_level` (0.9) is that of both together."""

MIN_TOKENS_FOR_BOUNDS = 30
"""Smaller samples give an estimate without bounds: Student's t and its correction for skewness are asymptotic."""

_RECORD = "record.json"
_DISTRIBUTIONS = "distributions.npy"
"""Log-probabilities [positions, vocabulary] as float32: a position takes 4 bytes per token of the vocabulary."""

Floats = NDArray[np.float64]
TokenPosition = tuple[int, int]
"""The index of a passage, and the index of one of its scored tokens."""


def compare_full_vocabulary(
    context: TaskContext, name: str, passages: Sequence[Passage], scores: Sequence[Score], looks: int = 1
) -> list[Score]:
    """Return the scores with full-vocabulary KL at a random sample of tokens; of the original, records its distributions there.

    Each of `looks` looks takes an equal share of the sample. Scores are returned unchanged where KL is exact already, or where
    the runtime returns no full distributions, of the artifact or of the original.

    Raises:
        ServerError: the runtime does not answer any more.
        DataError: the record belongs to other passages.
    """
    session = context.session
    if not isinstance(session, FullVocabularySession) or not session.whole_tokens:
        return list(scores)
    digest = passages_digest(passages)
    # Artifacts are compared at the positions that the original recorded, whatever their own sample would be.
    record = _RecordedDistributions((context.original_measurement or context.output_dir) / "record" / f"{name}@whole")
    if context.original_measurement is None:
        if not record.matches(digest):
            # Per look: stopping early then leaves a sample that is as dense as at the end.
            positions = sample_positions(scores, math.ceil(session.whole_tokens / looks), digest)
            record.write(digest, positions, session.distributions(passages, positions, context.progress))
        return list(scores)
    if not record.exists():
        return list(scores)
    positions = record.positions(digest)
    # One request per token: the dearest part of a measurement is not repeated after an interruption.
    journal_path = context.output_dir / "journal" / name / "whole.npz"
    kls = _read_kls(journal_path, digest)
    if kls is None:
        kls = record.compare(session.distributions(passages, positions, context.progress))
        _write_kls(journal_path, digest, kls)
    return attach_full_kl(scores, positions, kls)


def sample_positions(scores: Sequence[Score], count: int, digest: str) -> list[TokenPosition]:
    """Sample scored tokens uniformly at random; the passages' digest is the seed, so that every artifact gets the same ones."""
    candidates = [(passage, token) for passage, score in enumerate(scores) for token in range(len(score.negative_log_likelihood))]
    # Seeded by content: the sample does not depend on the runtime, the machine or the order of tasks.
    generator = np.random.default_rng(int(digest[:16], 16))
    return [
        candidates[index]
        for index in sorted(generator.choice(len(candidates), min(count, len(candidates)), replace=False).tolist())
    ]


def attach_full_kl(scores: Sequence[Score], positions: Sequence[TokenPosition], kls: Floats) -> list[Score]:
    """Return the scores with full-vocabulary KL at the sampled positions, nan elsewhere, and the sampling weight."""
    sizes = [0 if score.kl is None else len(score.kl) for score in scores]
    sampled = [
        (passage, token, value) for (passage, token), value in zip(positions, kls.tolist(), strict=True) if token < sizes[passage]
    ]
    count = sum(not math.isnan(value) for _, _, value in sampled)
    if not count:
        return list(scores)
    full_kls = [np.full(size, np.nan) for size in sizes]
    for passage, token, value in sampled:
        full_kls[passage][token] = value
    # The inverse of the sampled share: samples of tasks or looks of different density add up to a mean over all tokens.
    weight = sum(sizes) / count
    return [
        score if score.kl is None else replace(score, whole=full_kl, weight=weight)
        for score, full_kl in zip(scores, full_kls, strict=True)
    ]


def kl_divergence(original: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return KL(original ‖ other) in nats from two arrays of log-probabilities [vocabulary].

    Both are normalized first: as float32, their probabilities do not sum to exactly 1.
    """
    original_log_probs, other_log_probs = original.astype(np.float64), other.astype(np.float64)
    # In float64: the float32 probabilities of 152,000 tokens sum to 1 within some 1e-5 only, which would enter KL.
    original_log_probs -= np.logaddexp.reduce(original_log_probs)
    other_log_probs -= np.logaddexp.reduce(other_log_probs)
    return max(float((np.exp(original_log_probs) * (original_log_probs - other_log_probs)).sum()), 0.0)


def estimate_full_kl(lower: Floats, full: Floats, weights: Floats) -> WholeKl:
    """Estimate the mean full-vocabulary KL of all tokens from a sample.

    `lower` are the lower bounds of all tokens, `full` the KL of the sampled ones (nan elsewhere), which represent `weights` tokens
    each. The mean lower bound is known, so only the mean difference `full - lower` is estimated. Its upper bound is Student's t
    with Hall's first correction for skewness (Journal of the Royal Statistical Society B 54, 1992), for few tokens contribute most
    of it; the lower bound is Student's t, at least the mean lower bound. The 99th percentile is bounded by an order statistic of
    the sample, where it is large enough.
    """
    sampled = ~np.isnan(full)
    full_sample, differences, sample_weights = full[sampled], (full - lower)[sampled], weights[sampled]
    lower_mean, count = float(lower.mean()), int(sampled.sum())
    # Each token is a cluster: they are drawn at random over all passages, so that few share one.
    mean, error = clustered_mean(sample_weights * differences, sample_weights)
    interval: tuple[float, float] | None = None
    if count >= MIN_TOKENS_FOR_BOUNDS:
        t, skew = student_quantile(CONFIDENCE, count - 1), _skewness(sample_weights * (differences - mean))
        # Only positive skewness widens: a correction that narrows the upper bound would make passing easier.
        upper_reach = error * (t + max(skew, 0.0) * (1 + 2 * t**2) / (6 * math.sqrt(count)))
        interval = (max(lower_mean + mean - t * error, lower_mean), max(lower_mean + mean + upper_reach, lower_mean))
    return WholeKl(
        tokens=count, kl_mean=max(lower_mean + mean, 0.0), kl_interval=interval, kl_p99_at_most=_upper_percentile(full_sample)
    )


def _skewness(residuals: Floats) -> float:
    spread = float(residuals.std())
    return float((residuals**3).mean()) / spread**3 if spread > 0 else 0.0


def _upper_percentile(values: Floats) -> float | None:
    """Return the smallest order statistic that bounds the 99th percentile from above with 95 % confidence, None without one."""
    from scipy.special import bdtr

    count = len(values)
    # The k-th smallest of n bounds the percentile with probability P(Bin(n, 0.99) < k): from 299 on the largest does.
    ranks = np.flatnonzero(bdtr(np.arange(count), count, 0.99) >= CONFIDENCE)
    return float(np.sort(values)[ranks[0]]) if len(ranks) else None


@dataclass(frozen=True)
class _RecordedDistributions:
    """The original's log-probabilities at the sampled positions; positions for which the runtime returned none are left out."""

    folder: Path

    def exists(self) -> bool:
        return (self.folder / _RECORD).is_file()

    def matches(self, digest: str) -> bool:
        return self.exists() and read_json_object(self.folder / _RECORD).get("passages") == digest

    def write(self, digest: str, positions: Sequence[TokenPosition], distributions: Sequence[NDArray[np.float32] | None]) -> None:
        """Write the distributions; nothing where the runtime returned none."""
        recorded = [
            (position, log_probs) for position, log_probs in zip(positions, distributions, strict=True) if log_probs is not None
        ]
        if not recorded:
            return
        with disk_errors(self.folder, making=True):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            # As .npy, which can be memory-mapped: 320 positions over 150,000 tokens have 190 MB.
            np.save(self.folder / _DISTRIBUTIONS, np.stack([log_probs for _, log_probs in recorded]))
            content = {"passages": digest, "places": [position for position, _ in recorded]}
            write_text(self.folder / _RECORD, json.dumps(content))  # last: it marks the record as complete

    def positions(self, digest: str) -> list[TokenPosition]:
        """Return the sampled positions.

        Raises:
            DataError: the record belongs to other passages.
        """
        content = read_json_object(self.folder / _RECORD)
        if content.get("passages") != digest:
            raise DataError(f"{self.folder}: was recorded on other passages than these; measure the original again with --fresh")
        return [(int(passage), int(token)) for passage, token in cast("list[list[int]]", content["places"])]

    def compare(self, distributions: Sequence[NDArray[np.float32] | None]) -> Floats:
        """Return KL at each sampled position, nan where the artifact has no distribution, or one of another vocabulary size."""
        original = cast("NDArray[np.float32]", np.load(self.folder / _DISTRIBUTIONS, mmap_mode="r"))
        return np.array(
            [
                math.nan if log_probs is None or log_probs.shape != reference.shape else kl_divergence(reference, log_probs)
                for reference, log_probs in zip(original, distributions, strict=True)
            ]
        )


def _read_kls(path: Path, digest: str) -> Floats | None:
    try:
        with np.load(path) as arrays:
            return cast("Floats", arrays["kl"]) if str(arrays["digest"]) == digest else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_kls(path: Path, digest: str, kls: Floats) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, kl=kls, digest=np.array(digest))
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getvalue())
