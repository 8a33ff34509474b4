"""The records that there are, and which of them fits a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from compress.families import FAMILIES
from compress.families.family import Family, config_value
from compress.recipe.schema import load_attribute

_LLAVA = (
    "is LLaVA in its authors' own form, which transformers does not read; use the repository of the same model at llava-hf, or "
    "convert it with convert_llava_weights_to_hf.py from transformers' sources"
)
OTHER_FORMATS: Mapping[str, str] = {
    "internvl_chat": (
        "is InternVL in its authors' own form, which transformers does not read; use the repository of the same model whose name "
        "ends in -hf, such as OpenGVLab/InternVL3-2B-hf, or convert it with convert_internvl_weights_to_hf.py from transformers' "
        "sources"
    ),
    **dict.fromkeys(("llava_llama", "llava_mistral", "llava_qwen"), _LLAVA),
}
"""Messages for models whose files are another format of a supported architecture, by `model_type`."""


def matching_record(config: Mapping[str, Any]) -> tuple[Family | None, str]:
    """Return the record that fits a config, or None and the reason."""
    records = list(_families())
    family = next((family for family in records if family.model_type == config.get("model_type")), None)
    if family is None:
        if message := OTHER_FORMATS.get(str(config.get("model_type"))):
            return None, f"model_type {config.get('model_type')!r} {message}"
        types = ", ".join(family.model_type for family in records)
        return None, f"model_type {config.get('model_type')!r} is no supported architecture; supported are {types}"
    for key, required in family.requires:
        value = config_value(config, key)
        allowed = required if isinstance(required, tuple) else (required,)
        # an absent key means transformers' default, which is an allowed value
        if value is not None and value not in allowed:
            choices = " or ".join(map(repr, allowed))
            return None, f"{key} is {value!r}; of {family.model_type} only checkpoints with {choices} there are supported"
    return family, ""


def says_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a config ties the output head to the embeddings; of an unknown architecture, by its top level alone."""
    family = next((family for family in _families() if family.model_type == config.get("model_type")), None)
    return bool(config.get("tie_word_embeddings")) if family is None else family.says_tied(config)


def text_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults of config.json's text section for an architecture; empty for an unknown one."""
    defaults = (family.defaults for family in _families() if family.model_type == config.get("model_type"))
    return dict(next(defaults, ()))


def _families() -> Iterator[Family]:
    return (cast("Family", load_attribute(row)) for row in FAMILIES.values())
