import pytest
import torch
from torch import Tensor

from compress.families import Pair
from compress.numerics.rounding import output_error, quantize
from compress.numerics.scheme import Scheme
from compress.stages import awq_solver
from compress.stages.awq_solver import Point, fold
from compress.stages.block import BlockWeights, divide_linear, divide_norm
from compress.stages.solvers import Method, solve
from tests.stages.toy import HEAD_DIM, HEADS, KV_HEADS, NAMES, PAIRS, WIDTH, Block, alike, samples, statistics, with_folded


@pytest.mark.parametrize("pair", PAIRS[1:])
def test_a_folded_scale_keeps_the_function(pair: Pair) -> None:
    block, x = Block(), samples()
    moments = statistics(block, x)
    state = BlockWeights.of(block, NAMES, HEADS)
    fold(state, pair, moments, alike(Scheme(3, 8, symmetric=False)), 20)
    (name,) = pair.linears
    scale = state.input_scales[name]
    assert scale.max() / scale.min() > 1.1
    with torch.no_grad():
        torch.testing.assert_close(with_folded(block, state)(x), block(x), rtol=1e-5, atol=1e-5)


def test_a_scale_folded_into_a_norm_with_bias_keeps_the_function() -> None:
    block, x = Block(), samples()
    moments = statistics(block, x)
    state = BlockWeights.of(block, NAMES, HEADS)
    fold(state, PAIRS[0], moments, alike(Scheme(3, 8, symmetric=False)), 20)
    folded = with_folded(block, state)
    with torch.no_grad():
        for name in ("q", "v"):
            before = block.get_submodule(name)(block.norm(x))
            after = folded.get_submodule(name)(folded.norm(x))
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(folded.norm.weight, block.norm.weight)


def test_grouped_heads_share_their_source_channels_scale() -> None:
    block = Block()
    state = BlockWeights.of(block, NAMES, HEADS)
    fold(state, PAIRS[1], statistics(block, samples()), alike(Scheme(3, 8, symmetric=False)), 20)
    heads = state.input_scales["o"].view(HEADS, HEAD_DIM)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert not torch.equal(heads[0], heads[2])


def test_the_scale_is_what_the_stored_norm_was_really_divided_by() -> None:
    block = Block(torch.bfloat16)
    block.norm.weight.data[3] = 0
    state = BlockWeights.of(block, ("q",), HEADS)
    asked = torch.linspace(0.3, 3, WIDTH)
    scale = divide_norm(state, "norm", asked)
    stored = state.changed["norm.weight"]
    assert stored.dtype == torch.bfloat16
    alive = torch.arange(WIDTH) != 3
    assert torch.equal((stored.float() * scale).to(torch.bfloat16), block.norm.weight)
    torch.testing.assert_close(scale[alive], asked[alive], rtol=1 / 128, atol=0)
    assert scale[3] == 1
    assert stored[3] == 0


def test_a_linear_is_divided_by_what_its_stored_bias_was_divided_by() -> None:
    block = Block(torch.bfloat16)
    block.v.bias.data[1] = 0
    state = BlockWeights.of(block, ("v",), HEADS)
    asked = torch.linspace(0.3, 3, KV_HEADS * HEAD_DIM)
    scale = divide_linear(state, "v", asked)
    assert torch.equal((state.changed["v.bias"].float() * scale).to(torch.bfloat16), block.v.bias)
    assert scale[1] == asked[1]
    torch.testing.assert_close(state.weights["v"] * scale.unsqueeze(1), block.v.weight.float())


def test_a_bias_that_its_type_cannot_hold_divided_stays() -> None:
    block = Block(torch.float16)
    block.v.bias.data[:2] = torch.tensor([60000.0, 6e-8])
    state = BlockWeights.of(block, ("v",), HEADS)
    asked = torch.full((KV_HEADS * HEAD_DIM,), 2.0)
    asked[:2] = torch.tensor([0.5, 4.0])
    scale = divide_linear(state, "v", asked)
    assert torch.equal(state.changed["v.bias"][:2], block.v.bias[:2])
    assert scale[:2].tolist() == [1, 1]
    assert torch.equal(state.weights["v"][:2], block.v.weight[:2].float())
    torch.testing.assert_close(scale[2:], asked[2:], rtol=1e-2, atol=0)


