"""What the parts of an ONNX artifact cost that no stage quantized, and which settings make them smaller; from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.export.format import ExportSpec
from compress.export.onnx_limits import FLOAT_BYTES, block_size, linear_bytes
from compress.families import within
from compress.figures import size
from compress.layouts import is_quantized
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from compress.export.onnx_export import OnnxExport

_WORTH = 0.05
"""The share of an artifact that a setting has to save to be named: less is not worth a choice."""


def cost_notes(settings: OnnxExport, spec: ExportSpec) -> list[str]:
    """Return how large the artifact is beside the original, and what each setting that is left at its default would save."""
    if not spec.schemes:
        return []
    total = settings.predict_bytes(spec)
    head = "output head and embeddings" if spec.family.head is not None else "embeddings"
    keys = "head_bits: 8, embedding_bits: 8" if spec.family.head is not None else "embedding_bits: 8"
    saved = (
        (_ends_saving(settings, spec, total), f"{head} in 8 bits ({keys})"),
        (
            _vision_saving(settings, spec),
            "the vision tower in 8 bits (targets: [decoder, {component: vision, bits: 8, group_size: -1}] on the stage)",
        ),
        (total - settings.model_copy(update={"dtype": "float16"}).predict_bytes(spec), "dtype: float16 alone"),
    )
    worth = [f"{words} saves {size(count)}" for count, words in saved if count > _WORTH * total]
    if not worth:
        return []
    planned = not is_quantized(spec.checkpoint.config)  # once stages ran, the checkpoint is no longer the original
    times = f", {total / spec.checkpoint.weight_bytes:.2f} times the original's" if planned else ""
    return [
        f"{settings.artifact}: about {size(total)} of weights{times}: what no stage quantizes is in {settings.dtype}; "
        f"{', '.join(worth)}"
    ]


def _ends_saving(settings: OnnxExport, spec: ExportSpec, total: int) -> int:
    """Return how many bytes 8-bit ends save where they are floats."""
    quantized = spec.family.head in {spec.family.module_name(f"{name}.weight")[: -len(".weight")] for name in spec.schemes}
    head = settings.head_bits or (None if spec.family.head is None or quantized else 8)
    smaller = settings.model_copy(update={"head_bits": head, "embedding_bits": 8})
    return 0 if smaller.check(spec) else total - smaller.predict_bytes(spec)


def _vision_saving(settings: OnnxExport, spec: ExportSpec) -> int:
    """Return how many bytes an 8-bit vision tower saves where it is in floats."""
    number, saved = FLOAT_BYTES[settings.dtype], 0
    for name, entry in spec.checkpoint.tensors.items():
        owner, _, kind = name.rpartition(".")
        module = spec.family.module_name(name)
        inside = any(within(module, part) for part in spec.family.vision_blocks)
        if inside and kind == "weight" and len(entry.shape) == 2 and owner not in spec.schemes and block_size(entry.shape[1]):
            rows, columns = entry.shape
            saved += rows * columns * number - linear_bytes((rows, columns), Scheme(8, -1, symmetric=True), number)
    return saved
