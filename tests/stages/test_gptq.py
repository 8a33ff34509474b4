from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.checkpoints.quantization_config import is_readable
from compress.numerics.gptq import GptqOptions
from compress.numerics.scheme import Scheme
from compress.stages.blockwise.block import BlockWeights
from compress.stages.quantization.gptq import Gptq
from compress.stages.quantization.method import Method, solve
from compress.stages.quantization.parts import FULL_RANGE
from compress.stages.quantization.quantizer import Quantizer
from compress.stages.quantization.rounders.clip import ClipSearch
from compress.stages.quantization.rounders.gptq import GptqRounder
from compress.stages.quantization.rtn import Rtn
from compress.stages.quantization.transforms.awq import AwqScaling
from tests.stages.bench import Bench, divergence, tensors_of
from tests.stages.toy import HEADS, Block, alike, observed_inputs, samples
from tests.stages.variants import stage_of


def gptq(**fields: Any) -> Gptq:
    return Gptq.model_validate({"stage": "gptq", "bits": 4, "group_size": 32, "grid": 8, **fields})


def rtn(stage: Gptq) -> Rtn:
    return Rtn.model_validate({"stage": "rtn", **stage.model_dump(include={"bits", "group_size", "symmetric"})})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bits": 2, "group_size": 8, "symmetric": False},
        {"bits": 3, "scales": "awq", "clip": True},
        {"bits": 8, "group_size": -1, "actorder": "none"},
        {"group_size": -1},
    ],
)
def test_predictions_are_closer_to_the_original_than_with_nearest_codes(
    bench: Bench, tmp_path: Path, fields: dict[str, Any]
) -> None:
    stage = gptq(**fields)
    bench.apply(tmp_path / "gptq", stage)
    bench.apply(tmp_path / "rtn", rtn(stage))
    schemes = quantized_linears(open_checkpoint(tmp_path / "gptq"))
    assert set(schemes.values()) == {stage.component_schemes()["decoder"]}
    assert divergence(bench, tmp_path / "gptq") < 0.8 * divergence(bench, tmp_path / "rtn")


def test_the_vision_tower_and_projector_take_schemes_of_their_own(bench: Bench, tmp_path: Path) -> None:
    stage = gptq(
        targets=[
            "decoder",
            {"component": "vision", "bits": 8, "group_size": -1, "activations": "token"},
            {"component": "projector", "bits": 3, "group_size": 64},
        ]
    )
    bench.apply(tmp_path / "out", stage)
    schemes = quantized_linears(open_checkpoint(tmp_path / "out"))
    by_part = {
        part: {schemes[name] for name in schemes if name.startswith(part)}
        for part in ("model.", "visual.blocks.", "visual.merger.")
    }
    assert by_part == {
        "model.": {Scheme(4, 32, symmetric=False)},
        "visual.blocks.": {Scheme(8, -1, symmetric=True, activations="token")},
        "visual.merger.": {Scheme(3, 64, symmetric=False)},
    }
    assert bench.plan(stage).max_bytes == open_checkpoint(tmp_path / "out").weight_bytes
    assert divergence(bench, tmp_path / "out") < 0.5


@pytest.mark.parametrize("name", ["gptq", "int8"])
def test_settings_reach_the_rounding(name: str) -> None:
    stage = stage_of(name, dampening_frac=0.5, shrinkage=0.25)
    assert isinstance(stage, Quantizer)
    rounder = stage.method().rounder
    assert isinstance(rounder, GptqRounder)
    assert (rounder.options.dampening_frac, rounder.options.shrinkage) == (0.5, 0.25)
    by_default = stage_of(name)
    assert isinstance(by_default, Quantizer)
    rounder = by_default.method().rounder
    assert isinstance(rounder, GptqRounder)
    assert rounder.options.shrinkage is None  # by the number of tokens


