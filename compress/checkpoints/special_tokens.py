"""The tokens of a model with a role in generation: those that end an answer, and those that stand for images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from compress.checkpoints.checkpoint import read_config, read_json_object
from compress.errors import CheckpointError
from compress.families import Family


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens with a role in generation."""

    stops: tuple[int, ...]
    """The end-of-sequence tokens, the default one first."""

    placeholders: tuple[int, ...] = ()
    """The tokens that stand for images and videos in a prompt, which no answer may contain."""


def special_tokens(folder: Path, family: Family) -> SpecialTokens:
    """Return the special tokens of a checkpoint or artifact.

    Raises:
        CheckpointError: config.json is missing, or a file is no JSON object.
    """
    return SpecialTokens(end_tokens(folder), family.placeholders(read_config(folder)))


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the end-of-sequence tokens, the default one first; empty where no file names one.

    They are those of generation_config.json, else of config.json, its text section first, else the tokenizer's one.

    Raises:
        CheckpointError: config.json is missing, or a file is no JSON object.
    """
    config = read_config(folder)
    # the order in which transformers' generate looks: instruction-tuned models often have their end-of-turn token there alone
    sections = (read_if_there(folder, "generation_config.json"), cast("dict[str, Any]", config.get("text_config") or {}), config)
    named: object = next((section["eos_token_id"] for section in sections if section.get("eos_token_id") is not None), None)
    if named is None:
        return _tokenizer_end(folder)
    return tuple(cast("list[int]", named)) if isinstance(named, list) else (cast("int", named),)


def required_end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the end-of-sequence tokens of a checkpoint; see `end_tokens`.

    Raises:
        CheckpointError: no file names one.
    """
    if tokens := end_tokens(folder):
        return tokens
    raise CheckpointError(f"{folder}: no eos_token_id in generation_config.json or config.json; add it, so that answers can end")


def read_if_there(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object of a file; empty where the folder has none of that name.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return read_json_object(folder / name) if (folder / name).is_file() else {}


def _tokenizer_end(folder: Path) -> tuple[int, ...]:
    """Return the id of the tokenizer's `eos_token`, which its settings give as text or as an object."""
    settings = read_if_there(folder, "tokenizer_config.json")
    token: object = settings.get("eos_token")
    text = cast("Mapping[str, object]", token).get("content") if isinstance(token, dict) else token
    added = cast("list[Mapping[str, Any]]", read_if_there(folder, "tokenizer.json").get("added_tokens") or [])
    rows = [(row.get("id"), row.get("content")) for row in added]
    decoder = cast("Mapping[str, Mapping[str, Any]]", settings.get("added_tokens_decoder") or {})
    rows += [(int(key), row.get("content")) for key, row in decoder.items()]
    return tuple(number for number, content in rows if isinstance(number, int) and text and content == text)[:1]
