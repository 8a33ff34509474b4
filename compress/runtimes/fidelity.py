"""Exact KL divergence of two models over the full vocabulary, from recorded hidden states instead of logits.

The original's final hidden states and its output head are recorded once. To compare an artifact, both models' logits are computed
from hidden states a few positions at a time, so that the logits of a long text never are in memory at once.
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

from compress.checkpoints.checkpoint import read_json_object
from compress.errors import StoreError, UsageError
from compress.runtimes.runtime import Passage, passages_digest

_FILES: Any = safetensors.torch
_MAX_LOGITS = 1 << 25
"""Logits in memory at once: 128 MiB in float32, of which the softmax of two models holds a few copies."""

_VOCABULARY_CHUNK = 1 << 14
"""Rows of the head that are converted to float32 at once: a bfloat16 head of 152,000 × 8,192 has 5 GB in float32."""

_SCHEMA = 2
"""The version of the record's format: records of another one are refused."""

_HEAD = "head.safetensors"


@dataclass(frozen=True)
class Head:
    """A model's output head."""

    weight: Tensor
    """[vocabulary, hidden]"""

    bias: Tensor | None
    """[vocabulary]"""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the float32 logits [positions, vocabulary] of hidden states [positions, hidden]."""
        # float32 products: bfloat16 logits have 8 bits, so that top tokens tie and a small KL is their rounding.
        inputs = hidden.to(torch.float32)
        chunks = [inputs @ rows.to(torch.float32).t() for rows in torch.split(self.weight, _VOCABULARY_CHUNK)]
        logits = torch.cat(chunks, 1)
        return logits if self.bias is None else logits + self.bias.to(torch.float32)


class HeadCache:
    """A session's cache: the digest of its own head, and the original's recorded head."""

    def __init__(self) -> None:
        self._digest: str | None = None
        self._read: tuple[Path, Head] | None = None

    def digest(self, head: Head) -> str:
        """Return the SHA-256 of the session's own head."""
        if self._digest is None:
            digest = hashlib.sha256()
            for tensor in (head.weight, *(() if head.bias is None else (head.bias,))):
                contiguous = tensor.detach().cpu().contiguous()
                # With type and shape: equal bytes of another type are another head.
                digest.update(f"{contiguous.dtype} {list(contiguous.shape)}".encode())
                digest.update(contiguous.view(torch.uint8).numpy().data)
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
    """The arrays of a `Score`, over the concatenated tokens of several passages."""

    negative_log_likelihood: NDArray[np.float64]
    kl: NDArray[np.float64] | None
    same_top: NDArray[np.bool_] | None


