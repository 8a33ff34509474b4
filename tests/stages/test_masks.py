"""Pruned weights stay exactly zero, whatever rounds the others."""

import pytest
import torch
from torch import Tensor

from compress.numerics.gptq import GptqOptions
from compress.numerics.scheme import Scheme
from compress.stages.blockwise.block import BlockWeights
from compress.stages.quantization.method import Method, solve
from compress.stages.quantization.parts import Rounder, Transform
from compress.stages.quantization.rounders.gptq import GptqRounder
from compress.stages.quantization.rounders.nearest import NEAREST
from compress.stages.quantization.transforms.awq import AwqScaling
from tests.stages.toy import HEADS, NAMES, PAIRS, Block, alike, observed_inputs, samples
from tests.stages.variants import quantizers

METHODS = [stage.method() for stage in quantizers()]
ROUNDERS = list(dict.fromkeys(method.rounder for method in METHODS))
TRANSFORMS = list(dict.fromkeys(method.transforms for method in METHODS))
SCHEMES = {
    "asymmetric": Scheme(3, 8, symmetric=False),
    "symmetric": Scheme(4, 16, symmetric=True),
    "channel": Scheme(8, -1, symmetric=True, activations="token"),
    "float": Scheme(8, -1, symmetric=True, type="float", activations="token"),
    "float-tensor": Scheme(8, -1, symmetric=True, type="float", block_rows=-1, activations="tensor"),
}


def half_masks(block: Block) -> dict[str, Tensor]:
    """Return masks that keep two of each four weights, the larger ones; `up` is not pruned."""
    masks: dict[str, Tensor] = {}
    for name in set(NAMES) - {"up"}:
        weight = block.get_parameter(f"{name}.weight").detach().float().abs()
        fours = weight.view(len(weight), -1, 4)
        masks[name] = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True).flatten(1)
    return masks


@pytest.mark.parametrize("rounder", ROUNDERS, ids=repr)
@pytest.mark.parametrize(
    ("scheme", "transforms"),
    [
        (scheme, transforms)
        for scheme in SCHEMES
        for transforms in TRANSFORMS
        if not scheme.startswith("float")
        or not any(isinstance(transform, AwqScaling) for transform in transforms)  # is for integers
    ],
)
def test_a_pruned_weight_is_exactly_zero(rounder: Rounder, scheme: str, transforms: tuple[Transform, ...]) -> None:
    block = Block(torch.bfloat16)
    inputs, masks = observed_inputs(block.float(), samples()), half_masks(block)
    state = BlockWeights.of(block.to(torch.bfloat16), NAMES, HEADS)
    state.masks = masks
    quantized = solve(state, PAIRS, inputs, alike(SCHEMES[scheme]), Method(transforms, rounder))
    assert set(quantized) == set(NAMES)
    for name, weight in quantized.items():
        rounded = weight.dequantize()
        kept = masks.get(name, torch.ones_like(rounded, dtype=torch.bool))
        assert (rounded[~kept] == 0).all()
        assert (rounded[kept] != 0).float().mean() > 0.5


def test_without_a_mask_nothing_changes() -> None:
    block, schemes = Block(), alike(Scheme(3, 8, symmetric=False))
    inputs = observed_inputs(block, samples())
    for rounder in ROUNDERS:
        results: list[dict[str, Tensor]] = []
        for masks in ({}, {name: torch.ones_like(block.get_parameter(f"{name}.weight"), dtype=torch.bool) for name in NAMES}):
            state = BlockWeights.of(block, NAMES, HEADS)
            state.masks = masks
            quantized = solve(state, PAIRS, inputs, schemes, Method((AwqScaling(8),), rounder))
            results.append({name: weight.dequantize() for name, weight in quantized.items()})
        assert all(torch.equal(results[0][name], results[1][name]) for name in NAMES)


def test_gptq_compensates_what_is_pruned_in_the_weights_that_are_kept() -> None:
    block, scheme = Block(), Scheme(8, 16, symmetric=False)
    inputs, masks = observed_inputs(block, samples()), half_masks(block)

    def loss(rounder: Rounder) -> float:
        state = BlockWeights.of(block, NAMES, HEADS)
        state.masks = masks
        quantized = solve(state, (), inputs, alike(scheme), Method(rounder=rounder))
        return inputs["down"].output_error(quantized["down"].dequantize() - block.down.weight)

    assert loss(GptqRounder(GptqOptions())) < 0.8 * loss(NEAREST)
