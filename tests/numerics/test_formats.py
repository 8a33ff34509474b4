"""Rounding and packing on drawn shapes and widths, beside compressed-tensors' own code and the formats' descriptions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.checkpoints.layouts import pack_linear, quantization_config
from compress.numerics.activations import fake_quantize_activations
from compress.numerics.floats import expand_scales, float_scales
from compress.numerics.grids import QuantizedWeight
from compress.numerics.packing import pack_gptq, pack_words, unpack_gptq, unpack_words
from compress.numerics.rounding import quantize, rounding_error
from compress.numerics.scheme import Activations, Scheme
from compress.runtimes import activations as reader

repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)

BITS = st.sampled_from([2, 3, 4, 8])
SEEDS = st.integers(0, 2**31)
SPREADS = st.sampled_from([1e-3, 0.05, 1.0, 300.0])
FLOATS = (
    Scheme(8, -1, symmetric=True, type="float", activations="token"),
    Scheme(8, -1, symmetric=True, type="float", block_rows=-1, activations="tensor"),
    Scheme(8, 128, symmetric=True, type="float", block_rows=128, activations="group"),
)


@dataclass(frozen=True)
class Drawn:
    """A random matrix and how it is to be held."""

    weight: Tensor
    scheme: Scheme


def draw_matrix(rows: int, columns: int, seed: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * spread


@st.composite
def integers(draw: st.DrawFn, bits: st.SearchStrategy[int] = BITS, symmetric: bool | None = None) -> Drawn:
    """Draw a matrix of any shape with a group size that divides it, or one scale per row."""
    groups, size, rows = draw(st.integers(1, 6)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    integral = draw(st.booleans())
    balanced = draw(st.booleans()) if symmetric is None else symmetric
    weight = draw_matrix(rows, groups * size, draw(SEEDS), draw(SPREADS))
    return Drawn(weight, Scheme(draw(bits), -1 if integral else size, balanced))


@st.composite
def floats(draw: st.DrawFn) -> Drawn:
    """Draw a matrix for 8-bit floats; it need not be made of whole blocks."""
    weight = draw_matrix(draw(st.integers(1, 300)), draw(st.integers(1, 300)), draw(SEEDS), draw(SPREADS))
    return Drawn(weight, draw(st.sampled_from(FLOATS)))


def group_of(scheme: Scheme) -> Any:
    """Return the library's own reading of the config that we write for a scheme."""
    config: Any = QuantizationConfig.model_validate(quantization_config({"a.proj": scheme}, ignore=[]))
    return config.config_groups["group_0"]


def signed(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the codes and zero points as compressed-tensors counts them: from minus half of the levels."""
    assert weight.zero_points is not None
    half = weight.scheme.levels // 2
    return weight.codes.to(torch.int16) - half, weight.zero_points.to(torch.int16) - half


def far_from_a_tie(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return where a value is not so near the middle of two codes that the last bit of a float decides between them."""
    steps = (weight / expand_scales(quantized.scales, quantized.scheme, (weight.shape[0], weight.shape[1]))).abs()
    return (steps - steps.floor() - 0.5).abs() > 1e-3


@repeatable
@given(integers())
def test_scales_and_zero_points_are_those_of_compressed_tensors(drawn: Drawn) -> None:
    actual = quantize(drawn.weight, drawn.scheme, torch.float32)
    groups = drawn.weight.view(drawn.weight.shape[0], -1, actual.scheme.group_size)
    scales, zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), group_of(drawn.scheme).weights)
    torch.testing.assert_close(actual.scales, scales, rtol=1e-6, atol=0)
    if not drawn.scheme.symmetric:
        assert int((signed(actual)[1] - zero_points.to(torch.int16)).abs().max()) <= 1
    else:
        assert not signed(actual)[1].any()


@repeatable
@given(integers())
def test_the_library_packs_the_same_words(drawn: Drawn) -> None:
    actual = quantize(drawn.weight, drawn.scheme, torch.float32)
    codes, zero_points = signed(actual)
    # What it is to round lies in the middle of our codes, so that both must choose the same.
    middles = actual.dequantize()
    tensors = {"weight": middles, "weight_scale": actual.scales, "weight_zero_point": zero_points.to(torch.int8)}
    reference = PackedQuantizationCompressor.compress(tensors, group_of(drawn.scheme))
    packed = {name.removeprefix("proj."): tensor for name, tensor in pack_linear("proj", actual).items()}
    assert torch.equal(packed["weight_packed"], reference["weight_packed"])
    assert torch.equal(packed["weight_shape"], reference["weight_shape"])
    if not drawn.scheme.symmetric:
        assert torch.equal(packed["weight_zero_point"], reference["weight_zero_point"])
    rows, columns = codes.shape
    assert torch.equal(unpack_words(packed["weight_packed"], drawn.scheme.bits, columns).view(rows, columns), actual.codes)


