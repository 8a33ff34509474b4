"""Reading and writing of a checkpoint's weights tensor by tensor, so that they are never all in memory."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, TensorEntry, TensorSpec
from compress.checkpoints.layouts import quantized_linears, read_linear
from compress.checkpoints.quantization_config import is_readable
from compress.errors import CheckpointError, StoreError
from compress.families import Family
from compress.files import write_json
from compress.numerics.activations import fake_quantize_activations
from compress.numerics.grids import QuantizedWeight
from compress.numerics.scheme import Scheme

SHARD_BYTES = 5_000_000_000
"""The largest shard of a checkpoint, in bytes: the default of transformers 4, which the hubs' files have."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Types by their names in safetensors files."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_CHUNK = 1 << 24
"""Bytes copied at once."""

_CHECK_CHUNK = 1 << 24
"""8-bit elements converted to float32 at once."""

_INPUT_HOOK = "_compress_input_quantization"
"""The attribute of a linear with the hook that quantizes its input activations."""

HEADER_SLACK = 160
"""More bytes than a header's entry takes beside the tensor's name."""


class WeightReader:
    """Reads a checkpoint's tensors by their names in the model, each mapped from its file and checked to be finite.

    Linears that an earlier stage has quantized are read as the weights that their codes stand for.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self.checkpoint = checkpoint
        self.disk_names = {family.module_name(name): name for name in checkpoint.tensors}
        schemes = quantized_linears(checkpoint) if is_readable(checkpoint.config) else {}
        self.quantized = {
            family.module_name(f"{name}.weight").removesuffix(".weight"): (name, scheme) for name, scheme in schemes.items()
        }
        """The quantized linears by their names in the model: each name on disk, and its scheme."""

    def tensor(self, name: str, device: str = "cpu") -> Tensor:
        """Return the tensor with the name `name` in the model.

        Raises:
            CheckpointError: it is missing, or has NaN or infinite values.
        """
        if quantized := self.quantized.get(name.removesuffix(".weight")):
            stored = self.quantized_weight(*quantized)
            return stored.dequantize(stored.scales.dtype).to(device)
        if name not in self.disk_names:
            raise CheckpointError(f"{self.checkpoint.folder}: holds no tensor for the model's {name}; fetch the checkpoint again")
        return self.disk_tensor(self.disk_names[name], device)

    def disk_tensor(self, name: str, device: str = "cpu") -> Tensor:
        """Return the tensor with the name `name` on disk; on the CPU it is a view of the file and must not be modified.

        Raises:
            CheckpointError: it has NaN or infinite values.
        """
        entry = self.checkpoint.tensors[name]
        tensor = map_tensor(entry).to(device)
        if not is_finite(tensor):
            raise CheckpointError(f"{entry.file}: {name} holds NaN or infinite values; fetch the checkpoint again or mend it")
        return tensor

    def quantized_weight(self, disk_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return the codes and scales of a quantized linear by its name on disk."""
        return read_linear(disk_name, scheme, self.disk_tensor)

    def load(self, module: nn.Module, prefix: str, device: str = "cpu") -> None:
        """Load every parameter and persistent buffer of the module `prefix` from the checkpoint, in the module's type.

        Raises:
            CheckpointError: a tensor is missing, has another shape than the module, or is not finite in its own or that type.
        """
        for name in module.state_dict():
            self.load_tensor(module, name, f"{prefix}.{name}", device)

    def quantize_inputs(self, model: nn.Module, device: str = "cpu") -> None:
        """Make the linears that an earlier stage has quantized with their input activations quantize these in the model."""
        for name, (disk_name, scheme) in self.quantized.items():
            if scheme.activations is not None:
                scale = self.disk_tensor(f"{disk_name}.input_scale", device) if scheme.activations == "tensor" else None
                quantize_inputs(model.get_submodule(name), scheme, scale)

    def load_tensor(self, module: nn.Module, name: str, full: str, device: str = "cpu") -> None:
        """Load one parameter or buffer of a module from the tensor with the name `full` in the model; raises as `load` does."""
        owner, _, leaf = name.rpartition(".")
        current = cast("Tensor", getattr(module.get_submodule(owner), leaf))
        value = self.tensor(full, device)
        if value.shape != current.shape:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {full} has shape {list(value.shape)}, config.json asks for {list(current.shape)}; "
                "fetch both again"
            )
        if value.dtype != current.dtype and not is_finite(value.to(current.dtype)):
            raise CheckpointError(
                f"{self.checkpoint.folder}: {full} is {value.dtype} and overflows in {current.dtype}, the model's type; "
                "convert the whole checkpoint to bfloat16 or float32"
            )
        set_tensor(module, name, value)


