import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from torch import Tensor

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import (
    kv_cache_tensors,
    linear_shape,
    pack_linear,
    packed_bytes,
    quantization_config,
    quantized_linears,
    read_linear,
    unquantized_linears,
)
from compress.checkpoints.quantization_config import scheme_of
from compress.errors import CheckpointError
from compress.families.resolve import family_of
from compress.numerics.grids import QuantizedWeight
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_qwen2_5_vl

W8A8 = Scheme(8, -1, symmetric=True, activations="token")
W8A8_STATIC = Scheme(8, -1, symmetric=True, activations="tensor")
FP8_DYNAMIC = Scheme(8, -1, symmetric=True, type="float", activations="token")
FP8_STATIC = Scheme(8, -1, symmetric=True, type="float", block_rows=-1, activations="tensor")
FP8_BLOCK = Scheme(8, 128, symmetric=True, type="float", block_rows=128, activations="group")
FP8_WEIGHTS = Scheme(8, -1, symmetric=True, type="float")
UNPACKED = [W8A8, W8A8_STATIC, FP8_DYNAMIC, FP8_STATIC, FP8_BLOCK, FP8_WEIGHTS]
SCHEMES = [scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (16, 32, -1) for symmetric in (False, True)]


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("quantization", SCHEMES)
def test_a_linear_reads_back_as_it_was_packed(quantization: Scheme) -> None:
    weight = quantize(random_weight(24, 96), quantization, torch.bfloat16)
    tensors = pack_linear("decoder.proj", weight)
    back = read_linear("decoder.proj", quantization, tensors.__getitem__)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.zero_points is not None
    assert weight.zero_points is not None
    assert torch.equal(back.zero_points, weight.zero_points)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("quantization", SCHEMES)
def test_compressed_tensors_reads_the_same_matrix(quantization: Scheme) -> None:
    weight = quantize(random_weight(64, 96), quantization, torch.float32)
    tensors = {name.removeprefix("proj."): tensor for name, tensor in pack_linear("proj", weight).items()}
    config: Any = QuantizationConfig.model_validate(quantization_config({"a.proj": quantization}, ignore=[]))
    reference = PackedQuantizationCompressor.decompress(tensors, config.config_groups["group_0"])
    assert torch.equal(reference["weight"], weight.dequantize())


def with_input_scale(weight: QuantizedWeight) -> QuantizedWeight:
    """Return the weight as a stage gives it: with a scale for its input where that is fixed."""
    fixed = weight.scheme.activations == "tensor"
    return replace(weight, input_scale=torch.tensor([0.0625])) if fixed else weight


@pytest.mark.parametrize("quantization", UNPACKED)
@pytest.mark.parametrize("shape", [(24, 96), (5, 32), (130, 300), (256, 128)])
def test_a_linear_of_8_bits_reads_back_as_it_was_laid_out(quantization: Scheme, shape: tuple[int, int]) -> None:
    weight = with_input_scale(quantize(random_weight(*shape), quantization, torch.bfloat16))
    tensors = pack_linear("decoder.proj", weight)
    assert tensors["decoder.proj.weight"].dtype == (torch.int8 if quantization.type == "int" else torch.float8_e4m3fn)
    assert "decoder.proj.weight_shape" not in tensors
    back = read_linear("decoder.proj", quantization, tensors.__getitem__)
    assert back.scheme == weight.scheme
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert (back.input_scale is None) == (weight.input_scale is None)
    assert back.input_scale is None or float(back.input_scale) == 0.0625


@pytest.mark.parametrize("quantization", UNPACKED)
@pytest.mark.parametrize("shape", [(24, 96), (256, 384)])
def test_compressed_tensors_reads_the_same_matrix_of_8_bits(quantization: Scheme, shape: tuple[int, int]) -> None:
    weight = with_input_scale(quantize(random_weight(*shape), quantization, torch.float32))
    tensors = {name.removeprefix("proj."): tensor for name, tensor in pack_linear("proj", weight).items()}
    config: Any = QuantizationConfig.model_validate(quantization_config({"a.proj": quantization}, ignore=[]))
    reference = IntQuantizationCompressor if quantization.type == "int" else FloatQuantizationCompressor
    assert torch.equal(reference.decompress(tensors, config.config_groups["group_0"])["weight"], weight.dequantize())


