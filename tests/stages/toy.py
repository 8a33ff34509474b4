"""A block small enough to see through, with what its linears are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.engine.hessian import FULL_HESSIAN, HessianRequest
from compress.engine.replay import Positions
from compress.engine.statistics import InputStatistics
from compress.families import ScalePair
from compress.numerics.scheme import Scheme
from compress.stages.blockwise.block import BlockWeights

NAMES = ("q", "v", "o", "up", "down")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
WIDTH = HEADS * HEAD_DIM
PAIRS = (
    ScalePair("norm", ("q", "v")),
    ScalePair("v", ("o",), grouped=True),
    ScalePair("up", ("down",)),
)


class Block(nn.Module):
    """An attention without positions and a feed-forward, with a LayerNorm (so with a bias) and biases on v and up."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.bias)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query = self.q(normed).view(-1, HEADS, HEAD_DIM).transpose(0, 1)
        value = self.v(normed).view(-1, KV_HEADS, HEAD_DIM).transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, dim=0)
        mixed = (query @ query.transpose(1, 2)).softmax(dim=-1) @ value
        out = self.o(mixed.transpose(0, 1).reshape(-1, WIDTH))
        return self.down(torch.relu(self.q(out)[:, :1]) * self.up(out))


def samples(count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, WIDTH, generator=generator) * torch.logspace(-1, 1, WIDTH)


def observed_inputs(block: Block, x: Tensor, requested: HessianRequest = FULL_HESSIAN) -> dict[str, InputStatistics]:
    statistics: dict[str, InputStatistics] = {}
    hooks: list[RemovableHandle] = []
    for name in NAMES:

        def count(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            if name not in statistics:
                everything = torch.ones(len(args[0]), dtype=torch.bool)
                statistics[name] = InputStatistics(requested=requested)
                statistics[name].add(args[0], Positions(everything, ~everything))

        hooks.append(block.get_submodule(name).register_forward_pre_hook(count))
    with torch.no_grad():
        block(x)
    for hook in hooks:
        hook.remove()
    return statistics


def with_folded(block: Block, state: BlockWeights) -> Block:
    copy = Block(block.q.weight.dtype)
    values = {**block.state_dict(), **state.changed, **{f"{name}.weight": state.weight(name) for name in state.weights}}
    copy.load_state_dict(values)
    return copy


def alike(scheme: Scheme) -> dict[str, Scheme]:
    """Return the same scheme for all of a block's linears."""
    return dict.fromkeys(NAMES, scheme)