def predict(hidden: Tensor, head: Head, tokens: Tensor, original: tuple[Tensor, Head] | None) -> Predictions:
    """Return the log-likelihoods of `tokens` [positions] given `hidden` [positions, hidden], and KL with the original.

    Raises:
        UsageError: the original has another vocabulary.
    """
    if original is not None and original[1].weight.shape[0] != head.weight.shape[0]:
        raise UsageError(
            f"the original's head has {original[1].weight.shape[0]} tokens, this artifact's {head.weight.shape[0]}; "
            "only models of one vocabulary can be compared token by token"
        )
    nll, kl, same_top = ([torch.empty(0, dtype=torch.float64)] for _ in range(3))
    step = max(1, _MAX_LOGITS // head.weight.shape[0])
    for first in range(0, hidden.shape[0], step):
        chunk = slice(first, first + step)
        log_q = head.logits(hidden[chunk]).log_softmax(1)
        nll.append(-log_q.gather(1, tokens[chunk, None]).squeeze(1).to("cpu", torch.float64))
        if original is not None:
            log_p = original[1].logits(original[0][chunk]).log_softmax(1)
            same_top.append((log_p.argmax(1) == log_q.argmax(1)).to("cpu", torch.float64))
            # Summed in float64: the terms of 150,000 tokens have both signs, and cancel to a KL of 1e-6.
            divergence = (log_p.exp() * (log_p - log_q)).sum(1, dtype=torch.float64)
            kl.append(divergence.clamp_min(0).cpu())  # below zero only by rounding
    likelihood = torch.cat(nll).numpy()
    if original is None:
        return Predictions(likelihood, None, None)
    return Predictions(likelihood, torch.cat(kl).numpy(), torch.cat(same_top).numpy().astype(np.bool_))


class RecordWriter:
    """Writes a record: a folder with the output head and each batch's hidden states; it appears under its name when complete.

    Where a neighbouring record has the same head, the new one refers to that file.
    """

    def __init__(self, folder: Path, passages: Sequence[Passage], head: Head, heads: HeadCache) -> None:
        self._folder = folder
        self._partial = folder.with_name(f".{folder.name}.partial")
        self._files: dict[str, str] = {}
        self._passages = passages
        shutil.rmtree(self._partial, ignore_errors=True)
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"{self._partial}: cannot be made ({error}); choose a folder that can be written to") from error
        self._head_digest = heads.digest(head)
        # The head is the bulk of a record (over a gigabyte in large vocabularies), and the same for every task of one model.
        self._head = _neighbouring_head(folder, self._head_digest)
        if self._head is None:
            self._save("head", {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias}))

    def add(self, hidden: dict[int, Tensor]) -> None:
        """Write a batch: hidden states [positions, hidden] by the passages' indices."""
        name = f"hidden-{len(self._files):06d}"
        self._save(name, {str(index): states for index, states in hidden.items()})
        self._files |= {str(index): name for index in hidden}

    def finish(self) -> None:
        """Complete the record and rename it into place.

        Raises:
            StoreError: the disk is full, or the record exists already.
        """
        record = {
            "schema": _SCHEMA,
            "passages": passages_digest(self._passages),
            "head": self._head or _HEAD,
            "head_digest": self._head_digest,
            "files": self._files,
        }
        try:
            # Last before the rename: a record without it is none.
            (self._partial / "record.json").write_text(json.dumps(record), encoding="utf-8")
            self._partial.rename(self._folder)
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot be written ({error}); free space or remove the old record") from error

    def discard(self) -> None:
        """Remove an incomplete record."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self._partial / f"{name}.safetensors"
        try:
            _FILES.save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: cannot be written ({error}); free space on that disk and run again") from error


class Record:
    """A record of the original's predictions, opened for comparison."""

    def __init__(self, folder: Path, passages: Sequence[Passage], device: torch.device, heads: HeadCache) -> None:
        content = read_json_object(folder / "record.json")
        if content.get("schema") != _SCHEMA or content.get("passages") != passages_digest(passages):
            raise UsageError(f"{folder}: was recorded on other passages than these; record the original again on the same ones")
        self._folder = folder
        self._files = cast("dict[str, str]", content["files"])
        self._loaded: tuple[str, dict[str, Tensor]] = ("", {})
        self._device = device
        # Relative in the record, so that a run folder can be moved; resolved, so that tasks that share a head read it once.
        self.head = heads.read((folder / str(content["head"])).resolve(), device)

    def __contains__(self, index: int) -> bool:
        """Return whether the passage of this index was recorded; the original may have failed to score it."""
        return str(index) in self._files

    def hidden(self, index: int) -> Tensor:
        """Return the original's hidden states [positions, hidden] of the passage of this index."""
        name = self._files[str(index)]
        if self._loaded[0] != name:
            self._loaded = (name, _FILES.load_file(self._folder / f"{name}.safetensors", device=str(self._device)))
        return self._loaded[1][str(index)]


def _neighbouring_head(folder: Path, digest: str) -> str | None:
    """Return the relative path to a head with this digest in a neighbouring record, None where there is none."""
    for path in sorted(folder.parent.glob(f"[!.]*/{_HEAD}")):
        record = path.with_name("record.json")
        if path.parent != folder and record.is_file() and read_json_object(record).get("head_digest") == digest:
            return f"../{path.parent.name}/{_HEAD}"
    return None
