"""Calibration samples drawn from their sources and written to one folder, with a manifest that pins each by its content."""

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

from compress.calibration.identity import WordHashes, looks_of, shingles, words_of
from compress.calibration.questions import Question, count_questions, read_questions
from compress.calibration.sets import TextSet, VqaSet, WikitextSet
from compress.calibration.texts import read_documents
from compress.calibration.windows import Encode, Wanted, Window, choose, pack_windows
from compress.checkpoint import read_config, text_config
from compress.conversation import RefusedError, check_reserved, load_tokenizer
from compress.errors import DataError
from compress.families import family_at
from compress.files import write_json, write_text
from compress.pictures import media_type
from compress.progress import Progress
from compress.runtimes.runtime import Prompt

MANIFEST = "manifest.json"
QUESTIONS = "questions.jsonl"
WINDOWS = "windows.safetensors"
SHINGLES = "shingles.safetensors"
IMAGES = "images"


@dataclass(frozen=True)
class PinnedSet:
    """A recipe's calibration set with its files on this machine; `label` says which hub dataset they are, empty for local ones."""

    spec: TextSet | WikitextSet | VqaSet
    files: tuple[Path, ...]
    label: str = ""


@dataclass(frozen=True)
class CalibrationSelection:
    """All calibration sets of a recipe and the seed their samples are drawn with."""

    seed: int
    sets: tuple[PinnedSet, ...]


