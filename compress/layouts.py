"""How a quantized linear lies on disk in a checkpoint between stages: compressed-tensors, pack-quantized.

Format: https://github.com/vllm-project/compressed-tensors. A linear `name` becomes `name.weight_packed` (int32, codes packed
along the input), `name.weight_scale` [out, groups], `name.weight_shape` (int64) and, where its grid is asymmetric,
`name.weight_zero_point` (int32, packed along the output). Names are those on disk, without `.weight`. Nothing here imports torch
before tensors are given.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from compress.errors import CheckpointError
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.checkpoint import Checkpoint
    from compress.families import Family
    from compress.numerics.grids import QuantizedWeight

METHOD = "compressed-tensors"
PACK_QUANTIZED = "pack-quantized"
_PACKED, _SCALE, _SHAPE, _ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
_SHAPE_BYTES = 16


def packed_bytes(shape: tuple[int, int], scheme: Scheme, scale_bytes: int = 2) -> int:
    """Return the bytes a linear [out, in] takes on disk, all of its tensors together; `scale_bytes` per scale."""
    rows, columns = shape
    groups = scheme.groups(columns)
    zero_points = 0 if scheme.symmetric else _words(rows, scheme.bits) * groups * 4
    return rows * _words(columns, scheme.bits) * 4 + rows * groups * scale_bytes + zero_points + _SHAPE_BYTES


def pack_linear(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that stand for the linear `name` on disk."""
    import torch

    from compress.numerics.packing import pack_words

    bits = weight.scheme.bits
    tensors = {
        f"{name}.{_PACKED}": pack_words(weight.codes, bits),
        f"{name}.{_SCALE}": weight.scales.contiguous(),
        f"{name}.{_SHAPE}": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not weight.scheme.symmetric:
        tensors[f"{name}.{_ZERO_POINT}"] = pack_words(weight.zero_points.t(), bits).t().contiguous()
    return tensors


def read_linear(name: str, scheme: Scheme, read: Callable[[str], Tensor]) -> QuantizedWeight:
    """Return the codes, scales and zero points of the linear `name`; `read` gives a tensor by its name on disk.

    Raises:
        CheckpointError: the tensors do not fit each other or the scheme.
    """
    import torch

    from compress.numerics.grids import QuantizedWeight
    from compress.numerics.packing import unpack_words

    packed, scales = read(f"{name}.{_PACKED}"), read(f"{name}.{_SCALE}")
    rows, columns = cast("list[int]", read(f"{name}.{_SHAPE}").tolist())
    groups = scheme.groups(columns)
    if tuple(packed.shape) != (rows, _words(columns, scheme.bits)) or tuple(scales.shape) != (rows, groups):
        raise CheckpointError(
            f"{name}: its packed tensors {tuple(packed.shape)} and {tuple(scales.shape)} do not hold a matrix [{rows}, {columns}] "
            f"of {scheme.bits} bits in groups of {scheme.group_size}; config.json does not fit the weights, fetch both again"
        )
    if scheme.symmetric:
        zero_points = torch.full_like(scales, scheme.levels // 2, dtype=torch.uint8)
    else:
        zero_points = unpack_words(read(f"{name}.{_ZERO_POINT}").t(), scheme.bits, rows).t().contiguous()
    own = Scheme(bits=scheme.bits, group_size=columns // groups, symmetric=scheme.symmetric)
    return QuantizedWeight(unpack_words(packed, scheme.bits, columns), scales, zero_points, own)


def linear_tensors(name: str) -> tuple[str, ...]:
    """Return the names of the tensors that may stand for the quantized linear `name`."""
    return tuple(f"{name}.{suffix}" for suffix in (_PACKED, _SCALE, _SHAPE, _ZERO_POINT))


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that weights are quantized."""
    return bool(config.get("quantization_config"))


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`: `schemes` by the quantized linears' names, `ignore` the names of all others.

    With one scheme its group targets every `Linear`; with several, each targets its linears by name. A name without a dot is the
    output head's: it is no `Linear` to vLLM, which knows it by another prefix, so it is always targeted by a pattern.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    return {
        "config_groups": {
            f"group_{number}": _group(scheme, _targets(names, alone=len(groups) == 1))
            for number, (scheme, names) in enumerate(groups.items())
        },
        "format": PACK_QUANTIZED,
        "global_compression_ratio": None,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
    }


def quantized_linears(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Return the scheme of every quantized linear of a checkpoint, by its name on disk; empty where nothing is quantized.

    Raises:
        CheckpointError: it is quantized in another way than this package writes.
    """
    config = checkpoint.config.get("quantization_config")
    if not config:
        return {}
    settings = cast("Mapping[str, Any]", config)
    if settings.get("quant_method") != METHOD or settings.get("format") != PACK_QUANTIZED:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: quantized as {settings.get('quant_method')!r}, format {settings.get('format')!r}; "
            f"only {METHOD!r} with {PACK_QUANTIZED!r} can be read, or start from the model's original"
        )
    suffix = f".{_PACKED}"
    names = [name.removesuffix(suffix) for name in checkpoint.tensors if name.endswith(suffix)]
    groups = list(cast("Mapping[str, Any]", settings.get("config_groups") or {}).values())
    return {name: _scheme_of(checkpoint, name, groups) for name in names}


def linear_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Return [out, in] of a linear by its name on disk, quantized or not; read without torch."""
    if dense := checkpoint.tensors.get(f"{name}.weight"):
        rows, columns = dense.shape
        return rows, columns
    entry = checkpoint.tensors[f"{name}.{_SHAPE}"]
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        rows, columns = struct.unpack("<2q", file.read(_SHAPE_BYTES))
    return rows, columns


def unquantized_linears(checkpoint: Checkpoint, family: Family, quantized: Iterable[str]) -> list[str]:
    """Return the names on disk of the linears that stay as they are: all matrices but the embeddings, and a head that is tied."""
    taken = set(quantized)
    names = [
        name.removesuffix(".weight")
        for name, entry in checkpoint.tensors.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and family.module_name(name) != f"{family.embeddings}.weight"
    ]
    if family.head is not None and family.head not in {family.module_name(name) for name in [*names, *taken]}:
        names.append(family.head)
    return sorted(name for name in names if name not in taken)


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // 32)


def _targets(names: list[str], alone: bool) -> list[str]:
    heads = [rf"re:(.*\.)?{name}$" for name in sorted(names) if "." not in name]
    return (["Linear"] if alone else [name for name in sorted(names) if "." in name]) + heads


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    per_channel = scheme.group_size == -1
    return {
        "format": PACK_QUANTIZED,
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": None if per_channel else scheme.group_size,
            "num_bits": scheme.bits,
            "observer": "minmax",
            "observer_kwargs": {},
            "strategy": "channel" if per_channel else "group",
            "symmetric": scheme.symmetric,
            "type": "int",
        },
    }


def _scheme_of(checkpoint: Checkpoint, name: str, groups: list[Any]) -> Scheme:
    for group in groups:
        if any(_matches(str(target), name) for target in group["targets"]):
            weights = group["weights"]
            size = weights.get("group_size")
            return Scheme(bits=int(weights["num_bits"]), group_size=int(size or -1), symmetric=bool(weights["symmetric"]))
    raise CheckpointError(
        f"{checkpoint.folder}/config.json: no group of quantization_config targets {name}, which is packed; fetch the files again"
    )


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in ("Linear", name)