@repeatable
@given(integers(bits=st.just(8), symmetric=True))
def test_the_library_rounds_to_the_same_8_bit_integers(drawn: Drawn) -> None:
    scheme = replace(drawn.scheme, group_size=-1, activations="token")
    actual = quantize(drawn.weight, scheme, torch.float32)
    reference = IntQuantizationCompressor.compress({"weight": drawn.weight, "weight_scale": actual.scales}, group_of(scheme))
    clear = far_from_a_tie(drawn.weight, actual)
    assert torch.equal(pack_linear("proj", actual)["proj.weight"][clear], reference["weight"][clear])


@repeatable
@given(floats())
def test_the_library_rounds_to_the_same_8_bit_floats(drawn: Drawn) -> None:
    actual = quantize(drawn.weight, drawn.scheme, torch.float32)
    reference = FloatQuantizationCompressor.compress(
        {"weight": drawn.weight, "weight_scale": actual.scales}, group_of(drawn.scheme)
    )
    assert actual.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(actual.codes.view(torch.uint8), reference["weight"].contiguous().view(torch.uint8))


@repeatable
@given(floats())
def test_float_scales_bring_the_largest_value_of_each_part_to_the_largest_float(drawn: Drawn) -> None:
    rows, columns = drawn.weight.shape
    scales = float_scales(drawn.weight, drawn.scheme, torch.float32)
    assert scales.shape == (drawn.scheme.scale_rows(rows), drawn.scheme.groups(columns))
    codes = quantize(drawn.weight, drawn.scheme, torch.float32).codes.to(torch.float32)
    height = rows if drawn.scheme.block_rows == -1 else drawn.scheme.block_rows
    width = columns if drawn.scheme.group_size == -1 else drawn.scheme.group_size
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            assert codes[row : row + height, column : column + width].abs().max() == 448
    if drawn.scheme.block_rows == 1:
        reference, _ = calculate_qparams(drawn.weight.amin(1, True), drawn.weight.amax(1, True), group_of(drawn.scheme).weights)
        assert torch.equal(scales, reference)


@repeatable
@given(floats())
def test_floats_are_as_near_as_three_bits_of_mantissa_allow(drawn: Drawn) -> None:
    actual = quantize(drawn.weight, drawn.scheme, torch.bfloat16)
    error = (actual.dequantize() - drawn.weight).abs()
    steps = expand_scales(actual.scales, actual.scheme, (drawn.weight.shape[0], drawn.weight.shape[1]))
    # Half a unit in the last of four places, or of the subnormal step 2^-9; a scale rounded to bfloat16 may cut the largest short.
    assert (error <= (drawn.weight.abs() / 16).maximum(steps * 2**-10) * 1.01).all()
    assert torch.equal(rounding_error(drawn.weight, drawn.scheme, torch.bfloat16), actual.dequantize() - drawn.weight)


def test_zeros_and_values_beyond_the_range_are_held() -> None:
    for scheme in (Scheme(8, -1, True, "float"), Scheme(8, 128, True, "float", 128), Scheme(8, -1, True, "float", -1)):
        zeros = quantize(torch.zeros(3, 5), scheme, torch.bfloat16)
        assert torch.equal(zeros.dequantize(), torch.zeros(3, 5))
        assert zeros.scales.unique().tolist() == [1.0]
    clipped = quantize(torch.tensor([[1.0, -4.0]]), Scheme(8, -1, True, "float"), torch.float32, shrink=0.5)
    assert clipped.dequantize().tolist() == [[1.0, -2.0]]


