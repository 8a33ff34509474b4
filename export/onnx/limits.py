"""Which checkpoints the ONNX graphs support, and the artifact's size; from headers, config and schemes alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from compress.checkpoints.layouts import linear_tensors
from compress.checkpoints.spec import CheckpointSpec
from compress.export.onnx.graphs import GRAPHS
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.export.onnx.apply import OnnxExport

MAX_BLOCK, MIN_BLOCK = 256, 16
"""The largest and the smallest block size of MatMulNBits: its documented sizes are the powers of two between them."""

EXPORT_GROUP_SIZE = 32
"""The group size of an output head or embeddings that the export itself quantizes: small, as they are rounded to nearest without
calibration; with float32 scales it costs 1 bit per weight."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
"""The RoPE types that the decoder graphs support; the frequencies of `dynamic` change with the length."""

_WIDTHS = (4, 8)
"""The bits of MatMulNBits."""

_PATCHES = "vision_model.embeddings.patch_embedding"
"""CLIP's patch embedding, which `embedding_bits` quantizes too."""

FLOAT_BYTES = {"float32": 4, "float16": 2}
"""The bytes of a float in each compute type."""


def block_size(group_size: int) -> int:
    """Return the largest MatMulNBits block size, a power of two from 16 to 256, that divides a group size; 0 if there is none.

    The blocks of one group have the same scale.
    """
    # x & -x is the largest power of two that divides x: 192 becomes blocks of 64, three of which repeat one scale.
    block = min(group_size & -group_size, MAX_BLOCK)
    return block if block >= MIN_BLOCK else 0


def faults(settings: OnnxExport, spec: CheckpointSpec) -> list[str]:
    """Return why the ONNX graphs do not support a checkpoint, one line each with its remedy."""
    family = spec.family
    if family.derived or family.name not in GRAPHS:
        return [
            f"there are ONNX graphs for {', '.join(GRAPHS)}, and {family.architecture} is none of them; use format: vllm, or add "
            "its graphs to compress.export.onnx.graphs"
        ]
    lines = _scheme_faults(spec) + _rope_faults(spec) + _embedding_and_head_faults(settings, spec)
    if spec.has_kv_scales:
        lines.append("ONNX graphs have no place for the scales of keys and values; remove kv_cache")
    return lines


def _scheme_faults(spec: CheckpointSpec) -> list[str]:
    """Return the linears with a scheme that no operator supports, one line per reason."""
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, scheme in spec.schemes.items():
        if reason := _reason(scheme, spec.shape(name)[1]):
            reasons[reason] += 1
            first.setdefault(reason, name)
    return [
        f"{first[reason]}{f' and {count - 1} others' if count > 1 else ''}: {reason}" for reason, count in reasons.items()
    ]  # fmt: skip


def _reason(scheme: Scheme, columns: int) -> str | None:
    if scheme.type == "float":
        return "8-bit floats have no operator on CPUs; use stage: int8, awq or gptq, or format: vllm"
    if scheme.bits not in _WIDTHS:
        return f"MatMulNBits holds 4 or 8 bits, not {scheme.bits}; set bits: 4 or 8, or format: vllm"
    # W8A8 has a scale per output channel and becomes MatMulInteger or MatMul, which have no blocks.
    if scheme.activations is None and not block_size(columns if scheme.group_size == -1 else scheme.group_size):
        return (
            f"groups of {columns if scheme.group_size == -1 else scheme.group_size} input channels are made of no power of two "
            f"from {MIN_BLOCK} on, as MatMulNBits needs; set group_size: 32, 64 or 128"
        )
    return None


