"""AWQ on one block: scales that move from a linear's input channels into the layer before, then ranges, then codes.

arXiv 2306.00978. With W a weight, G the second moment of its input and Q rounding, a scale s per input channel is chosen to
minimise tr(ΔW G ΔWᵀ), ΔW = Q(W·s)/s - W: the squared error of the output over all calibration tokens, at a cost that does not
depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from compress.engine.statistics import Moments
from compress.families import Pair
from compress.numerics.grids import QuantizedWeight, Scheme
from compress.numerics.rounding import clip, fold_symmetric, output_error, own_scheme, quantize, rounding_error

_STRIDE = 4
_EXTREME = 1e4
_FLOOR = 1e-3


@dataclass(frozen=True)
class Method:
    """How a block is quantized: the scheme, whether ranges are searched, and into how many steps a search is divided."""

    scheme: Scheme
    clip: bool
    grid: int


@dataclass
class BlockWeights:
    """A block's linears to be quantized, in float32, with what was done to them; `heads` is how many its attention has.

    `stored` holds the block's tensors that the checkpoint has in another type than the one the block runs in, as they are there;
    `input_scales` what each linear's input channels were multiplied by, `changed` the new norms and biases in the type
    they are stored in. Names are relative to the block.
    """

    module: nn.Module
    weights: dict[str, Tensor]
    heads: int
    stored: Mapping[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    input_scales: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    changed: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())

    @classmethod
    def of(cls, module: nn.Module, linears: Iterable[str], heads: int, stored: Mapping[str, Tensor] | None = None) -> BlockWeights:
        """Take the weights of a block's linears."""
        block = cls(module, {}, heads, stored or {})
        block.weights |= {name: block.current(f"{name}.weight").to(torch.float32) for name in linears}
        return block

    def current(self, name: str) -> Tensor:
        """Return a parameter as it is to be stored so far."""
        if name in self.changed:
            return self.changed[name]
        return self.stored[name] if name in self.stored else self.module.get_parameter(name).detach()

    def precision(self, name: str) -> torch.dtype:
        """Return the type that new values of a parameter are rounded to, so that both disk and running block hold them exactly."""
        disk, running = self.current(name).dtype, self.module.get_parameter(name).dtype
        return running if torch.promote_types(disk, running) == disk else disk


def solve(block: BlockWeights, pairs: Sequence[Pair], moments: Mapping[str, Moments], method: Method) -> dict[str, QuantizedWeight]:
    """Return each linear's codes, their scales in the type its weight is stored in.

    `block.changed` then holds the norms and biases that go with them.
    """
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
    dtype = block.precision(f"{pair.linears[0]}.weight")
    gram = fold_symmetric(moments.gram().div_(moments.tokens))
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
    """Bring a scale to lie around 1; channels that are given (nearly) nothing must not take part in where that is."""
    live = scale[scale > 0]
    if not live.numel():
        return torch.ones_like(scale)
    scale = scale.clamp(min=float(torch.maximum(live.min(), live.median() * _FLOOR)))
    return (scale / (scale.max() * scale.min()).sqrt()).clamp_(1 / _EXTREME, _EXTREME)


def _relative_magnitude(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the mean over rows of |W| relative to the largest of its group, float32 [in]."""
    groups = weight.abs().view(weight.shape[0], -1, own_scheme(scheme, weight.shape[1]).group_size)
    relative = groups / groups.amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    return relative.mean(dim=0).view(-1).clamp_(min=1e-4)


def divide_norm(block: BlockWeights, name: str, scale: Tensor) -> Tensor:
    """Divide a norm's weight and bias by a scale; return the scale that its weight, as stored, was really divided by.

    Channels whose weight is zero pass nothing on and keep the scale 1, as do those which the stored type cannot hold divided.
    """
    old, new, usable = _divided(block, f"{name}.weight", scale)
    effective = torch.where(usable, old.to(torch.float32) / new.to(torch.float32), 1.0)
    if _has(block.module, f"{name}.bias"):
        bias, divided, _ = _divided(block, f"{name}.bias", effective)
        usable &= divided.isfinite()
        effective = torch.where(usable, effective, 1.0)
        block.changed[f"{name}.bias"] = torch.where(usable, divided, bias)
    block.changed[f"{name}.weight"] = torch.where(usable, new, old)
    return effective


def divide_linear(block: BlockWeights, name: str, scale: Tensor) -> Tensor:
    """Divide a linear's output rows and bias by a scale; return the scale that its bias, as stored, was really divided by.

    Rows whose bias the stored type cannot hold divided keep the scale 1; those without a bias take any.
    """
    if _has(block.module, f"{name}.bias"):
        bias, new, usable = _divided(block, f"{name}.bias", scale)
        scale = torch.where(usable, bias.to(torch.float32) / new.to(torch.float32), torch.where(bias == 0, scale, 1.0))
        block.changed[f"{name}.bias"] = torch.where(usable, new, bias)
    block.weights[name] = block.weights[name] / scale.unsqueeze(1)
    return scale


def _divided(block: BlockWeights, name: str, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a parameter as stored, the same divided by a scale, and where that is neither zero nor out of the type's range."""
    old = block.current(name)
    new = (old.to(torch.float32) / scale).to(block.precision(name)).to(old.dtype)
    return old, new, (new != 0) & new.isfinite()


def _round(block: BlockWeights, name: str, moments: Moments, method: Method) -> QuantizedWeight:
    weight, shrink = block.weights[name], 1.0
    dtype = block.precision(f"{name}.weight")
    if method.clip:
        gram = moments.gram().div_(moments.tokens)
        if name in block.input_scales:
            gram.div_(torch.outer(block.input_scales[name], block.input_scales[name]))
        shrink = clip(weight, gram, method.scheme, dtype, method.grid)
    rounded = quantize(weight, method.scheme, dtype, shrink)
    return replace(rounded, scales=rounded.scales.to(block.current(f"{name}.weight").dtype))


def _has(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None) is not None
