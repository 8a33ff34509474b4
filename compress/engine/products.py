"""Products of 16-bit floats on CPUs without instructions for them: computed in float32, which such CPUs are far faster at.

Torch multiplies bfloat16 and float16 matrices at a sixth of float32's speed on a CPU with AVX2 alone. The factors are exact in
float32, and the sums are float32 in either case: only the order in which they are summed differs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ROWS = 1024
"""Rows of inputs that are multiplied at once: enough for the product's full speed."""

_ELEMENTS = 1 << 22
"""Elements of a weight that are converted at once: 16 MiB in float32."""


def float32_products(device: str) -> AbstractContextManager[object]:
    """Return a context in which linears with 16-bit weights compute in float32 where `device` has nothing faster for them.

    Results are in the type of the inputs. Of gradients it knows nothing: it is for forwards alone.
    """
    dtypes = _emulated() if torch.device(device).type == "cpu" else frozenset[torch.dtype]()
    return cast("AbstractContextManager[object]", _Float32Linears(dtypes)) if dtypes else nullcontext()


@cache
def _emulated() -> frozenset[torch.dtype]:
    """Return the 16-bit types whose products oneDNN does not compute on this processor; torch then uses its own slow kernels."""
    mkldnn = cast("Any", torch.ops.mkldnn)
    known = ((torch.bfloat16, mkldnn._is_mkldnn_bf16_supported), (torch.float16, mkldnn._is_mkldnn_fp16_supported))
    return frozenset(dtype for dtype, supported in known if not supported())


class _Float32Linears(TorchFunctionMode):
    """Replaces `torch.nn.functional.linear` for some types."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, or its replacement."""
        del types
        if func is torch.nn.functional.linear and not kwargs and args[0].dtype in self._dtypes and args[1].dtype == args[0].dtype:
            return _linear(*args)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1])
    outputs = rows.new_empty(len(rows), len(weight))
    step = max(1, _ELEMENTS // weight.shape[1])
    for start in range(0, len(rows), _ROWS):
        batch = slice(start, start + _ROWS)
        converted = rows[batch].float()
        for first in range(0, len(weight), step):
            channels = slice(first, first + step)
            part = None if bias is None else bias[channels].float()
            outputs[batch, channels] = torch.nn.functional.linear(converted, weight[channels].float(), part)
    return outputs.view(*inputs.shape[:-1], len(weight))
