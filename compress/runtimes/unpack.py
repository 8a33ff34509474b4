"""Dequantize any exported artifact to dense weights, written from the formats' specifications alone.

No code is shared with the packing side, so that a mistake there cannot cancel out here. The formats: dense tensors; AutoAWQ's
GEMM layout (`qweight`, `qzeros`, `scales`; https://github.com/casper-hansen/AutoAWQ); GPTQ's of the first version (the same names;
https://github.com/AutoGPTQ/AutoGPTQ); compressed-tensors' pack-quantized (`weight_packed`, `weight_scale`, `weight_shape`,
`weight_zero_point`), int- and float-quantized (`weight`, `weight_scale`; https://github.com/vllm-project/compressed-tensors), and
these three mixed. Scales of activations, keys and values are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from math import gcd
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from compress.checkpoints.awq_gptq_config import AWQ, GPTQ, check_packed_config
from compress.checkpoints.checkpoint import Checkpoint, TensorEntry
from compress.errors import CheckpointError
from compress.untrusted.reading import library_errors as refused

Read = Callable[[str], Tensor]
_COMPRESSED_TENSORS = "compressed-tensors"
_COLUMNS_OF_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's interleaving: the column, among eight, of each nibble of a word."""

# Read with the codes that they belong to: as tensors of their own the model has no place for them.
_AUXILIARY_TENSORS = (
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "input_scale",
    "k_scale",
    "v_scale",
    "qzeros",
    "scales",
    "g_idx",
)
_CODE_DTYPES = ("I8", "F8_E4M3")
_SUPPORTED_FORMATS = ("dense", "pack-quantized", "int-quantized", "float-quantized", "mixed-precision")
_CHUNK = 1 << 22
"""Weights that are unpacked at once: 16 MiB of float32 codes."""


def dense_count(checkpoint: Checkpoint) -> int:
    """Return how many weights `dense_tensors` yields: scales, zero points and the like are no weights of their own."""
    quantized = bool(checkpoint.config.get("quantization_config"))
    return sum(not (quantized and name.rpartition(".")[2] in _AUXILIARY_TENSORS) for name in checkpoint.tensors)


def dense_tensors(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Generator[tuple[str, Tensor]]:
    """Yield every weight of an artifact, dense, by its name on disk, in file order; one is in memory at a time.

    A quantized matrix [out, in] is (code - zero point) · scale, computed in float32 and rounded once to `dtype`; floats have no
    zero point.

    Raises:
        CheckpointError: it is in a format that no export writes.
    """
    quantization = cast("Mapping[str, Any]", checkpoint.config.get("quantization_config") or {})
    method = quantization.get("quant_method", "")
    if method not in ("", AWQ, GPTQ, _COMPRESSED_TENSORS):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: quant_method {method!r} cannot be read here; evaluate it with runtime: vllm"
        )
    if unsupported := _unsupported_format(quantization):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: the format {unsupported} cannot be read here, only by vLLM; "
            "evaluate it with runtime: vllm"
        )
    check_packed_config(checkpoint)
    with open_tensors(checkpoint, device) as read:
        # In file order: a memory-mapped shard is read once, front to back.
        for entry in sorted(checkpoint.tensors.values(), key=lambda entry: (entry.file, entry.start)):
            owner, _, suffix = entry.name.rpartition(".")
            # Only in quantized artifacts: a dense model may have a parameter of its own called `scales`.
            if method and suffix in _AUXILIARY_TENSORS:
                continue
            with refused(f"{entry.file}: {entry.name} cannot be read as config.json says", remedy="export the artifact again"):
                weight = _dense(entry, quantization, checkpoint.tensors, read)
            yield entry.name if weight is None else f"{owner}.weight", (read(entry.name) if weight is None else weight).to(dtype)


