import pytest
import torch
from torch import Tensor

from compress.engine.hessian import HessianRequest, HessianSketch
from compress.families import ScalePair
from compress.numerics.gptq import GptqOptions
from compress.numerics.grids import QuantizedWeight
from compress.numerics.rounding import output_errors, quantize, rounding_error
from compress.numerics.scheme import Scheme
from compress.stages.blockwise.block import BlockWeights, divide_linear, divide_norm
from compress.stages.quantization import method as quantization
from compress.stages.quantization.method import Method, solve
from compress.stages.quantization.rounders.clip import ClipSearch
from compress.stages.quantization.rounders.gptq import GptqRounder
from compress.stages.quantization.rounders.nearest import Nearest
from compress.stages.quantization.transforms import scale_search
from compress.stages.quantization.transforms.awq import AwqScaling
from compress.stages.quantization.transforms.scale_search import GridPoint
from tests.stages.toy import HEAD_DIM, HEADS, KV_HEADS, NAMES, PAIRS, WIDTH, Block, alike, observed_inputs, samples, with_folded

AWQ = AwqScaling()


@pytest.mark.parametrize("pair", PAIRS[1:])
def test_a_folded_scale_keeps_the_function(pair: ScalePair) -> None:
    block, x = Block(), samples()
    statistics = observed_inputs(block, x)
    state = BlockWeights.of(block, NAMES, HEADS)
    AWQ.apply(state, pair, statistics, alike(Scheme(3, 8, symmetric=False)))
    (name,) = pair.balance_layers
    scale = state.smoothing_scales[name]
    assert scale.max() / scale.min() > 1.1
    with torch.no_grad():
        torch.testing.assert_close(with_folded(block, state)(x), block(x), rtol=1e-5, atol=1e-5)


def test_a_scale_folded_into_a_norm_with_bias_keeps_the_function() -> None:
    block, x = Block(), samples()
    statistics = observed_inputs(block, x)
    state = BlockWeights.of(block, NAMES, HEADS)
    AWQ.apply(state, PAIRS[0], statistics, alike(Scheme(3, 8, symmetric=False)))
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
    AWQ.apply(state, PAIRS[1], observed_inputs(block, samples()), alike(Scheme(3, 8, symmetric=False)))
    heads = state.smoothing_scales["o"].view(HEADS, HEAD_DIM)
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
    torch.testing.assert_close(state.weight("v") * scale.unsqueeze(1), block.v.weight.float())


def test_a_bias_that_its_type_cannot_hold_divided_stays() -> None:
    block = Block(torch.float16)
    block.v.bias.data[:2] = torch.tensor([60000.0, 6e-8])
    state = BlockWeights.of(block, ("v",), HEADS)
    asked = torch.full((KV_HEADS * HEAD_DIM,), 2.0)
    asked[:2] = torch.tensor([0.5, 4.0])
    scale = divide_linear(state, "v", asked)
    assert torch.equal(state.changed["v.bias"][:2], block.v.bias[:2])
    assert scale[:2].tolist() == [1, 1]
    assert torch.equal(state.weight("v")[:2], block.v.weight[:2].float())
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
    alone = GridPoint(0.75, duo).scale(magnitude, importance)
    scale = GridPoint(0.75, duo).scale(torch.cat([torch.tensor([dead]), magnitude]), torch.cat([torch.tensor([0.3]), importance]))
    torch.testing.assert_close(scale[1:] / scale[1], alone / alone[0])
    assert scale.min() > 1e-4
    assert scale.max() < 1e4


