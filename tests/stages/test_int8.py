from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.numerics.scheme import Scheme
from compress.stages.blockwise.block import BlockWeights
from compress.stages.quantization.int8 import Int8
from compress.stages.quantization.method import Method, solve
from compress.stages.quantization.transforms.smoothquant import SmoothQuant
from tests.stages.bench import Bench, divergence, tensors_of
from tests.stages.toy import HEADS, NAMES, PAIRS, Block, alike, observed_inputs, samples, with_folded


def int8(**fields: Any) -> Int8:
    return Int8.model_validate({"stage": "int8", **fields})


@pytest.mark.parametrize("activations", ["token", "tensor", "none"])
def test_predictions_stay_close_to_the_original(bench: Bench, tmp_path: Path, activations: str) -> None:
    stage = int8(activations=activations)
    bench.apply(tmp_path / "out", stage)
    checkpoint = open_checkpoint(tmp_path / "out")
    expected = None if activations == "none" else activations
    assert {(scheme.bits, scheme.group_size, scheme.activations) for scheme in quantized_linears(checkpoint).values()} == {
        (8, -1, expected)
    }
    assert bench.plan(stage).max_bytes == checkpoint.weight_bytes
    scales = [name for name in checkpoint.tensors if name.endswith("input_scale")]
    assert len(scales) == (len(quantized_linears(checkpoint)) if activations == "tensor" else 0)
    assert 0 < divergence(bench, tmp_path / "out") < (0.05 if activations == "tensor" else 0.02)


def test_without_statistics_no_sample_is_read() -> None:
    assert not int8(smoothing="none", rounding="nearest").calibrated
    assert int8(smoothing="none", rounding="nearest", activations="tensor").calibrated
    assert int8(smoothing="none").calibrated
    assert int8(smoothing=0.5, rounding="nearest").calibrated


def test_a_component_can_keep_its_inputs(bench: Bench, tmp_path: Path) -> None:
    bench.apply(tmp_path / "out", int8(targets=["decoder", {"component": "projector", "activations": "none"}]))
    schemes = quantized_linears(open_checkpoint(tmp_path / "out"))
    assert {scheme.activations for name, scheme in schemes.items() if name.startswith("visual.")} == {None}
    assert {scheme.activations for name, scheme in schemes.items() if not name.startswith("visual.")} == {"token"}


SCHEME = Scheme(8, -1, symmetric=True, activations="tensor")


@pytest.mark.parametrize("strength", [None, 0.7])
def test_smoothing_keeps_the_function(strength: float | None) -> None:
    block, x = Block(), samples()
    statistics, state = observed_inputs(block, x), BlockWeights.of(block, NAMES, HEADS)
    for pair in PAIRS[1:]:
        SmoothQuant(strength).apply(state, pair, statistics, alike(SCHEME))
    assert state.smoothing_scales
    with torch.no_grad():
        torch.testing.assert_close(with_folded(block, state)(x), block(x), rtol=1e-5, atol=1e-5)


def test_the_strength_that_is_found_beats_none_and_fixed_ones_on_inputs_with_outliers() -> None:
    block, x = Block(), samples()
    x[:, 3] *= 30
    statistics = observed_inputs(block, x)

    def error(strength: float | None, *, moved: bool = True) -> float:
        state = BlockWeights.of(block, NAMES, HEADS)
        if moved:
            SmoothQuant(strength).apply(state, PAIRS[0], statistics, alike(SCHEME))
        normed = block.norm(x)
        inputs = normed / state.smoothing_scales.get("q", torch.ones(1))
        step = inputs.abs().max() / 127
        weight = state.weight("q")
        scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
        with torch.no_grad():
            exact = normed @ block.q.weight.t()
            rounded = (inputs / step).round() * step @ ((weight / scale).round() * scale).t()
        return float((rounded - exact).square().mean())

    searched = error(None)
    assert searched < 0.9 * error(None, moved=False)
    assert searched < 1.1 * min(error(strength) for strength in (0.25, 0.5, 0.75))


def test_inputs_that_are_always_zero_have_a_scale_that_can_be_divided_by() -> None:
    block, scheme = Block(), Scheme(8, -1, symmetric=True, activations="tensor")
    with torch.no_grad():
        block.norm.weight.zero_()
        block.norm.bias.zero_()
    codes = solve(BlockWeights.of(block, ("q",), HEADS), (), observed_inputs(block, samples()), {"q": scheme}, Method())
    assert codes["q"].input_scale == torch.ones(1)


def test_what_is_not_targeted_stays_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    bench.apply(tmp_path / "out", int8())
    before, after = tensors_of(bench.folder), tensors_of(tmp_path / "out")
    vision = [name for name in before if name.startswith("visual.")]
    assert vision
    assert all(torch.equal(after[name], before[name]) for name in vision)
