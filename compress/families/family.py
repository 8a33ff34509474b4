"""The record of a model architecture."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, cast

_IMAGE_INPUT = "pixel_values"


@dataclass(frozen=True)
class ScalePair:
    """A module whose output channels feed linears of the same block, so that a scale can move from one to the other.

    Names are relative to a block; a pair whose modules a block does not have does not apply to it. AWQ and SmoothQuant in
    llm-compressor call the two by the same names.
    """

    smooth_layer: str
    """A norm, whose weight and bias are divided by the scale, or a linear, whose output rows are."""

    balance_layers: tuple[str, ...]
    """The linears that read it, whose input channels are multiplied by the scale."""

    grouped: bool = False
    """Whether the channels of `smooth_layer` are key-value heads, which grouped-query attention repeats for the balance layers."""


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, as data: the names of its components, and how other programs read its checkpoints.

    Module names are those of transformers 5. Names within a block are relative to the block.
    """

    name: str
    """The family's name in messages and reports, such as `qwen2.5-vl`."""

    model_type: str
    """The `model_type` in config.json, by which the record is chosen."""

    architecture: str
    """The class of transformers that `architectures` of config.json names."""

    renames: tuple[tuple[str, str], ...]
    """Regular expressions and replacements from names on disk to names in transformers: the first that matches is applied once; a
    name that none matches does not change."""

    vision: tuple[str, ...]
    """All modules that compute the image features which the decoder reads, the projector included."""

    projector: tuple[str, ...]
    """Of `vision`, the modules between the tower's last block and the decoder; each module of a list counts as one."""

    vision_blocks: tuple[str, ...]
    """Of `vision`, the `ModuleList`s of the tower's blocks; a tower in two stages has two."""

    embeddings: str
    """The decoder's token embeddings."""

    blocks: str
    """The `ModuleList` of the decoder's blocks; of the text tower's in a model that generates nothing."""

    head: str | None
    """The output head (lm_head); None where nothing is generated."""

    image_token_keys: tuple[str, ...]
    """The keys of config.json with the ids of the placeholder tokens of images and videos."""

    scale_pairs: tuple[ScalePair, ...]
    """The layers of a decoder block between which AWQ and SmoothQuant may move scales."""

    vision_scale_pairs: tuple[ScalePair, ...]
    """The same within a block of the vision tower."""

    cross_attention_linears: tuple[str, ...] = ()
    """Linears of a decoder block that read image features instead of hidden states: keys and values of cross-attention."""

    image_mask: str = ""
    """The model input with the cross-attention mask [samples, tokens, images, tiles]; empty for none."""

    text_model: str = ""
    """The module to call for text without images, where the whole model requires images; empty where it does not."""

    single_image: bool = False
    """Whether a prompt can have one image at most."""

    chat_template: str = ""
    """A chat template (Jinja) for published checkpoints without one."""

    served_until: str = ""
    """The last vLLM version with the architecture, where later ones dropped it; empty otherwise."""

    served_unquantized: tuple[str, ...] = ()
    """Modules whose weights vLLM cannot load quantized, since its classes for them use plain linears."""

    served_names: tuple[tuple[str, str], ...] = ()
    """As `renames`, from names on disk to those by which vLLM looks up a module in a quantization config, where its own mapping of
    names (`hf_to_vllm_mapper`) gives others."""

    requires: tuple[tuple[str, str | bool | tuple[str, ...]], ...] = ()
    """Keys of config.json (dotted) and their allowed values: with others the checkpoint is another architecture of the same
    `model_type`."""

    defaults: tuple[tuple[str, Any], ...] = ()
    """Keys of config.json's text section that published files omit, with transformers' defaults."""

    tied_by: tuple[str, ...] = ("tie_word_embeddings",)
    """The keys of config.json (dotted), any of which ties the head to the embeddings, as transformers 5 reads them."""

    tied_default: bool = False
    """Whether the head is tied to the embeddings where none of `tied_by` is present."""

    derived: str = ""
    """For a model without a record: a description of the derived family for the plan; empty in a record."""

    @property
    def frontends(self) -> tuple[str, ...]:
        """The modules whose outputs enter the decoder: the embeddings, and all modules of the vision side."""
        return (self.embeddings, *self.vision)

    def inside_vision(self, name: str) -> bool:
        """Return whether a module or tensor belongs to the vision side."""
        return any(within(name, module) for module in self.vision)

    def entry(self, inputs: Container[str]) -> str:
        """Return the module to call for a batch with such inputs: the whole model (empty), or its text model."""
        return "" if _IMAGE_INPUT in inputs else self.text_model

    def placeholders(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the ids of the placeholder tokens of images and videos, by a checkpoint's config."""
        return tuple(int(config[key]) for key in self.image_token_keys if config.get(key) is not None)

    def says_tied(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config ties the output head to the embeddings; the weights may contradict it."""
        # absent keys do not count as false: the architecture's default then decides
        stated = [value for value in (config_value(config, key) for key in self.tied_by) if value is not None]
        return self.head is not None and (any(stated) if stated else self.tied_default)

    def module_name(self, disk_name: str) -> str:
        """Return the name in transformers of a tensor or module with the name `disk_name` on disk."""
        # only the first match: a second rule could rename the result of the first
        for pattern, replacement in self.renames:
            renamed, count = re.subn(pattern, replacement, disk_name, count=1)
            if count:
                return renamed
        return disk_name


def within(name: str, prefix: str) -> bool:
    """Return whether a dotted name is `prefix` or a descendant of it."""
    return name == prefix or name.startswith(f"{prefix}.")


def config_value(config: Mapping[str, Any], key: str) -> object:
    """Return the value at a dotted key; None where it is missing."""
    value: object = config
    for name in key.split("."):
        value = cast("Mapping[str, object]", value).get(name) if isinstance(value, Mapping) else None
    return value
