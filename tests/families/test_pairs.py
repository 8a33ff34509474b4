from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import open_checkpoint
from compress.engine.replay import BlockVisit, Replay, WalkConfig
from compress.families import Family, ScalePair, within
from compress.families.resolve import family_at
from compress.stages.blockwise.block import BlockWeights, fold_scale, foldable, grouped_heads
from tests.families.samples import batches, tensors_of
from tests.tiny import BUILDERS


def pairs_of(family: Family, unit: str) -> tuple[ScalePair, ...]:
    if within(unit, family.blocks):
        return family.scale_pairs
    return family.vision_scale_pairs if any(within(unit, blocks) for blocks in family.vision_blocks) else ()


def scaled(block: BlockWeights, pair: ScalePair, generator: torch.Generator) -> None:
    repeats = grouped_heads(block, pair)
    source = block.module.get_submodule(pair.smooth_layer)
    channels = source.out_features if isinstance(source, nn.Linear) else block.current(f"{pair.smooth_layer}.weight").shape[0]
    assert channels == repeats.kv_heads * repeats.head_dim
    fold_scale(block, pair, repeats, torch.exp(torch.randn(channels, generator=generator)))


def outputs(visit: BlockVisit) -> list[Tensor]:
    return [tensor for call in visit.calls for tensor in tensors_of(visit.run(call))]


def linears_of(module: nn.Module) -> list[str]:
    names: list[str] = []
    for name, submodule in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        if name and isinstance(submodule, nn.Linear):
            names.append(name)
    return names


def put(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        module.get_parameter(name).data = tensor


def assert_pairs_hold(folder: Path) -> set[ScalePair]:
    """Move random scales along every pair in every block of a float32 checkpoint; return the pairs that were there."""
    checkpoint, family = open_checkpoint(folder), family_at(folder)
    replay = Replay(WalkConfig(checkpoint, family, batches(folder), "cpu", folder, 1 << 30))
    generator = torch.Generator().manual_seed(0)
    heads = checkpoint.text_config["num_attention_heads"]
    moved: set[ScalePair] = set()
    for units in (replay.vision_units(), replay.decoder_units()):
        for visit in replay.walk(units):
            linears = linears_of(visit.module)
            before = outputs(visit)
            for pair in pairs_of(family, visit.name):
                block = BlockWeights.of(visit.module, linears, heads)
                if not foldable(block, pair):
                    continue
                old = {name: tensor.clone() for name, tensor in visit.module.state_dict().items()}
                scaled(block, pair, generator)
                put(visit.module, [*block.changed.items(), *((f"{name}.weight", block.weight(name)) for name in block.weights)])
                assert not torch.equal(
                    visit.module.get_parameter(f"{pair.balance_layers[0]}.weight"), old[f"{pair.balance_layers[0]}.weight"]
                )
                for actual, expected in zip(outputs(visit), before, strict=True):
                    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
                put(visit.module, old.items())
                moved.add(pair)
    return moved


@pytest.mark.parametrize("name", BUILDERS)
def test_scales_move_along_every_pair_without_changing_the_block(name: str, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path, dtype=torch.float32, layers=5)
    family = family_at(tmp_path)
    assert assert_pairs_hold(tmp_path) == {*family.scale_pairs, *family.vision_scale_pairs}