def test_by_default_there_are_zero_points_and_scales_of_awq() -> None:
    stage = gptq()
    assert not stage.symmetric
    assert [type(transform) for transform in stage.method().transforms] == [AwqScaling]


def test_what_is_not_targeted_stays_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    bench.apply(tmp_path / "out", gptq(scales="none"))  # else they would move into the norms
    before, after = tensors_of(bench.folder), tensors_of(tmp_path / "out")
    quantized = quantized_linears(open_checkpoint(tmp_path / "out"))
    unchanged = [name for name in before if name.removesuffix(".weight") not in quantized]
    assert any(name.startswith("visual.") for name in unchanged)
    assert all(torch.equal(after[name], before[name]) for name in unchanged)


def test_a_component_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder is named twice; remove one of the two"):
        gptq(targets=["decoder", {"component": "decoder", "bits": 8}])


def test_scales_for_keys_and_values_are_written_beside_the_weights(bench: Bench, tmp_path: Path) -> None:
    stage = gptq(kv_cache="fp8")
    bench.apply(tmp_path / "out", stage)
    checkpoint = open_checkpoint(tmp_path / "out")
    scales = {name: tensor for name, tensor in tensors_of(tmp_path / "out").items() if name.endswith(("k_scale", "v_scale"))}
    layers = bench.checkpoint.text_config["num_hidden_layers"]
    assert set(scales) == {f"model.layers.{layer}.self_attn.{kind}_scale" for layer in range(layers) for kind in "kv"}
    assert all(scale.shape == (1,) and scale.dtype == torch.float32 and 0 < scale < 10 for scale in scales.values())
    settings = checkpoint.config["quantization_config"]
    assert settings["kv_cache_scheme"]["num_bits"] == 8
    other = {**settings, "kv_cache_scheme": settings["kv_cache_scheme"] | {"type": "int"}}  # of llm-compressor, say
    assert is_readable(checkpoint.config) and not is_readable({**checkpoint.config, "quantization_config": other})
    assert bench.plan(stage).max_bytes == checkpoint.weight_bytes
    bench.apply(tmp_path / "plain", gptq())
    rounded, plain = divergence(bench, tmp_path / "out"), divergence(bench, tmp_path / "plain")
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.5)


def test_keys_and_values_are_rounded_as_a_cache_of_8_bit_floats_holds_them(bench: Bench, tmp_path: Path) -> None:
    bench.apply(tmp_path / "out", gptq(bits=8, kv_cache="fp8"))
    small = divergence(bench, tmp_path / "out")
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    tensors = tensors_of(tmp_path / "out")
    save_file({name: tensor / 100 if name.endswith("k_scale") else tensor for name, tensor in tensors.items()}, weights)
    assert small < 0.02
    assert divergence(bench, tmp_path / "out") > 10 * small


def method(clip: int | None) -> Method:
    return Method(rounder=GptqRounder(GptqOptions(), ClipSearch(clip) if clip else FULL_RANGE))


@pytest.mark.parametrize("clip", [None, 10])
def test_linears_with_one_input_get_the_codes_that_each_would_get_alone(clip: int | None) -> None:
    block, scheme = Block(), alike(Scheme(3, 8, symmetric=False))
    apart = observed_inputs(block, samples())
    assert apart["q"] is not apart["v"]
    codes = [
        solve(BlockWeights.of(block, ("q", "v"), HEADS), (), inputs, scheme, method(clip))
        for inputs in (apart, apart | {"v": apart["q"]})
    ]
    for name in ("q", "v"):
        alone, together = (actual[name] for actual in codes)
        assert torch.equal(alone.codes, together.codes)
        assert torch.equal(alone.scales, together.scales)
        assert alone.zero_points is not None
        assert together.zero_points is not None
        assert torch.equal(alone.zero_points, together.zero_points)
        assert together.scales.untyped_storage().nbytes() == together.scales.nbytes  # safetensors refuses to save shared memory
