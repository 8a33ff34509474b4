"""The journal of a measurement: answers and scores as they arrive, so that an interrupted measurement only requests the rest.

<measurement>/
  journal/<name>/answers-00000.parquet …   answers in the order of arrival, each with a digest of its request
  journal/<name>/scores-00000.npz …        the scores of one chunk of passages each
  record/<name>/00000/ …                   the original's predictions, one folder for each of these chunks

The journal is removed when the measurement is complete: its items contain the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from compress.data.prompts import Prompt
from compress.errors import CheckpointError, ServerError
from compress.files import disk_errors, write_bytes
from compress.progress import Progress
from compress.runtimes.runtime import UNSCORED, Answer, Generates, Passage, Score, Scores, passages_digest, scored_tokens

_FLUSH_ROWS = 64
_FLUSH_SECONDS = 2.0
"""Answers are written to disk after so many, or so long: the most that a killed measurement loses. A file per answer would be
thousands of small files."""

_CHUNK_PASSAGES = 128
_CHUNK_TOKENS = 32_768
"""The largest chunk of passages, which are scored, recorded and resumed together; existing records do not fit other sizes."""

_NAMED_FAULTS = 3
"""How many failed items a message names."""


@dataclass(frozen=True)
class Journal:
    """The folders of one name's scores."""

    folder: Path
    """The measurement's folder."""

    name: str
    record: Path | None
    """Where the predictions are recorded for later comparisons; None records nothing."""

    against: Path | None
    """The record of the same passages that predictions are compared with; None compares nothing."""


def answer_all(
    session: Generates, prompts: Sequence[Prompt], max_new_tokens: int, folder: Path, name: str, progress: Progress
) -> list[Answer]:
    """Generate an answer to each prompt, in order; those in the journal of `name` in `folder` are not requested again.

    Prompts that failed before are requested once more; failures that remain give a warning.

    Raises:
        ServerError: the runtime does not answer any more, or not one prompt could be answered.
        CheckpointError: the runtime's answers do not match the prompts.
    """
    journal = folder / "journal" / name
    keys = [_key(prompt, max_new_tokens) for prompt in prompts]
    # A server's failed items are requested again; in this process a fault is the item's own, and would come again.
    journalled = _read_answers(journal, with_faults=session.block is not None)
    answers = {index: journalled[key] for index, key in enumerate(keys) if key in journalled}
    blocks = _blocks(len(prompts), answers, session.block)
    with _writing(journal) as write, progress.task("answer", len(prompts), "prompts") as advance:
        advance(len(prompts) - sum(len(indices) for indices in blocks))
        for indices in blocks:
            batch = [prompts[index] for index in indices]
            # An early answer is known by its id alone: prompts that share one are journalled at the end of the batch.
            index_of = _unique_ids({index: prompts[index].id for index in indices})
            written: set[int] = set()

            def write_early(answer: Answer, index_of: dict[str, int] = index_of, written: set[int] = written) -> None:
                if (index := index_of.get(answer.id)) is not None:
                    write(keys[index], answer)
                    written.add(index)

            batch_answers = session.answer(batch, max_new_tokens, _SubProgress(progress, advance), write_early)
            if [answer.id for answer in batch_answers] != [prompt.id for prompt in batch]:
                raise CheckpointError(
                    f"task {name}: the runtime did not answer the {len(batch)} prompts it was given in their order"
                )
            for index, answer in zip(indices, batch_answers, strict=True):
                answers[index] = answer
                if index not in written:
                    write(keys[index], answer)
    faults = [(answer.id, answer.fault) for _, answer in sorted(answers.items()) if answer.fault is not None]
    report_faults(name, "answered", faults, len(prompts), progress)
    return [answers[index] for index in range(len(prompts))]


