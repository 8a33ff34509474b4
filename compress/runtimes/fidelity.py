"""Exact comparison of two models' predictions from their final hidden states, without ever keeping logits of a long text.

The original's hidden states and its output head are recorded once; any artifact is then compared with the original over the whole
vocabulary by computing both models' logits again, a few positions at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from compress.checkpoint import read_json_object
from compress.errors import StoreError, UsageError
from compress.runtimes.runtime import Passage, passages_digest

_FILES: Any = safetensors.torch
_LOGITS_AT_ONCE = 1 << 25
_VOCABULARY_AT_ONCE = 1 << 14
_SCHEMA = 2
_HEAD = "head.safetensors"


@dataclass(frozen=True)
class Head:
    """A model's output layer: `weight` [vocabulary, hidden], `bias` [vocabulary] where it has one."""

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the float32 logits [positions, vocabulary] of hidden states [positions, hidden]."""
        inputs = hidden.to(torch.float32)
        parts = [inputs @ part.to(torch.float32).t() for part in torch.split(self.weight, _VOCABULARY_AT_ONCE)]
        logits = torch.cat(parts, 1)
        return logits if self.bias is None else logits + self.bias.to(torch.float32)


class Heads:
    """The heads that one session meets again and again: its own one's digest, and the original's, read once."""

    def __init__(self) -> None:
        self._digest: str | None = None
        self._read: tuple[Path, Head] | None = None

    def digest(self, head: Head) -> str:
        """Return a SHA-256 over the session's own head."""
        if self._digest is None:
            digest = hashlib.sha256()
            for tensor in (head.weight, *(() if head.bias is None else (head.bias,))):
                plain = tensor.detach().cpu().contiguous()
                digest.update(f"{plain.dtype} {list(plain.shape)}".encode())
                digest.update(plain.view(torch.uint8).numpy().data)
            self._digest = digest.hexdigest()
        return self._digest

    def read(self, path: Path, device: torch.device) -> Head:
        """Read a recorded head."""
        if self._read is None or self._read[0] != path:
            tensors = _FILES.load_file(path, device=str(device))
            self._read = (path, Head(tensors["weight"], tensors.get("bias")))
        return self._read[1]


@dataclass(frozen=True)
class Predictions:
    """How each of some positions was predicted; the arrays of a `Score`, over several passages in a row."""

    negative_log_likelihood: NDArray[np.float64]
    kl: NDArray[np.float64] | None
    same_top: NDArray[np.bool_] | None


def predict(hidden: Tensor, head: Head, tokens: Tensor, original: tuple[Tensor, Head] | None) -> Predictions:
    """Score `tokens` [positions] against the predictions from `hidden` [positions, hidden], and compare with the original's.

    Raises:
        UsageError: the original has another vocabulary.
    """
    if original is not None and original[1].weight.shape[0] != head.weight.shape[0]:
        raise UsageError(
            f"the original's head has {original[1].weight.shape[0]} tokens, this artifact's {head.weight.shape[0]}; "
            "only models of one vocabulary can be compared token by token"
        )
    nll, kl, same_top = ([torch.empty(0, dtype=torch.float64)] for _ in range(3))
    step = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    for first in range(0, hidden.shape[0], step):
        part = slice(first, first + step)
        scores = head.logits(hidden[part]).log_softmax(1)
        nll.append(-scores.gather(1, tokens[part, None]).squeeze(1).to("cpu", torch.float64))
        if original is not None:
            reference = original[1].logits(original[0][part]).log_softmax(1)
            same_top.append((reference.argmax(1) == scores.argmax(1)).to("cpu", torch.float64))
            divergence = (reference.exp() * (reference - scores)).sum(1, dtype=torch.float64)
            kl.append(divergence.clamp_min(0).cpu())  # below zero only by rounding
    likelihood = torch.cat(nll).numpy()
    if original is None:
        return Predictions(likelihood, None, None)
    return Predictions(likelihood, torch.cat(kl).numpy(), torch.cat(same_top).numpy().astype(np.bool_))


class RecordWriter:
    """Writes a record: a folder with the head and each batch's hidden states; it appears under its name when it is complete.

    Where a record beside it holds the same head, that one is referred to.
    """

    def __init__(self, folder: Path, passages: Sequence[Passage], head: Head, heads: Heads) -> None:
        self._folder = folder
        self._aside = folder.with_name(f".{folder.name}.partial")
        self._files: dict[str, str] = {}
        self._passages = passages
        shutil.rmtree(self._aside, ignore_errors=True)
        try:
            self._aside.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"{self._aside}: cannot be made ({error}); choose a folder that can be written to") from error
        self._head_digest = heads.digest(head)
        self._head = _head_beside(folder, self._head_digest)
        if self._head is None:
            self._save("head", {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias}))

    def add(self, hidden: dict[int, Tensor]) -> None:
        """Write a batch: hidden states [positions, hidden] by the passages' places."""
        name = f"hidden-{len(self._files):06d}"
        self._save(name, {str(place): states for place, states in hidden.items()})
        self._files |= {str(place): name for place in hidden}

    def finish(self) -> None:
        """Complete the record and rename it into place.

        Raises:
            StoreError: the disk is full, or a record is there already.
        """
        record = {
            "schema": _SCHEMA,
            "passages": passages_digest(self._passages),
            "head": self._head or _HEAD,
            "head_digest": self._head_digest,
            "files": self._files,
        }
        try:
            (self._aside / "record.json").write_text(json.dumps(record), encoding="utf-8")
            self._aside.rename(self._folder)
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot be written ({error}); free space or remove the old record") from error

    def discard(self) -> None:
        """Remove what was written of a record that will not be completed."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self._aside / f"{name}.safetensors"
        try:
            _FILES.save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: cannot be written ({error}); free space on that disk and run again") from error


class Record:
    """A record of the original's predictions, read back."""

    def __init__(self, folder: Path, passages: Sequence[Passage], device: torch.device, heads: Heads) -> None:
        content = read_json_object(folder / "record.json")
        if content.get("schema") != _SCHEMA or content.get("passages") != passages_digest(passages):
            raise UsageError(f"{folder}: was recorded on other passages than these; record the original again on the same ones")
        self._folder = folder
        self._files = cast("dict[str, str]", content["files"])
        self._loaded: tuple[str, dict[str, Tensor]] = ("", {})
        self._device = device
        self.head = heads.read((folder / str(content["head"])).resolve(), device)

    def holds(self, place: int) -> bool:
        """Return whether the passage at this place was recorded; the original may have had no score of it."""
        return str(place) in self._files

    def hidden(self, place: int) -> Tensor:
        """Return the original's hidden states [positions, hidden] of the passage at this place."""
        name = self._files[str(place)]
        if self._loaded[0] != name:
            self._loaded = (name, _FILES.load_file(self._folder / f"{name}.safetensors", device=str(self._device)))
        return self._loaded[1][str(place)]


def _head_beside(folder: Path, digest: str) -> str | None:
    """Return where, relative to a record, one beside it holds the head of this digest."""
    for path in sorted(folder.parent.glob(f"[!.]*/{_HEAD}")):
        record = path.with_name("record.json")
        if path.parent != folder and record.is_file() and read_json_object(record).get("head_digest") == digest:
            return f"../{path.parent.name}/{_HEAD}"
    return None
