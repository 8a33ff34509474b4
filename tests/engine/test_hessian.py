import pytest
import torch
from torch import Tensor

from compress.engine.hessian import FULL_HESSIAN_CHANNELS, SKETCH_ROWS, FullHessian, HessianRequest, HessianSketch
from compress.numerics.rounding import PANEL, output_errors

CPU = torch.device("cpu")


def tokens(count: int, channels: int) -> Tensor:
    """Inputs with outlying channels and a mean, as a decoder has."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, generator=generator) * torch.logspace(-1, 1, channels) + 0.3


def counted(requested: HessianRequest, rows: Tensor, chunks: int = 7) -> FullHessian | HessianSketch:
    sums = requested.start(rows.shape[1], CPU)
    for chunk in torch.split(rows, -(-len(rows) // chunks)):
        sums.add(chunk)
    return sums


@pytest.mark.parametrize(
    "requested", [HessianRequest(), HessianRequest(full=False, sketch=False, block=12), HessianRequest(full=False, sketch=False)]
)
def test_the_diagonal_and_the_blocks_along_it_are_exact(requested: HessianRequest) -> None:
    rows = tokens(50, 48)
    sums = counted(requested, rows)
    assert isinstance(sums, FullHessian if requested.full else HessianSketch)
    hessian = rows.t() @ rows
    torch.testing.assert_close(sums.diagonal(), hessian.diagonal())
    for size in (size for size in (1, 4, 12) if requested.full or size <= requested.block):
        blocks = sums.blocks(size)
        assert blocks.shape == (48 // size, size, size)
        for index, block in enumerate(blocks):
            channels = slice(index * size, (index + 1) * size)
            torch.testing.assert_close(block, hessian[channels, channels], rtol=1e-5, atol=1e-3)


def test_blocks_that_cross_the_panels_of_a_whole_sum_are_symmetric() -> None:
    size = PANEL // 2 + PANEL // 4
    rows = tokens(20, 4 * size)
    torch.testing.assert_close(counted(HessianRequest(), rows).blocks(size)[1], (rows.t() @ rows)[size : 2 * size, size : 2 * size])


def test_the_output_error_by_a_sketch_is_near_the_true_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.engine.hessian.FULL_HESSIAN_CHANNELS", 0)
    rows = tokens(5000, 64)
    error = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    true = float(output_errors(error, rows.t() @ rows).sum())
    sums = counted(HessianRequest(full=False), rows)
    assert isinstance(sums, HessianSketch)
    assert len(sums.rows) < len(rows)
    assert float(sums.output_errors(error).sum()) == pytest.approx(true, rel=0.1)
    few = counted(HessianRequest(full=False), rows[:SKETCH_ROWS])
    true = float((rows[:SKETCH_ROWS] @ error.t()).square().sum())
    assert float(few.output_errors(error).sum()) == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_the_weighted_sum_of_two_is_that_of_their_tokens(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.engine.hessian.FULL_HESSIAN_CHANNELS", 0)
    requested, first, second = HessianRequest(full=full, block=4), tokens(30, 8), tokens(20, 8).flip(0, 1)
    error = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    sums = counted(requested, first)
    sums.add_weighted(counted(requested, second), 0.5, 3.0)
    both = torch.cat([first * 0.5**0.5, second * 3**0.5])
    torch.testing.assert_close(sums.diagonal(), both.square().sum(0))
    torch.testing.assert_close(sums.output_errors(error), (both @ error.t()).square().sum(dim=0))
    torch.testing.assert_close(sums.blocks(4)[1], both[:, 4:].t() @ both[:, 4:])


def test_few_channels_and_those_that_blocks_do_not_divide_are_kept_whole() -> None:
    assert isinstance(HessianRequest(full=False).start(FULL_HESSIAN_CHANNELS, CPU), FullHessian)
    assert isinstance(HessianRequest(full=False, sketch=False, block=5).start(12, CPU), FullHessian)
    assert isinstance(HessianRequest(full=False).start(FULL_HESSIAN_CHANNELS + 1, CPU), HessianSketch)


def test_what_a_method_reads_is_what_is_kept() -> None:
    from compress.numerics.gptq import GptqOptions
    from compress.numerics.scheme import Scheme
    from compress.stages.quantization.method import Method
    from compress.stages.quantization.rounders.clip import ClipSearch
    from compress.stages.quantization.rounders.gptq import GptqRounder
    from compress.stages.quantization.rounders.nearest import Nearest
    from compress.stages.quantization.transforms.awq import AwqScaling

    four, eight = Scheme(4, 64, symmetric=False), Scheme(8, 96, symmetric=True)
    awq, clipped = (AwqScaling(),), Nearest(ClipSearch())
    assert Method(awq, clipped).hessian_request([four, eight]) == HessianRequest(full=False, sketch=True, block=192)
    assert Method(awq).hessian_request([four]) == HessianRequest(full=False, sketch=True, block=1)
    assert Method().hessian_request([four]) is None
    static = Scheme(8, -1, symmetric=True, activations="tensor")
    assert Method().hessian_request([four, static]) == HessianRequest(full=False, sketch=False, block=1)
    channel = Method(rounder=clipped).hessian_request([Scheme(4, -1, symmetric=False)])
    assert channel is not None
    assert channel.full
    assert Method(rounder=GptqRounder(GptqOptions(), ClipSearch())).hessian_request([four]) == HessianRequest(True, False, 1)
