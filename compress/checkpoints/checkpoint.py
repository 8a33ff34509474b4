"""Reading of a checkpoint's config and tensor table (names, types, shapes, offsets), checked; without torch."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from compress.checkpoints.config_types import check_config, patterns_in
from compress.errors import CheckpointError
from compress.families.records import text_defaults
from compress.untrusted.limits import limits
from compress.untrusted.reading import check_folder, inside, parse_json, printable, read_object
from compress.untrusted.trial import try_patterns

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
ADAPTER = "adapter_config.json"
"""The config that PEFT writes beside an adapter's weights."""

_DEPTH = re.compile(r"^(?!max_)(.*_)?(layers?|depth|blocks)$")
"""Config keys that give a number of blocks."""

_MIN_DEPTH_LIMIT = 64
"""A depth up to this is allowed whatever the number of tensors: small models are published with settings that they do not use."""

_MAX_DIMENSIONS = 8
"""The most dimensions of a shape that is accepted."""

_OFFSETS = 2

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_MERGE = (
    "merge it and take the folder that this writes: "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(…), the base's tokenizer and processor beside it"
)
_ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".base_layer.", ".lora_magnitude_vector.", ".modules_to_save.")
"""Parts of tensor names that PEFT adds; they remain where an adapter was not merged."""

_RENAME = "save the model inside it, or take the prefix away from every name"
_WRAPPERS = {
    "base_model.model.": ("PEFT", "save what merge_and_unload() returns, or take the prefix away from every name"),
    "_orig_mod.": ("torch.compile", _RENAME),
    "module.": ("DataParallel", _RENAME),
}
"""Name prefixes of wrappers that were saved with the model: prefix → the wrapper and the remedy."""


@dataclass(frozen=True)
class TensorSpec:
    """The type and shape of a tensor."""

    dtype: str
    """Its type, as safetensors names it."""

    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size, in bytes."""
        return self.elements * _DTYPE_BITS[self.dtype] // 8

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """One tensor on disk."""

    name: str
    file: Path

    start: int
    """Its first byte in `file`."""

    end: int
    """Its last byte in `file`, exclusive; its size was checked when the header was read."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face layout whose config and safetensors headers were read and checked."""

    folder: Path
    config: Mapping[str, Any]

    tensors: Mapping[str, TensorEntry]
    """By name on disk."""

    read_range: Callable[[str, int, int], bytes] | None = None
    """Reads a file's bytes from a first to a last one, exclusive, from the hub; None where the files are local."""

    @cached_property
    def weight_bytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(entry.bytes for entry in self.tensors.values())

    @property
    def weight_files(self) -> list[Path]:
        """The files of its weights: shards, and the index where there are several."""
        files = sorted({entry.file for entry in self.tensors.values()})
        return files if [file.name for file in files] == [SINGLE] else [*files, self.folder / INDEX]

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The decoder's section of the config with the architecture's defaults; older files have it at the top level."""
        return text_config(self.config)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the decoder's section of a config.json with the architecture's defaults."""
    return {**text_defaults(config), **cast("Mapping[str, Any]", config.get("text_config") or config)}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's config and tensor table.

    Raises:
        CheckpointError: no checkpoint, a pickle checkpoint, or one with a missing, truncated or inconsistent file.
    """
    config = read_config(folder)
    if (folder / SINGLE).is_file():  # transformers, too, reads it before it looks for an index
        tensors = read_header(folder / SINGLE)
    elif (folder / INDEX).is_file():
        tensors = _read_sharded(folder)
    elif any((folder / name).exists() for name in _PICKLES):
        raise CheckpointError(
            f"{folder}: holds a pickle checkpoint, which can run code when loaded; set model.allow_pickle: true in the recipe "
            "if you trust its author, or use a safetensors copy"
        )
    else:
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}; is this a checkpoint's folder?")
    check_names(str(folder), tensors)
    return checked(Checkpoint(folder=folder, config=config, tensors=tensors))


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint after checking its config against its tensors.

    Raises:
        CheckpointError: the config has more blocks than there are tensors, or a pattern in it takes too long.
    """
    _check_depth(checkpoint)
    try_patterns(patterns_in(checkpoint.config), checkpoint.tensors, f"{checkpoint.folder}/config.json")
    return checkpoint


