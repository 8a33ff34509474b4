"""Quantization scheme of a linear: weights and input activations. Free of torch, so that a plan can be made with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activations = Literal["token", "tensor", "group"]
"""Strategy of the input activations: a dynamic scale per token, one static scale per tensor, or a dynamic scale per token and
group of `BLOCK` channels."""

Strategy = Literal["tensor", "channel", "group", "block"]
"""Which weights share a scale, in the words of compressed-tensors."""

BLOCK = 128
"""The side of the square blocks that share a scale in fine-grained FP8; compressed-tensors' `block_structure` is the same.

DeepSeek-V3 (arXiv 2412.19437, section 3.3) introduced it, with activations in groups of 128 channels of a token.
"""


@dataclass(frozen=True)
class Scheme:
    """Quantization scheme of a linear's weight [out, in] and of its input activations.

    Symmetric integers have their zero point fixed at 2^(bits-1); floating-point codes (8 bits are float8 e4m3fn) have none.
    """

    bits: int
    """The width of a code."""

    group_size: int
    """Input channels that share a scale (and zero point).

    -1: all of them, where one scheme covers matrices of several shapes. `QuantizedWeight` has the resolved size for integers.
    """

    symmetric: bool
    """Whether the integer grid is symmetric around zero."""

    type: Literal["int", "float"] = "int"
    """The type of the codes; the input activations, where they are quantized, have the same."""

    block_rows: int = 1
    """Output channels that share a scale; -1: all of them."""

    activations: Activations | None = None
    """How the input activations are quantized; None where they are not."""

    @property
    def strategy(self) -> Strategy:
        """Which weights share a scale."""
        if self.block_rows == -1:
            return "tensor"
        if self.block_rows > 1:
            return "block"
        return "channel" if self.group_size == -1 else "group"

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def format(self) -> str:
        """The format name that compressed-tensors gives such weights."""
        if self.type == "float":
            return "float-quantized"
        # 8-bit weights without 8-bit inputs are packed as well: vLLM chooses its weight-only kernels by this format's name
        return "pack-quantized" if self.activations is None else "int-quantized"

    def groups(self, columns: int) -> int:
        """Return how many groups a row of so many input channels has."""
        # rounded up for FP8 blocks, partial at the edges; integer groups divide the row, which the plan checks
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    def scale_rows(self, rows: int) -> int:
        """Return how many rows the scales of a weight with so many output channels have."""
        return 1 if self.block_rows == -1 else -(-rows // self.block_rows)
