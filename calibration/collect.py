"""Selection of calibration samples from their sources into one folder, with a manifest that pins each by its content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as tensors

from compress.calibration.sets import TextSet, VqaSet, WikitextSet
from compress.data.identity import WordHashes, fingerprint_of, shingles, words_of
from compress.data.images import media_type
from compress.data.prompts import Prompt, RefusedError, check_reserved, load_tokenizer, longest_input
from compress.data.questions import Question, open_questions
from compress.data.samples import IMAGES, MANIFEST, QUESTIONS, SHINGLES, WINDOWS
from compress.data.texts import read_documents
from compress.data.windows import Encode, Window, WindowRequest, draw_indices, encoder, pack_windows
from compress.errors import DataError
from compress.families.resolve import family_at
from compress.files import write_json, write_text
from compress.progress import Progress


@dataclass(frozen=True)
class PinnedSet:
    """A recipe's calibration set with its local files."""

    spec: TextSet | WikitextSet | VqaSet
    files: tuple[Path, ...]

    label: str = ""
    """The hub dataset of the files; empty for local ones."""


@dataclass(frozen=True)
class CalibrationSelection:
    """All calibration sets of a recipe, and the seed of the random selection."""

    seed: int
    sets: tuple[PinnedSet, ...]


def collect(
    selection: CalibrationSelection, model: Path, target: Path, progress: Progress, trust_remote_code: bool = False
) -> None:
    """Select the samples with the tokenizer of the checkpoint at `model` and write them to `target`.

    `manifest.json` has an entry per sample (kind, id, origin, SHA-256 of its content, and the data of the overlap check) and a
    digest of them all; `windows.safetensors` the token ids of each text set; `shingles.safetensors` the hashes of all 13-word
    shingles of their text, with the index of a sample; `questions.jsonl` and `images/` the questions. Questions that the model's
    processor refuses are omitted, with a warning.

    Raises:
        DataError: a source cannot be used or has too few samples, or a sample does not fit the model.
        CheckpointError: the checkpoint's tokenizer cannot be loaded.
    """
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(model, trust_remote_code)
    longest = _longest_window(model, trust_remote_code)
    samples, windows, rows = list[dict[str, Any]](), dict[str, NDArray[np.int32]](), list[dict[str, Any]]()
    texts = dict[int, str]()
    for index, pinned in enumerate(selection.sets):
        # by set, so that two sets of one file do not draw the same rows
        seed, name = f"{selection.seed}:{index}", f"calibration.sets.{index}"
        if isinstance(pinned.spec, VqaSet):
            check = _question_check(model, set(tokenizer.all_special_tokens), trust_remote_code)
            for row, sample in _take_questions(pinned, _draw_questions(pinned, seed, name, progress), target, check, progress):
                rows.append({"set": index, **row})
                samples.append({"set": index, **sample})
            continue
        if longest is not None and pinned.spec.tokens > longest:
            raise DataError(
                f"{name}: windows of {pinned.spec.tokens} tokens, and the model takes {longest}; lower {name}.tokens in the recipe"
            )
        request = WindowRequest(samples=pinned.spec.samples, tokens=pinned.spec.tokens, seed=seed, name=name)
        drawn = _draw_windows(pinned, request, encoder(tokenizer), progress)
        windows[name] = np.stack([window.token_ids for window in drawn])
        texts |= {len(samples) + number: window.text for number, window in enumerate(drawn)}
        samples += [{"set": index, **_window_entry(pinned, name, *numbered)} for numbered in enumerate(drawn)]
    if windows:
        tensors.save_file(windows, target / WINDOWS)
        tensors.save_file(_shingles_of(texts), target / SHINGLES)
    if rows:
        write_text(target / QUESTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    # of contents, not of files: the same samples from a renamed or converted file have the same digest
    digest = hashlib.sha256("\n".join([str(selection.seed), *(sample["sha256"] for sample in samples)]).encode()).hexdigest()
    write_json(target / MANIFEST, {"schema": 2, "seed": selection.seed, "digest": digest, "samples": samples})


def _longest_window(model: Path, trust_remote_code: bool) -> int | None:
    """Return the longest window of text for a model; one that generates nothing adds two special tokens to every text."""
    longest, family = longest_input(model), family_at(model, trust_remote_code)
    return longest - 2 if longest is not None and family.head is None else longest


def _draw_windows(pinned: PinnedSet, request: WindowRequest, encode: Encode, progress: Progress) -> list[Window]:
    spec = cast("TextSet | WikitextSet", pinned.spec)
    documents = chain.from_iterable(read_documents(path, spec.column) for path in pinned.files)
    with progress.task(f"{request.name}: pack text", request.samples, "windows") as advance:
        windows = pack_windows(documents, encode, request)
        advance(len(windows))
    return windows


def _window_entry(pinned: PinnedSet, name: str, number: int, window: Window) -> dict[str, Any]:
    return {
        "kind": "text",
        "id": f"{name}:{number}",
        "origin": _origin(pinned, window.first if window.first == window.last else f"{window.first} to {window.last}"),
        # bytes of one order, so that the digest is the same on every machine
        "sha256": hashlib.sha256(window.token_ids.astype("<i4").tobytes()).hexdigest(),
    }


def _shingles_of(texts: Mapping[int, str]) -> dict[str, NDArray[Any]]:
    """Return the distinct shingle hashes of the samples' texts, sorted, each with the index of a sample that contains it."""
    hashes = WordHashes()
    by_sample = {index: shingles(hashes.of(words_of(text))) for index, text in texts.items()}
    owners = np.concatenate([np.full(len(values), index, dtype=np.int64) for index, values in by_sample.items()])
    # sorted, as the overlap check finds them by bisection
    distinct, first = np.unique(np.concatenate(list(by_sample.values())), return_index=True)
    return {"hashes": distinct, "samples": owners[first]}


def _draw_questions(pinned: PinnedSet, seed: str, name: str, progress: Progress) -> list[Question]:
    spec = cast("VqaSet", pinned.spec)
    questions = open_questions(pinned.files, spec.columns, spec.rows)
    total = len(questions)
    folder = None if spec.image_folder is None else Path(spec.image_folder)
    if total < spec.samples:
        raise DataError(
            f"{name}: {', '.join(map(str, pinned.files))} holds {total} questions, {spec.samples} are asked for; "
            f"lower {name}.samples, or name a file with more"
        )
    drawn = list[Question]()
    with progress.task(f"{name}: read questions", spec.samples, "questions") as advance:
        chosen = frozenset(draw_indices(total, spec.samples, seed))
        for question in questions.read(chosen, folder):
            drawn.append(question)
            advance(1)
    return drawn


QuestionCheck = Callable[[Prompt, str | None, str], None]
"""Checks a question, its answer (or None) and its origin; raises where the model cannot process it."""


def _question_check(model: Path, reserved: set[str], trust_remote_code: bool) -> QuestionCheck:
    """Return a check that questions have no special tokens and that the checkpoint's processor accepts them."""
    from compress.calibration.batches import Exchange, load_processor, process  # with torch, which planning does without

    processor = load_processor(model, trust_remote_code)

    def check(prompt: Prompt, answer: str | None, origin: str) -> None:
        check_reserved((prompt.text, answer or ""), reserved, f"{origin}: question {prompt.id}")
        process(processor, [Exchange(replace(prompt, id=f"{origin}: question {prompt.id}"), answer)])

    return check


def _take_questions(
    pinned: PinnedSet, questions: Sequence[Question], target: Path, check: QuestionCheck, progress: Progress
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Write the questions that the model's processor accepts; return the results of `_write_question`.

    Raises:
        DataError: it accepts none, or a question cannot be used for another reason.
    """
    accepted, refused = list[tuple[dict[str, Any], dict[str, Any]]](), list[str]()
    for question in questions:
        try:
            accepted.append(_write_question(pinned, question, target, check))
        except RefusedError as error:
            refused.append(str(error))
            progress.warn(f"calibration leaves out a question: {error}")
    if not accepted:
        raise DataError(f"calibration: none of {len(refused):,} questions can be shown to the model; the first: {refused[0]}")
    return accepted


def _write_question(
    pinned: PinnedSet, question: Question, target: Path, check: QuestionCheck
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a question's images; return its row in `questions.jsonl` and its entry in the manifest.

    Raises:
        DataError: an image cannot be decoded, or `check` fails.
    """
    prompt = cast("VqaSet", pinned.spec).prompt.replace("{question}", question.question)
    # of several annotators' answers (VQAv2 has ten) the most frequent
    answer = Counter(question.answers).most_common(1)[0][0] if question.answers else None
    origin = _origin(pinned, question.origin)
    fingerprints = [fingerprint_of(image, origin) for image in question.images]  # decodes each image completely
    # before its images are written, so that a refused question leaves no file behind
    check(Prompt(question.id, prompt, question.images), answer, origin)
    images = [_write_image(image, digest, target) for image, digest in zip(question.images, question.image_digests, strict=True)]
    content = json.dumps([prompt, answer, *question.image_digests], ensure_ascii=False)
    row = {"id": question.id, "prompt": prompt, "answer": answer, "images": images}
    sample = {
        "kind": "question",
        "id": question.id,
        "origin": origin,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "words": " ".join(words_of(question.question)),
        "images": list(question.image_digests),
        "looks": [{"pixels": image.pixels, "hash": image.hashed.tobytes().hex()} for image in fingerprints],
    }
    return row, sample


def _write_image(data: bytes, digest: str, target: Path) -> str:
    """Write an image, which has been decoded, under its digest; return its path relative to `target`."""
    # by content: an image that many questions share is stored once, and no name from the file becomes a path
    path = target / IMAGES / f"{digest}.{media_type(data).rpartition('/')[2]}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return f"{IMAGES}/{path.name}"


def _origin(pinned: PinnedSet, row: str) -> str:
    return f"{pinned.label}/{row}" if pinned.label else row