def collect(
    selection: CalibrationSelection, model: Path, target: Path, progress: Progress, trust_remote_code: bool = False
) -> None:
    """Draw the samples with the tokenizer of the checkpoint at `model` and write them below `target`.

    `manifest.json` has an entry per sample (kind, id, origin, SHA-256 of its content, and what the overlap check compares) and
    a digest of them all; `windows.safetensors` the token ids of each text set; `shingles.safetensors` a hash of each 13 words in a
    row of their text, with the place of its sample; `questions.jsonl` and `images/` the questions. Those that the model's processor
    does not take are left out, and who watches is told which.

    Raises:
        DataError: a source cannot be used or gives fewer samples than asked for, or a sample does not fit the model.
        CheckpointError: the checkpoint's tokenizer cannot be loaded.
    """
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(model, trust_remote_code)
    longest = _longest_window(model, trust_remote_code)
    samples, windows, rows = list[dict[str, Any]](), dict[str, NDArray[np.int32]](), list[dict[str, Any]]()
    texts = dict[int, str]()
    for place, pinned in enumerate(selection.sets):
        seed, name = f"{selection.seed}:{place}", f"calibration.sets.{place}"
        if isinstance(pinned.spec, VqaSet):
            check = _question_check(model, set(tokenizer.all_special_tokens), trust_remote_code)
            for row, sample in _take_questions(pinned, _draw_questions(pinned, seed, name, progress), target, check, progress):
                rows.append({"set": place, **row})
                samples.append({"set": place, **sample})
            continue
        if longest is not None and pinned.spec.tokens > longest:
            raise DataError(
                f"{name}: windows of {pinned.spec.tokens} tokens, and the model takes {longest}; lower {name}.tokens in the recipe"
            )
        wanted = Wanted(samples=pinned.spec.samples, tokens=pinned.spec.tokens, seed=seed, name=name)
        drawn = _draw_windows(pinned, wanted, encoder(tokenizer), progress)
        windows[name] = np.stack([window.token_ids for window in drawn])
        texts |= {len(samples) + number: window.text for number, window in enumerate(drawn)}
        samples += [{"set": place, **_window_entry(pinned, name, *numbered)} for numbered in enumerate(drawn)]
    if windows:
        tensors.save_file(windows, target / WINDOWS)
        tensors.save_file(_shingles_of(texts), target / SHINGLES)
    if rows:
        write_text(target / QUESTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    total = hashlib.sha256("\n".join([str(selection.seed), *(sample["sha256"] for sample in samples)]).encode()).hexdigest()
    write_json(target / MANIFEST, {"schema": 2, "seed": selection.seed, "digest": total, "samples": samples})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a calibration folder.

    Raises:
        DataError: the folder holds none, or one that cannot be read.
    """
    try:
        return cast("dict[str, Any]", json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: its {MANIFEST} cannot be read ({error}); run again with --fresh to collect the samples anew"
        ) from error


def longest_input(model: Path) -> int | None:
    """Return how many tokens the checkpoint's config says its decoder takes, None where it does not say."""
    config = read_config(model)
    length: object = text_config(config).get("max_position_embeddings", config.get("max_position_embeddings"))
    return length if isinstance(length, int) else None


def _longest_window(model: Path, trust_remote_code: bool) -> int | None:
    """Return how many tokens of text the model takes at once; where it writes none, it has every text between two of its own."""
    longest, family = longest_input(model), family_at(model, trust_remote_code)
    return longest - 2 if longest is not None and family.head is None else longest


def encoder(tokenizer: Any) -> Encode:
    """Return what turns texts into token ids, special tokens neither added nor recognised."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,  # what reads like an image token in a text is text
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return cast("list[list[int]]", encoded["input_ids"])

    return encode


def _draw_windows(pinned: PinnedSet, wanted: Wanted, encode: Encode, progress: Progress) -> list[Window]:
    spec = cast("TextSet | WikitextSet", pinned.spec)
    documents = chain.from_iterable(read_documents(path, spec.column) for path in pinned.files)
    with progress.task(f"{wanted.name}: pack text", wanted.samples, "windows") as advance:
        windows = pack_windows(documents, encode, wanted)
        advance(len(windows))
    return windows


def _window_entry(pinned: PinnedSet, name: str, number: int, window: Window) -> dict[str, Any]:
    return {
        "kind": "text",
        "id": f"{name}:{number}",
        "origin": _origin(pinned, window.first if window.first == window.last else f"{window.first} to {window.last}"),
        "sha256": hashlib.sha256(window.token_ids.astype("<i4").tobytes()).hexdigest(),
    }


def _shingles_of(texts: Mapping[int, str]) -> dict[str, NDArray[Any]]:
    """Return the hashes of all runs of words of the samples' texts, sorted, each once, and the place of a sample that has it."""
    hashes = WordHashes()
    found = {place: shingles(hashes.of(words_of(text))) for place, text in texts.items()}
    owners = np.concatenate([np.full(len(own), place, dtype=np.int64) for place, own in found.items()])
    every, first = np.unique(np.concatenate(list(found.values())), return_index=True)
    return {"hashes": every, "samples": owners[first]}


def _draw_questions(pinned: PinnedSet, seed: str, name: str, progress: Progress) -> list[Question]:
    spec = cast("VqaSet", pinned.spec)
    total = count_questions(pinned.files, spec.columns, spec.rows)
    folder = None if spec.image_folder is None else Path(spec.image_folder)
    if total < spec.samples:
        raise DataError(
            f"{name}: {', '.join(map(str, pinned.files))} holds {total} questions, {spec.samples} are asked for; "
            f"lower {name}.samples, or name a file with more"
        )
    drawn = list[Question]()
    with progress.task(f"{name}: read questions", spec.samples, "questions") as advance:
        chosen = frozenset(choose(total, spec.samples, seed))
        for question in read_questions(pinned.files, spec.columns, chosen, spec.rows, folder):
            drawn.append(question)
            advance(1)
    return drawn


QuestionCheck = Callable[[Prompt, str | None, str], None]
"""Checks a question with its answer, None where it has none, and where it is from; raises where the model cannot be shown it."""


def _question_check(model: Path, reserved: set[str], trust_remote_code: bool) -> QuestionCheck:
    """Return what checks that questions hold no special token and that the processor of the checkpoint at `model` takes them."""
    from compress.calibration.batches import Exchange, load_processor, process

    processor = load_processor(model, trust_remote_code)

    def check(prompt: Prompt, answer: str | None, origin: str) -> None:
        check_reserved((prompt.text, answer or ""), reserved, f"{origin}: question {prompt.id}")
        process(processor, [Exchange(replace(prompt, id=f"{origin}: question {prompt.id}"), answer)])

    return check


def _take_questions(
    pinned: PinnedSet, questions: Sequence[Question], target: Path, check: QuestionCheck, progress: Progress
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Write questions, those left out which the model's processor does not take; return for each what `_write_question` does.

    Raises:
        DataError: it takes none, or a question cannot be used otherwise.
    """
    taken, refused = list[tuple[dict[str, Any], dict[str, Any]]](), list[str]()
    for question in questions:
        try:
            taken.append(_write_question(pinned, question, target, check))
        except RefusedError as error:
            refused.append(str(error))
            progress.warn(f"calibration leaves out a question: {error}")
    if not taken:
        raise DataError(f"calibration: none of {len(refused):,} questions can be shown to the model; the first: {refused[0]}")
    return taken


def _write_question(
    pinned: PinnedSet, question: Question, target: Path, check: QuestionCheck
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write a question's images; return its row in `questions.jsonl` and its entry in the manifest.

    Raises:
        DataError: it cannot be used, for the images or as `check` says.
    """
    prompt = cast("VqaSet", pinned.spec).prompt.replace("{question}", question.question)
    answer = Counter(question.answers).most_common(1)[0][0] if question.answers else None
    origin = _origin(pinned, question.origin)
    looks = [looks_of(image, origin) for image in question.images]  # decodes all of each, too
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
        "looks": [{"pixels": each.pixels, "hash": each.hashed.tobytes().hex()} for each in looks],
    }
    return row, sample


def _write_image(data: bytes, digest: str, target: Path) -> str:
    """Write an image, which has been decoded, under its digest; return its path below `target`."""
    path = target / IMAGES / f"{digest}.{media_type(data).rpartition('/')[2]}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return f"{IMAGES}/{path.name}"


def _origin(pinned: PinnedSet, place: str) -> str:
    return f"{pinned.label}/{place}" if pinned.label else place