def quantize_inputs(linear: nn.Module, scheme: Scheme, scale: Tensor | None) -> None:
    """Make a linear of the running model quantize its input activations, as a runtime will; `scale` is a static one.

    Gradients pass straight through the rounding (Bengio et al. 2013, arXiv 1308.3432), whose own are zero.
    """
    hooks: dict[int, Any] = linear.__dict__.setdefault(_INPUT_HOOK, {})
    for handle in hooks.values():
        handle.remove()  # a block is loaded anew whenever a walk reaches it

    def quantize_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        inputs = args[0]
        rounded = fake_quantize_activations(inputs.detach(), scheme, scale)
        if inputs.requires_grad and torch.is_grad_enabled():
            # the value of `rounded` with the gradient of `inputs`; only a sensitivity measurement asks for gradients
            rounded = inputs + (rounded - inputs.detach())
        return (rounded, *args[1:])

    hooks[0] = linear.register_forward_pre_hook(quantize_input)


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter or buffer `name` (dotted) of a module by `value`, in the type of the old one."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    value = value.to(cast("Tensor", getattr(owner, leaf)).dtype)
    if leaf in owner._parameters:  # pyright: ignore[reportPrivateUsage]
        # no weight ever needs a gradient here: sensitivities are those of activations
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)


def unload(module: nn.Module) -> None:
    """Move a module's parameters and persistent buffers to the meta device: their memory is freed, shapes and types stay."""
    for name, current in list(module.state_dict(keep_vars=True).items()):
        set_tensor(module, name, torch.empty_like(current, device="meta"))


def map_tensor(entry: TensorEntry) -> Tensor:
    """Return a tensor on disk as a private mapping of its bytes, which lives as long as the tensor."""
    dtype = DTYPES[entry.dtype]
    if entry.bytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    # a mapping must begin at a page; the tensor lies wherever the header ended
    first = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
    try:
        with entry.file.open("rb") as file:
            # copy on write: torch wants a writable buffer, and a mistaken write must not reach the checkpoint
            view = mmap.mmap(file.fileno(), entry.end - first, access=mmap.ACCESS_COPY, offset=first)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{entry.file}: {entry.name} cannot be read ({error}); fetch the file again") from error
    flat = torch.frombuffer(view, dtype=torch.uint8, count=entry.bytes, offset=entry.start - first)
    # some writers do not align their data, and torch cannot view bytes at an odd offset as wider numbers
    if (entry.start - first) % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(entry.shape)


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinite values."""
    if not tensor.is_floating_point():
        return True
    if tensor.numel() and tensor.element_size() > 1:
        # one pass that allocates nothing: NaN is both the smallest and the largest of what it occurs in
        return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
    # of 8-bit floats torch finds no extremes
    return all(bool(chunk.float().isfinite().all()) for chunk in torch.split(tensor.reshape(-1), _CHECK_CHUNK))


@dataclass
class _Shard:
    """A shard that is being written."""

    data: Path
    """The temporary file of its data, in the order of arrival."""

    entries: dict[str, tuple[TensorSpec, int]] = field(default_factory=lambda: dict[str, tuple[TensorSpec, int]]())
    """Each tensor's type and shape, and its first byte in `data`."""

    bytes: int = 0
    """The length of `data`."""

    header: int = 0
    """The largest length that the header can have."""


