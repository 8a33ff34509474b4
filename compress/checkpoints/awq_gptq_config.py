"""Check of the `quantization_config` of AWQ and GPTQ checkpoints: supported settings that fit the packed tensors.

Formats: AutoAWQ's GEMM (https://github.com/casper-hansen/AutoAWQ) and AutoGPTQ's, as GPTQModel writes it
(https://github.com/ModelCloud/GPTQModel, `checkpoint_format`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import CheckpointError

AWQ, GPTQ = "awq", "gptq"
_WORD = 32
"""Bits of a packed word."""

_WIDTHS: Mapping[str, tuple[int, ...]] = {AWQ: (4,), GPTQ: (2, 4, 8)}
"""The widths of each method that can be read; their codes fill words without a remainder."""
_REMEDY = "correct it, or export the artifact again; other forms are measured with runtime: vllm"


def check_packed_config(checkpoint: Checkpoint) -> None:
    """Check that the settings of AWQ's or GPTQ's tensors are supported, and that they fit the tensors' shapes.

    Raises:
        CheckpointError: a setting is not supported, or its width or group size does not fit the tensors.
    """
    settings = cast("Mapping[str, Any]", checkpoint.config.get("quantization_config") or {})
    method = settings.get("quant_method")
    if method not in (AWQ, GPTQ):
        return
    where = f"{checkpoint.folder}/config.json: quantization_config"
    for key, supported in _supported_values(method).items():
        if key in settings and settings[key] not in supported:
            values = " or ".join(str(value) for value in supported if value is not None)
            raise CheckpointError(f"{where}: {key} is {settings[key]!r}, and layout {method} is read with {values} here; {_REMEDY}")
    for name in checkpoint.tensors:
        if name.endswith(".qweight"):
            _check_shapes(checkpoint, name.removesuffix(".qweight"), settings, where)


def _supported_values(method: str) -> Mapping[str, tuple[object, ...]]:
    """Return the supported values of the keys that determine how packed words are read."""
    if method == AWQ:
        # other versions (gemv, marlin) order nibbles otherwise; GEMM always subtracts zero points
        return {"bits": _WIDTHS[AWQ], "version": ("gemm", "GEMM"), "zero_point": (True,)}
    # "gptq_v2" stores zero points that are one larger, and `dynamic` gives single layers other widths
    return {"bits": _WIDTHS[GPTQ], "checkpoint_format": ("gptq", "", None), "dynamic": (None, {}, [])}


def _check_shapes(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any], where: str) -> None:
    bits, size = settings.get("bits"), settings.get("group_size")
    if not isinstance(bits, int) or not isinstance(size, int):
        raise CheckpointError(f"{where}: bits and group_size are to be whole numbers, not {bits!r} and {size!r}; {_REMEDY}")
    shapes = {suffix: checkpoint.tensors.get(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales")}
    missing = [suffix for suffix, entry in shapes.items() if entry is None or len(entry.shape) != 2]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: {name} has no matrix {missing[0]}; export the artifact again")
    words, zeros, scales = (entry.shape for entry in shapes.values() if entry is not None)
    codes_per_word = _WORD // bits
    columns, rows = (
        (words[0], words[1] * codes_per_word) if settings["quant_method"] == AWQ else (words[0] * codes_per_word, words[1])
    )
    # 0 for a size that does not divide the width: it equals no shape below, so that the one message serves
    groups = 1 if size == -1 else columns // size if size > 0 and columns % size == 0 else 0
    if tuple(scales) != (groups, rows) or tuple(zeros) != (groups, -(-rows // codes_per_word)):
        raise CheckpointError(
            f"{where}: by {bits} bits in groups of {size} {name} is a matrix [{rows}, {columns}] with {groups} rows of scales, and "
            f"its scales are {list(scales)}, its zero points {list(zeros)}; {_REMEDY}"
        )
