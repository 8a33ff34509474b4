"""Planned checkpoints equal those on disk: config, and the type, shape and scheme of every tensor."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import difference, spec_of
from compress.numerics.scheme import Scheme
from compress.stages import STAGES
from compress.stages.llmcompressor.stage import Llmcompressor
from compress.stages.quantization.quantizer import Quantizer
from compress.stages.stage import Stage
from tests.stages.bench import Bench, dense, prepare, tensors_of
from tests.stages.variants import quantizers, stage_named, stage_of
from tests.tiny import BUILDERS

VISION = {"component": "vision", "bits": 8, "group_size": -1, "symmetric": True}
CHEAP: dict[str, tuple[dict[str, Any], ...]] = {
    "rtn": (
        {"symmetric": True, "kv_cache": "fp8"},
        {"bits": 3, "group_size": -1},
        {"targets": ["decoder", VISION]},
    ),
    "fp8": ({"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "block"}),
    "int8": ({"smoothing": "none", "rounding": "nearest", "activations": "tensor"}, {"rounding": "nearest", "smoothing": 0.5}),
    "awq": ({"grid": 1, "targets": ["decoder", "lm_head", "projector"]},),
    "gptq": ({"scales": "awq", "grid": 1},),
}
"""Settings of stages that are tried beside their defaults, or in their place: every storage format, strategy and scale."""

PLANNED = [name for name in STAGES if stage_named(name) is not Llmcompressor]
"""The stages whose result a plan knows."""

SWITCHED = list(quantizers())


def check(bench: Bench, target: Path, *stages: Stage) -> None:
    """Apply stages one after the other, and check that each leaves what was planned before the first ran."""
    before = spec_of(bench.checkpoint, bench.family)
    source = bench
    for number, stage in enumerate(stages):
        plan = stage.plan(before)
        assert plan.faults == ()
        (before,) = plan.after
        folder = source.apply(target / str(number), stage)
        written = spec_of(open_checkpoint(folder), bench.family)
        assert difference(before, written) is None
        assert before == written
        assert plan.max_bytes == written.weight_bytes == open_checkpoint(folder).weight_bytes
        source = Bench(folder, bench.calibration)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"symmetric": True}, True),
        ({"symmetric": True, "bits": "auto", "budget": {"bits_per_weight": 6}}, True),
        ({"targets": ["decoder", {"component": "projector", "symmetric": True}]}, True),
        ({"symmetric": True, "bits": 8}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_what_symmetric_grids_of_few_bits_cost_is_noted(bench: Bench, name: str, fields: dict[str, Any], told: bool) -> None:
    plan = stage_of(name, **fields).plan(spec_of(bench.checkpoint, bench.family))
    assert plan.faults == ()
    assert [note for note in plan.notes if "symmetric: false" in note] == list(plan.notes)
    assert bool(plan.notes) == told


@pytest.mark.parametrize("stage", SWITCHED, ids=[stage.stage for stage in SWITCHED])
def test_a_plan_asks_for_samples_where_the_method_reads_them(stage: Quantizer) -> None:
    read = stage.method().hessian_request([Scheme(4, 32, symmetric=True)])
    assert stage.uses_statistics() == (read is not None)


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name in PLANNED for fields in CHEAP.get(name, ({},))])
def test_what_a_stage_leaves_is_what_was_planned(bench: Bench, tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    check(bench, tmp_path, stage_of(name, **fields))


@pytest.mark.parametrize("family", [name for name in BUILDERS if name != "qwen2.5-vl"])
def test_every_family_keeps_to_the_plan(tmp_path: Path, family: str) -> None:
    bench = prepare(tmp_path, BUILDERS[family](tmp_path / "model"))
    kv_cache = None if bench.family.head is None else "fp8"
    check(bench, tmp_path, stage_of("rtn", kv_cache=kv_cache, targets=["decoder", VISION]))


CHAIN: tuple[dict[str, Any], ...] = (
    {"stage": "int8", "targets": ["vision"], "smoothing": "none", "rounding": "nearest"},
    {"stage": "awq", "bits": 4, "group_size": 32, "grid": 2, "balance": "auto"},
)


def test_two_quantizers_on_different_components_are_a_legal_chain(bench: Bench, tmp_path: Path) -> None:
    first, second = (stage_of(**fields) for fields in CHAIN)
    check(bench, tmp_path, first, second)
    once, twice = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "1")
    tower = [name for name in once if name.startswith("visual.")]
    assert tower and all(torch.equal(once[name], twice[name]) for name in tower)
    (fault,) = (
        second.model_copy(update={"targets": ("decoder", "vision")})
        .plan(*first.plan(spec_of(bench.checkpoint, bench.family)).after)
        .faults
    )
    assert ": quantized already; start from the model's original, target other components" in fault


FIRST: dict[str, dict[str, Any]] = {
    "weights": {"stage": "rtn", "bits": 3, "group_size": 32},
    "weights and inputs": {"stage": "int8", "smoothing": "none", "rounding": "nearest"},
}


@pytest.mark.parametrize("rounds", FIRST)
def test_a_second_quantizer_sees_what_the_first_one_made(bench: Bench, tmp_path: Path, rounds: str) -> None:
    rounded = bench.apply(tmp_path / "rounded", stage_of(**FIRST[rounds], targets=["vision"]))
    plain = tmp_path / "plain"  # the same weights, written out
    shutil.copytree(bench.folder, plain)
    before, after = tensors_of(bench.folder), dense(rounded)
    names = {bench.family.module_name(name): name for name in before}
    save_file(
        {names[name]: value.to(before[names[name]].dtype) for name, value in after.items()},
        plain / "model.safetensors",
        metadata={"format": "pt"},
    )
    gptq = stage_of("gptq")
    chained = tensors_of(Bench(rounded, bench.calibration).apply(tmp_path / "chained", gptq))
    alone = tensors_of(Bench(plain, bench.calibration).apply(tmp_path / "alone", gptq))
    decoder = [name for name in alone if ".layers." in name and "visual" not in name]
    equal = [torch.equal(chained[name], alone[name]) for name in decoder]
    assert equal and (all(equal) if rounds == "weights" else not all(equal))


def test_a_difference_is_named(bench: Bench) -> None:
    spec = spec_of(bench.checkpoint, bench.family)
    (four,) = stage_of("rtn").plan(spec).after
    (eight,) = stage_of("rtn", bits=8).plan(spec).after
    assert "weight_packed was planned as TensorSpec(dtype='I32'" in (difference(four, eight) or "")
    assert difference(four, four) is None