def _rope_faults(spec: CheckpointSpec) -> list[str]:
    text = spec.text_config
    # transformers 5 writes rope_parameters; configs of earlier versions have rope_scaling, and some of those `type`.
    rope = cast("Mapping[str, Any]", text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    # "mrope" in old Qwen-VL configs names the three axes, not a scaling: transformers reads it as "default".
    if kind in (*ROPE_TYPES, "mrope"):
        return []
    return [f"positions of rope_type {kind!r} are not in the graphs, which know {', '.join(ROPE_TYPES)}; use format: vllm"]


def _embedding_and_head_faults(settings: OnnxExport, spec: CheckpointSpec) -> list[str]:
    """Return why the output head or the embeddings cannot be quantized by the export."""
    family, lines = spec.family, list[str]()
    # Schemes are by name on disk, `family.head` is a name in memory; for Qwen2.5-VL, LLaVA and others the two differ.
    quantized = {family.module_name(f"{name}.weight").removesuffix(".weight") for name in spec.schemes}
    if settings.head_bits and family.head is None:
        lines.append(f"{family.name} has no output head; remove head_bits")
    if settings.head_bits and family.head in quantized:
        lines.append("a stage quantizes the output head already; remove head_bits")
    width = _width(spec)
    if width % MIN_BLOCK and (settings.head_bits or settings.embedding_bits):
        lines.append(f"rows of {width} numbers are not made of blocks of {MIN_BLOCK}; remove head_bits and embedding_bits")
    return lines


def _width(spec: CheckpointSpec) -> int:
    name = next(name for name in spec.tensors if _is(spec, name, spec.family.embeddings))
    return spec.tensors[name].shape[1]


def _is(spec: CheckpointSpec, name: str, module: str | None) -> bool:
    return module is not None and spec.family.module_name(name) == f"{module}.weight"


def expected_bytes(settings: OnnxExport, spec: CheckpointSpec, *, built: bool = False) -> int:
    """Return the size of the weights that an export writes, in bytes.

    `built`: the decoder is that of onnxruntime-genai's builder, which stores a tied head separately, and the cosines and sines of
    every position.
    """
    float_bytes = FLOAT_BYTES[settings.dtype]
    total, counted = 0, set[str]()
    for name, scheme in spec.schemes.items():
        total += linear_bytes(spec.shape(name), scheme, float_bytes)
        # Both names: a checkpoint on disk has a linear's packed tensors, a planned spec may still have its dense weight.
        counted.update((*linear_tensors(name), f"{name}.weight"))
    total += _rope_table_bytes(spec.text_config, float_bytes) if built else 0
    stored_bits = _embedding_and_head_bits(settings, spec, separate=built)
    for name, entry in spec.tensors.items():
        if name in counted:
            continue
        if settings.embedding_bits and spec.family.head is None and _is(spec, name, _PATCHES):
            total += math.prod(entry.shape) + entry.shape[0] * float_bytes
            continue
        copies = next((bits for module, bits in stored_bits if _is(spec, name, module)), [None])
        total += sum(_matrix_bytes(entry.shape, bits, float_bytes) for bits in copies)
    return total


def _rope_table_bytes(text: Mapping[str, Any], float_bytes: int) -> int:
    """Return the size of the cosine and sine tables, each [positions, head width / 2]."""
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return int(text.get("max_position_embeddings") or 0) * int(width) * float_bytes


def _embedding_and_head_bits(
    settings: OnnxExport, spec: CheckpointSpec, separate: bool
) -> list[tuple[str | None, list[int | None]]]:
    """Return, for the embeddings and the head, the bits of each stored copy (None: floats)."""
    family = spec.family
    embedding, head = settings.embedding_bits, settings.head_bits
    if family.head is None or not spec.tied:
        return [(family.embeddings, [embedding]), (family.head, [head])]
    # A tied matrix is stored once only if both ends read the same bytes: the embeddings' folder data serves the decoder too.
    copies: list[int | None] = [embedding] if embedding == head and not separate else [embedding, head]
    return [(family.embeddings, copies), (family.head, [])]


def _matrix_bytes(shape: tuple[int, ...], bits: int | None, float_bytes: int) -> int:
    count = math.prod(shape)
    # Symmetric: a scale per group and no zero points.
    return count * float_bytes if bits is None else count * bits // 8 + count // EXPORT_GROUP_SIZE * float_bytes


def linear_bytes(shape: tuple[int, int], scheme: Scheme, float_bytes: int) -> int:
    """Return the size of a quantized linear [out, in] in a graph whose floats have `float_bytes` bytes."""
    rows, columns = shape
    if scheme.activations is not None:
        # DequantizeLinear wants a zero point per channel (one byte each); MatMulInteger takes a scalar, which is a constant.
        return rows * columns + rows * (float_bytes + (scheme.activations == "tensor"))
    blocks = columns // block_size(columns if scheme.group_size == -1 else scheme.group_size)
    # MatMulNBits pads each row's packed zero points to whole bytes.
    zero_points = 0 if scheme.symmetric else rows * -(-blocks * scheme.bits // 8)
    return rows * columns * scheme.bits // 8 + rows * blocks * float_bytes + zero_points
