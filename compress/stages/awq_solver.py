"""AWQ on one block: scales that move from a linear's input channels into the layer before, then ranges, then codes.

arXiv 2306.00978. With W a weight, G the second moment of its input and Q rounding, a scale s per input channel is chosen to
minimise tr(ΔW G ΔWᵀ), ΔW = Q(W·s)/s - W: the squared error of the output over all calibration tokens, at a cost that does not
depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from compress.engine.statistics import Moments
from compress.families import Pair
from compress.numerics.grids import QuantizedWeight, Scheme
from compress.numerics.rounding import clip, fold_symmetric, output_error, own_scheme, quantize, rounding_error

_STRIDE = 4
_EXTREME = 1e4


@dataclass(frozen=True)
class Method:
    """How a block is quantized: the scheme, whether ranges are searched, and into how many steps a search is divided."""

    scheme: Scheme
    clip: bool
    grid: int


@dataclass
class BlockWeights:
    """A block's linears to be quantized, in float32, with what was done to them; `heads` is how many its attention has.

    `input_scales` holds what each linear's input channels were multiplied by, `changed` the new norms and biases in the type
    they are stored in. Names are relative to the block.
    """

    module: nn.Module
    weights: dict[str, Tensor]
    heads: int
    input_scales: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    changed: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())

    @classmethod
    def of(cls, module: nn.Module, linears: Iterable[str], heads: int) -> BlockWeights:
        """Take the weights of a block's linears."""
        weights = {name: _parameter(module, f"{name}.weight").to(torch.float32) for name in linears}
        return cls(module, weights, heads)


def solve(block: BlockWeights, pairs: Sequence[Pair], moments: Mapping[str, Moments], method: Method) -> dict[str, QuantizedWeight]:
    """Return each linear's codes; `block.changed` then holds the norms and biases that go with them."""
    for pair in pairs:
        fold(block, pair, moments, method)
    return {name: _round(block, name, moments[name], method) for name in block.weights}


def fold(block: BlockWeights, pair: Pair, moments: Mapping[str, Moments], method: Method) -> None:
    """Search a pair's scale and move it from the linears' input into their source; a pair with a part left out stays as it is."""
    source = block.module.get_submodule(pair.source)
    from_linear = isinstance(source, nn.Linear)
    if any(name not in block.weights for name in pair.linears) or (from_linear and pair.source not in block.weights):
        return
    repeats = _repeats(block, pair)
    scale = search(block, pair, repeats, moments[pair.linears[0]], method)
    if scale is None:
        return
    scale = divide_linear(block, pair.source, scale) if from_linear else divide_norm(block, pair.source, scale)
    spread = repeats.spread(scale)
    for name in pair.linears:
        block.weights[name] = block.weights[name] * spread
        block.input_scales[name] = spread


@dataclass(frozen=True)
class Repeats:
    """How grouped-query attention repeats source channels: input channel (k·repeats + r)·D + d reads source channel k·D + d."""

    kv_heads: int
    repeats: int
    head_dim: int

    def spread(self, values: Tensor) -> Tensor:
        """Return the value of each input channel's source channel."""
        heads = values.view(self.kv_heads, 1, self.head_dim)
        return heads.expand(self.kv_heads, self.repeats, self.head_dim).reshape(-1)

    def pool(self, values: Tensor) -> Tensor:
        """Return the mean over the input channels that read each source channel."""
        return values.view(self.kv_heads, self.repeats, self.head_dim).mean(dim=1).view(-1)


