"""The search for each group's clipping range (AWQ, arXiv 2306.00978, section 3.2): `compress.numerics.rounding.clip`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.engine.hessian import HessianRequest
from compress.numerics.grids import Grid, Scheme, full_range, resolve_group_size
from compress.numerics.rounding import clip
from compress.stages.blockwise.block import input_blocks
from compress.stages.quantization.parts import LinearGroup, SearchGrid

_ATTENTION_SCORE_LINEARS = frozenset(
    {"q_proj", "k_proj", "qkv", "qkv_proj", "query", "key", "query_key_value", "Wqkv", "c_attn", "in_proj"}
)
"""Layers whose outputs are multiplied in attention scores. Their ranges are not clipped, as in AWQ's own code: the average error
of clipping them is small, but it changes which tokens are attended to."""

_MAX_BLOCK = 1024
"""The largest group whose blocks of the Hessian are accumulated alone; for larger ones the full Hessian is."""


@dataclass(frozen=True)
class ClipSearch:
    """Grids whose range is shrunk to the least output error of each group."""

    steps: int = 20
    """Grid steps of the search from the full range down to half of it."""

    def request(self, schemes: Collection[Scheme]) -> HessianRequest:
        """Return that it reads one block along the Hessian's diagonal per group."""
        sizes = {scheme.group_size for scheme in schemes if scheme.type == "int"}
        block = math.lcm(*(size for size in sizes if size > 0))
        # one group per row needs the whole matrix
        full = -1 in sizes or block > _MAX_BLOCK
        return HessianRequest(full=full, sketch=False, block=1 if full else block)

    def prepare(self, group: LinearGroup) -> SearchGrid:
        """Return the search; linears of attention scores keep their full range."""
        assert group.statistics is not None
        columns = group.block.weights[group.names[0]].shape[1]
        sizes = {
            name: resolve_group_size(group.schemes[name], columns).group_size
            for name in group.names
            if name.rpartition(".")[2] not in _ATTENTION_SCORE_LINEARS
        }
        # computed now, before a rounder that uses up the Hessian; linears of one group size share them
        blocks = {size: input_blocks(group.block, group.names[0], group.statistics, size) for size in set(sizes.values())}

        def search(name: str, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
            shrink = clip(weight, blocks[sizes[name]], scheme, dtype, self.steps) if name in sizes else 1.0
            return full_range(weight, scheme, dtype, shrink)

        return search