class ShardWriter:
    """Writes tensors, in the order they are added, into a checkpoint's safetensors files, without buffering them in memory.

    A shard's data goes to a temporary file. At the end header and data are assembled, the widest types first (so that every tensor
    is aligned), then by name. Use as a context manager: the files appear when it ends without an error.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._shards: list[_Shard] = []
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close()
            for shard in self._shards:
                shard.data.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            StoreError: the disk is full, or the name was added before.
        """
        if any(name in shard.entries for shard in self._shards):
            raise StoreError(f"{self.folder}: {name} is written twice; remove one of the two from the checkpoint")
        # safetensors has no strides: a transposed view would be written in the wrong order
        value = tensor.detach().contiguous()
        size = value.numel() * value.element_size()
        header = len(json.dumps(name)) + HEADER_SLACK
        shard = self._shards[-1] if self._shards else None
        # a tensor larger than the limit still gets a file, of its own
        if shard is None or (shard.entries and shard.bytes + size + shard.header + header > self.limit):
            shard = self._open()
        try:
            assert self._file is not None
            if size:
                # as bytes, because numpy has neither bfloat16 nor float8
                self._file.write(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._full(error, size) from error
        shard.entries[name] = (TensorSpec(_DTYPE_NAMES[value.dtype], tuple(value.shape)), shard.bytes)
        shard.bytes += size
        shard.header += header

    def _open(self) -> _Shard:
        self._close()
        shard = _Shard(self.folder / f".shard-{len(self._shards) + 1:05}.data")
        self._shards.append(shard)
        try:
            self._file = shard.data.open("wb")
        except OSError as error:
            raise self._full(error, 0) from error
        return shard

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _finish(self) -> None:
        try:
            self._close()
        except OSError as error:
            raise self._full(error, 0) from error
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            name = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            try:
                _assemble(shard, self.folder / name)
            except OSError as error:
                raise self._full(error, shard.bytes) from error
            shard.data.unlink()
            weight_map |= dict.fromkeys(shard.entries, name)
        if count > 1:
            total = sum(shard.bytes for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)
        sync_folder(self.folder)

    def _full(self, error: OSError, more: int) -> StoreError:
        written = sum(shard.bytes for shard in self._shards)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(
                f"{self.folder}: the disk is full; {written:,} bytes of weights were ready and {more:,} more did not fit. "
                "Free at least twice that much and run again"
            )
        return StoreError(f"{self.folder}: cannot write weights ({error}); make the folder writable and run again")


def shard_header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, list[str]]:
    """Return a safetensors file's first bytes, up to its data, and the order of the tensors in it.

    The widest types come first, so that every tensor is aligned, then names decide.
    """
    # the order of safetensors' own writer, so that equal tensors give equal files
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    # transformers 4 refuses a file whose metadata names no framework
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.bytes]}
        # without gaps: safetensors rejects offsets that do not join
        offset += tensor.bytes
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # padded by spaces, as the format allows, so that the data begin at a multiple of the widest type
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, order


def _assemble(shard: _Shard, path: Path) -> None:
    header, order = shard_header({name: spec for name, (spec, _) in shard.entries.items()})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with shard.data.open("rb") as source, temporary.open("wb") as target:
            target.write(header)
            # the kernel copies by file descriptor: the header must not still be in Python's buffer
            target.flush()
            for start, end in _runs([(start, start + spec.bytes) for spec, start in map(shard.entries.__getitem__, order)]):
                _copy_range(source, target, start, end)
            target.flush()
            # before the rename, which may reach the disk first: after a power cut the name would belong to an empty file
            os.fsync(target.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _runs(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent ranges."""
    runs: list[tuple[int, int]] = []
    for start, end in ranges:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        elif end > start:
            runs.append((start, end))
    return runs


def _copy_range(source: IO[bytes], target: IO[bytes], start: int, end: int) -> None:
    """Append bytes start to end of the source to the target, inside the kernel where possible."""
    in_kernel = hasattr(os, "copy_file_range")
    while start < end:
        size = min(_COPY_CHUNK, end - start)
        done = 0
        if in_kernel:
            try:
                done = os.copy_file_range(source.fileno(), target.fileno(), size, start)
            except OSError as error:
                # anything else says that this file system or kernel cannot copy inside the kernel: read and write instead
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
            in_kernel = done > 0
        if not done:
            source.seek(start)
            data = source.read(size)
            # the next range is tried inside the kernel again, by file descriptor: nothing may stay in Python's buffer
            target.write(data)
            target.flush()
            done = len(data)
            if not done:
                raise OSError(errno.EIO, "the temporary file is shorter than what was written to it")
        start += done


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