@pytest.mark.parametrize(
    ("preset", "quantization"),
    [("W8A8", W8A8), ("FP8_DYNAMIC", FP8_DYNAMIC), ("FP8", FP8_STATIC), ("FP8_BLOCK", FP8_BLOCK), ("W4A16", scheme(4, 128, True))],
)
def test_groups_say_what_the_librarys_own_schemes_say(preset: str, quantization: Scheme) -> None:
    config: Any = QuantizationConfig.model_validate(quantization_config({"a.proj": quantization}, ignore=[]))
    actual: Any = config.config_groups["group_0"]
    reference: Any = preset_name_to_scheme(preset, ["Linear"])
    settings = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"}
    assert actual.weights.model_dump(include=settings) == reference.weights.model_dump(include=settings)
    assert (actual.input_activations is None) == (reference.input_activations is None)
    if actual.input_activations is not None:
        assert actual.input_activations.model_dump(include=settings) == reference.input_activations.model_dump(include=settings)


def test_a_config_of_several_formats_says_so() -> None:
    quantization = {"a.up": scheme(4), "v.up": W8A8, "v.down": FP8_BLOCK, "lm_head": FP8_STATIC}
    content = quantization_config(quantization, ignore=["v.proj"], kv_cache=True)
    reference: Any = QuantizationConfig.model_validate(content)
    assert reference.format == "mixed-precision"
    assert [group.format for group in reference.config_groups.values()] == [
        "pack-quantized", "int-quantized", "float-quantized", "float-quantized",
    ]  # fmt: skip
    assert (reference.kv_cache_scheme.num_bits, reference.kv_cache_scheme.type, reference.kv_cache_scheme.strategy) == (
        8,
        "float",
        "tensor",
    )
    assert not reference.kv_cache_scheme.dynamic
    assert quantization_config(quantization, ignore=[])["kv_cache_scheme"] is None


def test_scales_of_keys_and_values_are_named_after_the_attention() -> None:
    tensors = kv_cache_tensors("model.layers.0.self_attn", torch.tensor(0.5), torch.tensor([0.25]))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "model.layers.0.self_attn.k_scale": [0.5],
        "model.layers.0.self_attn.v_scale": [0.25],
    }


@pytest.mark.parametrize("quantization", [*SCHEMES, *UNPACKED])
@pytest.mark.parametrize("shape", [(24, 96), (5, 32), (64, 160)])
def test_predicted_bytes_are_exact(quantization: Scheme, shape: tuple[int, int]) -> None:
    tensors = pack_linear("proj", with_input_scale(quantize(random_weight(*shape), quantization, torch.bfloat16)))
    assert packed_bytes(shape, quantization, "BF16") == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_the_config_is_one_that_compressed_tensors_accepts() -> None:
    content = quantization_config({"layers.0.q_proj": scheme(4, 64)}, ignore=["lm_head", "visual.merger.mlp.0"])
    reference: Any = QuantizationConfig.model_validate(content)
    assert reference.format == "pack-quantized"
    assert reference.quantization_status == QuantizationStatus.COMPRESSED
    assert reference.ignore == ["lm_head", "visual.merger.mlp.0"]
    weights = reference.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric, weights.strategy) == (4, 64, False, "group")
    assert reference.config_groups["group_0"].targets == ["Linear"]


def test_several_schemes_target_their_linears_by_name() -> None:
    quantization = {"a.up": scheme(4), "a.down": scheme(8), "b.up": scheme(4), "lm_head": scheme(8)}
    groups = quantization_config(quantization, ignore=[])["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a.up", "b.up"], ["a.down", r"re:(.*\.)?lm_head$"]]


