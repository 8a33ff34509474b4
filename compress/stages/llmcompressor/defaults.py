"""Defaults of the arguments of llm-compressor's modifiers, from the family's record; free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from compress.checkpoints.checkpoint import Checkpoint
from compress.families import Family, within

ENVIRONMENT = "llmcompressor"
"""The name of the library's environment."""

_ATTENTION = "self_attn"
_QUERY, _KEY, _VALUE, _OUT = (f"{_ATTENTION}.{name}_proj" for name in "qkvo")
_MLP_IN, _MLP_OUT = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"


class Defaults:
    """The arguments for one model, with the library's patterns of names in transformers."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self._text: Mapping[str, Any] = checkpoint.text_config
        self._family = family
        self._shapes = {family.module_name(name): entry.shape for name, entry in checkpoint.tensors.items()}

    @cached_property
    def ignore(self) -> list[str]:
        """The modules that are not quantized: the vision side, the projector, and the output head."""
        modules = dict.fromkeys((*self._family.vision, *self._family.projector))
        return [*([self._family.head] if self._family.head else []), *(rf"re:{re.escape(module)}(\..*)?$" for module in modules)]

    @cached_property
    def mappings(self) -> dict[str, list[Any]]:
        """AWQ's and SmoothQuant's `mappings`: the decoder's scale pairs, each for the blocks that have all of its modules.

        The library's defaults would include vision layers of the same names.
        """
        awq: list[Any] = []
        smoothquant: list[Any] = []
        for pair in self._family.scale_pairs:
            modules = (pair.smooth_layer, *pair.balance_layers)
            # blocks may differ: a pattern that matches a norm without its linears makes the library fail
            complete = [block for block in self._blocks if all(self._shape(block, module) for module in modules)]
            if not complete:
                continue
            smooth_layer, *linears = (self._pattern(complete, module) for module in modules)
            awq.append({"smooth_layer": smooth_layer, "balance_layers": linears})
            if len(self._shape(complete[0], pair.smooth_layer)) == 1:
                smoothquant.append([linears, smooth_layer])
        return {"AWQModifier": awq, "SmoothQuantModifier": smoothquant}

    @cached_property
    def rotation(self) -> dict[str, Any] | None:
        """SpinQuant's modules; None where not all inputs of the decoder can be rotated, or its blocks have other layers.

        The library supports text models only; here the projector's output is rotated together with the embeddings.
        """
        family, norm = self._family, f"{self._family.blocks.rpartition('.')[0]}.norm"
        layers = (_QUERY, _KEY, _VALUE, _OUT, *_MLP_IN, _MLP_OUT)
        # whatever else reads or writes the rotated states would have to be rotated too
        rotatable = (family.embeddings, family.blocks, norm, *family.vision, *([family.head] if family.head else []))
        complete = all(self._shape(block, layer) for block in self._blocks for layer in layers)
        others = [name for name in self._shapes if not any(within(name, module) for module in rotatable)]
        if not complete or others or family.head is None or family.cross_attention_linears:
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
                "mlp_in": [self._pattern(blocks, layer) for layer in _MLP_IN],
                "mlp_out": [self._pattern(blocks, _MLP_OUT), *map(self._last_linear, family.projector)],
                "lm_head": family.head,
            },
            "norm_mappings": [
                *({"norm": norm, "linears": linears} for linears, norm in self.mappings["SmoothQuantModifier"]),
                {"norm": norm, "linears": [family.head]},
            ],
        }

    @cached_property
    def _blocks(self) -> list[int]:
        pattern = re.compile(rf"{re.escape(self._family.blocks)}\.(\d+)\.")
        return sorted({int(match.group(1)) for name in self._shapes if (match := pattern.match(name))})

    def _shape(self, block: int, module: str) -> tuple[int, ...]:
        return self._shapes.get(f"{self._family.blocks}.{block}.{module}.weight", ())

    def _pattern(self, blocks: list[int], module: str) -> str:
        # the whole name: the library searches all modules, and a vision block may have layers of the same names
        return rf"re:{re.escape(self._family.blocks)}\.({'|'.join(map(str, blocks))})\.{re.escape(module)}$"

    def _last_linear(self, module: str) -> str:
        """Return the linear of a projector's module whose output the decoder reads."""
        width = int(self._text["hidden_size"])
        # its width tells it from a projector's inner linears, which families name differently; of several the last one
        names = [name for name, shape in self._shapes.items() if within(name, module) and len(shape) == 2 and shape[0] == width]
        return max(names, key=_natural).removesuffix(".weight")


def _natural(name: str) -> list[tuple[int, str]]:
    # numbers as numbers: "10" sorts before "2" as text
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
