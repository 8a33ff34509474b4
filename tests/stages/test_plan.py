"""Planned checkpoints equal those on disk: config, and the type, shape and scheme of every tensor."""

from pathlib import Path
from typing import Any, cast

import pytest

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import difference, spec_of
from compress.recipe.schema import load_row
from compress.stages import STAGES
from compress.stages.stage import Stage
from tests.stages.bench import Bench, prepare
from tests.tiny import BUILDERS

INTEGERS = {"bits": 4, "group_size": 32}
VISION = {"component": "vision", "bits": 8, "group_size": -1, "symmetric": True}
CHEAP: dict[str, tuple[dict[str, Any], ...]] = {
    "rtn": (
        INTEGERS | {"symmetric": True, "kv_cache": "fp8"},
        {"bits": 3, "group_size": -1},
        INTEGERS | {"targets": ["decoder", VISION]},
    ),
    "fp8": ({"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "block"}),
    "hqq": (INTEGERS,),
    "int8": ({"smoothing": "none", "rounding": "nearest", "activations": "tensor"}, {"rounding": "nearest", "smoothing": 0.5}),
    "awq": (INTEGERS | {"grid": 1, "targets": ["decoder", "lm_head", "projector"]},),
    "gptq": (INTEGERS | {"scales": "awq", "grid": 1},),
}
"""Settings of each stage: every storage format, strategy and scale."""


def stage_of(name: str, **fields: Any) -> Stage:
    return cast("type[Stage]", load_row(STAGES, name)).model_validate({"stage": name, **fields})


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


def test_every_stage_of_this_package_is_here() -> None:
    assert CHEAP.keys() == STAGES.keys() - {"llmcompressor"}  # only whose run can tell


@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, variants in CHEAP.items() for fields in variants])
def test_what_a_stage_leaves_is_what_was_planned(bench: Bench, tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    check(bench, tmp_path, stage_of(name, **fields))


@pytest.mark.parametrize("family", [name for name in BUILDERS if name != "qwen2.5-vl"])
def test_every_family_keeps_to_the_plan(tmp_path: Path, family: str) -> None:
    bench = prepare(tmp_path, BUILDERS[family](tmp_path / "model"))
    kv_cache = None if bench.family.head is None else "fp8"
    check(bench, tmp_path, stage_of("rtn", **INTEGERS, kv_cache=kv_cache, targets=["decoder", VISION]))


def test_a_difference_is_named(bench: Bench) -> None:
    spec = spec_of(bench.checkpoint, bench.family)
    (four,) = stage_of("rtn", **INTEGERS).plan(spec).after
    (eight,) = stage_of("rtn", bits=8, group_size=32).plan(spec).after
    assert "weight_packed was planned as TensorSpec(dtype='I32'" in (difference(four, eight) or "")
    assert difference(four, four) is None
