"""Tiny checkpoints with random weights, in every other way like published ones: config, tokenizer, processor, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

from transformers import PreTrainedConfig

from compress.families import FAMILIES, Family
from compress.recipe.schema import load_attribute
from tests.tiny.blip2 import build_blip2
from tests.tiny.clip import build_clip
from tests.tiny.internvl import build_internvl
from tests.tiny.llava import build_llava
from tests.tiny.llava_next import build_llava_next
from tests.tiny.mllama import build_mllama
from tests.tiny.parts import TEXT, Sizes, picture
from tests.tiny.qwen import build_tokenizer
from tests.tiny.qwen2_5_vl import build_qwen2_5_vl
from tests.tiny.qwen2_vl import build_qwen2_vl
from tests.tiny.qwen3_vl import build_qwen3_vl

__all__ = [
    "BUILDERS",
    "TEXT",
    "Builder",
    "Sizes",
    "build_blip2",
    "build_clip",
    "build_internvl",
    "build_llava",
    "build_llava_next",
    "build_mllama",
    "build_qwen2_5_vl",
    "build_qwen2_vl",
    "build_qwen3_vl",
    "build_tokenizer",
    "picture",
    "writes",
]

# transformers formats every config that it reads, for a log that is off: a tenth of the time of a tiny model's test.
PreTrainedConfig.__repr__ = object.__repr__


class Builder(Protocol):
    """Writes a checkpoint into a folder and returns it; keywords are fields of `Sizes`."""

    def __call__(self, folder: Path, **overrides: Any) -> Path:
        """Write the checkpoint."""
        ...


BUILDERS: dict[str, Builder] = {
    "qwen2-vl": build_qwen2_vl,
    "qwen2.5-vl": build_qwen2_5_vl,
    "qwen3-vl": build_qwen3_vl,
    "llava": build_llava,
    "llava-next": build_llava_next,
    "internvl3": build_internvl,
    "mllama": build_mllama,
    "blip-2": build_blip2,
    "clip": build_clip,
}
"""A builder for every family, by the family's name."""


def writes(family: str) -> bool:
    """Return whether models of a family generate text."""
    return cast("Family", load_attribute(FAMILIES[family])).head is not None