@pytest.mark.parametrize("head", ["lm_head", "language_model.lm_head"])
def test_a_head_is_targeted_by_a_pattern_whatever_stands_before_it(head: str) -> None:
    content = quantization_config({"a.up": scheme(4), head: scheme(4)}, ignore=[])
    assert content["config_groups"]["group_0"]["targets"] == ["Linear", r"re:(.*\.)?lm_head$"]
    content = quantization_config({"a.up": scheme(4), head: scheme(8)}, ignore=[])
    assert content["config_groups"]["group_1"]["targets"] == [r"re:(.*\.)?lm_head$"]
    assert scheme_of(content, head, "config.json") == scheme(8)


def test_a_checkpoint_tells_how_its_linears_are_held(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source")

    schemes = {
        "v_proj": None,
        "down_proj": scheme(8, -1, symmetric=True),
        "o_proj": W8A8,
        "up_proj": FP8_BLOCK,
        "k_proj": FP8_DYNAMIC,
    }

    def choose(name: str) -> Scheme | None:
        return schemes.get(name.rpartition(".")[2], scheme(3, 16))

    written = round_checkpoint(source, tmp_path / "rounded", choose)
    checkpoint = open_checkpoint(tmp_path / "rounded")
    assert quantized_linears(checkpoint) == written
    assert quantized_linears(open_checkpoint(source)) == {}
    shape = open_checkpoint(source).tensors["model.layers.0.mlp.down_proj.weight"].shape
    assert linear_shape(checkpoint, "model.layers.0.mlp.down_proj") == shape
    assert linear_shape(checkpoint, "model.layers.0.self_attn.v_proj") == (64, 128)


def test_what_stays_as_it_is_is_listed_by_its_name_on_disk(tmp_path: Path) -> None:
    source = open_checkpoint(build_qwen2_5_vl(tmp_path / "source", tied=True))
    taken = [name.removesuffix(".weight") for name in source.tensors if "proj.weight" in name and name.startswith("model.layers.")]
    left = unquantized_linears(source, family_of(source.config), taken)
    assert "lm_head" in left  # tied: in no file, but a module all the same
    assert "visual.blocks.0.attn.qkv" in left
    assert "visual.merger.mlp.2" in left
    assert not [name for name in left if "embed" in name or "norm" in name or "layers" in name]


def test_a_checkpoint_quantized_by_others_is_refused(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source")
    path = source / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(CheckpointError, match=r"config\.json: quantized as 'gptq'.*start from the model's original"):
        quantized_linears(open_checkpoint(source))


def test_an_unsupported_architecture_is_named_with_its_place() -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: model_type 'fuyu' is no supported architecture; supported are"):
        family_of({"model_type": "fuyu"})
    with pytest.raises(CheckpointError, match=r"^someone/fuyu: model_type 'fuyu' is no supported architecture"):
        family_of({"model_type": "fuyu"}, where="someone/fuyu")


def test_tensors_that_do_not_fit_the_scheme_are_refused() -> None:
    tensors = pack_linear("proj", quantize(random_weight(8, 64), scheme(4, 32), torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"proj: its packed tensors .* do not hold a matrix \[8, 64\] of 8 bits"):
        read_linear("proj", scheme(8, 32), tensors.__getitem__)
    tensors = pack_linear("proj", quantize(random_weight(8, 64), W8A8, torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"proj: its weight is torch\.int8 \[8, 64\] with scales .* says float-quantized"):
        read_linear("proj", FP8_DYNAMIC, tensors.__getitem__)


def test_the_plans_part_needs_no_torch() -> None:
    modules = "compress.checkpoints.layouts, compress.export.vllm.format, compress.runtimes.transformers.runtime"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert completed.stdout.strip() == "False"


def test_bits_per_weight_follow_from_the_sizes() -> None:
    shape = (4096, 4096)
    bits = 8 * packed_bytes(shape, scheme(4, 128), "BF16") / math.prod(shape)
    assert bits == pytest.approx(4 + 16 / 128 + 4 / 128, abs=1e-4)
