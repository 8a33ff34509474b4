from pathlib import Path

import pytest
import torch

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.stages.quantization.fp8 import Fp8, Granularity
from tests.stages.bench import Bench, divergence, tensors_of


@pytest.mark.parametrize(("granularity", "calibrated"), [("channel", False), ("tensor", True), ("block", False)])
def test_predictions_stay_close_to_the_original(bench: Bench, tmp_path: Path, granularity: Granularity, calibrated: bool) -> None:
    stage = Fp8(stage="fp8", granularity=granularity)
    assert stage.calibrated == calibrated
    bench.apply(tmp_path / "out", stage)
    checkpoint = open_checkpoint(tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    schemes = quantized_linears(checkpoint)
    assert {scheme.format for scheme in schemes.values()} == {"float-quantized"}
    assert all(tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn for name in schemes)
    assert all((f"{name}.input_scale" in tensors) == calibrated for name in schemes)
    assert bench.plan(stage).max_bytes == checkpoint.weight_bytes
    assert 0 < divergence(bench, tmp_path / "out") < 0.05


def test_matrices_that_a_runtime_joins_have_one_scale(bench: Bench, tmp_path: Path) -> None:
    bench.apply(tmp_path / "out", Fp8(stage="fp8", granularity="tensor"))
    tensors = tensors_of(tmp_path / "out")
    for joined in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for kind in ("weight_scale", "input_scale"):
            assert len({float(tensors[f"model.layers.1.{name}.{kind}"]) for name in joined}) == 1
        largest = max(float(tensors_of(bench.folder)[f"model.layers.1.{name}.weight"].abs().max()) for name in joined)
        assert float(tensors[f"model.layers.1.{joined[0]}.weight_scale"]) == pytest.approx(largest / 448, rel=0.01)
    scales = {float(tensors[f"model.layers.1.mlp.{name}.weight_scale"]) for name in ("up_proj", "down_proj")}
    assert len(scales) == 2


def test_a_component_can_have_scales_of_another_kind(bench: Bench, tmp_path: Path) -> None:
    stage = Fp8.model_validate(
        {"stage": "fp8", "granularity": "block", "targets": ["decoder", {"component": "vision", "granularity": "channel"}]}
    )
    bench.apply(tmp_path / "out", stage)
    schemes = quantized_linears(open_checkpoint(tmp_path / "out"))
    assert {scheme.block_rows for name, scheme in schemes.items() if name.startswith("visual.")} == {1}
    assert {scheme.block_rows for name, scheme in schemes.items() if not name.startswith("visual.")} == {128}
