"""Which checkpoints onnxruntime-genai 0.18 and its model builder support; from headers, config and schemes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.checkpoints.layouts import unquantized_linears
from compress.checkpoints.spec import CheckpointSpec
from compress.export.onnx.limits import faults as graph_faults
from compress.numerics.scheme import Scheme

if TYPE_CHECKING:
    from compress.export.onnx_genai.format import OnnxGenai


@dataclass(frozen=True)
class ModelType:
    """How onnxruntime-genai supports a family with images."""

    type: str
    """The model type in `genai_config.json`."""

    built: bool
    """Whether the model builder supports the decoder."""


MODEL_TYPES: Mapping[str, ModelType] = {
    "qwen2-vl": ModelType("qwen2_5_vl", built=False),
    "qwen2.5-vl": ModelType("qwen2_5_vl", built=True),
    "qwen3-vl": ModelType("qwen3_vl", built=True),
}
"""The supported families. Qwen2-VL has Qwen2.5-VL's prompts, patches and positions, and so its type."""

_BUILDER_BLOCKS = (16, 32, 64, 128, 256)
"""The block sizes of MatMulNBits: the builder makes each group one block."""

_AWQ_BITS = 4
_USE_OWN_DECODER = "set decoder: own"


def layout_of(scheme: Scheme) -> Literal["awq", "gptq"]:
    """Return the layout in which the builder gets linears of a scheme: AWQ for 4 bits, GPTQ for 8."""
    return "awq" if scheme.bits == _AWQ_BITS else "gptq"


def faults(export: OnnxGenai, spec: CheckpointSpec) -> list[str]:
    """Return why onnxruntime-genai, or its builder, does not support a checkpoint, one line each with its remedy."""
    family = spec.family
    if family.name not in MODEL_TYPES:
        return [
            f"onnxruntime-genai 0.18 runs {', '.join(MODEL_TYPES)} with images, and {family.architecture} is none of them: it "
            "has no model type that takes such prompts and images; use format: onnx"
        ]
    lines = graph_faults(export, spec)
    if export.decoder == "own":
        return lines
    if not MODEL_TYPES[family.name].built:
        lines.append(f"onnxruntime-genai's model builder does not know {family.architecture}; {_USE_OWN_DECODER}")
    return [*lines, *_builder_faults(spec)]


def _builder_faults(spec: CheckpointSpec) -> list[str]:
    """Return why the builder does not support the decoder's linears."""
    family = spec.family
    decoder = decoder_schemes(spec)
    if not decoder:
        return []
    lines = [
        f"{name}: {reason}; {_USE_OWN_DECODER}" for name, scheme in decoder.items() if (reason := _reason(spec, name, scheme))
    ][:1]
    if len(set(decoder.values())) > 1:
        lines.append(
            f"onnxruntime-genai's builder reads one scheme for all linears of the decoder; use the same for all, "
            f"or {_USE_OWN_DECODER}"
        )
    unquantized = [
        name
        for name in unquantized_linears(spec, family, spec.schemes)
        if not family.inside_vision(family.module_name(name)) and family.module_name(name) != family.head
    ]
    if unquantized:
        others = f" and {len(unquantized) - 1} others" if len(unquantized) > 1 else ""
        lines.append(
            f"{unquantized[0]}{others}: not quantized, and onnxruntime-genai's builder "
            f"takes either all linears of the decoder's blocks quantized or none; {_USE_OWN_DECODER}"
        )
    # Its input leaves the head out: AWQ's and GPTQ's layouts hold one scheme, and heads are often quantized by another.
    if family.head in {family.module_name(name) for name in spec.schemes}:
        lines.append(f"onnxruntime-genai's builder is not given a quantized output head; {_USE_OWN_DECODER}")
    return lines


def _reason(spec: CheckpointSpec, name: str, scheme: Scheme) -> str | None:
    if scheme.activations is not None:
        return "onnxruntime-genai's builder reads no linears whose inputs are rounded to 8 bits"
    if layout_of(scheme) == "gptq" and not scheme.symmetric:
        return "onnxruntime-genai's builder reads 8 bits as GPTQ lays them out, symmetric, and this grid is asymmetric"
    # This package's own graphs split such a group into several blocks; the builder does not.
    group = spec.shape(name)[1] if scheme.group_size == -1 else scheme.group_size
    if group not in _BUILDER_BLOCKS:
        sizes = ", ".join(map(str, _BUILDER_BLOCKS))
        return f"onnxruntime-genai's builder makes each group one block of MatMulNBits, which has {sizes} channels, not {group}"
    return None


def decoder_schemes(spec: CheckpointSpec) -> dict[str, Scheme]:
    """Return the schemes of the linears in the decoder's blocks, by their names on disk."""
    family = spec.family
    return {
        name: scheme
        for name, scheme in spec.schemes.items()
        if not family.inside_vision(family.module_name(name)) and family.module_name(name) != family.head
    }


def notes() -> list[str]:
    """Return the differences between onnxruntime-genai's prompt processing and the checkpoint's processor."""
    return [
        "onnxruntime-genai rounds halves of image sizes away from zero, transformers to even: an image one of whose sides is an "
        "odd multiple of half the patch grid (such as 70 pixels in a grid of 28) may be read at another size there; its tokenizer "
        "does not compose letters and accents that are apart (NFC): give it text that is"
    ]
