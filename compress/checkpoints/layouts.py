"""The storage of quantized linears in a checkpoint between stages: compressed-tensors.

Format: https://github.com/vllm-project/compressed-tensors. By the scheme, a linear `name` becomes
- pack-quantized: `name.weight_packed` (int32, codes packed along the input), `name.weight_scale` [out, groups], `name.weight_shape`
  (int64) and, where its grid is asymmetric, `name.weight_zero_point` (int32, packed along the output);
- int-quantized: `name.weight` (int8 [out, in]) and `name.weight_scale` [out, 1];
- float-quantized: `name.weight` (float8 e4m3fn [out, in]) and `name.weight_scale`: [out, 1], [1], or one per block;
the last two with `name.input_scale` [1] where input activations have a static scale. Names are those on disk, without `.weight`.
Torch is only imported by the functions that take or return tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from compress.checkpoints.checkpoint import TensorSpec
from compress.checkpoints.quantization_config import FORMATS, METHOD, is_readable, quantization_config, scheme_of
from compress.errors import CheckpointError
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.checkpoints.checkpoint import Checkpoint
    from compress.checkpoints.spec import CheckpointSpec
    from compress.families import Family
    from compress.numerics.grids import QuantizedWeight

__all__ = [
    "KV_SCALES",
    "PackedLinear",
    "is_quantized",
    "kv_cache_tensors",
    "linear_shape",
    "linear_specs",
    "linear_tensors",
    "pack_linear",
    "packed_bytes",
    "quantization_config",
    "quantized_linears",
    "quantized_names",
    "read_linear",
    "read_packed",
    "unquantized_linears",
]

_PACKED, _SCALE, _SHAPE, _ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
_WEIGHT, _INPUT_SCALE = "weight", "input_scale"
_SUFFIXES = (_PACKED, _SCALE, _SHAPE, _ZERO_POINT, _WEIGHT, _INPUT_SCALE)
"""The names of a quantized linear's tensors, as in compressed-tensors."""

KV_SCALES = ("k_scale", "v_scale")
"""The scales of an attention's cached keys and values, as compressed-tensors names them."""

_SHAPE_BYTES = 16
"""Two int64."""

_MATRIX = 2
_CODE_TYPES = ("I8", "F8_E4M3")
"""The types of unpacked codes, as safetensors names them."""

_SIGN = 128
"""The zero point of 8-bit codes: code ^ 128 converts between uint8 and int8."""


def linear_specs(name: str, shape: tuple[int, int], scheme: Scheme, dtype: str) -> dict[str, TensorSpec]:
    """Return the types and shapes of the tensors on disk of the linear `name` [out, in], whose scales have the type `dtype`."""
    rows, columns = shape
    scales = (scheme.scale_rows(rows), scheme.groups(columns))
    if scheme.format == "pack-quantized":
        specs = {
            _PACKED: TensorSpec("I32", (rows, _words(columns, scheme.bits))),
            _SCALE: TensorSpec(dtype, scales),
            # words are padded to whole ones: without the shape a width that does not fill its last word is lost
            _SHAPE: TensorSpec("I64", (2,)),
        }
        if not scheme.symmetric:
            # packed along the outputs, as compressed-tensors does (packed_dim 0); codes are packed along the inputs
            specs[_ZERO_POINT] = TensorSpec("I32", (_words(rows, scheme.bits), scales[1]))
    else:
        codes = "F8_E4M3" if scheme.type == "float" else "I8"
        specs = {
            _WEIGHT: TensorSpec(codes, shape),
            # compressed-tensors stores one scale as a vector of one, not as a matrix
            _SCALE: TensorSpec(dtype, (1,) if scheme.strategy == "tensor" else scales),
        }
        if scheme.activations == "tensor":
            specs[_INPUT_SCALE] = TensorSpec("F32", (1,))
    return {f"{name}.{suffix}": spec for suffix, spec in specs.items()}


def packed_bytes(shape: tuple[int, int], scheme: Scheme, dtype: str) -> int:
    """Return the size on disk of a linear [out, in], all of its tensors together, whose scales have the type `dtype`."""
    return sum(spec.bytes for spec in linear_specs("", shape, scheme, dtype).values())


