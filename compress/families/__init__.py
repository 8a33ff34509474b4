"""What is known of each model architecture, as data: one frozen record per file."""

from compress.families.family import Family, Pair, family_of, within

__all__ = ["FAMILIES", "Family", "Pair", "family_of", "within"]

FAMILIES = {
    "qwen2-vl": "compress.families.qwen2_vl:QWEN2_VL",
    "qwen2.5-vl": "compress.families.qwen2_5_vl:QWEN2_5_VL",
}
"""The supported families: name → the record."""
