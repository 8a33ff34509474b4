"""HQQ beside rounding to nearest, and beside the published solver with its float zero points."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.numerics.grids import full_range
from compress.numerics.rounding import round_nearest
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.stages.quantization.hqq import HalfQuadratic, Hqq
from compress.stages.quantization.rtn import Rtn
from compress.stages.stage import StageContext
from tests.stages.bench import Bench, divergence

SEARCH = HalfQuadratic(lp_norm=0.7, beta=10.0, kappa=1.01, iters=20)


def hqq(**fields: Any) -> Hqq:
    return Hqq.model_validate({"stage": "hqq", "bits": 4, "group_size": 32, **fields})


def matrix(rows: int = 64, columns: int = 256) -> Tensor:
    """Return weights with a few outliers, as trained ones have."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.01, weight * 4, weight)


def published(weight: Tensor, bits: int, size: int, *, round_zeros: bool = False) -> Tensor:
    """Return the dequantized weight of the published solver: scales of the full range, zero points moved as floats."""
    groups, levels = weight.view(-1, size), 1 << bits
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / (levels - 1)
    zero, beta, least = -low / scale, 10.0, float("inf")
    for _ in range(20):
        codes = (groups / scale + zero).round().clamp(0, levels - 1)
        residual = groups - (codes - zero) * scale
        if (error := float(residual.abs().mean())) >= least:
            break
        shrunk = residual.sign() * (residual.abs() - residual.abs() ** -0.3 / beta).clamp(min=0)
        zero, beta, least = (codes - (groups - shrunk) / scale).mean(1, keepdim=True), beta * 1.01, error
    zero = zero.round() if round_zeros else zero
    return (((groups / scale + zero).round().clamp(0, levels - 1) - zero) * scale).view_as(weight)


def mean_error(weight: Tensor, rounded: Tensor) -> float:
    return float((rounded - weight).abs().mean())


@pytest.mark.parametrize(("bits", "to_published", "to_nearest"), [(2, 0.9, 0.8), (3, 1.0, 0.92), (4, 1.05, 0.98)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_moved_scales_fit_about_as_well_as_the_published_float_zero_points(
    bits: int, to_published: float, to_nearest: float, symmetric: bool
) -> None:
    weight, scheme = matrix(), Scheme(bits, 64, symmetric)
    error = mean_error(weight, round_nearest(weight, SEARCH.search(weight, scheme, torch.float32)).dequantize())
    nearest = mean_error(weight, round_nearest(weight, full_range(weight, scheme, torch.float32)).dequantize())
    assert error < to_nearest * nearest
    if not symmetric:  # the published solver has no symmetric grids
        assert error < to_published * mean_error(weight, published(weight, bits, 64))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_published_zero_points_lose_their_gain_when_they_are_rounded(bits: int) -> None:
    """Why scales are moved: the layouts' zero points are integers."""
    weight = matrix()
    nearest = mean_error(
        weight, round_nearest(weight, full_range(weight, Scheme(bits, 64, symmetric=False), torch.float32)).dequantize()
    )
    assert mean_error(weight, published(weight, bits, 64)) < 0.97 * nearest
    assert mean_error(weight, published(weight, bits, 64, round_zeros=True)) > 0.99 * nearest


def test_a_row_does_not_depend_on_those_it_is_searched_with() -> None:
    weight, scheme = matrix(), Scheme(3, 64, symmetric=False)
    whole = SEARCH.search(weight, scheme, torch.bfloat16)
    halves = [SEARCH.search(half, scheme, torch.bfloat16) for half in (weight[:32], weight[32:])]
    assert torch.equal(whole.scales, torch.cat([half.scales for half in halves]))


def test_a_group_of_zeros_stays_one() -> None:
    weight = matrix()
    weight[3, :64] = 0
    grid = SEARCH.search(weight, Scheme(3, 64, symmetric=False), torch.float32)
    assert grid.scales.isfinite().all()
    assert (round_nearest(weight, grid).dequantize()[3, :64] == 0).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_predictions_are_closer_than_with_full_ranges_and_no_sample_is_read(bench: Bench, tmp_path: Path, bits: int) -> None:
    assert not hqq(bits=bits).calibrated
    for name, stage in (("hqq", hqq(bits=bits)), ("rtn", Rtn.model_validate({"stage": "rtn", "bits": bits, "group_size": 32}))):
        (tmp_path / name).mkdir()
        stage.apply(StageContext(bench.folder, tmp_path / name, None, bench.family, "cpu", 0, Silent()))
    assert set(quantized_linears(open_checkpoint(tmp_path / "hqq")).values()) == {Scheme(bits, 32, symmetric=False)}
    assert divergence(bench, tmp_path / "hqq") < 0.97 * divergence(bench, tmp_path / "rtn")


@pytest.mark.parametrize(("field", "value"), [("lp_norm", 1.0), ("beta", 0), ("kappa", 0.9), ("iters", 0)])
def test_fields_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        hqq(**{field: value})