def _repeats(block: BlockWeights, pair: Pair) -> Repeats:
    columns = block.weights[pair.linears[0]].shape[1]
    if not pair.grouped:
        return Repeats(1, 1, columns)
    rows, head_dim = block.weights[pair.source].shape[0], columns // block.heads
    return Repeats(rows // head_dim, columns // rows, head_dim)


def search(block: BlockWeights, pair: Pair, repeats: Repeats, moments: Moments, method: Method) -> Tensor | None:
    """Return the best scale per source channel, float32, or None where none is better than no scale.

    The loss is smooth in the exponent, so every fourth step is tried first, then those around the best.
    """
    weight = torch.cat([block.weights[name] for name in pair.linears])
    dtype = _parameter(block.module, f"{pair.linears[0]}.weight").dtype
    gram = fold_symmetric(moments.gram() / moments.tokens)
    magnitude, importance = repeats.pool(moments.mean_abs()), repeats.pool(_relative_magnitude(weight, method.scheme))

    @cache
    def loss(point: Point) -> float:
        spread = repeats.spread(point.scale(magnitude, importance))
        error = rounding_error(weight * spread, method.scheme, dtype).div_(spread)
        return float(output_error(error, gram))

    coarse = [Point(step / method.grid, duo) for duo in (False, True) for step in range(0, method.grid + 1, _STRIDE)]
    nearest = min(coarse, key=loss)
    steps = range(1 - _STRIDE, _STRIDE)
    fine = [Point(round(nearest.exponent * method.grid + step) / method.grid, nearest.duo) for step in steps]
    best = min((point for point in fine if 0 <= point.exponent <= 1), key=loss)
    return None if best == Point(0.0, duo=False) else best.scale(magnitude, importance)


@dataclass(frozen=True)
class Point:
    """A point of the search: the scale a^α, or with `duo` a^α / w^(1-α), with a the mean |x| and w the mean relative |W|."""

    exponent: float
    duo: bool

    def scale(self, magnitude: Tensor, importance: Tensor) -> Tensor:
        """Return the scale per channel, normalised to lie around 1."""
        scale = magnitude.pow(self.exponent)
        return _normalised(scale / importance.pow(1 - self.exponent) if self.duo else scale)


def _normalised(scale: Tensor) -> Tensor:
    scale = scale.clamp(min=1e-12)
    return (scale / (scale.max() * scale.min()).sqrt()).clamp_(1 / _EXTREME, _EXTREME)


def _relative_magnitude(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the mean over rows of |W| relative to the largest of its group, float32 [in]."""
    groups = weight.abs().view(weight.shape[0], -1, own_scheme(scheme, weight.shape[1]).group_size)
    relative = groups / groups.amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    return relative.mean(dim=0).view(-1).clamp_(min=1e-4)


def divide_norm(block: BlockWeights, name: str, scale: Tensor) -> Tensor:
    """Divide a norm's weight and bias by a scale; return the scale that its weight, as stored, was really divided by.

    Channels whose weight is zero pass nothing on and keep the scale 1.
    """
    old = _current(block, f"{name}.weight")
    new = (old.to(torch.float32) / scale).to(old.dtype)
    usable = (old != 0) & (new != 0) & new.isfinite()
    new = torch.where(usable, new, old)
    effective = torch.where(usable, old.to(torch.float32) / new.to(torch.float32), 1.0)
    block.changed[f"{name}.weight"] = new
    _divide_bias(block, name, effective)
    return effective


def divide_linear(block: BlockWeights, name: str, scale: Tensor) -> Tensor:
    """Divide a linear's output rows and bias by a scale; return the scale that its bias, as stored, was really divided by."""
    bias = _current(block, f"{name}.bias") if _has(block.module, f"{name}.bias") else None
    if bias is not None:
        new = (bias.to(torch.float32) / scale).to(bias.dtype)
        usable = (bias != 0) & (new != 0) & new.isfinite()
        scale = torch.where(usable, bias.to(torch.float32) / new.to(torch.float32), scale)
        block.changed[f"{name}.bias"] = new
    block.weights[name] = block.weights[name] / scale.unsqueeze(1)
    return scale


def _divide_bias(block: BlockWeights, name: str, scale: Tensor) -> None:
    if _has(block.module, f"{name}.bias"):
        bias = _current(block, f"{name}.bias")
        block.changed[f"{name}.bias"] = (bias.to(torch.float32) / scale).to(bias.dtype)


def _round(block: BlockWeights, name: str, moments: Moments, method: Method) -> QuantizedWeight:
    weight = block.weights[name]
    dtype = _parameter(block.module, f"{name}.weight").dtype
    if not method.clip:
        return quantize(weight, method.scheme, dtype)
    gram = moments.gram() / moments.tokens
    if name in block.input_scales:
        gram = gram / torch.outer(block.input_scales[name], block.input_scales[name])
    return quantize(weight, method.scheme, dtype, clip(weight, gram, method.scheme, dtype, method.grid))


def _parameter(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(name).detach()


def _has(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None) is not None


def _current(block: BlockWeights, name: str) -> Tensor:
    return block.changed.get(name, _parameter(block.module, name))
