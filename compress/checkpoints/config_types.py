"""The types of the keys of config.json that this package reads, checked when it is read rather than where they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from compress.errors import CheckpointError
from compress.untrusted.reading import printable

_LARGEST = 2**53
"""Sizes and counts of a model lie far below; floats represent whole numbers exactly up to it."""


def _is_count(value: object) -> bool:
    # not isinstance: true and false are integers to Python
    return type(value) is int and 0 < value <= _LARGEST


def _is_token(value: object) -> bool:
    # negative ids occur: -1 for none, -200 for images in LLaVA's original code
    return type(value) is int and abs(value) <= _LARGEST


def _is_tokens(value: object) -> bool:
    return _is_token(value) or (isinstance(value, list) and all(_is_token(item) for item in cast("list[object]", value)))


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in cast("list[object]", value))


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


_COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "model_type": (lambda value: isinstance(value, str), "a text"),
    "architectures": (_is_texts, "a list of texts"),
    "auto_map": (_is_table, "a table"),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "eos_token_id": (_is_tokens, "a whole number, or a list of them"),
    "pad_token_id": (_is_token, "a whole number"),
    **dict.fromkeys(("max_position_embeddings", "head_dim", *_COUNTS), (_is_count, "a whole number above 0")),
    **dict.fromkeys(_TOKENS, (_is_token, "a whole number")),
}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check the types of what is read of a config.json, and of its parts, or of a generation_config.json.

    `where` is the file that an error names.

    Raises:
        CheckpointError: a key holds something else.
    """
    parts: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while parts:
        prefix, part = parts.pop()
        for key, value in part.items():
            name = f"{prefix}{key}"
            # null means the default, as in files that transformers writes
            if value is None:
                continue
            fits, kind = _TYPES.get(key, (_fits_anything, ""))
            part_of_it = key.endswith("_config") and not key.startswith("_")  # transformers' own marks, `_from_model_config`
            if part_of_it:
                fits, kind = _is_table, "a table"
            if not fits(value):
                raise CheckpointError(f"{where}: {printable(name)} must be {kind}, not {_shown(value)}; fetch the file again")
            # its keys have types of their own, checked below
            if part_of_it and key != "quantization_config":
                parts.append((f"{name}.", value))
    check_quantization(config.get("quantization_config"), where)


def patterns_in(config: Mapping[str, Any]) -> set[str]:
    """Return the regular expressions that a config.json matches names with: those after `re:` in its `quantization_config`."""
    settings = cast("Mapping[str, Any]", config.get("quantization_config") or {})
    groups = cast("Mapping[str, Mapping[str, Any]]", settings.get("config_groups") or {}).values()
    named: list[object] = [*(settings.get("ignore") or []), *(target for group in groups for target in group["targets"])]
    return {str(name).removeprefix("re:") for name in named if str(name).startswith("re:")}


def check_quantization(settings: Mapping[str, Any] | None, where: str) -> None:
    """Check the types of what is read of a `quantization_config`; raises as `check_config` does."""
    if not settings:
        return

    def refuse(name: str, kind: str) -> None:
        raise CheckpointError(f"{where}: quantization_config.{printable(name)} must be {kind}; fetch the file again")

    for key in ("quant_method", "format"):
        if not isinstance(settings.get(key) or "", str):
            refuse(key, "a text")
    # read before anything is matched: a text in place of a list would be taken for a list of letters
    if not _is_texts(settings.get("ignore") or []):
        refuse("ignore", "a list of texts")
    groups: object = settings.get("config_groups") or {}
    if not isinstance(groups, dict):
        refuse("config_groups", "a table")
    for name, group in cast("dict[str, object]", groups).items():
        place = f"config_groups.{name}"
        rows = cast("dict[str, object]", group) if isinstance(group, dict) else {}
        if not rows or not _is_texts(rows.get("targets")):
            refuse(f"{place}.targets", "a list of texts")
        for part in ("weights", "input_activations"):
            held: object = rows.get(part)
            if (held is None and part == "weights") or not (held is None or isinstance(held, dict)):
                refuse(f"{place}.{part}", "a table")
            elif held is not None:
                _check_arguments(cast("dict[str, object]", held), f"{place}.{part}", refuse)


def _check_arguments(settings: Mapping[str, object], place: str, refuse: Callable[[str, str], None]) -> None:
    if settings.get("num_bits") not in (*range(1, 17), 32) or isinstance(settings.get("num_bits"), bool):
        refuse(f"{place}.num_bits", "a number of bits")
    if not isinstance(settings.get("strategy"), str):
        refuse(f"{place}.strategy", "a text")
    if not isinstance(settings.get("symmetric"), bool):
        refuse(f"{place}.symmetric", "true or false")
    if not isinstance(settings.get("type", "int"), str):
        refuse(f"{place}.type", "a text")
    size = settings.get("group_size")
    if not (size is None or size == -1 or _is_count(size)):
        refuse(f"{place}.group_size", "a whole number above 0, or -1")
    block: object = settings.get("block_structure")
    if not (block is None or (isinstance(block, list) and all(_is_count(item) for item in cast("list[object]", block)))):
        refuse(f"{place}.block_structure", "a list of whole numbers")


def _fits_anything(value: object) -> bool:
    del value
    return True


def _shown(value: object) -> str:
    kinds = {
        "dict": "a table",
        "list": "a list",
        "str": "a text",
        "bool": "true or false",
        "int": "such a number",
        "float": "a fraction",
    }
    return kinds[type(value).__name__]