def _dense(entry: TensorEntry, quantization: Mapping[str, Any], names: Container[str], read: Read) -> Tensor | None:
    """Return the dense matrix of a tensor of codes; None for a tensor that is dense already.

    `names` are those of all tensors.
    """
    owner, _, suffix = entry.name.rpartition(".")
    if suffix == "weight_packed":
        return _unpack_compressed(owner, settings_of(quantization, owner)["weights"], read)
    if suffix == "weight" and entry.dtype in _CODE_DTYPES:
        return _dequantize_unpacked(owner, settings_of(quantization, owner)["weights"], read)
    if suffix != "qweight":
        return None
    if f"{owner}.g_idx" in names:
        _check_group_order(owner, read)
    return _unpack_gptq(owner, quantization, read) if quantization.get("quant_method") == GPTQ else _unpack_awq(owner, read)


def _unsupported_format(quantization: Mapping[str, Any]) -> str:
    """Return a compressed-tensors format that is not supported here; empty where all are."""
    if quantization.get("transform_config"):
        return "with rotations at run time"
    groups = cast("Iterable[Mapping[str, Any]]", quantization.get("config_groups", {}).values())
    formats = [quantization.get("format"), *(group.get("format") for group in groups)]
    return next((str(name) for name in formats if name and name not in _SUPPORTED_FORMATS), "")


@contextmanager
def open_tensors(checkpoint: Checkpoint, device: torch.device) -> Generator[Read]:
    """Open every file of a checkpoint, memory-mapped, and yield a function that reads a tensor by its name."""
    opening: Any = safe_open
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for file in {entry.file for entry in checkpoint.tensors.values()}:
            with refused(f"{file}: cannot be read"):
                files[file] = stack.enter_context(opening(file, framework="pt", device=str(device)))
        yield lambda name: files[checkpoint.tensors[name].file].get_tensor(name)


