"""Linears of a loaded artifact see their inputs rounded exactly where config.json says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compress.checkpoints.checkpoint import open_checkpoint
from compress.families.resolve import family_of
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.activations import fake_quantize_activations
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.quantized import INPUT_SCALE, round_checkpoint, scheme
from tests.tiny import build_qwen2_5_vl

TOKEN = Scheme(8, -1, symmetric=True, activations="token")
TENSOR = Scheme(8, -1, symmetric=True, activations="tensor")
FLOAT_TOKEN = Scheme(8, -1, symmetric=True, type="float", activations="token")
FLOAT_TENSOR = Scheme(8, -1, symmetric=True, type="float", block_rows=-1, activations="tensor")
FLOAT_BLOCK = Scheme(8, 128, symmetric=True, type="float", block_rows=128, activations="group")
FLOAT_WEIGHTS = Scheme(8, -1, symmetric=True, type="float")


def load(
    folder: Path, chosen: Callable[[str], Scheme | None] | Scheme, vision: Callable[[str], Scheme | None] = lambda name: None
) -> dict[str, nn.Linear]:
    """Return the linears, by their names on disk, of a tiny model that was rounded and loaded."""
    source = build_qwen2_5_vl(folder / "source", layers=2)
    round_checkpoint(source, folder / "rounded", chosen, vision=vision)
    model = load_model(OpenContext.at(folder / "rounded", folder / "rounded", Silent()), torch.float32, torch.device("cpu"))
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.config)
    weights = [name for name in checkpoint.tensors if name.endswith(".weight")]
    modules = {name: model.get_submodule(family.module_name(name).removesuffix(".weight")) for name in weights}
    return {name.removesuffix(".weight"): module for name, module in modules.items() if isinstance(module, nn.Linear)}


def some_inputs(module: nn.Linear) -> Tensor:
    return torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0)) * 3


def rounds(module: nn.Linear) -> bool:
    """Return whether a linear computes with something else than its input."""
    inputs = some_inputs(module)
    return not torch.equal(module(inputs), linear(inputs, module.weight, module.bias))


@pytest.mark.parametrize("quantized", [TOKEN, TENSOR, FLOAT_TOKEN, FLOAT_TENSOR, FLOAT_BLOCK])
def test_every_quantized_linear_rounds_its_input_and_no_other(quantized: Scheme, tmp_path: Path) -> None:
    linears = load(tmp_path, quantized)
    scale = torch.tensor([INPUT_SCALE]) if quantized.activations == "tensor" else None
    decoder = {name for name in linears if name.startswith("model.layers.")}
    assert len(decoder) == 2 * 7
    for name, module in linears.items():
        assert rounds(module) == (name in decoder), name
    assert quantized.activations is not None
    for name in decoder:
        module, inputs = linears[name], some_inputs(linears[name])
        expected = linear(
            fake_quantize_activations(inputs, quantized.activations, quantized.type, 8, scale), module.weight, module.bias
        )
        assert torch.equal(module(inputs), expected), name


def test_mixed_schemes_round_where_each_says(tmp_path: Path) -> None:
    def choose(name: str) -> Scheme | None:
        return scheme(4, 32) if "mlp" in name else TOKEN if "layers.0" in name else None

    linears = load(tmp_path, choose, vision=lambda name: FLOAT_TOKEN if name.endswith("attn.qkv") else None)
    rounding = {name for name, module in linears.items() if rounds(module)}
    attention = {f"model.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "o")}
    assert rounding == attention | {"visual.blocks.0.attn.qkv", "visual.blocks.1.attn.qkv"}


@pytest.mark.parametrize("quantized", [scheme(4, 32), FLOAT_WEIGHTS])
def test_weights_alone_leave_inputs_as_they_are(quantized: Scheme, tmp_path: Path) -> None:
    assert not [name for name, module in load(tmp_path, quantized).items() if rounds(module)]


def test_a_whole_tensor_needs_its_scale() -> None:
    with pytest.raises(ValueError, match="a fixed scale is needed"):
        fake_quantize_activations(torch.ones(2, 2), "tensor", "int", 8, None)
