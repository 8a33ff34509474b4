"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL's decoder behind a vision tower with window attention and gated feed-forward."""

from dataclasses import replace

from compress.families.family import ScalePair
from compress.families.qwen2_vl import QWEN2_VL

QWEN2_5_VL = replace(
    QWEN2_VL,
    name="qwen2.5-vl",
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    vision_scale_pairs=(
        ScalePair("norm1", ("attn.qkv",)),
        ScalePair("norm2", ("mlp.gate_proj", "mlp.up_proj")),
        ScalePair("mlp.up_proj", ("mlp.down_proj",)),
    ),
)
