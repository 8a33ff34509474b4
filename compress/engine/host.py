"""Activations between blocks, offloaded to host memory up to a limit and beyond it to memory-mapped scratch files."""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from compress.errors import StoreError

_MAX_SPAN = 2
"""A tensor keeps its strides where they span at most so many times its size; otherwise it is stored contiguously."""


class HostMemory:
    """Stores tensors off the device. A scratch file is unlinked at once: it disappears with its tensor."""

    def __init__(self, scratch: Path, limit: int) -> None:
        self.scratch = scratch
        self.limit = limit
        self.resident = 0

    def offload(self, tensor: Tensor) -> Tensor:
        """Return a copy of the tensor on the host, in memory up to the limit and in a mapped file beyond it.

        Raises:
            StoreError: the scratch folder is full or cannot be written.
        """
        strides, extent = _layout(tensor)
        size = extent * tensor.element_size()
        # an empty file cannot be mapped
        if size == 0 or self.resident + size <= self.limit:
            # detached: a stored activation must not keep the graph that computed it
            copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor.detach())
            self.resident += size
            # the budget is returned when the last reference goes, wherever the walk drops it
            weakref.finalize(copy, self._release, size)
            return copy
        return self._spill(tensor, strides, size)

    def offload_all(self, tree: Any) -> Any:
        """Return a copy of nested containers with every tensor in them offloaded."""
        return map_tensors(tree, self.offload)

    def _release(self, size: int) -> None:
        self.resident -= size

    def _spill(self, tensor: Tensor, strides: tuple[int, ...], size: int) -> Tensor:
        try:
            with tempfile.TemporaryFile(dir=self.scratch) as file:
                file.truncate(size)
                _reserve(file.fileno(), size)
                # the mapping outlives the file, which has no name: after a kill nothing is left in the scratch folder
                view = mmap.mmap(file.fileno(), size)
        except OSError as error:
            cause = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written ({error})"
            raise StoreError(
                f"{self.scratch}: {cause}; {size:,} bytes of activations did not fit in memory nor there. "
                "Free space, or use fewer calibration samples"
            ) from error
        copy = torch.frombuffer(view, dtype=tensor.dtype).as_strided(tensor.shape, strides)
        return copy.copy_(tensor)


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the strides of a tensor's copy, and how many elements they span.

    They are the tensor's own where that costs little: a linear adds its bias at another point on a slice than on a contiguous copy,
    and rounds differently.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() <= extent <= _MAX_SPAN * tensor.numel():
        return tensor.stride(), extent
    return torch.empty(tensor.shape, device="meta").stride(), tensor.numel()


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the file's blocks now: writing to a mapping on a full disk would kill the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return a copy of nested tuples, lists, dicts and dataclasses with `function` applied to every tensor in them.

    `torch.utils._pytree` takes dataclasses and unregistered subclasses of dict and list for leaves: it would silently pass over
    the tensors in them, which then stay on the device and count as never read.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        items = {key: map_tensors(value, function) for key, value in cast("dict[Any, Any]", tree).items()}
        # transformers' ModelOutput is a dict whose constructor takes its items as keywords
        return items if type(cast("object", tree)) is dict else cast("Any", type(cast("object", tree)))(**items)
    # a named tuple's constructor takes its fields one by one, not a sequence
    if isinstance(tree, tuple) and hasattr(cast("object", tree), "_fields"):
        return cast("Any", type(cast("object", tree)))(*(map_tensors(value, function) for value in cast("tuple[Any, ...]", tree)))
    if isinstance(tree, (tuple, list)):
        values = (map_tensors(value, function) for value in cast("list[Any]", tree))
        return tuple(values) if isinstance(tree, tuple) else list(values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = {item.name: map_tensors(getattr(tree, item.name), function) for item in dataclasses.fields(tree)}
        return dataclasses.replace(cast("Any", tree), **changed)
    return tree
