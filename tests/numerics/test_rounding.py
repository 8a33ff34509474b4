from typing import cast

import pytest
import torch
from torch import Tensor

from compress.numerics.grids import grid
from compress.numerics.rounding import clip, diagonal_blocks, output_errors, quantize, rounding_error
from compress.numerics.scheme import Scheme


def matrix(rows: int = 12, columns: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02


def random_hessian(columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return inputs.t() @ inputs / 400


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [1, 3, 16, 48, -1])
def test_rounding_is_to_the_nearest_code(bits: int, symmetric: bool, group_size: int) -> None:
    weight = matrix()
    quantized = quantize(weight, Scheme(bits, group_size, symmetric), torch.float32)
    size = 48 if group_size == -1 else group_size
    assert quantized.scheme.group_size == size
    assert quantized.zero_points is not None
    assert quantized.scales.shape == quantized.zero_points.shape == (12, 48 // size)
    assert int(quantized.codes.max()) < 2**bits
    if symmetric:
        assert (quantized.zero_points == 2 ** (bits - 1)).all()
    steps = quantized.scales.repeat_interleave(size, dim=1)
    # A zero point is itself rounded, so the outermost values may lie half a step beyond the grid, and half a step more from a code.
    assert ((quantized.dequantize() - weight).abs() <= steps * 1.001).all()
    every = (torch.arange(2**bits).view(-1, 1, 1, 1) - quantized.zero_points.unsqueeze(-1)) * quantized.scales.unsqueeze(-1)
    nearest = (every - weight.view(12, -1, size)).abs().amin(dim=0).view(12, 48)
    torch.testing.assert_close((quantized.dequantize() - weight).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_fit_the_scales_as_stored(dtype: torch.dtype) -> None:
    weight = matrix(64, 128)
    scheme = Scheme(4, 32, symmetric=False)
    quantized = quantize(weight, scheme, dtype)
    assert quantized.scales.dtype == dtype
    assert quantized.zero_points is not None
    error = (quantized.dequantize() - weight).view(64, 4, 32)
    shifted = quantized.codes.view(64, 4, 32).float() - quantized.zero_points.unsqueeze(-1).float()
    inside = (quantized.codes.view(64, 4, 32) > 0) & (quantized.codes.view(64, 4, 32) < 15)
    assert (error.abs() <= quantized.scales.float().unsqueeze(-1) * 0.501)[inside].all()
    assert shifted.abs().max() <= 15


def test_a_grid_always_holds_zero_and_spans_its_group() -> None:
    groups = torch.tensor([[[0.5, 1.5, 1.0], [-2.0, -1.0, -0.5], [-1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]])
    scales, zero_points = grid(groups, Scheme(2, 3, symmetric=False), torch.float32)
    assert scales.tolist() == [[0.5, pytest.approx(2 / 3), 1.0, 1.0]]
    assert zero_points.tolist() == [[0.0, 3.0, 1.0, 0.0]]
    zeros = quantize(torch.zeros(2, 4), Scheme(4, 4, symmetric=False), torch.bfloat16)
    assert torch.equal(zeros.dequantize(), torch.zeros(2, 4))


def test_rounding_error_is_what_quantize_loses() -> None:
    weight = matrix()
    for scheme in (Scheme(3, 16, False), Scheme(4, -1, True)):
        expected = quantize(weight, scheme, torch.bfloat16).dequantize() - weight
        torch.testing.assert_close(rounding_error(weight, scheme, torch.bfloat16), expected, rtol=0, atol=1e-7)


def test_output_errors_are_the_squared_errors_of_the_output() -> None:
    inputs, error = matrix(100, 48, seed=3), matrix(seed=4)
    torch.testing.assert_close(output_errors(error, inputs.t() @ inputs), (inputs @ error.t()).square().sum(dim=0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_never_loses_more_within_a_group_and_less_somewhere(bits: int) -> None:
    weight, hessian = matrix(), random_hessian(48)
    scheme = Scheme(bits, 16, symmetric=False)

    def losses(shrink: Tensor | float) -> Tensor:
        error = (quantize(weight, scheme, torch.bfloat16, shrink).dequantize() - weight).view(12, 3, 16)
        blocks = torch.stack([hessian[start : start + 16, start : start + 16] for start in (0, 16, 32)])
        return torch.einsum("rgi,gij,rgj->rg", error, blocks, error)

    shrink = clip(weight, diagonal_blocks(hessian, 16), scheme, torch.bfloat16, steps=20)
    assert shrink.shape == (12, 3)
    plain, clipped = losses(1.0), losses(shrink)
    assert (clipped <= plain * 1.0001).all()
    assert clipped.sum() < plain.sum() * 0.95
    for factor in (0.95, 0.8, 0.6):  # every second of the twenty factors is tried
        assert (clipped <= losses(factor) * 1.0001).all()
    best = torch.stack([losses(1 - step / 40) for step in range(20)]).amin(dim=0)
    assert clipped.sum() <= best.sum() * 1.01  # what lies between is tried beside the best of them
    tried = {round(1 - step / 40, 3) for step in range(20)}
    assert {round(factor, 3) for factor in cast("list[float]", shrink.view(-1).tolist())} <= tried


def test_clipping_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, scheme = matrix(), random_hessian(48), Scheme(3, 16, symmetric=True)
    blocks = diagonal_blocks(hessian, 16)
    at_once = clip(weight, blocks, scheme, torch.bfloat16, steps=8)
    monkeypatch.setattr("compress.numerics.rounding._TILE", {"cpu": 5 * 48})
    monkeypatch.setattr("compress.numerics.rounding._TILE_ROWS", 1)
    monkeypatch.setattr("compress.numerics.rounding._TILE_COLUMNS", 32)
    assert torch.equal(clip(weight, blocks, scheme, torch.bfloat16, steps=8), at_once)
