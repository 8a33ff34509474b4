"""Model architectures as data: one frozen record per file."""

from compress.families.family import Family, ScalePair, within

__all__ = ["FAMILIES", "Family", "ScalePair", "within"]

FAMILIES = {
    "qwen2-vl": "compress.families.qwen2_vl:QWEN2_VL",
    "qwen2.5-vl": "compress.families.qwen2_5_vl:QWEN2_5_VL",
    "qwen3-vl": "compress.families.qwen3_vl:QWEN3_VL",
    "llava": "compress.families.llava:LLAVA",
    "llava-next": "compress.families.llava_next:LLAVA_NEXT",
    "internvl3": "compress.families.internvl:INTERNVL3",
    "mllama": "compress.families.mllama:MLLAMA",
    "blip-2": "compress.families.blip2:BLIP2",
    "clip": "compress.families.clip:CLIP",
}
"""The supported families: name → the record."""
