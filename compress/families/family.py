"""The record that describes one model architecture, and how a checkpoint finds its own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compress.errors import CheckpointError

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint

_IMAGES = "pixel_values"
_LLAVA = (
    "is LLaVA in its authors' own form, which transformers does not read; use the repository of the same model at llava-hf, or "
    "convert it with convert_llava_weights_to_hf.py from transformers' sources"
)
_ELSEWHERE: Mapping[str, str] = {
    "internvl_chat": (
        "is InternVL in its authors' own form, which transformers does not read; use the repository of the same model whose name "
        "ends in -hf, such as OpenGVLab/InternVL3-2B-hf, or convert it with convert_internvl_weights_to_hf.py from transformers' "
        "sources"
    ),
    **dict.fromkeys(("llava_llama", "llava_mistral", "llava_qwen"), _LLAVA),
}
"""What to use in the place of models whose files are another form of a supported architecture, by their `model_type`."""


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
    """One architecture of transformers, as data: where its parts are, and how others read its checkpoints.

    Names of modules are those of the model in memory (transformers 5). Names within a block leave out the block's own.
    """

    name: str
    """What the family is called in messages and reports, such as `qwen2.5-vl`."""

    model_type: str
    """The `model_type` of its config.json, by which a checkpoint finds the record."""

    architecture: str
    """The class of transformers that `architectures` of config.json names."""

    renames: tuple[tuple[str, str], ...]
    """Regular expressions and their replacements, from names on disk to names in memory: the first that matches is used once, and a
    name that none matches is the same in both."""

    vision: tuple[str, ...]
    """All modules that turn images into what the decoder reads, the projector included."""

    projector: tuple[str, ...]
    """Of `vision`, the modules that lead from the tower's last block to the decoder; each module of a list counts as one."""

    vision_blocks: tuple[str, ...]
    """Of `vision`, the lists of the tower's blocks; a tower in two stages has two."""

    embeddings: str
    """The decoder's token embeddings."""

    blocks: str
    """The list of the decoder's blocks; of a model that generates nothing, of its text tower's."""

    head: str | None
    """The output head (lm_head); None where nothing is generated."""

    image_token_keys: tuple[str, ...]
    """The keys of config.json that name the tokens which stand for images and videos in a prompt."""

    scale_pairs: tuple[ScalePair, ...]
    """Where AWQ and SmoothQuant may move scales within a decoder block."""

    vision_scale_pairs: tuple[ScalePair, ...]
    """Where they may within a block of the vision tower."""

    vision_readers: tuple[str, ...] = ()
    """Linears of a decoder block that are given the images' states and not the prompt's: keys and values of cross-attention."""

    image_mask: str = ""
    """The input of the model that says which images' states each token reads, [samples, tokens, images, tiles]; empty for none."""

    text_model: str = ""
    """The module that takes text without images, where the whole model takes none; empty where it does."""

    single_image: bool = False
    """Whether a prompt can have one image at most."""

    chat_template: str = ""
    """A chat template (Jinja) for published checkpoints that ship none."""

    served_until: str = ""
    """The last vLLM that has the architecture, where later ones dropped it; empty where it is still there."""

    served_plain: tuple[str, ...] = ()
    """Modules whose weights vLLM cannot take quantized, since its own classes for them have no quantized linear."""

    served_names: tuple[tuple[str, str], ...] = ()
    """As `renames`, from names on disk to those by which vLLM looks a module up in a quantization config, where its own mapping of
    names (`hf_to_vllm_mapper`) leads elsewhere."""

    requires: tuple[tuple[str, str | bool | tuple[str, ...]], ...] = ()
    """Keys of config.json (dotted) and the value, or values, that they may have: with others the checkpoint is another
    architecture under the same `model_type`."""

    defaults: tuple[tuple[str, Any], ...] = ()
    """Keys of the text's part of config.json that published files leave out, and what transformers takes for them."""

    tied_by: tuple[str, ...] = ("tie_word_embeddings",)
    """The keys of config.json (dotted), any of which says that the head is the embeddings, as transformers 5 reads them."""

    tied_default: bool = False
    """Whether the head is the embeddings where none of `tied_by` is there."""

    derived: str = ""
    """For a model without a record: what was found by looking at it, told in the plan; empty in a record."""

    @property
    def frontends(self) -> tuple[str, ...]:
        """The modules whose outputs enter the decoder beside its blocks' own chain: the embeddings, and all that sees images."""
        return (self.embeddings, *self.vision)

    def inside_vision(self, name: str) -> bool:
        """Return whether a module or tensor belongs to what makes of images what the decoder reads."""
        return any(within(name, part) for part in self.vision)

    def entry(self, inputs: Container[str]) -> str:
        """Return the module that takes a batch with such inputs: the whole model (empty), or its text's part alone."""
        return "" if _IMAGES in inputs else self.text_model

    def placeholders(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the tokens that only stand for images and videos in a prompt, by a checkpoint's config."""
        return tuple(int(config[key]) for key in self.image_token_keys if config.get(key) is not None)

    def says_tied(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config says that the output head is the embedding matrix; the weights may say otherwise."""
        said = [value for value in (_value(config, key) for key in self.tied_by) if value is not None]
        return self.head is not None and (any(said) if said else self.tied_default)

    def module_name(self, disk_name: str) -> str:
        """Return the in-memory name of a tensor or module that a checkpoint calls `disk_name`."""
        for pattern, replacement in self.renames:
            renamed, count = re.subn(pattern, replacement, disk_name, count=1)
            if count:
                return renamed
        return disk_name


def within(name: str, prefix: str) -> bool:
    """Return whether a dotted name is `prefix` or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def family_of(
    config: Mapping[str, Any], where: str = "config.json", checkpoint: Checkpoint | None = None, trust_remote_code: bool = False
) -> Family:
    """Return the family of a model by its config.json; `where` is the folder, file or hub id that an error names.

    Where no record fits, one is derived from the `checkpoint`, if that is given; this imports torch, and with `trust_remote_code`
    the model's own code.

    Raises:
        CheckpointError: no record fits, and none can be derived.
    """
    family, misfit = _recorded(config)
    if family is not None:
        return family
    if checkpoint is not None and (trust_remote_code or config.get("model_type") not in _ELSEWHERE):
        from compress.families.derived import derive_family

        return derive_family(checkpoint, f"{where}: {misfit}", trust_remote_code)
    raise CheckpointError(f"{where}: {misfit}")


def family_at(folder: Path, trust_remote_code: bool = False) -> Family:
    """Return the family of the checkpoint in a folder, whose weights are looked at only where no record fits its config.

    Raises:
        CheckpointError: no record fits, and none can be derived.
    """
    from compress.checkpoint import open_checkpoint, read_config

    config = read_config(folder)
    return _recorded(config)[0] or family_of(config, str(folder), open_checkpoint(folder), trust_remote_code)


def _recorded(config: Mapping[str, Any]) -> tuple[Family | None, str]:
    """Return the record that fits a config, or why none does."""
    known = list(_families())
    family = next((family for family in known if family.model_type == config.get("model_type")), None)
    if family is None:
        if instead := _ELSEWHERE.get(str(config.get("model_type"))):
            return None, f"model_type {config.get('model_type')!r} {instead}"
        types = ", ".join(family.model_type for family in known)
        return None, f"model_type {config.get('model_type')!r} is no supported architecture; supported are {types}"
    for key, needed in family.requires:
        found = _value(config, key)
        allowed = needed if isinstance(needed, tuple) else (needed,)
        if found is not None and found not in allowed:
            these = " or ".join(map(repr, allowed))
            return None, f"{key} is {found!r}; of {family.model_type} only checkpoints with {these} there are supported"
    return family, ""


def says_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a config says that the output head is the embedding matrix; an unknown architecture's, at the top alone."""
    family = next((family for family in _families() if family.model_type == config.get("model_type")), None)
    return bool(config.get("tie_word_embeddings")) if family is None else family.says_tied(config)


def text_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config leaves out of its text's part because it is usual for the architecture; empty for an unknown one."""
    defaults = (family.defaults for family in _families() if family.model_type == config.get("model_type"))
    return dict(next(defaults, ()))


def _families() -> Iterator[Family]:
    from compress.families import FAMILIES

    for row in FAMILIES.values():
        module, _, attribute = row.partition(":")
        yield cast("Family", getattr(importlib.import_module(module), attribute))


def _value(config: Mapping[str, Any], key: str) -> object:
    """Return what stands at a dotted key, None where nothing does."""
    value: object = config
    for part in key.split("."):
        value = cast("Mapping[str, object]", value).get(part) if isinstance(value, Mapping) else None
    return value
