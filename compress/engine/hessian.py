"""The Hessian Σ xᵀx of a linear's input activations, summed over tokens: in full, or only what a method reads of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.numerics.rounding import PANEL, diagonal_blocks, output_errors

SKETCH_ROWS = 1024
"""Rows of a count sketch. More rows estimate the output error more exactly; to rank two roundings far fewer are enough."""

FULL_HESSIAN_CHANNELS = 4096
"""Up to this many channels the full Hessian replaces a sketch: it is exact, and takes at most 64 MiB."""

_CHUNK = 1 << 22
"""Elements of activations that are converted to float32 at once."""

_SEED = 0
"""Seed of the sketch's random signs: the same samples always give the same sketch."""


@dataclass(frozen=True)
class HessianRequest:
    """What a method reads of the Hessian.

    Instead of a sketch of up to `FULL_HESSIAN_CHANNELS` channels, or of blocks that do not divide them, it is accumulated in full.
    """

    full: bool = True
    """Whether it reads the full matrix."""

    sketch: bool = True
    """Whether it estimates the output error of rounded weights."""

    block: int = 1
    """The size of the blocks along the diagonal that it reads, in channels."""

    def __or__(self, other: HessianRequest) -> HessianRequest:
        """Return a request for what both read."""
        full = self.full or other.full
        # blocks of the common multiple contain both sizes; a full Hessian contains blocks of any size
        return HessianRequest(full, self.sketch or other.sketch, 1 if full else math.lcm(self.block, other.block))

    def start(self, channels: int, device: torch.device) -> FullHessian | HessianSketch:
        """Return an accumulator without tokens."""
        # blocks that do not divide the channels cannot tile the diagonal
        if self.full or channels % self.block or (self.sketch and channels <= FULL_HESSIAN_CHANNELS):
            return FullHessian(channels, device)
        return HessianSketch(channels, SKETCH_ROWS if self.sketch else 0, self.block, device)


FULL_HESSIAN = HessianRequest()
DIAGONAL_ONLY = HessianRequest(full=False, sketch=False)
"""Nothing but the diagonal, which is always accumulated."""


class FullHessian:
    """Σ xᵀx, float32 [in, in]. Only `lower`, the triangle on and below the diagonal, is valid."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.lower = torch.zeros(channels, channels, device=device)

    def add(self, rows: Tensor) -> None:
        """Add tokens [tokens, in], float32."""
        for start in range(0, rows.shape[1], PANEL):
            panel = slice(start, start + PANEL)
            # xᵀx is symmetric: computing it on and below the diagonal alone saves almost half of the multiplications
            self.lower[start:, panel].addmm_(rows[:, start:].t(), rows[:, panel])

    def add_weighted(self, other: FullHessian | HessianSketch, self_weight: float, other_weight: float) -> None:
        """Replace it by the weighted sum of both, in its own memory."""
        assert isinstance(other, FullHessian)
        self.lower.mul_(self_weight).add_(other.lower, alpha=other_weight)

    def diagonal(self) -> Tensor:
        """Return Σ x², float32 [in]."""
        return self.lower.diagonal()

    def blocks(self, size: int) -> Tensor:
        """Return the blocks along the diagonal, float32 [in / size, size, size]."""
        # what lies above the diagonal of `lower` is not valid: mirrored from below
        blocks = diagonal_blocks(self.lower, size).tril()
        return blocks + blocks.tril(-1).transpose(1, 2)

    def output_errors(self, error: Tensor) -> Tensor:
        """Return the squared error of each output channel, summed over tokens, for a weight error [out, in]: float32 [out]."""
        return output_errors(error, self.lower)


class HessianSketch:
    """The blocks along the diagonal of Σ xᵀx, exact, and a sketch of the tokens: fewer rows with nearly the same Σ xᵀx.

    Token t is added, with a random sign, to row t modulo `count` (a count sketch, arXiv 1207.6365): rowsᵀ·rows has the expectation
    Σ xᵀx, and is equal to it up to `count` tokens.
    """

    def __init__(self, channels: int, count: int, block: int, device: torch.device) -> None:
        self.rows = torch.zeros(count, channels, device=device)
        self.diagonal_blocks = torch.zeros(channels // block, block, block, device=device)
        # a CPU generator, whatever the device: CUDA's gives other signs
        self._signs = torch.Generator().manual_seed(_SEED)
        self._next = 0

    def add(self, rows: Tensor) -> None:
        """Add tokens [tokens, in], float32."""
        blocks, size, _ = self.diagonal_blocks.shape
        by_block = rows.view(-1, blocks, size).transpose(0, 1)
        self.diagonal_blocks.baddbmm_(by_block.transpose(1, 2), by_block)
        start = 0
        while len(self.rows) and start < len(rows):
            tokens = rows[start : start + len(self.rows) - self._next]
            # random signs: the products of different tokens in one row cancel in expectation, without them the estimate is biased
            signs = torch.randint(0, 2, (len(tokens), 1), generator=self._signs).mul_(2).sub_(1).to(tokens)
            self.rows[self._next : self._next + len(tokens)].addcmul_(tokens, signs)
            # goes on where the last chunk ended: up to `count` tokens each has a row of its own, and the estimate is exact
            self._next = (self._next + len(tokens)) % len(self.rows)
            start += len(tokens)

    def add_weighted(self, other: FullHessian | HessianSketch, self_weight: float, other_weight: float) -> None:
        """Replace it by the weighted sum of both; it then has the rows of both."""
        assert isinstance(other, HessianSketch)
        self.diagonal_blocks.mul_(self_weight).add_(other.diagonal_blocks, alpha=other_weight)
        # roots, as the rows enter the estimate squared; concatenated, since adding them would mix tokens of both
        self.rows = torch.cat([self.rows.mul_(self_weight**0.5), other.rows.mul_(other_weight**0.5)])

    def diagonal(self) -> Tensor:
        """Return Σ x², float32 [in]."""
        return self.diagonal_blocks.diagonal(dim1=1, dim2=2).reshape(-1)

    def blocks(self, size: int) -> Tensor:
        """Return the blocks along the diagonal, float32 [in / size, size, size]; `size` has to divide the requested block size."""
        return torch.cat([diagonal_blocks(block, size) for block in self.diagonal_blocks])

    def output_errors(self, error: Tensor) -> Tensor:
        """Return an estimate of the squared error of each output channel, summed over tokens, for a weight error [out, in]."""
        # diag(ΔW H ΔWᵀ) is the squared length of ΔW xᵀ's rows, with the sketched rows in place of all tokens
        return (error @ self.rows.t()).square_().sum(dim=1)


def in_chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """Split tokens [tokens, in] into chunks whose float32 copies stay small."""
    return torch.split(rows, max(1, _CHUNK // max(1, rows.shape[1])))