def test_a_norm_whose_bias_cannot_be_held_divided_stays() -> None:
    block = Block(torch.float16)
    block.norm.bias.data[3] = 60000
    state = BlockWeights.of(block, ("q",), HEADS)
    scale = divide_norm(state, "norm", torch.full((WIDTH,), 0.5))
    assert scale[3] == 1
    assert state.changed["norm.bias"][3] == 60000
    assert state.changed["norm.weight"][3] == block.norm.weight[3]
    assert torch.equal(state.changed["norm.weight"][4:], block.norm.weight[4:] * 2)


def test_a_norm_stored_wider_than_it_runs_is_exact_in_both_types() -> None:
    block = Block(torch.bfloat16)
    stored = torch.linspace(0.5, 2, WIDTH)
    state = BlockWeights.of(block, ("q",), HEADS, {"norm.weight": stored})
    scale = divide_norm(state, "norm", torch.linspace(0.3, 3, WIDTH))
    new = state.changed["norm.weight"]
    assert new.dtype == torch.float32
    assert torch.equal(new, new.to(torch.bfloat16).float())
    torch.testing.assert_close(new * scale, stored, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dead", [0.0, 1e-20])
@pytest.mark.parametrize("duo", [False, True])
def test_a_dead_channel_leaves_the_others_their_scales(dead: float, duo: bool) -> None:
    magnitude, importance = torch.logspace(-2, 1, 64), torch.linspace(0.2, 0.6, 64)
    alone = Point(0.75, duo).scale(magnitude, importance)
    scale = Point(0.75, duo).scale(torch.cat([torch.tensor([dead]), magnitude]), torch.cat([torch.tensor([0.3]), importance]))
    torch.testing.assert_close(scale[1:] / scale[1], alone / alone[0])
    assert scale.min() > 1e-4
    assert scale.max() < 1e4


def test_channels_that_are_all_dead_are_not_scaled() -> None:
    assert torch.equal(Point(0.5, duo=False).scale(torch.zeros(8), torch.ones(8)), torch.ones(8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_below_rounding_to_nearest(bits: int) -> None:
    block, x = Block(torch.bfloat16), samples()
    block_moments = statistics(block.float(), x)
    block.to(torch.bfloat16)
    scheme = Scheme(bits, 8, symmetric=False)
    names = NAMES
    state = BlockWeights.of(block, names, HEADS)
    codes = solve(state, PAIRS, block_moments, alike(scheme), Method(scales=20, clip=20))

    def loss(name: str, weight: Tensor) -> float:
        original = block.get_parameter(f"{name}.weight").float()
        return float(output_error(weight - original, block_moments[name].mean_gram()))

    total, nearest = 0.0, 0.0
    for name in ("q", "o", "down"):
        scale = state.input_scales.get(name, torch.ones(1))
        total += loss(name, codes[name].dequantize() / scale)
        nearest += loss(name, quantize(block.get_parameter(f"{name}.weight"), scheme, torch.bfloat16).dequantize())
    assert total < 0.8 * nearest


def test_large_weights_are_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    block, scheme = Block(), alike(Scheme(3, 8, symmetric=False))
    given = statistics(block, samples())
    found: list[Tensor] = []
    for limit in (awq_solver._PART, 5 * WIDTH):  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(awq_solver, "_PART", limit)
        state = BlockWeights.of(block, NAMES, HEADS)
        fold(state, PAIRS[0], given, scheme, 20)
        found.append(state.input_scales["q"])
        assert (len(awq_solver.parts_of(state, PAIRS[0], scheme)) > 1) == (limit == 5 * WIDTH)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("left_out", ["v", "o"])
def test_a_pair_with_a_part_left_out_stays_as_it_is(left_out: str) -> None:
    block = Block()
    state = BlockWeights.of(block, [name for name in ("v", "o") if name != left_out], HEADS)
    fold(state, PAIRS[1], statistics(block, samples()), alike(Scheme(3, 8, symmetric=False)), 20)
    assert state.changed == {}
    assert state.input_scales == {}


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    block, x = Block(), samples()
    with torch.no_grad():
        block.norm.weight[:4] = 0
        block.norm.bias[:4] = 0
    state = BlockWeights.of(block, NAMES, HEADS)
    codes = solve(state, PAIRS, statistics(block, x), alike(Scheme(4, 8, symmetric=False)), Method(scales=20, clip=20))
    assert all(code.dequantize().isfinite().all() for code in codes.values())
    assert all(value.isfinite().all() for value in state.changed.values())