def pack_linear(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors on disk of the linear `name`."""
    import torch

    from compress.numerics.packing import pack_words

    scheme, scales = weight.scheme, weight.scales.contiguous()
    if scheme.format == "pack-quantized":
        tensors = {
            f"{name}.{_PACKED}": pack_words(weight.codes, scheme.bits),
            f"{name}.{_SCALE}": scales,
            f"{name}.{_SHAPE}": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if weight.zero_points is not None and not scheme.symmetric:
            tensors[f"{name}.{_ZERO_POINT}"] = pack_words(weight.zero_points.t(), scheme.bits).t().contiguous()
        return tensors
    codes = weight.codes.contiguous()
    tensors = {
        # unsigned codes around 128 are what the numerics use; the format stores them around 0
        f"{name}.{_WEIGHT}": codes if scheme.type == "float" else (codes ^ _SIGN).view(torch.int8),
        f"{name}.{_SCALE}": scales.view(1) if scheme.strategy == "tensor" else scales,
    }
    if weight.input_scale is not None:
        tensors[f"{name}.{_INPUT_SCALE}"] = weight.input_scale.to(torch.float32).view(1)
    return tensors


@dataclass(frozen=True)
class PackedLinear:
    """A quantized weight [rows, columns] of integers whose codes are still packed."""

    rows: int
    columns: int

    words: Tensor
    """int32 [rows, words]."""

    scales: Tensor
    """[rows, groups]."""

    zero_points: Tensor
    """uint8 [rows, groups]."""


def read_packed(name: str, scheme: Scheme, read: Callable[[str], Tensor]) -> PackedLinear:
    """Return a pack-quantized linear without unpacking its codes; `read` returns a tensor by its name on disk.

    Raises:
        CheckpointError: the tensors do not fit each other or the scheme.
    """
    import torch

    from compress.numerics.packing import unpack_words

    words, scales = read(f"{name}.{_PACKED}"), read(f"{name}.{_SCALE}")
    rows, columns = cast("list[int]", read(f"{name}.{_SHAPE}").tolist())
    groups = scheme.groups(columns)
    # the shape comes from the file: without this check unpacking would read past a row, or return too little
    if tuple(words.shape) != (rows, _words(columns, scheme.bits)) or tuple(scales.shape) != (rows, groups):
        raise CheckpointError(
            f"{name}: its packed tensors {tuple(words.shape)} and {tuple(scales.shape)} do not hold a matrix [{rows}, {columns}] "
            f"of {scheme.bits} bits in groups of {scheme.group_size}; config.json does not fit the weights, fetch both again"
        )
    if scheme.symmetric:
        zero_points = torch.full_like(scales, scheme.levels // 2, dtype=torch.uint8)
    else:
        zero_points = unpack_words(read(f"{name}.{_ZERO_POINT}").t(), scheme.bits, rows).t().contiguous()
    return PackedLinear(rows, columns, words, scales, zero_points)


def read_linear(name: str, scheme: Scheme, read: Callable[[str], Tensor]) -> QuantizedWeight:
    """Return the quantized weight of the linear `name`; `read` returns a tensor by its name on disk.

    Raises:
        CheckpointError: the tensors do not fit each other or the scheme.
    """
    from compress.numerics.grids import QuantizedWeight
    from compress.numerics.packing import unpack_words

    if scheme.format != "pack-quantized":
        return _read_unpacked(name, scheme, read)
    packed = read_packed(name, scheme, read)
    # one group per row has the size of the row from here on: -1 would divide nothing
    resolved = replace(scheme, group_size=packed.columns // packed.scales.shape[1])
    codes = unpack_words(packed.words, scheme.bits, packed.columns)
    return QuantizedWeight(codes, packed.scales, packed.zero_points, resolved)


def _read_unpacked(name: str, scheme: Scheme, read: Callable[[str], Tensor]) -> QuantizedWeight:
    import torch

    from compress.numerics.grids import QuantizedWeight

    codes, scales = read(f"{name}.{_WEIGHT}"), read(f"{name}.{_SCALE}")
    rows, columns = codes.shape
    expected = (scheme.scale_rows(rows), scheme.groups(columns))
    if scales.numel() != expected[0] * expected[1] or codes.dtype != (
        torch.float8_e4m3fn if scheme.type == "float" else torch.int8
    ):
        raise CheckpointError(
            f"{name}: its weight is {codes.dtype} [{rows}, {columns}] with scales {tuple(scales.shape)}, config.json says "
            f"{scheme.format} with scales {expected}; fetch both again"
        )
    scales = scales.view(expected)
    input_scale = read(f"{name}.{_INPUT_SCALE}") if scheme.activations == "tensor" else None
    if scheme.type == "float":
        return QuantizedWeight(codes, scales, None, scheme, input_scale)
    zero_points = torch.full_like(scales, _SIGN, dtype=torch.uint8)
    resolved = replace(scheme, group_size=columns // expected[1])
    return QuantizedWeight(codes.view(torch.uint8) ^ _SIGN, scales, zero_points, resolved, input_scale)


def linear_tensors(name: str) -> tuple[str, ...]:
    """Return the names of all tensors that a quantized linear `name` can have on disk."""
    return tuple(f"{name}.{suffix}" for suffix in _SUFFIXES)


def kv_cache_tensors(attention: str, key_scale: Tensor, value_scale: Tensor) -> dict[str, Tensor]:
    """Return the tensors on disk of the scales of cached keys and values of the module `attention` (its name on disk)."""
    import torch

    scales = zip(KV_SCALES, (key_scale, value_scale), strict=True)
    return {f"{attention}.{suffix}": scale.to(torch.float32).view(1) for suffix, scale in scales}


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes quantized weights."""
    return bool(config.get("quantization_config"))


def quantized_linears(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Return the scheme of every quantized linear of a checkpoint, by its name on disk; empty where nothing is quantized.

    Raises:
        CheckpointError: it is quantized in a format that this package does not read.
    """
    settings = cast("Mapping[str, Any]", checkpoint.config.get("quantization_config") or {})
    where = f"{checkpoint.folder}/config.json"
    if not is_readable(checkpoint.config):
        raise CheckpointError(
            f"{where}: quantized as {settings.get('quant_method')!r}, format {settings.get('format')!r}; only {METHOD!r} with "
            f"{', '.join(map(repr, FORMATS))} can be read, or start from the model's original"
        )
    return {name: scheme_of(settings, name, where) for name in quantized_names(checkpoint)} if settings else {}


def quantized_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names on disk of the linears whose weights are quantized in any format of compressed-tensors."""
    names: list[str] = []
    for name, entry in checkpoint.tensors.items():
        linear, _, suffix = name.rpartition(".")
        # int8 or float8 alone may be a weight of another kind; with a scale beside it, it is codes
        unpacked = suffix == _WEIGHT and entry.dtype in _CODE_TYPES and f"{linear}.{_SCALE}" in checkpoint.tensors
        if suffix == _PACKED or unpacked:
            names.append(linear)
    return names


def linear_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Return [out, in] of a linear by its name on disk, quantized or not; read without torch.

    Raises:
        CheckpointError: it is no matrix, or the tensor with its shape is missing.
    """
    if (weight := checkpoint.tensors.get(f"{name}.{_WEIGHT}")) and len(weight.shape) == _MATRIX:
        rows, columns = weight.shape
        return rows, columns
    entry = checkpoint.tensors.get(f"{name}.{_SHAPE}")
    # before reading: a header may declare any tensor under that name
    if entry is None or entry.bytes != _SHAPE_BYTES:
        raise CheckpointError(f"{checkpoint.folder}: {name} has no shape of a matrix; fetch the checkpoint again")
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        rows, columns = struct.unpack("<2q", file.read(_SHAPE_BYTES))
    return rows, columns


def unquantized_linears(checkpoint: Checkpoint | CheckpointSpec, family: Family, quantized: Iterable[str]) -> list[str]:
    """Return the names on disk of the linears that are not quantized: matrices except the embeddings, and a tied head."""
    quantized_set = set(quantized)
    names = [
        name.removesuffix(".weight")
        for name, entry in checkpoint.tensors.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and family.module_name(name) != f"{family.embeddings}.weight"
    ]
    # a tied head has no tensor, but is a Linear of the model: unnamed, it would be looked for as a quantized one
    if family.head is not None and family.head not in {family.module_name(name) for name in [*names, *quantized_set]}:
        names.append(family.head)
    return sorted(name for name in names if name not in quantized_set)


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // 32)
