"""What ONNX graphs can hold of a checkpoint, and how large they will be; read from headers, config and schemes alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from compress.export.format import ExportSpec
from compress.export.graphs import GRAPHS
from compress.layouts import linear_shape, linear_tensors
from compress.numerics.scheme import Scheme
from compress.output_head import head_is_tied

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.export.onnx_export import OnnxExport

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
ROUNDED_BLOCK = 32
"""How many input channels share a scale in an output head or embeddings that the export itself rounds."""

ROTATIONS = ("default", "linear", "llama3", "yarn", "dynamic")
"""The ways to rotate positions that decoders here know; the last one's frequencies change with the length."""

_WIDTHS = (4, 8)
_PATCHES = "vision_model.embeddings.patch_embedding"
"""What CLIP's patches are multiplied with, which counts as embeddings."""

FLOAT_BYTES = {"float32": 4, "float16": 2}
"""The bytes of a number in each type that graphs compute in."""


def block_size(group_size: int) -> int:
    """Return the block of MatMulNBits that a group of so many input channels is made of: a power of two from 16 to 256.

    0 where there is none. Several blocks of one group carry the same scale.
    """
    block = min(group_size & -group_size, LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else 0


def faults(settings: OnnxExport, spec: ExportSpec) -> list[str]:
    """Return why no ONNX graph here can hold a checkpoint, one line each with its remedy."""
    family = spec.family
    if family.derived or family.name not in GRAPHS:
        return [
            f"there are ONNX graphs for {', '.join(GRAPHS)}, and {family.architecture} is none of them; use format: vllm, or add "
            "its graphs to compress.export.graphs"
        ]
    found = _schemes(spec) + _positions(spec) + _ends(settings, spec)
    if spec.kv_cache:
        found.append("ONNX graphs have no place for the scales of keys and values; leave kv_cache away")
    return found


def _schemes(spec: ExportSpec) -> list[str]:
    """Return which linears are held in a way that no operator reads, one line for all of one reason."""
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, scheme in spec.schemes.items():
        if reason := _reason(scheme, linear_shape(spec.checkpoint, name)[1]):
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
    if scheme.activations is None and not block_size(columns if scheme.group_size == -1 else scheme.group_size):
        return (
            f"groups of {columns if scheme.group_size == -1 else scheme.group_size} input channels are made of no power of two "
            f"from {SMALLEST_BLOCK} on, as MatMulNBits needs; set group_size: 32, 64 or 128"
        )
    return None


def _positions(spec: ExportSpec) -> list[str]:
    text = spec.checkpoint.text_config
    rotation = cast("Mapping[str, Any]", text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = str(rotation.get("rope_type") or rotation.get("type") or "default")
    if kind in (*ROTATIONS, "mrope"):
        return []
    return [f"positions of rope_type {kind!r} are not in the graphs, which know {', '.join(ROTATIONS)}; use format: vllm"]


def _ends(settings: OnnxExport, spec: ExportSpec) -> list[str]:
    """Return what stands against rounding the output head or the embeddings."""
    family, found = spec.family, list[str]()
    held = {family.module_name(f"{name}.weight").removesuffix(".weight") for name in spec.schemes}
    if settings.head_bits and family.head is None:
        found.append(f"{family.name} has no output head; leave head_bits away")
    if settings.head_bits and family.head in held:
        found.append("a stage quantizes the output head already; leave head_bits away")
    width = _width(spec)
    if width % SMALLEST_BLOCK and (settings.head_bits or settings.embedding_bits):
        found.append(f"rows of {width} numbers are not made of blocks of {SMALLEST_BLOCK}; leave head_bits and embedding_bits away")
    return found


def _width(spec: ExportSpec) -> int:
    name = next(name for name in spec.checkpoint.tensors if _is(spec, name, spec.family.embeddings))
    return spec.checkpoint.tensors[name].shape[1]


def _is(spec: ExportSpec, name: str, module: str | None) -> bool:
    return module is not None and spec.family.module_name(name) == f"{module}.weight"


def expected_bytes(settings: OnnxExport, spec: ExportSpec, *, built: bool = False) -> int:
    """Return the size of the weights that an export writes, in bytes.

    `built` says that the decoder is that of onnxruntime-genai's builder, which stores a head that is the embeddings once more, and
    the cosines and sines of every position.
    """
    checkpoint, number = spec.checkpoint, FLOAT_BYTES[settings.dtype]
    total, taken = 0, set[str]()
    for name, scheme in spec.schemes.items():
        total += linear_bytes(linear_shape(checkpoint, name), scheme, number)
        taken.update((*linear_tensors(name), f"{name}.weight"))
    total += _rotation_bytes(checkpoint.text_config, number) if built else 0
    ends = _end_widths(settings, spec, apart=built)
    for name, entry in checkpoint.tensors.items():
        if name in taken:
            continue
        if settings.embedding_bits and spec.family.head is None and _is(spec, name, _PATCHES):
            total += math.prod(entry.shape) + entry.shape[0] * number
            continue
        widths = next((widths for module, widths in ends if _is(spec, name, module)), [None])
        total += sum(_held_bytes(entry.shape, width, number) for width in widths)
    return total


def _rotation_bytes(text: Mapping[str, Any], number: int) -> int:
    """Return the size of two tables [positions, head width / 2]."""
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return int(text.get("max_position_embeddings") or 0) * int(width) * number


def _end_widths(settings: OnnxExport, spec: ExportSpec, apart: bool) -> list[tuple[str | None, list[int | None]]]:
    """Return in how many bits each matrix of embeddings or head is held, once for each time that it is stored."""
    family = spec.family
    words, head = settings.embedding_bits, settings.head_bits
    if family.head is None or not head_is_tied(spec.checkpoint, family):
        return [(family.embeddings, [words]), (family.head, [head])]
    both: list[int | None] = [words] if words == head and not apart else [words, head]
    return [(family.embeddings, both), (family.head, [])]


def _held_bytes(shape: tuple[int, ...], bits: int | None, number: int) -> int:
    count = math.prod(shape)
    return count * number if bits is None else count * bits // 8 + count // ROUNDED_BLOCK * number


def linear_bytes(shape: tuple[int, int], scheme: Scheme, number: int) -> int:
    """Return the size of a linear [out, in] in a graph whose floats have `number` bytes."""
    rows, columns = shape
    if scheme.activations is not None:
        return rows * columns + rows * (number + (scheme.activations == "tensor"))
    blocks = columns // block_size(columns if scheme.group_size == -1 else scheme.group_size)
    points = 0 if scheme.symmetric else rows * -(-blocks * scheme.bits // 8)
    return rows * columns * scheme.bits // 8 + rows * blocks * number + points