def _check_depth(checkpoint: Checkpoint) -> None:
    """Check that no number of blocks, and no list in the config, exceeds the number of tensors.

    Building the model would otherwise create that many blocks before the first missing tensor is noticed.

    Raises:
        CheckpointError: one does.
    """
    limit = max(len(checkpoint.tensors), _MIN_DEPTH_LIMIT)
    # without quantization_config: its `ignore` may have several names and patterns for a linear, more entries than tensors
    settings: list[tuple[str, object]] = [
        (name, value) for name, value in checkpoint.config.items() if name != "quantization_config"
    ]
    while settings:
        name, value = settings.pop()
        extent = len(cast("list[object]", value)) if isinstance(value, list) else value
        # lists too: some architectures build a stage for each entry (depths)
        if isinstance(extent, int) and extent > limit and (isinstance(value, list) or _DEPTH.search(name)):
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: {printable(name)} is {'a list of ' if isinstance(value, list) else ''}"
                f"{extent:,}, and the checkpoint has {len(checkpoint.tensors):,} tensors; fetch both again"
            )
        if isinstance(value, dict):
            settings += cast("dict[str, object]", value).items()


def check_names(where: str, tensors: Collection[str]) -> None:
    """Check that tensors have a model's names, without the prefixes of a wrapper or a PEFT adapter.

    Raises:
        CheckpointError: they have such names.
    """
    unmerged = next((name for name in tensors if any(mark in name for mark in _ADAPTER_MARKS)), None)
    if unmerged is not None:
        raise CheckpointError(f"{where}: holds {unmerged}, a part of a PEFT adapter that is not merged; {_MERGE}")
    for prefix, (wrapper, remedy) in _WRAPPERS.items():
        # all of them: a model may have a module of that name among others
        if tensors and all(name.startswith(prefix) for name in tensors):
            raise CheckpointError(f"{where}: all names of its tensors begin with {prefix!r}, as {wrapper} leaves them; {remedy}")


def adapter_message(base: str) -> str:
    """Return the message for a folder or repository with only an adapter; `base` is the model that it belongs to."""
    return f"holds a PEFT adapter and no model; it belongs to {base}: {_MERGE}"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    try:
        exists = folder.is_dir()
    except (OSError, ValueError):  # a name that is too long, or contains NUL
        exists = False
    if not exists:
        raise CheckpointError(f"{printable(str(folder))}: no such folder")
    check_folder(folder)
    if not (folder / "config.json").exists() and (folder / ADAPTER).is_file():
        base = read_json_object(folder / ADAPTER).get("base_model_name_or_path") or "a model that it does not name"
        raise CheckpointError(f"{folder}: {adapter_message(printable(str(base)))}")
    path = folder / "config.json"
    config = read_json_object(path)
    check_config(config, str(path))
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint's folder.

    Raises:
        CheckpointError: it is missing, unreadable, no object, or outside of the folder.
    """
    try:
        return read_object(path, root=path.parent)
    except FileNotFoundError as error:
        raise CheckpointError(f"{printable(str(path))}: missing; is {path.parent} a checkpoint's folder?") from error


def read_index(index: Path) -> dict[str, str]:
    """Return each tensor's shard, from a checkpoint's index file.

    Raises:
        CheckpointError: it cannot be read, or names a file outside the checkpoint's folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; fetch the file again")
    shards = cast("dict[str, object]", weight_map)
    for name, shard in shards.items():
        # "../x" or an absolute path would read any safetensors file of this machine
        if not isinstance(shard, str) or Path(shard).name != shard or not shard:
            raise CheckpointError(
                f"{index}: {printable(name)} points to {shard!r}, outside the checkpoint's folder; do not use this checkpoint"
            )
    return cast("dict[str, str]", shards)