@repeatable
@given(st.sampled_from([4, 8]), st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_gptq_words_are_those_of_compressed_tensors_transposed(bits: int, words: int, rows: int, seed: int) -> None:
    columns = words * 32 // bits
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_gptq(codes, bits)
    assert packed.shape == (columns * bits // 32, rows)
    assert torch.equal(packed, pack_words(codes, bits).t())
    assert torch.equal(unpack_gptq(packed, bits), codes)
    per_word = 32 // bits
    for index in range(per_word):  # field i of word r, lowest first, is input channel r · (fields per word) + i
        fields = (packed >> (bits * index)) & ((1 << bits) - 1)
        assert torch.equal(fields, codes[:, index::per_word].t().to(torch.int32))


@st.composite
def inputs(draw: st.DrawFn, columns: st.SearchStrategy[int]) -> Tensor:
    """Draw activations [samples, tokens, channels], one token of them zero."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(columns))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(SEEDS))) * draw(SPREADS)
    values[0, 0] = 0
    return values


@repeatable
@given(inputs(st.integers(1, 3).map(lambda groups: 128 * groups)), st.sampled_from(["token", "group"]))
def test_inputs_round_to_floats_as_the_library_rounds_them(values: Tensor, kind: Activations) -> None:
    quantization = next(scheme for scheme in FLOATS if scheme.activations == kind)
    arguments = group_of(quantization).input_activations
    scales, zero_points = compute_dynamic_scales_and_zp(values, arguments, torch.nn.Module())
    reference = fake_quantize(values, scales, zero_points, arguments)
    torch.testing.assert_close(reader.fake_quantize_activations(values, kind, "float", 8, None), reference, rtol=1e-6, atol=0)


@repeatable
@given(inputs(st.integers(1, 300)), st.sampled_from(["int", "float"]))
def test_inputs_round_by_a_fixed_scale_as_the_library_rounds_them(values: Tensor, kind: Any) -> None:
    arguments = group_of(Scheme(8, -1, True, kind, -1 if kind == "float" else 1, "tensor")).input_activations
    scale = torch.tensor([0.02])
    reference = fake_quantize(values, scale, torch.zeros(1), arguments)
    assert torch.equal(reader.fake_quantize_activations(values, "tensor", kind, 8, scale), reference)


@repeatable
@given(inputs(st.integers(1, 300)))
def test_tokens_round_to_integers_with_127_for_the_largest(values: Tensor) -> None:
    rounded = reader.fake_quantize_activations(values, "token", "int", 8, None)
    largest = values.abs().amax(-1, keepdim=True)
    codes = rounded / torch.where(largest == 0, 1, largest / 127)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    torch.testing.assert_close(rounded.abs().amax(-1, keepdim=True), largest)
    assert ((rounded - values).abs() <= largest / 127 * 0.5001).all()
    assert not rounded[0, 0].any()
    assert reader.fake_quantize_activations(values.bfloat16(), "token", "int", 8, None).dtype == torch.bfloat16


@repeatable
@given(inputs(st.integers(1, 300)))
def test_a_last_group_may_be_narrower_than_128_channels(values: Tensor) -> None:
    rounded = reader.fake_quantize_activations(values, "group", "float", 8, None)
    starts = range(0, values.shape[-1], 128)
    chunks = [reader.fake_quantize_activations(values[..., start : start + 128], "token", "float", 8, None) for start in starts]
    assert torch.equal(rounded, torch.cat(chunks, dim=-1))


@repeatable
@given(inputs(st.integers(1, 300)), st.sampled_from(["token", "group", "tensor"]), st.sampled_from(["int", "float"]))
def test_a_stage_rounds_inputs_as_what_reads_its_artifact_does(values: Tensor, kind: Any, sort: Any) -> None:
    """Two programs of the same: neither calls the other, so that a mistake in one is a difference between them."""
    scheme = Scheme(8, 128 if kind == "group" else -1, True, sort, 128 if kind == "group" else 1, kind)
    scale = torch.tensor([0.02]) if kind == "tensor" else None
    for given_values in (values, values.bfloat16()):
        actual = fake_quantize_activations(given_values, scheme, scale)
        assert torch.equal(actual, reader.fake_quantize_activations(given_values, kind, sort, 8, scale))
        assert actual.dtype == given_values.dtype


def test_a_stage_needs_the_scale_that_is_fixed() -> None:
    with pytest.raises(ValueError, match="activations with a static scale cannot be quantized without it"):
        fake_quantize_activations(torch.ones(2, 2), Scheme(8, -1, symmetric=True, activations="tensor"))
