"""Fake-quantized keys and values, as a runtime with an FP8 KV cache computes them, with an artifact's scales.

compressed-tensors' `kv_cache_scheme`: an attention's keys (after RoPE) and values are divided by `k_scale` and `v_scale`, float32
[1] each, before they are rounded to float8 e4m3fn.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.errors import CheckpointError

SCALES = (".k_scale", ".v_scale")
"""The suffixes of the scales' names, after that of the attention."""

_NAME = "compress_rounded_cache"
_FLOAT8 = torch.finfo(torch.float8_e4m3fn)


def fake_quantize_cache(modules: Mapping[str, nn.Module], scales: Mapping[str, Tensor]) -> None:
    """Make attentions compute with fake-quantized keys and values; `scales` by the attention's module name and `SCALES`.

    Raises:
        CheckpointError: the model lacks an attention, or the artifact one of its two scales.
    """
    if not scales:
        return
    interface = cast("Any", ALL_ATTENTION_FUNCTIONS)
    if _NAME not in interface:
        interface[_NAME] = _attend
    for name in {key.rpartition(".")[0] for key in scales}:
        attention: Any = modules.get(name)
        pair = [scales.get(f"{name}{suffix}") for suffix in SCALES]
        if attention is None or any(scale is None for scale in pair):
            raise CheckpointError(f"{name}: its scales for keys and values do not belong to this model; export the artifact again")
        attention.cache_scales = pair
        attention.config = copy(attention.config)  # a copy: masks are built by the model's own config
        # transformers looks the function up by this name at each call: no forward method has to be replaced.
        attention.config._attn_implementation = _NAME


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    key_scale, value_scale = cast("list[Tensor]", module.cache_scales)
    # The hook sits behind RoPE and before the product, where a runtime writes its cache.
    inner = cast("Any", ALL_ATTENTION_FUNCTIONS)["sdpa"]
    return inner(module, query, _fake_quantize(key, key_scale), _fake_quantize(value, value_scale), *args, **kwargs)


def _fake_quantize(states: Tensor, scale: Tensor) -> Tensor:
    # Clamped as vLLM's cache kernel saturates, whatever torch's cast does beyond 448.
    codes = (states.to(torch.float32) / scale).clamp(_FLOAT8.min, _FLOAT8.max).to(torch.float8_e4m3fn)
    return (codes.to(torch.float32) * scale).to(states.dtype)
