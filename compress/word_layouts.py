"""Whether what config.json says of AWQ's and GPTQ's packed words is what is read of them here, and fits the tensors.

Formats: AutoAWQ's GEMM (https://github.com/casper-hansen/AutoAWQ) and AutoGPTQ's, as GPTQModel writes it
(https://github.com/ModelCloud/GPTQModel, `checkpoint_format`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from compress.checkpoint import Checkpoint
from compress.errors import CheckpointError

AWQ, GPTQ = "awq", "gptq"
_WORD = 32
_WIDTHS: Mapping[str, tuple[int, ...]] = {AWQ: (4,), GPTQ: (2, 4, 8)}
"""Bits of which whole codes fill a word, as both formats have them."""
_REMEDY = "correct it, or export the artifact again; other forms are measured with runtime: vllm"


def check_words(checkpoint: Checkpoint) -> None:
    """Check the keys by which AWQ's or GPTQ's tensors are read against what is read here, and against the tensors' shapes.

    Raises:
        CheckpointError: a key says what is not read here, or other widths or groups than the tensors have.
    """
    settings = cast("Mapping[str, Any]", checkpoint.config.get("quantization_config") or {})
    method = settings.get("quant_method")
    if method not in (AWQ, GPTQ):
        return
    where = f"{checkpoint.folder}/config.json: quantization_config"
    for key, read in _read_here(method).items():
        if key in settings and settings[key] not in read:
            known = " or ".join(str(value) for value in read if value is not None)
            raise CheckpointError(f"{where}: {key} is {settings[key]!r}, and layout {method} is read with {known} here; {_REMEDY}")
    for name in checkpoint.tensors:
        if name.endswith(".qweight"):
            _check_shapes(checkpoint, name.removesuffix(".qweight"), settings, where)


def _read_here(method: str) -> Mapping[str, tuple[object, ...]]:
    """Return the values that a key may have, for those keys that say how the words are to be read."""
    if method == AWQ:
        return {"bits": _WIDTHS[AWQ], "version": ("gemm", "GEMM"), "zero_point": (True,)}
    return {"bits": _WIDTHS[GPTQ], "checkpoint_format": ("gptq", "", None), "dynamic": (None, {}, [])}


def _check_shapes(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any], where: str) -> None:
    bits, size = settings.get("bits"), settings.get("group_size")
    if not isinstance(bits, int) or not isinstance(size, int):
        raise CheckpointError(f"{where}: bits and group_size are to be whole numbers, not {bits!r} and {size!r}; {_REMEDY}")
    shapes = {part: checkpoint.tensors.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
    missing = [part for part, entry in shapes.items() if entry is None or len(entry.shape) != 2]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: {name} has no matrix {missing[0]}; export the artifact again")
    words, zeros, scales = (entry.shape for entry in shapes.values() if entry is not None)
    fields = _WORD // bits
    columns, rows = (words[0], words[1] * fields) if settings["quant_method"] == AWQ else (words[0] * fields, words[1])
    groups = 1 if size == -1 else columns // size if size > 0 and columns % size == 0 else 0
    if tuple(scales) != (groups, rows) or tuple(zeros) != (groups, -(-rows // fields)):
        raise CheckpointError(
            f"{where}: by {bits} bits in groups of {size} {name} is a matrix [{rows}, {columns}] with {groups} rows of scales, and "
            f"its scales are {list(scales)}, its zero points {list(zeros)}; {_REMEDY}"
        )
