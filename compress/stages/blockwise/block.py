"""A block's linears while they are being quantized, and scales that move between layers without changing the block's function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.engine.statistics import InputStatistics
from compress.families import ScalePair

_ALL = slice(None)


@dataclass
class BlockWeights:
    """A block's linears to be quantized, and the scales that were moved between its layers. Names are relative to the block."""

    module: nn.Module

    weights: dict[str, Tensor]
    """The linears' weights as they are stored; `weight` applies the scales to them."""

    heads: int
    """The number of query heads of the block's attention."""

    stored: Mapping[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    """The block's tensors whose type in the checkpoint differs from the one that the block runs in, as in the checkpoint."""

    smoothing_scales: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    """The factors that a linear's input channels were multiplied by, float32 [in]."""

    masks: Mapping[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    """Where a linear's weights are kept, bool [out, in], by the names of those of which some are pruned, to stay exactly zero."""

    output_scales: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    """The divisors of a linear's output channels, float32 [out]."""

    changed: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    """New weights of norms and biases, in the type they are stored in."""

    @classmethod
    def of(cls, module: nn.Module, linears: Iterable[str], heads: int, stored: Mapping[str, Tensor] | None = None) -> BlockWeights:
        """Take the weights of a block's linears, none of them pruned."""
        block = cls(module, {}, heads, stored or {})
        block.weights |= {name: block.current(f"{name}.weight") for name in linears}
        return block

    def weight(self, name: str, rows: slice | Tensor = _ALL) -> Tensor:
        """Return a copy of a linear's weight, or of some rows, with scales and mask applied: float32 [rows, in]."""
        weight = self.unmasked_weight(name, rows)
        return weight.mul_(self.mask(name, rows)) if name in self.masks else weight

    def unmasked_weight(self, name: str, rows: slice | Tensor = _ALL) -> Tensor:
        """Return `weight` without the mask: what was pruned is an error that a method may compensate."""
        # a copy even of float32: it is scaled in place, and the original may be a view of the mapped file
        weight = self.weights[name][rows].to(torch.float32, copy=True)
        # a linear can be both in two pairs: its rows are divided as smooth layer, its columns multiplied as balance layer
        if name in self.output_scales:
            weight.div_(self.output_scales[name][rows].unsqueeze(1))
        return weight.mul_(self.smoothing_scales[name]) if name in self.smoothing_scales else weight

    def mask(self, name: str, rows: slice | Tensor = _ALL) -> Tensor:
        """Return where a linear's weights are kept, or those of some rows: bool [rows, in]."""
        return self.masks[name][rows] if name in self.masks else torch.ones_like(self.weights[name][rows], dtype=torch.bool)

    def chunks(self, name: str, elements: int) -> Iterator[Tensor]:
        """Yield `weight` in chunks of rows with at most `elements` elements."""
        rows, columns = self.weights[name].shape
        step = max(1, elements // columns)
        yield from (self.weight(name, slice(start, start + step)) for start in range(0, rows, step))

    def current(self, name: str) -> Tensor:
        """Return a parameter in its stored type, changes included."""
        if name in self.changed:
            return self.changed[name]
        return self.stored[name] if name in self.stored else self.module.get_parameter(name).detach()

    def precision(self, name: str) -> torch.dtype:
        """Return the type that new values of a parameter are rounded to, exact in both its stored and its running type."""
        stored, running = self.current(name).dtype, self.module.get_parameter(name).dtype
        # the narrower of both: a value that only the wider one holds would differ between the file and the walk
        return running if torch.promote_types(stored, running) == stored else stored


def unscale(weight: Tensor, smoothing_scale: Tensor | None, output_scale: Tensor | None) -> Tensor:
    """Take a linear's scales back from a weight [out, in], in its own memory: what it is to the block as it was."""
    if output_scale is not None:
        weight.mul_(output_scale.unsqueeze(1))
    return weight if smoothing_scale is None else weight.div_(smoothing_scale)


def foldable(block: BlockWeights, pair: ScalePair) -> bool:
    """Return whether a scale can move between a pair's layers: the block has all of them, and its linears are being quantized."""
    if any(name not in block.weights for name in pair.balance_layers) or not _present(block.module, pair.smooth_layer):
        return False
    # a smooth linear outside of the block's targets keeps its codes or its own type; a norm can always be rewritten
    return pair.smooth_layer in block.weights or not isinstance(block.module.get_submodule(pair.smooth_layer), nn.Linear)


def fold_scale(block: BlockWeights, pair: ScalePair, repeats: GroupedHeads, scale: Tensor) -> None:
    """Divide a pair's smooth layer by a scale per channel and multiply its balance layers' input channels by it.

    The factor is the effective one: the quotient of the old and new values after rounding to the type they are stored in.
    """
    linear = isinstance(block.module.get_submodule(pair.smooth_layer), nn.Linear)
    # the stored values round the scale: multiplying by the one asked for would leave that rounding as an error of every token
    effective = repeats.expand(
        divide_linear(block, pair.smooth_layer, scale) if linear else divide_norm(block, pair.smooth_layer, scale)
    )
    for name in pair.balance_layers:
        block.smoothing_scales[name] = block.smoothing_scales[name] * effective if name in block.smoothing_scales else effective


def take_hessian(block: BlockWeights, name: str, statistics: InputStatistics) -> Tensor:
    """Return the mean Hessian of a linear's scaled input activations, float32 [in, in]; it uses statistics up that allow it."""
    hessian = statistics.take_hessian()
    if name in block.smoothing_scales:
        scale = block.smoothing_scales[name]
        # inputs are x / s after the fold, so Σ xᵀx loses s on both sides; in place, it may be gigabytes
        hessian.div_(scale).div_(scale.unsqueeze(1))
    return hessian


def input_blocks(block: BlockWeights, name: str, statistics: InputStatistics, size: int) -> Tensor:
    """Return blocks along the diagonal of Σ xᵀx of a linear's scaled input activations, float32 [in / size, size, size]."""
    blocks = statistics.blocks(size)
    if name in block.smoothing_scales:
        scale = block.smoothing_scales[name].view(-1, size)
        blocks.div_(scale.unsqueeze(1)).div_(scale.unsqueeze(2))
    return blocks


def input_max(block: BlockWeights, name: str, statistics: InputStatistics) -> Tensor:
    """Return the largest magnitude of each channel of a linear's scaled input activations, float32 [in]."""
    largest = statistics.abs_max()
    return largest / block.smoothing_scales[name] if name in block.smoothing_scales else largest


def input_square(block: BlockWeights, name: str, statistics: InputStatistics) -> Tensor:
    """Return the mean square of each channel of a linear's scaled input activations, float32 [in]."""
    squares = statistics.mean_square()
    return squares / block.smoothing_scales[name].square() if name in block.smoothing_scales else squares


@dataclass(frozen=True)
class GroupedHeads:
    """Grouped-query attention repeats source channels: input channel (k·repeats + r)·D + d reads source channel k·D + d."""

    kv_heads: int
    repeats: int
    head_dim: int

    def expand(self, values: Tensor) -> Tensor:
        """Return the value of each input channel's source channel."""
        heads = values.view(self.kv_heads, 1, self.head_dim)
        return heads.expand(self.kv_heads, self.repeats, self.head_dim).reshape(-1)

    def pool(self, values: Tensor) -> Tensor:
        """Return the mean over the input channels that read each source channel."""
        return values.view(self.kv_heads, self.repeats, self.head_dim).mean(dim=1).view(-1)

    def pool_max(self, values: Tensor) -> Tensor:
        """Return the largest over the input channels that read each source channel."""
        return values.view(self.kv_heads, self.repeats, self.head_dim).amax(dim=1).view(-1)


def grouped_heads(block: BlockWeights, pair: ScalePair) -> GroupedHeads:
    """Return how the smooth layer's output channels map to the balance layers' input channels."""
    columns = block.weights[pair.balance_layers[0]].shape[1]
    if not pair.grouped:
        return GroupedHeads(1, 1, columns)
    rows, head_dim = block.weights[pair.smooth_layer].shape[0], columns // block.heads
    return GroupedHeads(rows // head_dim, columns // rows, head_dim)


def divide_norm(block: BlockWeights, name: str, scale: Tensor) -> Tensor:
    """Divide a norm's weight and bias by a scale; return the effective scale of its weight in the stored type.

    Channels whose weight is zero keep the scale 1, as do those whose quotient overflows or underflows the stored type.
    """
    old, new, usable = _divided(block, f"{name}.weight", scale)
    # 0 / 0 for a zero weight, infinite for an underflow: such channels are not scaled at all
    effective = torch.where(usable, old.to(torch.float32) / new.to(torch.float32), 1.0)
    if _has(block.module, f"{name}.bias"):
        bias, divided, _ = _divided(block, f"{name}.bias", effective)
        # weight and bias are divided by one scale: where the bias overflows, the weight's channel is given up too
        usable &= divided.isfinite()
        effective = torch.where(usable, effective, 1.0)
        block.changed[f"{name}.bias"] = torch.where(usable, divided, bias)
    block.changed[f"{name}.weight"] = torch.where(usable, new, old)
    return effective


def divide_linear(block: BlockWeights, name: str, scale: Tensor) -> Tensor:
    """Divide a linear's output rows and bias by a scale; return the effective scale of its bias in the stored type.

    Rows whose bias overflows or underflows the stored type keep the scale 1; rows without a bias take any scale.
    """
    if _has(block.module, f"{name}.bias"):
        bias, new, usable = _divided(block, f"{name}.bias", scale)
        scale = torch.where(usable, bias.to(torch.float32) / new.to(torch.float32), torch.where(bias == 0, scale, 1.0))
        block.changed[f"{name}.bias"] = torch.where(usable, new, bias)
    block.output_scales[name] = block.output_scales[name] * scale if name in block.output_scales else scale
    return scale


def _divided(block: BlockWeights, name: str, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a parameter as stored, its quotient by a scale, and where that is neither zero nor out of the type's range."""
    old = block.current(name)
    new = (old.to(torch.float32) / scale).to(block.precision(name)).to(old.dtype)
    return old, new, (new != 0) & new.isfinite()


def _has(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None) is not None


def _present(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
