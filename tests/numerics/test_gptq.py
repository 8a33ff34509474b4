"""GPTQ against the algorithm as its paper writes it, with the inverse."""

from typing import cast

import pytest
import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.numerics.gptq import Feedback, GptqOptions, optimism, round_columns, shrinkage
from compress.numerics.grids import full_range, grid
from compress.numerics.rounding import output_errors, quantize
from compress.numerics.scheme import Scheme


def problem(rows: int = 24, columns: int = 192, tokens: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)
    return weight, inputs.t() @ inputs / tokens


def as_in_the_paper(weight: Tensor, hessian: Tensor, scheme: Scheme, dampening_frac: float, actorder: bool) -> Tensor:
    """Return the rounded matrix: columns in turn, each error divided by the inverse's diagonal and taken from those that follow."""
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    scales, zeros = grid(weight.view(rows, -1, size), scheme, torch.float32)
    order = hessian.diagonal().argsort(descending=True, stable=True) if actorder else torch.arange(columns)
    damped = hessian.double() + dampening_frac * hessian.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    inverse = cast("Tensor", torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True))
    left = weight.double()[:, order].clone()
    rounded = torch.empty_like(left)
    for index, column in enumerate(cast("list[int]", order.tolist())):
        scale, zero = scales[:, column // size].double(), zeros[:, column // size].double()
        code = (left[:, index] / scale).round().add(zero).clamp(0, scheme.levels - 1)
        rounded[:, index] = (code - zero) * scale
        error = (left[:, index] - rounded[:, index]) / inverse[index, index]
        left[:, index:] -= torch.outer(error, inverse[index, index:])
    return rounded[:, order.argsort()].float()


def error_of(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    return float(output_errors(rounded - weight, hessian).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric", "actorder"), [(32, False, True), (48, True, True), (-1, True, False), (64, False, False)]
)
def test_the_codes_are_those_of_the_paper(bits: int, group_size: int, symmetric: bool, actorder: bool) -> None:
    weight, hessian = problem()
    scheme = Scheme(bits, group_size, symmetric)
    expected = as_in_the_paper(weight, hessian, scheme, 0.01, actorder)
    actual = round_columns(
        weight, Feedback.of(hessian.clone(), GptqOptions(0.01, actorder)), full_range(weight, scheme, torch.float32)
    ).dequantize()
    same = ((actual - expected).abs() < 1e-5).float().mean()
    assert same > 0.98  # a tie that float32 breaks the other way changes what comes after it in that row
    assert error_of(weight, actual, hessian) == pytest.approx(error_of(weight, expected, hessian), rel=0.02)


def test_it_loses_far_less_than_the_nearest_codes() -> None:
    weight, hessian = problem()
    scheme = Scheme(3, 32, symmetric=True)
    nearest = quantize(weight, scheme, torch.float32).dequantize()
    actual = round_columns(
        weight, Feedback.of(hessian.clone(), GptqOptions()), full_range(weight, scheme, torch.float32)
    ).dequantize()
    assert error_of(weight, actual, hessian) < 0.6 * error_of(weight, nearest, hessian)


def test_shrinkage_makes_the_second_moment_smaller_beside_its_diagonal() -> None:
    weight, hessian = problem()
    scheme = Scheme(3, 32, symmetric=False)
    smaller = hessian * 0.7 + 0.3 * torch.diag(hessian.diagonal())
    grid_of_weight = full_range(weight, scheme, torch.float32)
    actual = round_columns(weight, Feedback.of(hessian.clone(), GptqOptions(shrinkage=0.3)), grid_of_weight)
    expected = round_columns(weight, Feedback.of(smaller, GptqOptions()), grid_of_weight)
    assert (actual.codes == expected.codes).float().mean() > 0.98
    plain = round_columns(weight, Feedback.of(hessian.clone(), GptqOptions()), grid_of_weight)
    assert (plain.codes == expected.codes).float().mean() < 0.9


def test_with_few_samples_shrinkage_loses_less_on_others() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, mixing = torch.randn(48, 192, generator=generator), torch.randn(192, 192, generator=generator) / 192**0.5
    # tokens of very unlike size, as language models have them: the largest decide the second moment
    few, many = (
        torch.randn(tokens, 1, generator=generator).mul_(1.5).exp_() * torch.randn(tokens, 192, generator=generator) @ mixing
        for tokens in (1000, 50_000)
    )
    grid_of_weight = full_range(weight, Scheme(3, 32, symmetric=False), torch.float32)
    errors: list[float] = []
    for options in (GptqOptions(), GptqOptions(shrinkage=None).of(192, len(few))):
        feedback = Feedback.of(few.t() @ few / len(few), options)
        rounded = round_columns(weight, feedback, grid_of_weight).dequantize()
        errors.append(error_of(weight, rounded, many.t() @ many / len(many)))
    assert errors[1] < 0.95 * errors[0]


def test_shrinkage_follows_the_number_of_tokens() -> None:
    assert shrinkage(1536, 4096) == pytest.approx(0.1875)
    assert shrinkage(384, 17_513) == pytest.approx(0.011, abs=1e-4)
    assert shrinkage(11_008, 2300) == shrinkage(1, 0) == 0.3
    assert GptqOptions(shrinkage=None).of(192, 1000) == GptqOptions(shrinkage=0.096)
    assert GptqOptions(shrinkage=0.2).of(192, 1000) == GptqOptions(shrinkage=0.2)


def test_with_many_samples_the_default_shrinks_less_and_loses_less() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, mixing = torch.randn(48, 192, generator=generator), torch.randn(192, 192, generator=generator) / 192**0.5
    many = torch.randn(20_000, 192, generator=generator) @ mixing
    hessian = many.t() @ many / len(many)
    grid_of_weight = full_range(weight, Scheme(3, 32, symmetric=False), torch.float32)
    errors: list[float] = []
    for options in (GptqOptions(shrinkage=0.1), GptqOptions(shrinkage=None).of(192, len(many))):
        rounded = round_columns(weight, Feedback.of(hessian.clone(), options), grid_of_weight).dequantize()
        errors.append(error_of(weight, rounded, mixing.t() @ mixing))
    assert errors[1] < 0.99 * errors[0]


def test_scales_are_those_that_are_stored() -> None:
    weight, hessian = problem()
    actual = round_columns(
        weight, Feedback.of(hessian, GptqOptions()), full_range(weight, Scheme(4, 32, symmetric=False), torch.bfloat16)
    )
    assert actual.scales.dtype == torch.bfloat16
    assert actual.codes.dtype == torch.uint8
    assert actual.codes.shape == weight.shape
    assert actual.scheme.group_size == 32


def test_inputs_that_are_always_zero_leave_the_nearest_code() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    scheme = Scheme(4, 32, symmetric=False)
    actual = round_columns(weight, Feedback.of(hessian, GptqOptions()), full_range(weight, scheme, torch.float32))
    assert torch.equal(actual.codes[:, 5], quantize(weight, scheme, torch.float32).codes[:, 5])


def test_a_second_moment_of_nothing_rounds_to_nearest() -> None:
    weight, _ = problem()
    scheme = Scheme(4, 32, symmetric=True)
    actual = round_columns(weight, Feedback.of(torch.zeros(192, 192), GptqOptions()), full_range(weight, scheme, torch.float32))
    assert torch.equal(actual.codes, quantize(weight, scheme, torch.float32).codes)


def test_a_singular_second_moment_is_damped_until_it_can_be_factored() -> None:
    weight, hessian = problem(tokens=3)
    scheme = Scheme(4, 32, symmetric=True)
    actual = round_columns(
        weight, Feedback.of(hessian.clone(), GptqOptions(dampening_frac=1e-9)), full_range(weight, scheme, torch.float32)
    )
    assert actual.dequantize().isfinite().all()
    nearest = quantize(weight, scheme, torch.float32).dequantize()
    assert error_of(weight, actual.dequantize(), hessian) < error_of(weight, nearest, hessian)


def test_a_second_moment_that_is_not_finite_is_told() -> None:
    weight, hessian = problem()
    hessian[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match="second moment of its inputs is not finite; convert the checkpoint to bfloat16"):
        round_columns(weight, Feedback.of(hessian, GptqOptions()), full_range(weight, Scheme(4, 32, symmetric=True), torch.float32))


def test_a_matrix_with_a_negative_direction_is_told() -> None:
    weight, _ = problem()
    hessian = torch.eye(192)
    hessian[0, 1] = hessian[1, 0] = 1e12
    with pytest.raises(CheckpointError, match="cannot be factored"):
        round_columns(weight, Feedback.of(hessian, GptqOptions()), full_range(weight, Scheme(4, 32, symmetric=True), torch.float32))


@pytest.mark.parametrize("tokens", [96, 160, 320])
def test_the_error_on_other_tokens_is_larger_by_the_optimism(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    given, others = (torch.randn(count, 64, generator=generator) for count in (tokens, 20_000))
    weight = torch.randn(256, 64, generator=generator)
    # without damping, which makes the fit weaker than least squares
    feedback = Feedback.of(given.t() @ given / tokens, GptqOptions(dampening_frac=1e-6))
    error = round_columns(weight, feedback, full_range(weight, Scheme(4, 32, symmetric=False), torch.float32)).dequantize() - weight
    seen, unseen = (float(output_errors(error, rows.t() @ rows).sum()) / len(rows) for rows in (given, others))
    assert unseen / seen == pytest.approx(optimism(64, tokens), rel=0.15)


def test_optimism_of_few_tokens_is_finite() -> None:
    assert optimism(64, 1e9) == pytest.approx(1)
    assert optimism(64, 10) == optimism(64, 0) < 5