def score_all(session: Scores, passages: Sequence[Passage], journal: Journal, progress: Progress) -> list[Score]:
    """Score the passages, in order and in chunks; chunks in the journal are not scored again.

    The chunks' ends depend on the passages alone, so that a record is read in the chunks that it was written in.

    Raises:
        ServerError: the runtime does not answer any more, or not one passage could be scored.
        CheckpointError: the runtime's scores do not match the passages.
        UsageError: `against` was recorded on other passages, or by another runtime.
        StoreError: a record or the journal cannot be written.
    """
    scores: list[Score] = []
    with progress.task("score", sum(len(scored_tokens(passage)) for passage in passages), "tokens") as advance:
        for number, chunk in enumerate(_chunks(passages)):
            scores += _score_chunk(session, chunk, journal, f"{number:05d}", _SubProgress(progress, advance))
    scored = [score for passage, score in zip(passages, scores, strict=True) if scored_tokens(passage)]
    faults = [(score.id, score.fault) for score in scored if score.fault is not None and score.fault != UNSCORED]
    report_faults(journal.name, "scored", faults, len(scored), progress)
    return scores


def remove_journal(folder: Path) -> None:
    """Remove the journal of a measurement that is complete."""
    shutil.rmtree(folder / "journal", ignore_errors=True)


def report_faults(name: str, verb: str, faults: Sequence[tuple[str, str]], items: int, progress: Progress) -> None:
    """Warn of failed items.

    Raises:
        ServerError: all of them failed.
    """
    if not faults:
        return
    examples = "; ".join(f"{item}: {fault.removeprefix(f'{item}: ')}" for item, fault in faults[:_NAMED_FAULTS])
    # A score of 0 from a server that answered nothing would be judged as if the model were bad.
    if len(faults) == items:
        raise ServerError(f"task {name}: none of its {items:,} items could be {verb}; the first: {examples}")
    progress.warn(f"task {name}: {len(faults):,} of {items:,} items could not be {verb} and count as wrong; the first: {examples}")


@dataclass(frozen=True)
class _SubProgress:
    """Progress of a step within a larger task: counts and warnings go to the outer one."""

    outer: Progress
    advance: Callable[[int], None]

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """Return the outer task's `advance`."""
        del name, total, unit
        yield self.advance

    def warn(self, message: str) -> None:
        """Pass the warning to the outer progress."""
        self.outer.warn(message)


def _key(prompt: Prompt, max_new_tokens: int) -> str:
    """Return the digest of a request, which is an answer's key in the journal."""
    # By content, not by position: a journal of other questions, or of another prompt, matches nothing.
    digest = hashlib.sha256(json.dumps([prompt.id, prompt.text, len(prompt.images), max_new_tokens]).encode())
    for image in prompt.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def _blocks(count: int, answers: dict[int, Answer], block: int | None) -> list[list[int]]:
    """Return the indices of the prompts to request, in lists of those that go into one call.

    Where the runtime batches prompts in blocks, a block is requested as a whole even if some answers are known: an answer depends
    on the batch that it is computed in.
    """
    if block is None:
        missing = [index for index in range(count) if index not in answers]
        return [missing] if missing else []
    # Cut by index, not among what is missing: the batches of a resumed run are those of an uninterrupted one.
    blocks = [list(range(start, min(start + block, count))) for start in range(0, count, block)]
    return [indices for indices in blocks if any(index not in answers for index in indices)]


def _unique_ids(ids: dict[int, str]) -> dict[str, int]:
    """Return the indices of the ids that are unique."""
    counts = Counter(ids.values())
    return {name: index for index, name in ids.items() if counts[name] == 1}


@contextmanager
def _writing(folder: Path) -> Generator[Callable[[str, Answer], None]]:
    """Give the function that journals an answer under its key; buffered answers are written however the context ends."""
    rows: list[dict[str, object]] = []
    written = time.monotonic()

    def flush() -> None:
        nonlocal written
        if rows:
            _write_answers(folder, rows)
        rows.clear()
        written = time.monotonic()

    def write(key: str, answer: Answer) -> None:
        rows.append({"key": key, "id": answer.id, "text": answer.text, "token_ids": list(answer.token_ids), "fault": answer.fault})
        if len(rows) >= _FLUSH_ROWS or time.monotonic() - written >= _FLUSH_SECONDS:
            flush()

    try:
        yield write
    finally:
        flush()


def _write_answers(folder: Path, rows: Sequence[dict[str, object]]) -> None:
    from compress.data.tables import parquet_of

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A new file each time: parquet cannot be appended to, and a killed write damages no earlier answers.
        last = max((int(path.stem.rpartition("-")[2]) for path in folder.glob("answers-*.parquet")), default=-1)
        write_bytes(folder / f"answers-{last + 1:05d}.parquet", parquet_of(rows))


