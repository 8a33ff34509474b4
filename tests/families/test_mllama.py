from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoints.checkpoint import open_checkpoint
from compress.engine.replay import BlockVisit, Replay, WalkConfig
from compress.engine.statistics import observe
from compress.errors import CheckpointError
from compress.families.resolve import family_of
from tests.families.samples import LONG, SHORT, Fixed, encode, plain_outputs
from tests.tiny import build_mllama, picture

PATCHES, PADDED = 5, 8
"""The rows of a tile, and how many the tower's blocks see of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mllama(tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Fixed:
    """A sample with an image of one tile, and one with images of two and four tiles."""
    return encode(folder, [SHORT, LONG], [[picture(1, 28, 28)], [picture(2, 28, 56), picture(3, 112, 112)]])


@pytest.fixture(scope="module")
def text(folder: Path) -> Fixed:
    return encode(folder, [LONG, SHORT], [[], []])


def visits(folder: Path, calibration: list[Fixed], units: str) -> dict[str, Any]:
    """Return what `observe` finds of all linears of each part, or the error it raises."""
    checkpoint = open_checkpoint(folder)
    replay = Replay(WalkConfig(checkpoint, family_of(checkpoint.config), calibration, "cpu", folder, 1 << 30))
    return {visit.name: seen(visit) for visit in replay.walk(getattr(replay, units)())}


def seen(visit: BlockVisit) -> Any:
    if isinstance(visit.module, torch.nn.Linear):
        visit = replace(visit, module=torch.nn.Sequential(visit.module))
    names = [name.removesuffix(".weight") for name, tensor in visit.module.state_dict().items() if tensor.dim() > 1]
    try:
        return observe(visit, names)
    except CheckpointError as error:
        return str(error)


def test_the_images_states_count_where_a_token_reads_them(folder: Path, mixed: Fixed) -> None:
    tiles = [1, 2, 4]
    inputs = mixed.inputs()
    assert list(inputs["pixel_values"].shape[:3]) == [2, 2, 4]  # the first sample's second image, and nine tiles, are padding
    visited = visits(folder, [mixed], "decoder_units")["model.language_model.layers.1"]
    assert visited["cross_attn.k_proj"] is visited["cross_attn.v_proj"]
    assert visited["cross_attn.k_proj"].text is None
    assert visited["cross_attn.k_proj"].vision.tokens == sum(tiles) * PATCHES
    read = inputs["cross_attention_mask"].bool().any(dim=1).flatten()
    assert int(read.sum()) == sum(tiles)
    (states,) = plain_outputs(folder, [mixed], ["model.multi_modal_projector"])["model.multi_modal_projector"][0]
    rows = states.reshape(len(read), PATCHES, -1)[read].flatten(0, 1).float()
    torch.testing.assert_close(visited["cross_attn.k_proj"].mean_hessian() * len(rows), rows.t() @ rows)
    asked = int(inputs["attention_mask"].sum())
    for name in ("cross_attn.q_proj", "cross_attn.o_proj", "mlp.down_proj"):
        assert (visited[name].text.tokens, visited[name].vision) == (asked, None)


def test_padding_of_tiles_and_patches_does_not_count_in_the_tower(folder: Path, mixed: Fixed) -> None:
    visited = visits(folder, [mixed], "vision_units")
    assert [name.rpartition(".")[2] for name in visited] == ["0", "1", "0", "1", "multi_modal_projector"]
    for statistics in visited.values():
        assert {name: sums.vision.tokens for name, sums in statistics.items()} == dict.fromkeys(statistics, 7 * PATCHES)
    (states,) = plain_outputs(folder, [mixed], ["model.vision_model.layernorm_pre"])["model.vision_model.layernorm_pre"][0]
    assert states.shape[-2] == PATCHES < PADDED


def test_a_block_that_some_batches_skip_is_passed_over_for_them(folder: Path, mixed: Fixed, text: Fixed) -> None:
    visited = visits(folder, [text, mixed, text], "decoder_units")
    asked, other = (int(batch.inputs()["attention_mask"].sum()) for batch in (mixed, text))
    tokens = [statistics["mlp.down_proj"].tokens for statistics in visited.values()]
    assert tokens == [asked + 2 * other, asked, asked + 2 * other]


def test_a_block_that_no_sample_reaches_is_an_error(folder: Path, text: Fixed) -> None:
    visited = visits(folder, [text], "decoder_units")
    assert visited["model.language_model.layers.1"] == (
        "model.language_model.layers.1: no calibration sample reaches it; add samples that do, images with questions for what "
        "reads images"
    )
    assert not isinstance(visited["model.language_model.layers.2"], str)
    assert all(isinstance(error, str) for error in visits(folder, [text], "vision_units").values())
