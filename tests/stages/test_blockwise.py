"""The harness with a method that quantizes nothing: it prunes by magnitude, and what it leaves can then be quantized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.checkpoints.spec import spec_of
from compress.engine.hessian import HessianRequest
from compress.engine.planned_shards import PlannedShards
from compress.engine.replay import BlockVisit
from compress.engine.statistics import InputStatistics
from compress.engine.weights import set_tensor
from compress.progress import Silent
from compress.stages.blockwise.block import BlockWeights, input_square
from compress.stages.blockwise.harness import Blockwise
from compress.stages.blockwise.run import BlockContext, StageRun
from compress.stages.linears import select
from compress.stages.quantization.gptq import Gptq
from compress.stages.quantization.quantize import quantize_linears
from compress.stages.stage import StageContext
from tests.stages.bench import Bench, dense, tensors_of


class KilledError(Exception):
    pass


@dataclass
class Pruner:
    """Keeps the half of each row's weights with the largest |w|·‖x‖ (Wanda, arXiv 2306.11695)."""

    blocks: int | None = None
    """Blocks after which it is killed."""

    solved: list[str] = field(default_factory=lambda: list[str]())

    def request(self, names: Sequence[str]) -> HessianRequest:
        del names
        return HessianRequest(full=False, sketch=False)

    def solve(self, context: BlockContext, block: BlockWeights, statistics: Mapping[str, InputStatistics]) -> dict[str, Tensor]:
        if len(self.solved) == self.blocks:
            raise KilledError
        self.solved.append(context.visit.name)
        pruned: dict[str, Tensor] = {}
        for name, local in context.local.items():
            score = block.weight(local).abs() * input_square(block, local, statistics[local]).sqrt()
            kept = torch.zeros_like(score).scatter_(1, score.topk(score.shape[1] // 2).indices, 1)
            pruned[name] = block.weights[local] * kept.to(block.weights[local])
        return pruned

    def pack(self, name: str, result: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight": result}

    def unpack(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        return read(f"{name}.weight")

    def load(self, module: nn.Module, result: Tensor) -> None:
        set_tensor(module, "weight", result)

    def observes(self, unit: str) -> bool:
        del unit
        return False

    def observe(self, visit: BlockVisit) -> dict[str, Tensor]:
        raise AssertionError(visit.name)


def run_of(bench: Bench, target: Path) -> StageRun:
    target.mkdir(exist_ok=True)
    selection = select(spec_of(bench.checkpoint, bench.family), ("decoder",), ())
    context = StageContext(bench.folder, target, bench.calibration, bench.family, "cpu", 0, Silent())
    return StageRun("prune", context, bench.checkpoint, {linear.name: linear for linear in selection.linears})


def prune(bench: Bench, target: Path, pruner: Pruner) -> Path:
    run = run_of(bench, target)
    shards = PlannedShards.lay_out(run.work, spec_of(run.checkpoint, run.family).tensors)
    shards.create(target)
    blockwise = Blockwise(run, pruner, {name: linear.disk_name for name, linear in run.targeted.items()}, shards)
    blockwise.walk()
    blockwise.write(run.checkpoint.config, {})
    return target


@pytest.fixture(scope="module")
def pruned(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(bench, tmp_path_factory.mktemp("pruned") / "whole", Pruner())


def test_a_pruner_leaves_a_checkpoint_of_the_same_spec(bench: Bench, pruned: Path) -> None:
    assert spec_of(open_checkpoint(pruned), bench.family) == spec_of(bench.checkpoint, bench.family)
    before, after = tensors_of(bench.folder), tensors_of(pruned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 3 * 7
    for name in changed:
        assert float((after[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        assert torch.equal(after[name], torch.where(after[name] == 0, 0, before[name]))


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_killed_pruner_goes_on_at_its_block_and_ends_the_same(bench: Bench, pruned: Path, tmp_path: Path, blocks: int) -> None:
    with pytest.raises(KilledError):
        prune(bench, tmp_path / "out", Pruner(blocks))
    rest = Pruner()
    prune(bench, tmp_path / "out", rest)
    assert len(rest.solved) == 3 - blocks
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in pruned.iterdir()}
    for path in pruned.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_zeros_that_are_a_pattern_stay_when_the_rest_is_quantized(bench: Bench, pruned: Path, tmp_path: Path) -> None:
    stage = Gptq(stage="gptq", bits=4, group_size=32, symmetric=False)
    zeros: dict[bool, float] = {}
    for sparse in (False, True):
        target = tmp_path / str(sparse)
        target.mkdir()
        context = StageContext(pruned, target, bench.calibration, bench.family, "cpu", 0, Silent())
        quantize_linears(stage, context, sparse=frozenset(run_of(bench, target).targeted) if sparse else frozenset())
        rounded = dense(target)
        kept = [
            rounded[bench.family.module_name(f"{name}.weight")][tensors_of(pruned)[f"{name}.weight"] == 0]
            for name in quantized_linears(open_checkpoint(target))
        ]
        zeros[sparse] = float((torch.cat(kept) == 0).float().mean())
    assert zeros[True] == 1
    assert zeros[False] < 0.95  # error feedback moves them where nothing holds them
