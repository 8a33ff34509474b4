"""A checkpoint's safetensors files laid out before any tensor is computed: each tensor is written once, at its final place.

All files are made at the start, with their headers and at their full size, so that a disk which is too small is noticed before the
first expensive step. A unit of work (a block) is committed by a file of its own with the names of its tensors, written after their
bytes have reached the disk. The files get their names in the checkpoint, and the index is written, when all tensors are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from compress.checkpoints.checkpoint import INDEX, SINGLE, TensorEntry, TensorSpec
from compress.engine.weights import DTYPES, HEADER_SLACK, SHARD_BYTES, map_tensor, shard_header, sync_folder
from compress.errors import CheckpointError
from compress.files import write_json

_COMMIT = ".done.json"
"""The ending of a commit's file, after the unit's name."""


@dataclass(frozen=True)
class PlannedShards:
    """Files in the making, in a folder of their own beside the commits of finished units."""

    folder: Path

    entries: Mapping[str, TensorEntry]
    """Where each tensor lies, by its name on disk."""

    headers: Mapping[str, bytes]
    """Each file's first bytes, by its name."""

    @classmethod
    def lay_out(cls, folder: Path, tensors: Mapping[str, TensorSpec], limit: int = SHARD_BYTES) -> PlannedShards:
        """Lay out tensors in this order, in files of at most `limit` bytes; creates nothing."""
        groups: list[dict[str, TensorSpec]] = []
        data = header = 0
        for name, spec in tensors.items():
            entry_header = len(json.dumps(name)) + HEADER_SLACK
            if not groups or (groups[-1] and data + spec.bytes + header + entry_header > limit):
                groups.append({})
                data = header = 0
            groups[-1][name] = spec
            data, header = data + spec.bytes, header + entry_header
        entries: dict[str, TensorEntry] = {}
        headers: dict[str, bytes] = {}
        for number, group in enumerate(groups, start=1):
            file = folder / (SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors")
            headers[file.name], order = shard_header(group)
            start = len(headers[file.name])
            for name in order:
                spec = group[name]
                entries[name] = TensorEntry(spec.dtype, spec.shape, name, file, start, start + spec.bytes)
                start += spec.bytes
        # in the planned order again, in which `missing` lists them
        return cls(folder, {name: entries[name] for name in tensors}, headers)

    def create(self, target: Path) -> None:
        """Make the files, or go on with those that a killed run left, in `target` included, and with its commits.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.headers:  # a run that was killed while it published
            if not (self.folder / name).exists() and self._fits(target / name):
                (target / name).replace(self.folder / name)
        if all(self._fits(self.folder / name) for name in self.headers):
            return
        # the files are those of another plan: its commits would vouch for bytes that are about to be overwritten
        for commit in self.folder.glob(f"*{_COMMIT}"):
            commit.unlink()
        for name, header in self.headers.items():
            with (self.folder / name).open("wb") as file:
                file.write(header)
                file.flush()
                _reserve(file, self._size(name))
        sync_folder(self.folder)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors at their places.

        Raises:
            CheckpointError: one is not planned, or has another type or shape than planned.
        """
        for name, tensor in tensors.items():
            entry = self.entries.get(name)
            if entry is None or DTYPES[entry.dtype] != tensor.dtype or entry.shape != tuple(tensor.shape):
                # a tensor of another size would overwrite its neighbour
                planned = "not planned" if entry is None else f"planned as {entry.dtype} {list(entry.shape)}"
                raise CheckpointError(f"{name}: is {tensor.dtype} {list(tensor.shape)}, and {planned}; report this")
            # not "wb", which would truncate the file and lose every earlier block
            with entry.file.open("r+b") as file:
                file.seek(entry.start)
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def commit(self, unit: str, names: Iterable[str]) -> None:
        """Record that a unit's tensors are written."""
        written = sorted(names)
        # the bytes before the record that vouches for them
        self._sync({self.entries[name].file for name in written})
        write_json(self._path(unit), written)

    def committed(self, unit: str) -> list[str] | None:
        """Return the names of a finished unit's tensors; None where it is not finished, or its commit damaged."""
        return self._read(self._path(unit))

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written, as a view of its file."""
        return map_tensor(self.entries[name])

    def missing(self) -> list[str]:
        """Return the tensors that no commit has, in the order of the plan."""
        written = {name for path in self.folder.glob(f"*{_COMMIT}") for name in self._read(path) or ()}
        return [name for name in self.entries if name not in written]

    def publish(self, target: Path) -> None:
        """Move the files into the checkpoint's folder and write its index."""
        self._sync({self.folder / name for name in self.headers})
        for name in self.headers:
            # a rename is atomic: a killed run leaves each file in one of the two folders, and `create` looks into both
            (self.folder / name).replace(target / name)
        if len(self.headers) > 1:
            index = {
                "metadata": {"total_size": sum(entry.bytes for entry in self.entries.values())},
                "weight_map": {name: entry.file.name for name, entry in sorted(self.entries.items())},
            }
            # last: a folder with an index has all of its shards
            write_json(target / INDEX, index)
        sync_folder(target)

    def _path(self, unit: str) -> Path:
        return self.folder / f"{unit}{_COMMIT}"

    def _read(self, path: Path) -> list[str] | None:
        with suppress(OSError, ValueError):
            names = cast("object", json.loads(path.read_text(encoding="utf-8")))
            if isinstance(names, list) and all(name in self.entries for name in cast("list[object]", names)):
                return cast("list[str]", names)
        return None

    def _size(self, file: str) -> int:
        ends = (entry.end for entry in self.entries.values() if entry.file.name == file)
        return max(ends, default=len(self.headers[file]))

    def _fits(self, path: Path) -> bool:
        """Return whether a file is this plan's, by its header and size."""
        header = self.headers[path.name]
        try:
            with path.open("rb") as file:
                # the header names every tensor with its type, shape and place: equal headers are the same plan
                return path.stat().st_size == self._size(path.name) and file.read(len(header)) == header
        except OSError:
            return False

    def _sync(self, files: Iterable[Path]) -> None:
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _reserve(file: IO[bytes], size: int) -> None:
    """Give a file its full size, with its blocks on the disk where the system can."""
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if reserve is not None and size:
        # a sparse file would pass here and fail with a full disk hours later
        reserve(file.fileno(), 0, size)
    else:
        file.truncate(size)
