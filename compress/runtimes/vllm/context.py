"""The context length that vLLM serves a model with, by its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from compress.checkpoints.checkpoint import text_config

CONTEXT = 8192
"""The largest default of `max_model_len`, in tokens: models allow up to a million, whose KV cache does not fit into memory."""

_UNSCALED_ROPE_TYPES = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope", "default")
"""RoPE types whose `max_position_embeddings` already includes the scaling: vLLM multiplies it by no factor."""


def default_context(config: Mapping[str, Any]) -> int:
    """Return the default `max_model_len` of a model: its position count, at most `CONTEXT`."""
    # A plan must know the context without vLLM: a prompt that will not fit is refused before hours of compression.
    return min(positions_of(config) or CONTEXT, CONTEXT)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return the model's maximum context length by its config.json, in tokens; None where the config has none.

    Follows `_get_and_verify_max_len` of vLLM 0.33 (vllm/config/model.py).
    """
    text = text_config(config)
    length: object = text.get("max_position_embeddings")
    if not isinstance(length, int):
        return None
    rope: object = text.get("rope_parameters") or text.get("rope_scaling")
    scaling = cast("dict[str, object]", rope) if isinstance(rope, dict) else dict[str, object]()
    factor, kind = scaling.get("factor"), scaling.get("rope_type", scaling.get("type", "default"))
    return length if kind in _UNSCALED_ROPE_TYPES or not isinstance(factor, int | float) else int(length * factor)