def _read_answers(folder: Path, *, with_faults: bool) -> dict[str, Answer]:
    """Return the journalled answers by key; those of an unreadable file are requested again."""
    import pyarrow as pa

    from compress.data.tables import read_rows

    unreadable = cast("tuple[type[Exception], ...]", (OSError, ValueError, KeyError, TypeError, pa.ArrowException))
    answers: dict[str, Answer] = {}
    for path in sorted(folder.glob("answers-*.parquet")):
        with suppress(*unreadable):
            rows = cast("list[dict[str, Any]]", read_rows(path))
            answers |= {
                row["key"]: Answer(row["id"], row["text"], tuple(row["token_ids"]), row["fault"])
                for row in rows
                if row["fault"] is None or with_faults
            }
    return answers


def _chunks(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    chunk: list[Passage] = []
    tokens = 0
    for passage in passages:
        if chunk and (len(chunk) == _CHUNK_PASSAGES or tokens + len(passage.token_ids) > _CHUNK_TOKENS):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(passage)
        tokens += len(passage.token_ids)
    if chunk:
        yield chunk


def _score_chunk(session: Scores, passages: Sequence[Passage], journal: Journal, chunk: str, progress: _SubProgress) -> list[Score]:
    record = None if journal.record is None else journal.record / chunk
    against = None if journal.against is None else journal.against / chunk
    journal_path = journal.folder / "journal" / journal.name / f"scores-{chunk}.npz"
    digest = passages_digest(passages)
    # Both must be there: scores without the record that artifacts are compared with are of no use.
    if (record is None or record.is_dir()) and (journalled := _read_scores(journal_path, passages, digest)) is not None:
        progress.advance(sum(len(scored_tokens(passage)) for passage in passages))
        return journalled
    with disk_errors(journal.folder):
        journal_path.parent.mkdir(parents=True, exist_ok=True)
        if record is not None:
            shutil.rmtree(record, ignore_errors=True)  # the process that wrote it ended before it journalled the scores
            record.parent.mkdir(parents=True, exist_ok=True)
    scores = session.score(passages, record, against, progress)
    if [score.id for score in scores] != [passage.id for passage in passages]:
        raise CheckpointError(
            f"task {journal.name}: the runtime did not score the {len(passages)} items it was given in their order"
        )
    with disk_errors(journal.folder):
        write_bytes(journal_path, _pack_scores(scores, digest))
    return scores


def _pack_scores(scores: Sequence[Score], digest: str) -> bytes:
    at_least = any(score.at_least for score in scores)
    arrays = {
        "sizes": np.array([len(score.negative_log_likelihood) for score in scores], dtype=np.int64),
        "nll": np.concatenate([score.negative_log_likelihood for score in scores]),
        "about": np.array(json.dumps({"digest": digest, "faults": [score.fault for score in scores], "at_least": at_least})),
    }
    if any(score.kl is not None for score in scores):
        arrays["kl"] = np.concatenate([score.kl for score in scores if score.kl is not None])
        arrays["same_top"] = np.concatenate([score.same_top for score in scores if score.same_top is not None])
    buffer = io.BytesIO()
    np.savez(buffer, **cast("dict[str, Any]", arrays))
    return buffer.getvalue()


def _read_scores(path: Path, passages: Sequence[Passage], digest: str) -> list[Score] | None:
    """Return a chunk's journalled scores, None where there are none of these passages or the file is damaged."""
    try:
        with np.load(path) as arrays:
            about = json.loads(str(arrays["about"]))
            if about["digest"] != digest:
                return None
            at_least = bool(about["at_least"])
            ends = np.cumsum(arrays["sizes"]).tolist()
            columns = {name: arrays[name] for name in ("nll", "kl", "same_top") if name in arrays}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [
        Score(
            id=passage.id,
            negative_log_likelihood=columns["nll"][span],
            kl=columns["kl"][span] if "kl" in columns else None,
            same_top=columns["same_top"][span] if "same_top" in columns else None,
            fault=fault,
            at_least=at_least and len(columns["nll"][span]) > 0,
        )
        for passage, span, fault in zip(passages, slices, about["faults"], strict=True)
    ]
