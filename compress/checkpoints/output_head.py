"""Tied embeddings: whether the output head is the embedding matrix, decided as transformers 5 does; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from compress.checkpoints.checkpoint import Checkpoint, TensorEntry
from compress.errors import CheckpointError
from compress.families import Family

_KEY = "tie_word_embeddings"
_CHUNK = 1 << 24
"""Bytes of a matrix that are compared at once."""

_SAMPLES = 8
"""How many ranges of a matrix on a hub are compared before it is fetched."""

_SAMPLE = 1 << 16
"""Bytes of each."""

_FLOATS: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy's types of the floats on disk; it has no bfloat16, which is the upper half of a float32."""


def head_is_tied(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether the output head is tied to the embedding matrix.

    It is where the config says so, unless the checkpoint has a separate head with other values, as after merging a PEFT adapter:
    transformers 5 (`PreTrainedModel.tie_weights`) and vLLM then use the head on disk. Before the weights of a model on a hub are
    fetched, samples of the two matrices are compared.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not family.says_tied(checkpoint.config):
        return False
    head, embeddings = _matrix(checkpoint, family, family.head), _matrix(checkpoint, family, family.embeddings)
    if head is None:  # not on disk, so tied; a quantized head has codes in place of a matrix
        return not _has_quantized_head(checkpoint, family)
    # equal matrices count as tied: some writers save both, and transformers ties them again
    return embeddings is None or _equal(checkpoint, head, embeddings)


def check_head(checkpoint: Checkpoint, family: Family) -> None:
    """Check that the checkpoint has the head and the embeddings.

    Raises:
        CheckpointError: one of them is missing; transformers would initialize it at random, or use the other one.
    """
    if family.head is None:
        return
    where, tied = f"{checkpoint.folder}", family.says_tied(checkpoint.config)
    head, embeddings = _matrix(checkpoint, family, family.head), _matrix(checkpoint, family, family.embeddings)
    if head is None and not tied and not _has_quantized_head(checkpoint, family):
        raise CheckpointError(
            f"{where}: holds no output head ({family.head}.weight), and config.json does not say that it is the embeddings; fetch "
            f"the checkpoint again, or set {_key(family)}: true in config.json if it is"
        )
    if embeddings is None:
        remedy = f"write {family.head}.weight under that name too" if head is not None else "fetch the checkpoint again"
        raise CheckpointError(f"{where}: holds no embeddings ({family.embeddings}.weight); {remedy}")


def head_notes(checkpoint: Checkpoint, family: Family) -> list[str]:
    """Return notes where config.json contradicts itself or the weights on tied embeddings, with the choice that is made."""
    if family.head is None:
        return []
    config_tied, tied, stated = family.says_tied(checkpoint.config), head_is_tied(checkpoint, family), _stated(checkpoint.config)
    used = "the embeddings are" if tied else "the head on disk is"
    written = f"artifacts say {_KEY}: {str(tied).lower()} in every place"
    if config_tied and not tied:
        return [
            f"config.json says that the output head is the embeddings ({_KEY}), and the weights hold a head with other values, as "
            f"after merging a PEFT adapter: {used} used, as transformers 5 and vLLM do, and {written}. Older programs use the "
            f"embeddings: set {_KEY}: false in the original's config.json"
        ]
    if len(set(stated.values())) > 1:
        statements = " and ".join(f"{key}: {str(value).lower()}" for key, value in stated.items())
        return [f"config.json says {statements}; transformers 5 goes by {_key(family)}: {used} used, and {written}"]
    return []


def config_with_stated_tie(config: Mapping[str, Any], family: Family, tied: bool) -> dict[str, Any]:
    """Return a config that states in every section whether the embeddings are tied, so that all programs agree.

    A config without contradictions does not change.
    """
    settled = dict(config)
    if family.head is None or (tied == family.says_tied(config) and set(_stated(config).values()) <= {tied}):
        return settled
    settled[_KEY] = tied
    if isinstance(text := config.get("text_config"), Mapping):
        settled["text_config"] = {**cast("Mapping[str, Any]", text), _KEY: tied}
    return settled


def written_config(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """Return the config for results of a checkpoint, settled by its weights."""
    return config_with_stated_tie(checkpoint.config, family, head_is_tied(checkpoint, family))


def _key(family: Family) -> str:
    return " or ".join(family.tied_by) or _KEY


def _stated(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return a config's statements on tied embeddings, by key."""
    text = config.get("text_config")
    sections: list[tuple[str, Mapping[str, Any]]] = [(_KEY, config)]
    if isinstance(text, Mapping):
        sections.append((f"text_config.{_KEY}", cast("Mapping[str, Any]", text)))
    return {name: bool(section[_KEY]) for name, section in sections if section.get(_KEY) is not None}


def _matrix(checkpoint: Checkpoint, family: Family, module: str | None) -> TensorEntry | None:
    """Return the table entry of a module's weight; None where it is missing or quantized."""
    for name, entry in checkpoint.tensors.items():
        if entry.dtype in _FLOATS and family.module_name(name) == f"{module}.weight":
            return entry
    return None


def _has_quantized_head(checkpoint: Checkpoint, family: Family) -> bool:
    """Return whether the checkpoint has tensors of the head other than a plain matrix."""
    names = (family.module_name(name) for name in checkpoint.tensors)
    return any(name.startswith(f"{family.head}.") and not name.endswith(".bias") for name in names)


def _equal(checkpoint: Checkpoint, one: TensorEntry, other: TensorEntry) -> bool:
    if one.shape != other.shape or one.elements == 0:
        return one.shape == other.shape
    # gigabytes that a plan would fetch for one comparison: samples tell a trained head from the embeddings
    if checkpoint.read_range is not None and not (one.file.is_file() and other.file.is_file()):
        return _equal_samples(checkpoint, one, other)
    return _equal_files(one, other, _state(one), _state(other))


def _state(entry: TensorEntry) -> tuple[int, int, int]:
    """Return a file's identity, which changes when it is written again."""
    status = entry.file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=64)
def _equal_files(one: TensorEntry, other: TensorEntry, *states: tuple[int, int, int]) -> bool:
    """Compare two matrices, which may be gigabytes; cached for the state of their files."""
    del states
    count = one.elements
    # of the widest type, so that a chunk is small whatever the type; both files are read in the same elements
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
    """Yield the first and last element, exclusive, of the ranges that are compared, evenly spaced over the matrix."""
    size = min(count, _SAMPLE // 8)
    for index in range(_SAMPLES):
        start = (count - size) * index // (_SAMPLES - 1)
        yield start, start + size


def _sample(checkpoint: Checkpoint, entry: TensorEntry, start: int, end: int) -> NDArray[Any]:
    assert checkpoint.read_range is not None
    width = entry.bytes // entry.elements
    data = checkpoint.read_range(entry.file.name, entry.start + start * width, entry.start + end * width)
    if len(data) != (end - start) * width:
        raise CheckpointError(
            f"{entry.file.name}: the hub gave {len(data)} of {(end - start) * width} bytes of {entry.name}; try again"
        )
    return _values(entry, data)


def _values(entry: TensorEntry, data: bytes) -> NDArray[Any]:
    values = np.frombuffer(data, _FLOATS[entry.dtype])
    if entry.dtype != "BF16":
        return values
    # compared as numbers, since head and embeddings may have different types
    return (values.astype(np.uint32) << 16).view(np.float32)
