"""What a measurement has been told so far, kept item by item, so that one that was interrupted asks only for the rest.

<measurement>/
  journal/<name>/answers-00000.parquet …   answers as they came, a few at a time, each under a digest of what was asked
  journal/<name>/scores-00000.npz …        the scores of one chunk of passages each
  record/<name>/00000/ …                   the original's predictions, one folder for each of these chunks

The journal goes when the measurement is complete: its items hold the same.
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

from compress.errors import CheckpointError, ServerError
from compress.files import telling_where, write_bytes
from compress.progress import Progress
from compress.runtimes.runtime import UNSCORED, Answer, Passage, Prompt, Score, Session, passages_digest, scored_tokens

_PART_ROWS = 64
_PART_SECONDS = 2.0
"""After so many answers, or so long, a part is written: what a killed measurement loses at most."""
_CHUNK_PASSAGES = 128
_CHUNK_TOKENS = 32_768
_NAMED = 3


@dataclass(frozen=True)
class Journal:
    """Where the scores under `name` are kept in the measurement's `folder`.

    What a later comparison needs is written below `record`; or, with `against`, the predictions are compared with what was recorded
    there of the same passages.
    """

    folder: Path
    name: str
    record: Path | None
    against: Path | None


def answer_all(
    session: Session, prompts: Sequence[Prompt], max_new_tokens: int, folder: Path, name: str, progress: Progress
) -> list[Answer]:
    """Answer each prompt, in the order given; what the measurement at `folder` has an answer to under `name` is not asked again.

    Prompts that failed before are asked once more; who watches is told of those that fail for good.

    Raises:
        ServerError: the runtime does not answer any more, or not one prompt could be answered.
        CheckpointError: the runtime gave other answers than it was asked for.
    """
    journal = folder / "journal" / name
    keys = [_key(prompt, max_new_tokens) for prompt in prompts]
    known = _read_answers(journal, with_faults=session.block is not None)
    answers = {place: known[key] for place, key in enumerate(keys) if key in known}
    blocks = _blocks(len(prompts), answers, session.block)
    with _writing(journal) as write, progress.task("answer", len(prompts), "prompts") as advance:
        advance(len(prompts) - sum(len(places) for places in blocks))
        for places in blocks:
            asked = [prompts[place] for place in places]
            alone = _unique({place: prompts[place].id for place in places})
            kept: set[int] = set()

            def told(answer: Answer, alone: dict[str, int] = alone, kept: set[int] = kept) -> None:
                if (place := alone.get(answer.id)) is not None:
                    write(keys[place], answer)
                    kept.add(place)

            found = session.answer(asked, max_new_tokens, _Within(progress, advance), told)
            if [answer.id for answer in found] != [prompt.id for prompt in asked]:
                raise CheckpointError(
                    f"task {name}: the runtime did not answer the {len(asked)} prompts it was given in their order"
                )
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
                if place not in kept:
                    write(keys[place], answer)
    faults = [(answer.id, answer.fault) for _, answer in sorted(answers.items()) if answer.fault is not None]
    tell_of_faults(name, "answered", faults, len(prompts), progress)
    return [answers[place] for place in range(len(prompts))]


def score_all(session: Session, passages: Sequence[Passage], journal: Journal, progress: Progress) -> list[Score]:
    """Score the passages, in the order given and in chunks; chunks that were scored before are not scored again.

    Where the chunks end depends on the passages alone, so that a record is read in the chunks it was written in.

    Raises:
        ServerError: the runtime does not answer any more, or not one passage could be scored.
        CheckpointError: the runtime scored other passages than it was given.
        UsageError: `against` was recorded on other passages, or by another runtime.
        StoreError: a record or the journal cannot be written.
    """
    scores: list[Score] = []
    with progress.task("score", sum(len(scored_tokens(passage)) for passage in passages), "tokens") as advance:
        for number, chunk in enumerate(_chunks(passages)):
            scores += _score_chunk(session, chunk, journal, f"{number:05d}", _Within(progress, advance))
    scored = [score for passage, score in zip(passages, scores, strict=True) if scored_tokens(passage)]
    faults = [(score.id, score.fault) for score in scored if score.fault is not None and score.fault != UNSCORED]
    tell_of_faults(journal.name, "scored", faults, len(scored), progress)
    return scores


def forget(folder: Path) -> None:
    """Remove the journal of a measurement that is complete."""
    shutil.rmtree(folder / "journal", ignore_errors=True)


def tell_of_faults(name: str, what: str, faults: Sequence[tuple[str, str]], items: int, progress: Progress) -> None:
    """Tell who watches of the items that failed.

    Raises:
        ServerError: all of them did.
    """
    if not faults:
        return
    first = "; ".join(f"{item}: {fault.removeprefix(f'{item}: ')}" for item, fault in faults[:_NAMED])
    if len(faults) == items:
        raise ServerError(f"task {name}: none of its {items:,} items could be {what}; the first: {first}")
    progress.warn(f"task {name}: {len(faults):,} of {items:,} items could not be {what} and count as wrong; the first: {first}")


@dataclass(frozen=True)
class _Within:
    """Progress of a part, which is told of as that of the whole."""

    whole: Progress
    advance: Callable[[int], None]

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """Pass the counts on."""
        del name, total, unit
        yield self.advance

    def warn(self, message: str) -> None:
        """Pass the message on."""
        self.whole.warn(message)


def _key(prompt: Prompt, max_new_tokens: int) -> str:
    """Return a digest of what is asked."""
    digest = hashlib.sha256(json.dumps([prompt.id, prompt.text, len(prompt.images), max_new_tokens]).encode())
    for image in prompt.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def _blocks(count: int, answers: dict[int, Answer], block: int | None) -> list[list[int]]:
    """Return the places of the prompts to be asked, those in one list together.

    Where prompts are computed together, the same ones are asked for together whatever is known, so that they get the same answers.
    """
    if block is None:
        missing = [place for place in range(count) if place not in answers]
        return [missing] if missing else []
    blocks = [list(range(first, min(first + block, count))) for first in range(0, count, block)]
    return [places for places in blocks if any(place not in answers for place in places)]


def _unique(ids: dict[int, str]) -> dict[str, int]:
    """Return the places of the ids that stand once."""
    counts = Counter(ids.values())
    return {name: place for place, name in ids.items() if counts[name] == 1}


@contextmanager
def _writing(folder: Path) -> Generator[Callable[[str, Answer], None]]:
    """Give what keeps an answer under its key; what is not on the disk yet is written when the context is left, in every case."""
    rows: list[dict[str, object]] = []
    written = time.monotonic()

    def flush() -> None:
        nonlocal written
        if rows:
            _write_part(folder, rows)
        rows.clear()
        written = time.monotonic()

    def write(key: str, answer: Answer) -> None:
        rows.append({"key": key, "id": answer.id, "text": answer.text, "token_ids": list(answer.token_ids), "fault": answer.fault})
        if len(rows) >= _PART_ROWS or time.monotonic() - written >= _PART_SECONDS:
            flush()

    try:
        yield write
    finally:
        flush()


def _write_part(folder: Path, rows: Sequence[dict[str, object]]) -> None:
    from compress.calibration.tables import parquet_of

    with telling_where(folder):
        folder.mkdir(parents=True, exist_ok=True)
        last = max((int(path.stem.rpartition("-")[2]) for path in folder.glob("answers-*.parquet")), default=-1)
        write_bytes(folder / f"answers-{last + 1:05d}.parquet", parquet_of(rows))


def _read_answers(folder: Path, *, with_faults: bool) -> dict[str, Answer]:
    """Return the answers that were kept, by their keys; a part that cannot be read is asked for again."""
    import pyarrow as pa

    from compress.calibration.tables import read_rows

    unreadable = cast("tuple[type[Exception], ...]", (OSError, ValueError, KeyError, TypeError, pa.ArrowException))
    found: dict[str, Answer] = {}
    for path in sorted(folder.glob("answers-*.parquet")):
        with suppress(*unreadable):
            rows = cast("list[dict[str, Any]]", read_rows(path))
            found |= {
                row["key"]: Answer(row["id"], row["text"], tuple(row["token_ids"]), row["fault"])
                for row in rows
                if row["fault"] is None or with_faults
            }
    return found


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


def _score_chunk(session: Session, passages: Sequence[Passage], journal: Journal, chunk: str, progress: _Within) -> list[Score]:
    record = None if journal.record is None else journal.record / chunk
    against = None if journal.against is None else journal.against / chunk
    kept = journal.folder / "journal" / journal.name / f"scores-{chunk}.npz"
    digest = passages_digest(passages)
    if (record is None or record.is_dir()) and (known := _read_scores(kept, passages, digest)) is not None:
        progress.advance(sum(len(scored_tokens(passage)) for passage in passages))
        return known
    with telling_where(journal.folder):
        kept.parent.mkdir(parents=True, exist_ok=True)
        if record is not None:
            shutil.rmtree(record, ignore_errors=True)  # its scores were lost with the process that wrote it
            record.parent.mkdir(parents=True, exist_ok=True)
    scores = session.score(passages, record, against, progress)
    if [score.id for score in scores] != [passage.id for passage in passages]:
        raise CheckpointError(
            f"task {journal.name}: the runtime did not score the {len(passages)} items it was given in their order"
        )
    with telling_where(journal.folder):
        write_bytes(kept, _packed(scores, digest))
    return scores


def _packed(scores: Sequence[Score], digest: str) -> bytes:
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
    """Return a chunk's scores as they were kept, None where there are none of these passages, or a part of the file is lost."""
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
    parts = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
    return [
        Score(
            id=passage.id,
            negative_log_likelihood=columns["nll"][part],
            kl=columns["kl"][part] if "kl" in columns else None,
            same_top=columns["same_top"][part] if "same_top" in columns else None,
            fault=fault,
            at_least=at_least and len(columns["nll"][part]) > 0,
        )
        for passage, part, fault in zip(passages, parts, about["faults"], strict=True)
    ]
