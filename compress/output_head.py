"""Whether a model's output head is its embedding matrix: read from config and tensors as transformers 5 does, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint import Checkpoint, TensorEntry
from compress.errors import CheckpointError
from compress.families import Family

_KEY = "tie_word_embeddings"
_CHUNK = 1 << 24
"""Bytes of a matrix that are compared at once."""
_SAMPLES, _SAMPLE = 8, 1 << 16
"""How many places of a matrix on a hub are compared before it is fetched, and how many bytes at each."""

_FLOATS: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy's types of the floats on disk; it has no bfloat16, which is the upper half of a float32."""


def head_is_tied(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether the output head is the embedding matrix.

    It is where the config says so, unless the checkpoint holds a head of its own with other values, as PEFT leaves it after
    merging: transformers 5 (`PreTrainedModel.tie_weights`) and vLLM take what is on disk then. Before the weights of a model
    on a hub are fetched, a few places of the two are compared.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not family.says_tied(checkpoint.config):
        return False
    head, embeddings = _matrix(checkpoint, family, family.head), _matrix(checkpoint, family, family.embeddings)
    if head is None:
        return not _has_other(checkpoint, family)
    return embeddings is None or _equal(checkpoint, head, embeddings)


def check_head(checkpoint: Checkpoint, family: Family) -> None:
    """Check that the head and the embeddings are there.

    Raises:
        CheckpointError: one of them is in no file; transformers would make it up, or take the other one for it.
    """
    if family.head is None:
        return
    where, tied = f"{checkpoint.folder}", family.says_tied(checkpoint.config)
    head, embeddings = _matrix(checkpoint, family, family.head), _matrix(checkpoint, family, family.embeddings)
    if head is None and not tied and not _has_other(checkpoint, family):
        raise CheckpointError(
            f"{where}: holds no output head ({family.head}.weight), and config.json does not say that it is the embeddings; fetch "
            f"the checkpoint again, or set {_key(family)}: true in config.json if it is"
        )
    if embeddings is None:
        remedy = f"write {family.head}.weight under that name too" if head is not None else "fetch the checkpoint again"
        raise CheckpointError(f"{where}: holds no embeddings ({family.embeddings}.weight); {remedy}")


def head_notes(checkpoint: Checkpoint, family: Family) -> list[str]:
    """Return where config.json contradicts itself or the weights on whether the head is the embeddings, and what is taken."""
    if family.head is None:
        return []
    says, tied, stated = family.says_tied(checkpoint.config), head_is_tied(checkpoint, family), _stated(checkpoint.config)
    taken = "the embeddings are" if tied else "the head on disk is"
    written = f"artifacts say {_KEY}: {str(tied).lower()} in every place"
    if says and not tied:
        return [
            f"config.json says that the output head is the embeddings ({_KEY}), and the weights hold a head with other values, as "
            f"after merging a PEFT adapter: {taken} used, as transformers 5 and vLLM do, and {written}. Older programs use the "
            f"embeddings: set {_KEY}: false in the original's config.json"
        ]
    if len(set(stated.values())) > 1:
        said = " and ".join(f"{place}: {str(value).lower()}" for place, value in stated.items())
        return [f"config.json says {said}; transformers 5 goes by {_key(family)}: {taken} used, and {written}"]
    return []


def settled_config(config: Mapping[str, Any], family: Family, tied: bool) -> dict[str, Any]:
    """Return a config that says in every place whether the head is the embeddings, so that all who read it read the same.

    One that says nothing else anywhere stays as it is.
    """
    settled = dict(config)
    if family.head is None or (tied == family.says_tied(config) and set(_stated(config).values()) <= {tied}):
        return settled
    settled[_KEY] = tied
    if isinstance(text := config.get("text_config"), Mapping):
        settled["text_config"] = {**cast("Mapping[str, Any]", text), _KEY: tied}
    return settled


def written_config(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """Return the config for what is made of a checkpoint: settled by what its own weights are."""
    return settled_config(checkpoint.config, family, head_is_tied(checkpoint, family))


def _key(family: Family) -> str:
    return " or ".join(family.tied_by) or _KEY


def _stated(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return what a config says of the head, by the place in it."""
    text = config.get("text_config")
    places: list[tuple[str, Mapping[str, Any]]] = [(_KEY, config)]
    if isinstance(text, Mapping):
        places.append((f"text_config.{_KEY}", cast("Mapping[str, Any]", text)))
    return {name: bool(part[_KEY]) for name, part in places if part.get(_KEY) is not None}


def _matrix(checkpoint: Checkpoint, family: Family, module: str | None) -> TensorEntry | None:
    """Return where a module's weight lies, None where it is not there or is quantized."""
    for name, entry in checkpoint.tensors.items():
        if entry.dtype in _FLOATS and family.module_name(name) == f"{module}.weight":
            return entry
    return None


def _has_other(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether the head is held in another way than as a matrix: quantized."""
    parts = (family.module_name(name) for name in checkpoint.tensors)
    return any(part.startswith(f"{family.head}.") and not part.endswith(".bias") for part in parts)


def _equal(checkpoint: Checkpoint, one: TensorEntry, other: TensorEntry) -> bool:
    if one.shape != other.shape or one.elements == 0:
        return one.shape == other.shape
    if checkpoint.read_part is not None and not (one.file.is_file() and other.file.is_file()):
        return _equal_samples(checkpoint, one, other)
    return _equal_files(one, other, _state(one), _state(other))


def _state(entry: TensorEntry) -> tuple[int, int, int]:
    """Return what is another once a file was written again."""
    found = entry.file.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


@lru_cache(maxsize=64)
def _equal_files(one: TensorEntry, other: TensorEntry, *states: tuple[int, int, int]) -> bool:
    """Compare two matrices, gigabytes where they are equal: once for each state of their files."""
    del states
    count = one.elements
    step = _CHUNK // 8
    with one.file.open("rb") as first, other.file.open("rb") as second:
        for start in range(0, count, step):
            pair: list[NDArray[Any]] = []
            for file, entry in ((first, one), (second, other)):
                width = entry.bytes // count
                file.seek(entry.start + start * width)
                pair.append(_values(entry, file.read(min(step, count - start) * width)))
            if not np.array_equal(pair[0], pair[1]):
                return False
    return True


def _equal_samples(checkpoint: Checkpoint, one: TensorEntry, other: TensorEntry) -> bool:
    return all(np.array_equal(_sample(checkpoint, one, *span), _sample(checkpoint, other, *span)) for span in _spans(one.elements))


def _spans(count: int) -> Iterator[tuple[int, int]]:
    """Give the first and the last element, exclusive, of the places that are compared: even steps from the first to the last."""
    size = min(count, _SAMPLE // 8)
    for place in range(_SAMPLES):
        start = (count - size) * place // (_SAMPLES - 1)
        yield start, start + size


def _sample(checkpoint: Checkpoint, entry: TensorEntry, start: int, end: int) -> NDArray[Any]:
    assert checkpoint.read_part is not None
    width = entry.bytes // entry.elements
    data = checkpoint.read_part(entry.file.name, entry.start + start * width, entry.start + end * width)
    if len(data) != (end - start) * width:
        raise CheckpointError(
            f"{entry.file.name}: the hub gave {len(data)} of {(end - start) * width} bytes of {entry.name}; try again"
        )
    return _values(entry, data)


def _values(entry: TensorEntry, data: bytes) -> NDArray[Any]:
    found = np.frombuffer(data, _FLOATS[entry.dtype])
    if entry.dtype != "BF16":
        return found
    return (found.astype(np.uint32) << 16).view(np.float32)
