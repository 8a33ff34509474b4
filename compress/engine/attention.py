"""Ranges of the keys and values that attentions cache, from which the scales of a quantized KV cache are computed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "compress_observed"
"""The name under which the observing attention is registered in transformers."""


@dataclass
class CacheRange:
    """The largest magnitudes of an attention's keys (after the rotary embedding) and values over all calls, float32 scalars."""

    keys: Tensor
    values: Tensor


@contextmanager
def observe_cache_ranges(module: nn.Module) -> Generator[dict[str, CacheRange]]:
    """Yield the cache ranges of a module's attentions, by their names in it, updated by each forward inside the context.

    Attentions are observed through transformers' attention interface; one that does not use it is missing.
    """
    ranges: dict[str, CacheRange] = {}
    modules = list(module.modules())
    # the attention interface hands over the module, not its name
    names = dict(zip(modules, (name for name, _ in cast("Any", module).named_modules()), strict=True))
    # by identity: submodules share their config, whose setting must be saved once, before it is changed
    configs = {id(config): config for submodule in modules if (config := getattr(submodule, "config", None)) is not None}
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    registry = cast("Any", ALL_ATTENTION_FUNCTIONS)

    def observed(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # reduced in the attention's type, which is exact for a maximum; a float32 copy of long keys would be large
        maxima = [tensor.detach().abs().amax().to(torch.float32) for tensor in (key, value)]
        earlier = ranges.get(names[attention])
        if earlier is not None:
            maxima = [torch.maximum(maxima[0], earlier.keys), torch.maximum(maxima[1], earlier.values)]
        ranges[names[attention]] = CacheRange(*maxima)
        # any implementation would do: a visit's output is not used while ranges are observed
        return registry["sdpa"](attention, query, key, value, *args, **kwargs)

    registry[_NAME] = observed
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield ranges
    finally:
        for key, config in configs.items():
            config._attn_implementation = implementations[key]
        del registry[_NAME]
