"""The second moment Σ xᵀx of a linear's input over tokens: whole, or as little of it as a method reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.numerics.rounding import PANEL, diagonal_blocks, output_error

SKETCH_ROWS = 1024
"""How many rows stand for all tokens in a sketch: the output errors of two roundings are told apart by far fewer."""

WHOLE_CHANNELS = 4096
_CHUNK = 1 << 22
_SEED = 0


@dataclass(frozen=True)
class HessianRequest:
    """What of a second moment is to be kept up.

    `whole` is all of it; otherwise blocks of `block` channels along its diagonal, and with `sketch` what tells the output error of
    a rounded weight. Up to 4,096 channels, and where blocks do not divide them, it is kept whole all the same.
    """

    whole: bool = True
    sketch: bool = True
    block: int = 1

    def start(self, channels: int, device: torch.device) -> Gram | Sketch:
        """Return the sums over no token yet."""
        if self.whole or channels % self.block or (self.sketch and channels <= WHOLE_CHANNELS):
            return Gram(channels, device)
        return Sketch(channels, SKETCH_ROWS if self.sketch else 0, self.block, device)


WHOLE = HessianRequest()


class Gram:
    """Σ xᵀx, float32 [in, in]. Only `lower`, what lies on and below the diagonal, is kept up."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.lower = torch.zeros(channels, channels, device=device)

    def add(self, rows: Tensor) -> None:
        """Count tokens [tokens, in], float32."""
        for start in range(0, rows.shape[1], PANEL):
            panel = slice(start, start + PANEL)
            self.lower[start:, panel].addmm_(rows[:, start:].t(), rows[:, panel])

    def absorb(self, other: Gram | Sketch, own_weight: float, weight: float) -> None:
        """Make it the weighted sum of both, in its own memory."""
        assert isinstance(other, Gram)
        self.lower.mul_(own_weight).add_(other.lower, alpha=weight)

    def diagonal(self) -> Tensor:
        """Return Σ x², float32 [in]."""
        return self.lower.diagonal()

    def blocks(self, size: int) -> Tensor:
        """Return the squares along the diagonal, float32 [in / size, size, size]."""
        found = diagonal_blocks(self.lower, size).tril()
        return found + found.tril(-1).transpose(1, 2)

    def output_error(self, error: Tensor) -> Tensor:
        """Return the squared error of the output, summed over tokens, for an error of the weight [out, in]."""
        return output_error(error, self.lower)


class Sketch:
    """Blocks along the diagonal of Σ xᵀx, and fewer rows than there are tokens with nearly the same Σ xᵀx.

    Token t is added, with a random sign, to row t modulo `count` (a count sketch, arXiv 1207.6365): the expected product of the
    rows is that of the tokens, and up to `count` tokens it is the very same.
    """

    def __init__(self, channels: int, count: int, block: int, device: torch.device) -> None:
        self.rows = torch.zeros(count, channels, device=device)
        self.squares = torch.zeros(channels // block, block, block, device=device)
        self._signs = torch.Generator().manual_seed(_SEED)
        self._next = 0

    def add(self, rows: Tensor) -> None:
        """Count tokens [tokens, in], float32."""
        blocks, size, _ = self.squares.shape
        apart = rows.view(-1, blocks, size).transpose(0, 1)
        self.squares.baddbmm_(apart.transpose(1, 2), apart)
        done = 0
        while len(self.rows) and done < len(rows):
            part = rows[done : done + len(self.rows) - self._next]
            signs = torch.randint(0, 2, (len(part), 1), generator=self._signs).mul_(2).sub_(1).to(part)
            self.rows[self._next : self._next + len(part)].addcmul_(part, signs)
            self._next = (self._next + len(part)) % len(self.rows)
            done += len(part)

    def absorb(self, other: Gram | Sketch, own_weight: float, weight: float) -> None:
        """Make it the weighted sum of both; it has the rows of both then."""
        assert isinstance(other, Sketch)
        self.squares.mul_(own_weight).add_(other.squares, alpha=weight)
        self.rows = torch.cat([self.rows.mul_(own_weight**0.5), other.rows.mul_(weight**0.5)])

    def diagonal(self) -> Tensor:
        """Return Σ x², float32 [in]."""
        return self.squares.diagonal(dim1=1, dim2=2).reshape(-1)

    def blocks(self, size: int) -> Tensor:
        """Return the squares along the diagonal, float32 [in / size, size, size]; `size` has to divide that of the sketch's own."""
        return torch.cat([diagonal_blocks(square, size) for square in self.squares])

    def output_error(self, error: Tensor) -> Tensor:
        """Return the squared error of the output, summed over tokens, for an error of the weight [out, in]: an estimate."""
        return (error @ self.rows.t()).square_().sum()


def in_chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """Split tokens [tokens, in] into parts whose copies in float32 stay small."""
    return torch.split(rows, max(1, _CHUNK // max(1, rows.shape[1])))
