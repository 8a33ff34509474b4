"""The size of an ONNX artifact's unquantized components, and the settings that shrink them; from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoints.spec import CheckpointSpec
from compress.export.onnx.limits import FLOAT_BYTES, block_size, linear_bytes
from compress.families import within
from compress.numerics.scheme import Scheme
from compress.report.figures import size

if TYPE_CHECKING:
    from compress.export.onnx.apply import OnnxExport

_MIN_SAVING = 0.05
"""The share of the artifact's size from which on a saving is mentioned."""


def cost_notes(settings: OnnxExport, spec: CheckpointSpec, original_bytes: int | None) -> list[str]:
    """Return the artifact's size, relative to the original's in a plan, and what each setting at its default would save."""
    if not spec.schemes:
        return []
    total = settings.predict_bytes(spec)
    head = "output head and embeddings" if spec.family.head is not None else "embeddings"
    keys = "head_bits: 8, embedding_bits: 8" if spec.family.head is not None else "embedding_bits: 8"
    savings = (
        (_embeddings_and_head_saving(settings, spec, total), f"{head} in 8 bits ({keys})"),
        (
            _vision_saving(settings, spec),
            "the vision tower in 8 bits (targets: [decoder, {component: vision, bits: 8, group_size: -1}] on the stage)",
        ),
        (total - settings.model_copy(update={"dtype": "float16"}).predict_bytes(spec), "dtype: float16 alone"),
    )
    notes = [f"{setting} saves {size(count)}" for count, setting in savings if count > _MIN_SAVING * total]
    if not notes:
        return []
    times = f", {total / original_bytes:.2f} times the original's" if original_bytes else ""
    return [
        f"{settings.artifact}: about {size(total)} of weights{times}: what no stage quantizes is in {settings.dtype}; "
        f"{', '.join(notes)}"
    ]


def _embeddings_and_head_saving(settings: OnnxExport, spec: CheckpointSpec, total: int) -> int:
    """Return the bytes saved by 8-bit embeddings and output head where they are floats."""
    quantized = spec.family.head in {spec.family.module_name(f"{name}.weight")[: -len(".weight")] for name in spec.schemes}
    # `head_bits` on a head that a stage has quantized is refused in the plan, so it is not proposed either.
    head = settings.head_bits or (None if spec.family.head is None or quantized else 8)
    smaller = settings.model_copy(update={"head_bits": head, "embedding_bits": 8})
    # Rows that MatMulNBits' blocks do not divide cannot be rounded: such a setting must not be recommended.
    return 0 if smaller.check(spec) else total - smaller.predict_bytes(spec)


def _vision_saving(settings: OnnxExport, spec: CheckpointSpec) -> int:
    """Return the bytes saved by an 8-bit vision tower where it is in floats."""
    float_bytes, saved = FLOAT_BYTES[settings.dtype], 0
    for name, entry in spec.tensors.items():
        owner, _, suffix = name.rpartition(".")
        module = spec.family.module_name(name)
        inside = any(within(module, block) for block in spec.family.vision_blocks)
        # Matrices alone: no stage quantizes the patch convolution, whose kernel has four or five dimensions.
        if inside and suffix == "weight" and len(entry.shape) == 2 and owner not in spec.schemes and block_size(entry.shape[1]):
            rows, columns = entry.shape
            saved += rows * columns * float_bytes - linear_bytes((rows, columns), Scheme(8, -1, symmetric=True), float_bytes)
    return saved
