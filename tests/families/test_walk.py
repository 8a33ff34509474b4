from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.output_head import head_is_tied
from compress.engine.replay import Replay, WalkConfig
from compress.families.resolve import family_at
from tests.families.samples import batches, plain_outputs, tensors_of
from tests.tiny import BUILDERS


def assert_walk_equals(replay: Replay, units: list[str], expected: dict[str, list[list[Tensor]]]) -> list[str]:
    visited: list[str] = []
    for visit in replay.walk(units):
        visited.append(visit.name)
        outputs = [tensors_of(visit.run(call)) for call in visit.calls]
        assert len(outputs) == len(expected[visit.name]) > 0, visit.name
        for actual, reference in zip(outputs, expected[visit.name], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(actual, reference, strict=True)), visit.name
    return visited


def assert_every_part_equals(folder: Path) -> None:
    """Walk the vision tower, then the decoder, and compare all that their parts return with a plain forward's."""
    calibration, checkpoint, family = batches(folder), open_checkpoint(folder), family_at(folder)
    replay = Replay(WalkConfig(checkpoint, family, calibration, "cpu", folder, 1 << 30))
    decoder = [*replay.decoder_units(), *([family.head] if family.head and not head_is_tied(checkpoint, family) else [])]
    vision = replay.vision_units()
    assert len(vision) > 2
    expected = plain_outputs(folder, calibration, [*vision, *decoder])
    assert sorted(assert_walk_equals(replay, vision, expected)) == sorted(vision)
    assert assert_walk_equals(replay, decoder, expected) == decoder


@pytest.mark.parametrize("blocks", [2, 3])  # of two, Qwen3-VL's decoder reads what every one of them returns
@pytest.mark.parametrize("name", BUILDERS)
def test_every_part_returns_what_it_does_in_a_plain_forward(name: str, blocks: int, tmp_path: Path) -> None:
    BUILDERS[name](tmp_path, vision_blocks=blocks)
    assert family_at(tmp_path).name == name
    assert_every_part_equals(tmp_path)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_decoder_is_walked_without_the_vision_tower(name: str, tmp_path: Path) -> None:
    calibration = batches(BUILDERS[name](tmp_path))
    replay = Replay(WalkConfig(open_checkpoint(tmp_path), family_at(tmp_path), calibration, "cpu", tmp_path, 1 << 30))
    units = replay.decoder_units()
    assert assert_walk_equals(replay, units, plain_outputs(tmp_path, calibration, units)) == units
