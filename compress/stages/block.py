"""A block's linears while they are being quantized, and the scales that move between them without changing what the block does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.engine.statistics import Moments
from compress.families import ScalePair

_ALL = slice(None)


@dataclass
class BlockWeights:
    """A block's linears to be quantized, with what was done to them; `heads` is how many its attention has.

    `weights` are as they are stored; `weight` gives them with the scales that have moved: `input_scales` is what each linear's
    input channels were multiplied by, `output_scales` what its output channels were divided by. `stored` holds the block's tensors
    that the checkpoint has in another type than the one the block runs in, as they are there; `changed` the new norms and
    biases in the type they are stored in. Names are relative to the block.
    """

    module: nn.Module
    weights: dict[str, Tensor]
    heads: int
    stored: Mapping[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    input_scales: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    output_scales: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())
    changed: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())

    @classmethod
    def of(cls, module: nn.Module, linears: Iterable[str], heads: int, stored: Mapping[str, Tensor] | None = None) -> BlockWeights:
        """Take the weights of a block's linears."""
        block = cls(module, {}, heads, stored or {})
        block.weights |= {name: block.current(f"{name}.weight") for name in linears}
        return block

    def weight(self, name: str, rows: slice | Tensor = _ALL) -> Tensor:
        """Return a linear's weight, or some rows of it, as scaled so far: float32 [rows, in], in memory of its own."""
        weight = self.weights[name][rows].to(torch.float32, copy=True)
        if name in self.output_scales:
            weight.div_(self.output_scales[name][rows].unsqueeze(1))
        return weight.mul_(self.input_scales[name]) if name in self.input_scales else weight

    def pieces(self, name: str, elements: int) -> Iterator[Tensor]:
        """Yield a linear's weight as scaled so far, so many rows at a time that they have no more than so many elements."""
        rows, columns = self.weights[name].shape
        step = max(1, elements // columns)
        yield from (self.weight(name, slice(start, start + step)) for start in range(0, rows, step))

    def current(self, name: str) -> Tensor:
        """Return a parameter as it is to be stored so far."""
        if name in self.changed:
            return self.changed[name]
        return self.stored[name] if name in self.stored else self.module.get_parameter(name).detach()

    def precision(self, name: str) -> torch.dtype:
        """Return the type that new values of a parameter are rounded to, so that both disk and running block hold them exactly."""
        disk, running = self.current(name).dtype, self.module.get_parameter(name).dtype
        return running if torch.promote_types(disk, running) == disk else disk


def movable(block: BlockWeights, pair: ScalePair) -> bool:
    """Return whether a scale can move between a pair's modules: all that have to change are there, and to be quantized."""
    if any(name not in block.weights for name in pair.balance_layers) or not _present(block.module, pair.smooth_layer):
        return False
    return pair.smooth_layer in block.weights or not isinstance(block.module.get_submodule(pair.smooth_layer), nn.Linear)


def move(block: BlockWeights, pair: ScalePair, repeats: Repeats, scale: Tensor) -> None:
    """Divide a pair's source by a scale per channel and multiply its linears' input channels by it.

    What the source is really divided by, given the type it is stored in, is what the linears are multiplied by.
    """
    linear = isinstance(block.module.get_submodule(pair.smooth_layer), nn.Linear)
    spread = repeats.spread(
        divide_linear(block, pair.smooth_layer, scale) if linear else divide_norm(block, pair.smooth_layer, scale)
    )
    for name in pair.balance_layers:
        block.input_scales[name] = block.input_scales[name] * spread if name in block.input_scales else spread


def take_hessian(block: BlockWeights, name: str, moments: Moments) -> Tensor:
    """Return the mean second moment of what a linear is given after scales have moved, float32 [in, in].

    Sums that are disposable are spent.
    """
    gram = moments.take_hessian()
    if name in block.input_scales:
        scale = block.input_scales[name]
        gram.div_(scale).div_(scale.unsqueeze(1))
    return gram


def input_blocks(block: BlockWeights, name: str, moments: Moments, size: int) -> Tensor:
    """Return the second moments of `size` neighbouring input channels at a time after scales have moved, summed over tokens.

    They are float32 [in / size, size, size].
    """
    blocks = moments.blocks(size)
    if name in block.input_scales:
        scale = block.input_scales[name].view(-1, size)
        blocks.div_(scale.unsqueeze(1)).div_(scale.unsqueeze(2))
    return blocks


def input_max(block: BlockWeights, name: str, moments: Moments) -> Tensor:
    """Return the largest magnitude of each channel of what a linear is given after scales have moved, float32 [in]."""
    largest = moments.abs_max()
    return largest / block.input_scales[name] if name in block.input_scales else largest


def input_square(block: BlockWeights, name: str, moments: Moments) -> Tensor:
    """Return the mean square of each channel of what a linear is given after scales have moved, float32 [in]."""
    squares = moments.mean_square()
    return squares / block.input_scales[name].square() if name in block.input_scales else squares


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

    def pool_max(self, values: Tensor) -> Tensor:
        """Return the largest over the input channels that read each source channel."""
        return values.view(self.kv_heads, self.repeats, self.head_dim).amax(dim=1).view(-1)


def repeats_of(block: BlockWeights, pair: ScalePair) -> Repeats:
    """Return how a pair's source channels come to be its linears' input channels."""
    columns = block.weights[pair.balance_layers[0]].shape[1]
    if not pair.grouped:
        return Repeats(1, 1, columns)
    rows, head_dim = block.weights[pair.smooth_layer].shape[0], columns // block.heads
    return Repeats(rows // head_dim, columns // rows, head_dim)


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
    block.output_scales[name] = block.output_scales[name] * scale if name in block.output_scales else scale
    return scale


def _divided(block: BlockWeights, name: str, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a parameter as stored, the same divided by a scale, and where that is neither zero nor out of the type's range."""
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