def settings_of(quantization: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the settings of the linear `name` (on disk): its group in compressed-tensors' `config_groups`.

    Raises:
        CheckpointError: no group targets it.
    """
    groups = cast("Iterable[Mapping[str, Any]]", quantization.get("config_groups", {}).values())
    for group in groups:
        for target in group["targets"]:
            # compressed-tensors matches regular expressions from the start of the name, not in the middle.
            if target in ("Linear", name) or (target.startswith("re:") and re.match(target[3:], name)):
                return group
    raise CheckpointError(f"config.json: quantization_config has no group for {name}, which is packed; export the artifact again")


def _unpack_compressed(name: str, settings: Mapping[str, Any], read: Read) -> Tensor:
    """pack-quantized: a row's codes are one bit stream, lowest bits first; zero points are packed along the outputs. Unsigned."""
    bits = int(settings["num_bits"])
    rows, columns = cast("list[int]", read(f"{name}.weight_shape").tolist())
    scales = read(f"{name}.weight_scale").to(torch.float32)
    if settings["symmetric"]:
        # Signed codes are stored with 2^(bits - 1) added, so that the words hold unsigned fields.
        zero_points = torch.full_like(scales, 2 ** (bits - 1))
    else:
        zero_points = _bit_fields(read(f"{name}.weight_zero_point").t(), bits, rows).t()
    packed = read(f"{name}.weight_packed")
    # Shape and words come from two tensors of an untrusted file: a mismatch would be wrong rows, or an error deep in torch.
    if tuple(packed.shape) != (rows, -(-columns * bits // 32)):
        raise CheckpointError(
            f"{name}: its packed weight {list(packed.shape)} holds no matrix [{rows}, {columns}] of {bits} bits; export it again"
        )
    dense = torch.empty(rows, columns, device=scales.device)
    step = max(1, _CHUNK // columns)
    # In pieces of rows: the codes are float32 while they are unpacked, eight times the bytes of 4-bit words.
    for first in range(0, rows, step):
        chunk = slice(first, first + step)
        codes = _bit_fields(packed[chunk], bits, columns)
        grouped = codes.reshape(codes.shape[0], scales.shape[1], -1)
        dense[chunk] = ((grouped - zero_points[chunk].unsqueeze(2)) * scales[chunk].unsqueeze(2)).flatten(1)
    return dense


def _bit_fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` unsigned fields of `bits` bits in each row of int32 words, float32 [rows, count].

    Fields are aligned to words again every lcm(bits, 32) bits; the fields at the same offset in each such period are read together.
    """
    fields, period = 32 // gcd(bits, 32), bits // gcd(bits, 32)
    spans = -(-count // fields)
    padded = torch.nn.functional.pad(words, (0, spans * period - words.shape[1])).view(words.shape[0], spans, period)
    values = torch.empty(words.shape[0], spans, fields, device=words.device)
    for field in range(fields):
        word, start = divmod(field * bits, 32)
        inside = min(bits, 32 - start)
        # The mask also removes the sign bits that an int32 shift copies in.
        value = (padded[:, :, word] >> start) & ((1 << inside) - 1)
        if inside < bits:
            value |= (padded[:, :, word + 1] & ((1 << (bits - inside)) - 1)) << inside
        values[:, :, field] = value
    return values.flatten(1)[:, :count]


def _dequantize_unpacked(name: str, settings: Mapping[str, Any], read: Read) -> Tensor:
    """int- or float-quantized: unpacked int8 or float8 codes, with a scale per row, matrix or block."""
    codes, scales = read(f"{name}.weight"), read(f"{name}.weight_scale").to(torch.float32)
    if not settings.get("block_structure"):
        return codes.to(torch.float32) * scales.view(-1, 1)
    height, width = settings["block_structure"]
    dense = torch.empty(codes.shape, device=scales.device)
    for block in range(scales.shape[0]):
        rows = slice(block * height, (block + 1) * height)
        dense[rows] = codes[rows].to(torch.float32) * scales[block].repeat_interleave(width)[: codes.shape[1]]
    return dense


def _check_group_order(name: str, read: Read) -> None:
    """Check that GPTQ's groups are consecutive inputs: with `desc_act`, `g_idx` maps them in another order."""
    order, groups = read(f"{name}.g_idx"), read(f"{name}.scales").shape[0]
    if order.tolist() != (torch.arange(len(order)) // max(1, len(order) // groups)).tolist():
        raise CheckpointError(
            f"{name}: its groups are of inputs in another order (g_idx, desc_act: true), which is not read here; quantize without "
            "desc_act, or evaluate it with runtime: vllm"
        )


def _unpack_gptq(name: str, settings: Mapping[str, Any], read: Read) -> Tensor:
    """GPTQ: codes are packed along the inputs, zero points (stored minus one) along the outputs, lowest bits first."""
    bits = int(settings["bits"])
    packed, zeros, scales = read(f"{name}.qweight"), read(f"{name}.qzeros"), read(f"{name}.scales").to(torch.float32)
    columns, rows = packed.shape[0] * 32 // bits, packed.shape[1]
    group = columns // scales.shape[0]
    # Modulo: a zero point of 0 is stored as -1, which is all ones in its field.
    zero_points = ((_bit_fields(zeros, bits, rows) + 1) % 2**bits).t()
    dense = torch.empty(rows, columns, device=scales.device)
    for offset in range(32 // bits):
        codes = ((packed >> (bits * offset)) & (2**bits - 1)).to(torch.float32)
        groups = torch.arange(offset, columns, 32 // bits, device=scales.device) // group
        dense[:, offset :: 32 // bits] = (codes.t() - zero_points[:, groups]) * scales.t()[:, groups]
    return dense


def _unpack_awq(name: str, read: Read) -> Tensor:
    """AWQ: packed along the outputs: nibble i of word c is output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; matrices are [in, out]."""
    packed, zeros, scales = read(f"{name}.qweight"), read(f"{name}.qzeros"), read(f"{name}.scales").to(torch.float32)
    columns, words = packed.shape
    group = columns // scales.shape[0]
    dense = torch.empty(words * 8, columns, device=scales.device)
    for nibble, column in enumerate(_COLUMNS_OF_NIBBLES):
        codes = ((packed >> (4 * nibble)) & 15).to(torch.float32)
        zero_points = ((zeros >> (4 * nibble)) & 15).to(torch.float32).repeat_interleave(group, 0)
        dense[column::8] = ((codes - zero_points) * scales[:, column::8].repeat_interleave(group, 0)).t()
    return dense
