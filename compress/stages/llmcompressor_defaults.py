"""What llm-compressor's modifiers are given for arguments that are left out, from the family's record; free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from compress.checkpoint import Checkpoint
from compress.families import Family, within

_ATTENTION = "self_attn"
_QUERY, _KEY, _VALUE, _OUT = (f"{_ATTENTION}.{name}_proj" for name in "qkvo")
_INTO, _OUT_OF = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"


class Defaults:
    """The arguments for one model; patterns are the library's, on names in memory."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self._text: Mapping[str, Any] = checkpoint.text_config
        self._family = family
        self._shapes = {family.module_name(name): entry.shape for name, entry in checkpoint.tensors.items()}

    @cached_property
    def ignore(self) -> list[str]:
        """The modules that stay as they are: the vision side, the projector, and the output head."""
        parts = dict.fromkeys((*self._family.vision, *self._family.projector))
        return [*([self._family.head] if self._family.head else []), *(rf"re:{re.escape(part)}(\..*)?$" for part in parts)]

    @cached_property
    def mappings(self) -> dict[str, list[Any]]:
        """AWQ's and SmoothQuant's `mappings`: the decoder's pairs, each held to the blocks that have all of its modules.

        The library's own would take in vision layers of the same names.
        """
        awq: list[Any] = []
        smoothquant: list[Any] = []
        for pair in self._family.scale_pairs:
            modules = (pair.smooth_layer, *pair.balance_layers)
            whole = [block for block in self._blocks if all(self._shape(block, module) for module in modules)]
            if not whole:
                continue
            source, *linears = (self._pattern(whole, module) for module in modules)
            awq.append({"smooth_layer": source, "balance_layers": linears})
            if len(self._shape(whole[0], pair.smooth_layer)) == 1:
                smoothquant.append([linears, source])
        return {"AWQModifier": awq, "SmoothQuantModifier": smoothquant}

    @cached_property
    def rotation(self) -> dict[str, Any] | None:
        """SpinQuant's modules, or None where what enters the decoder cannot all be rotated, or its blocks have other parts.

        The library knows text models alone: here what the projector gives to the decoder is rotated with the embeddings.
        """
        family, norm = self._family, f"{self._family.blocks.rpartition('.')[0]}.norm"
        parts = (_QUERY, _KEY, _VALUE, _OUT, *_INTO, _OUT_OF)
        known = (family.embeddings, family.blocks, norm, *family.vision, *([family.head] if family.head else []))
        usual = all(self._shape(block, part) for block in self._blocks for part in parts)
        loose = [name for name in self._shapes if not any(within(name, part) for part in known)]
        if not usual or loose or family.head is None or family.vision_readers:
            return None
        blocks = self._blocks
        return {
            "head_dim": int(self._text.get("head_dim") or self._text["hidden_size"] // self._text["num_attention_heads"]),
            "mappings": {
                "embedding": family.embeddings,
                "attn": self._pattern(blocks, _ATTENTION),
                "attn_q": self._pattern(blocks, _QUERY),
                "attn_k": self._pattern(blocks, _KEY),
                "attn_v": self._pattern(blocks, _VALUE),
                "attn_o": self._pattern(blocks, _OUT),
                "mlp_in": [self._pattern(blocks, part) for part in _INTO],
                "mlp_out": [self._pattern(blocks, _OUT_OF), *map(self._last_linear, family.projector)],
                "lm_head": family.head,
            },
            "norm_mappings": [
                *({"norm": norm, "linears": linears} for linears, norm in self.mappings["SmoothQuantModifier"]),
                {"norm": norm, "linears": [family.head]},
            ],
        }

    @cached_property
    def _blocks(self) -> list[int]:
        place = re.compile(rf"{re.escape(self._family.blocks)}\.(\d+)\.")
        return sorted({int(found.group(1)) for name in self._shapes if (found := place.match(name))})

    def _shape(self, block: int, module: str) -> tuple[int, ...]:
        return self._shapes.get(f"{self._family.blocks}.{block}.{module}.weight", ())

    def _pattern(self, blocks: list[int], module: str) -> str:
        return rf"re:{re.escape(self._family.blocks)}\.({'|'.join(map(str, blocks))})\.{re.escape(module)}$"

    def _last_linear(self, part: str) -> str:
        """Return the linear of a projector's part that gives what the decoder reads."""
        width = int(self._text["hidden_size"])
        names = [name for name, shape in self._shapes.items() if within(name, part) and len(shape) == 2 and shape[0] == width]
        return max(names, key=_natural).removesuffix(".weight")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
