from pathlib import Path
from typing import Literal

import pytest
import torch

from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears, read_linear
from compress.checkpoints.spec import spec_of
from compress.families.mllama import MLLAMA
from compress.numerics.rounding import quantize
from compress.progress import Silent
from compress.stages.quantization.rtn import Rtn
from compress.stages.stage import StageContext
from tests.stages.bench import Bench, tensors_of
from tests.tiny import TEXT, build_mllama


def test_each_weight_has_its_nearest_code_and_no_sample_is_read(bench: Bench, tmp_path: Path) -> None:
    stage = Rtn(stage="rtn", bits=3, group_size=32, targets=("decoder", "vision"))
    assert not stage.calibrated
    stage.apply(StageContext(bench.folder, tmp_path, None, bench.family, "cpu", 0, Silent()))
    before, after = tensors_of(bench.folder), tensors_of(tmp_path)
    schemes = quantized_linears(open_checkpoint(tmp_path))
    assert any(name.startswith("visual.blocks.") for name in schemes)
    for name, scheme in schemes.items():
        weight = before[f"{name}.weight"]
        expected = quantize(weight, scheme, weight.dtype)
        actual = read_linear(name, scheme, after.__getitem__)
        assert torch.equal(actual.codes, expected.codes)
        assert torch.equal(actual.scales, expected.scales)
    assert bench.plan(stage).max_bytes == open_checkpoint(tmp_path).weight_bytes


def test_scales_for_keys_and_values_need_samples() -> None:
    assert Rtn(stage="rtn", bits=4, group_size=32, kv_cache="fp8").calibrated


def test_scales_for_keys_and_values_need_no_images_for_the_tower(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 8)
    text = TextSet(dataset="text", source=str(tmp_path / "text.txt"), samples=2, tokens=32)
    collect(CalibrationSelection(0, (PinnedSet(text, (tmp_path / "text.txt",)),)), bench.folder, tmp_path / "calibration", Silent())
    stage = Rtn(stage="rtn", bits=4, group_size=32, targets=("decoder", "vision"), kv_cache="fp8")
    assert not bench.plan(stage).reads_images
    Bench(bench.folder, tmp_path / "calibration").apply(tmp_path / "out", stage)
    bench.apply(tmp_path / "plain", stage.model_copy(update={"kv_cache": None}))
    scaled, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert all(torch.equal(scaled[name], tensor) for name, tensor in plain.items())
    assert {name.rpartition(".")[2] for name in scaled.keys() - plain.keys()} == {"k_scale", "v_scale"}


@pytest.mark.parametrize(("kv_cache", "needed"), [("fp8", True), (None, False)])
def test_attention_to_images_has_scales_for_keys_and_values_only_with_images(
    tmp_path: Path, kv_cache: Literal["fp8"] | None, needed: bool
) -> None:
    before = spec_of(open_checkpoint(build_mllama(tmp_path)), MLLAMA)
    assert Rtn(stage="rtn", bits=4, group_size=32, kv_cache=kv_cache).plan(before).reads_images == needed


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_of_no_size_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match="positive number of input channels, or -1"):
        Rtn(stage="rtn", bits=4, group_size=group_size)