def _read_sharded(folder: Path) -> dict[str, TensorEntry]:
    index = folder / INDEX
    headers: dict[str, dict[str, TensorEntry]] = {}
    tensors: dict[str, TensorEntry] = {}
    shards = read_index(index)
    check_count(len(shards), index)
    for name, shard in shards.items():
        # a shard's header has all of its tensors: read once, not per tensor
        if shard not in headers:
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise CheckpointError(
                f"{index}: {printable(name)} is said to be in {printable(shard)}, which does not hold it; fetch both again"
            )
        tensors[name] = headers[shard][name]
    return tensors


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensor table of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt.
    """
    try:
        state = inside(path.parent, path).stat()
        # reading a pipe would wait forever
        if not stat.S_ISREG(state.st_mode):
            raise CheckpointError(f"{path}: is no regular file; fetch the checkpoint again")
        size = state.st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            # the length comes from the file: 2^63 must not be allocated
            if length <= min(limits().json_bytes, size):
                start += file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; fetch the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: its header cannot be read ({error}); fetch the file again") from error
    return parse_header(path, start, size)


def parse_header(path: Path, start: bytes, size: int) -> dict[str, TensorEntry]:
    """Return the tensor table of a safetensors file of `size` bytes from its first bytes, which include the whole header.

    Format: https://huggingface.co/docs/safetensors (an 8-byte little-endian length, a JSON header, the data).

    Raises:
        CheckpointError: the file is truncated or corrupt.
    """
    length = int.from_bytes(start[:8], "little")
    # too large for this package, though a valid file: told apart from a truncated one
    if limits().json_bytes < length <= size - 8:
        raise CheckpointError(f"{path}: its header has {length:,} bytes ({limits().set_by('json_bytes')})")
    if not 0 < length <= min(size - 8, len(start) - 8):
        raise CheckpointError(f"{path}: truncated or no safetensors file ({size} bytes); fetch it again")
    header: object = parse_json(start[8 : 8 + length], f"{path}: its header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is no JSON object; fetch the file again")
    rows = cast("dict[str, object]", header)
    check_count(len(rows), path)
    entries = {name: _entry(path, name, row, 8 + length, size) for name, row in rows.items() if name != "__metadata__"}
    # as safetensors requires: bytes of no tensor could hide another file, and overlapping tensors multiply what a file declares
    expected_start = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != expected_start:
            problem = "overlaps another tensor" if entry.start < expected_start else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: {entry.name} {problem} (byte {entry.start}, not {expected_start}); fetch the file again"
            )
        expected_start = entry.end
    if expected_start != size:
        raise CheckpointError(f"{path}: its tensors end at byte {expected_start}, the file at {size}; fetch the file again")
    return entries


def check_count(tensors: int, path: Path) -> None:
    """Check the number of tensors that a file names.

    Raises:
        CheckpointError: it exceeds the limit.
    """
    if tensors > limits().tensors:
        raise CheckpointError(f"{path}: names {tensors:,} tensors ({limits().set_by('tensors')})")


def _entry(path: Path, name: str, row: object, start: int, size: int) -> TensorEntry:
    fields = cast("dict[str, object]", row) if isinstance(row, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not (isinstance(dtype, str) and dtype in _DTYPE_BITS) or shape is None or offsets is None or len(offsets) != _OFFSETS:
        problem = "type, shape or place" if fields else "value"
        raise CheckpointError(
            f"{path}: the header's entry for {printable(name)} is malformed (its {problem}); fetch the file again"
        )
    first, last = offsets
    expected = math.prod(shape) * _DTYPE_BITS[dtype] // 8
    # readers trust the shape: a larger one would read past the tensor
    if last - first != expected:
        problem = f"{printable(name)} has {last - first} bytes, its shape {shape} needs {expected}"
        raise CheckpointError(f"{path}: {problem}; fetch the file again")
    if start + last > size:
        problem = f"{printable(name)} ends at byte {start + last}, the file at {size}"
        raise CheckpointError(f"{path}: truncated: {problem}; fetch it again")
    return TensorEntry(name=name, dtype=dtype, shape=shape, file=path, start=start + first, end=start + last)


def _counts(value: object) -> tuple[int, ...] | None:
    """Return a short list of non-negative integers as a tuple; None for any other value."""
    items = cast("list[object]", value) if isinstance(value, list) else None
    # by type and not isinstance, since JSON's true is an int to Python; few dimensions bound the product
    if items is None or len(items) > _MAX_DIMENSIONS or not {type(item) for item in items} <= {int}:
        return None
    counts = tuple(cast("list[int]", items))
    return counts if min(counts, default=0) >= 0 else None