def test_channels_that_are_all_dead_are_not_scaled() -> None:
    assert torch.equal(GridPoint(0.5, duo=False).scale(torch.zeros(8), torch.ones(8)), torch.ones(8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_below_rounding_to_nearest(bits: int) -> None:
    block, x = Block(torch.bfloat16), samples()
    block_statistics = observed_inputs(block.float(), x)
    block.to(torch.bfloat16)
    scheme = Scheme(bits, 8, symmetric=False)
    names = NAMES
    state = BlockWeights.of(block, names, HEADS)
    codes = solve(state, PAIRS, block_statistics, alike(scheme), Method((AWQ,), Nearest(ClipSearch())))

    def loss(name: str, weight: Tensor) -> float:
        original = block.get_parameter(f"{name}.weight").float()
        return float(output_errors(weight - original, block_statistics[name].mean_hessian()).sum())

    total, nearest = 0.0, 0.0
    for name in ("q", "o", "down"):
        scale = state.smoothing_scales.get(name, torch.ones(1))
        total += loss(name, codes[name].dequantize() / scale)
        nearest += loss(name, quantize(block.get_parameter(f"{name}.weight"), scheme, torch.bfloat16).dequantize())
    assert total < 0.8 * nearest


def test_large_weights_are_searched_by_some_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows stand for all: their shares add up to the linears' rows, and the scale they choose is nearly as good."""
    block, schemes = Block(), alike(Scheme(3, 8, symmetric=False))
    inputs = observed_inputs(block, samples())
    rows = len(block.q.weight) + len(block.v.weight)

    def loss(scale: Tensor) -> float:
        errors = (rounding_error(layer.weight * scale, schemes["q"], torch.float32) / scale for layer in (block.q, block.v))
        return sum(map(inputs["q"].output_error, errors))

    losses = [loss(torch.ones(WIDTH))]
    for fewest, sample in ((scale_search.MIN_SAMPLE_ROWS, scale_search.SAMPLE_ELEMENTS), (24, 0)):
        monkeypatch.setattr(scale_search, "MIN_SAMPLE_ROWS", fewest)
        monkeypatch.setattr(scale_search, "SAMPLE_ELEMENTS", sample)
        state = BlockWeights.of(block, NAMES, HEADS)
        row_groups = scale_search.sample_rows(state, PAIRS[0], schemes)
        assert sum(len(group.weight) for group in row_groups) == (rows if sample else 24)
        assert sum(len(group.weight) * group.sample_weight for group in row_groups) == pytest.approx(rows)
        AWQ.apply(state, PAIRS[0], inputs, schemes)
        losses.append(loss(state.smoothing_scales["q"]))
    unscaled, by_all, by_some = losses
    assert by_all <= by_some <= 1.2 * by_all < unscaled


def test_a_scale_is_found_as_well_by_a_sketch_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    block, schemes = Block(), alike(Scheme(3, 8, symmetric=False))
    full = observed_inputs(block, samples(3000))
    monkeypatch.setattr("compress.engine.hessian.FULL_HESSIAN_CHANNELS", 0)
    sketched = observed_inputs(block, samples(3000), HessianRequest(full=False, block=8))
    assert isinstance(sketched["q"].text.hessian, HessianSketch)  # pyright: ignore[reportOptionalMemberAccess]
    errors: list[float] = []
    for inputs in (full, sketched):
        state = BlockWeights.of(block, NAMES, HEADS)
        codes = solve(state, PAIRS, inputs, schemes, Method((AWQ,), Nearest(ClipSearch())))
        original = block.down.weight
        rounded = codes["down"].dequantize() / state.smoothing_scales["down"]
        source = state.output_scales["up"]
        assert torch.equal(source, state.smoothing_scales["down"])
        errors.append(full["down"].output_error(rounded - original))
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("left_out", ["v", "o"])
def test_a_pair_with_a_part_left_out_stays_as_it_is(left_out: str) -> None:
    block = Block()
    state = BlockWeights.of(block, [name for name in ("v", "o") if name != left_out], HEADS)
    AWQ.apply(state, PAIRS[1], observed_inputs(block, samples()), alike(Scheme(3, 8, symmetric=False)))
    assert state.changed == {}
    assert state.smoothing_scales == {}


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    block, x = Block(), samples()
    with torch.no_grad():
        block.norm.weight[:4] = 0
        block.norm.bias[:4] = 0
    state = BlockWeights.of(block, NAMES, HEADS)
    codes = solve(
        state, PAIRS, observed_inputs(block, x), alike(Scheme(4, 8, symmetric=False)), Method((AWQ,), Nearest(ClipSearch()))
    )
    assert all(code.dequantize().isfinite().all() for code in codes.values())
    assert all(value.isfinite().all() for value in state.changed.values())


@pytest.mark.parametrize(
    "method", [Method(rounder=Nearest(ClipSearch(8))), Method(rounder=GptqRounder(GptqOptions(), ClipSearch(8)))]
)
def test_rows_are_rounded_a_few_at_a_time_as_all_at_once(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs, schemes = Block(), observed_inputs(Block(), samples()), alike(Scheme(3, 8, symmetric=True))
    actual: list[dict[str, QuantizedWeight]] = []
    for elements in (1 << 20, 5 * WIDTH):  # 5 rows of q, then of q and v together
        monkeypatch.setitem(quantization.MAX_ELEMENTS, "cpu", elements)
        actual.append(solve(BlockWeights.of(block, NAMES, HEADS), (), inputs, schemes, method))
    assert actual[0].keys() == actual[1].keys() == set(NAMES)
    for name, full in actual[0].items():
        batched = actual[1][name]
        assert torch.equal(batched.codes, full.codes)
        assert torch.equal(batched.scales, full.scales)
        assert batched.zero_points is not None
        assert torch.equal(batched.zero_points, full.zero_points if full.zero_points is not None else batched.codes)
