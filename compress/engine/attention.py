"""How large the keys and values are that an attention caches: what a runtime needs to keep them in fewer bits."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "compress_observed"


@dataclass
class CacheRange:
    """The largest magnitudes of an attention's keys (after their rotation) and values over all calls, float32 scalars."""

    keys: Tensor
    values: Tensor


@contextmanager
def observing(module: nn.Module) -> Generator[dict[str, CacheRange]]:
    """Note, while the context is open, what the attentions of a module are given, by their names in it.

    It rests on transformers' attention interface, through which every model's attention computes; one that goes around it is not
    noted.
    """
    found: dict[str, CacheRange] = {}
    parts = list(module.modules())
    names = dict(zip(parts, (name for name, _ in cast("Any", module).named_modules()), strict=True))
    configs = {id(config): config for part in parts if (config := getattr(part, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    inner = cast("Any", ALL_ATTENTION_FUNCTIONS)

    def observed(part: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = [tensor.detach().abs().amax().to(torch.float32) for tensor in (key, value)]
        known = found.get(names[part])
        if known is not None:
            sizes = [torch.maximum(sizes[0], known.keys), torch.maximum(sizes[1], known.values)]
        found[names[part]] = CacheRange(*sizes)
        return inner["sdpa"](part, query, key, value, *args, **kwargs)

    inner[_NAME] = observed
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield found
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        del inner[_NAME]
