"""The stage runs the real library in its real environment (`compress runtime install llmcompressor`)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from transformers import AutoModelForImageTextToText

import compress
from compress.calibration.batches import load_batches
from compress.checkpoints.artifact import side_files
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.checkpoints.spec import spec_of
from compress.errors import CheckpointError, DataError, MissingError, RecipeError
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.families import FAMILIES, within
from compress.families.resolve import family_of
from compress.pipeline.plan import make_plan
from compress.pipeline.steps.export import ExportArtifact
from compress.pipeline.steps.stage import ApplyStage
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.report.model import Report
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.runtime import Transformers
from compress.stages.llmcompressor.defaults import Defaults
from compress.stages.llmcompressor.stage import Llmcompressor
from compress.stages.llmcompressor.worker import Samples, UnknownNameError, fill_rotations
from compress.stages.stage import StageContext
from tests.jobs import Job, content, make_job
from tests.stages.bench import Bench, dense, logits, prepare, tensors_of
from tests.tiny import BUILDERS, build_qwen2_5_vl

PRELOADED = ("llmcompressor",)

GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}}}
GPTQ = {"GPTQModifier": {"config_groups": GROUPS}}


def stage(*modifiers: dict[str, Any], **fields: Any) -> Llmcompressor:
    return Llmcompressor.model_validate({"stage": "llmcompressor", "modifiers": modifiers, **fields})


def job_with(folder: Path, change: Callable[[dict[str, Any]], None]) -> Job:
    job = make_job(folder)
    recipe = content(job)
    recipe["stages"] = [{"stage": "llmcompressor", "modifiers": [GPTQ]}]
    change(recipe)
    job.recipe.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return job


def unchanged(recipe: dict[str, Any]) -> None:
    del recipe


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    base = tmp_path_factory.mktemp("llmcompressor")
    return prepare(base, build_qwen2_5_vl(base / "model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Report]:
    job = job_with(tmp_path_factory.mktemp("job"), unchanged)
    return job, compress.run(job.recipe, **job.places())


@pytest.fixture(scope="module")
def four_bit_floats(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4 of a checkpoint whose tensors have the names of newer transformers, and whose images stand out in one channel."""
    base = tmp_path_factory.mktemp("nvfp4")
    renamed = {bench.family.module_name(name): tensor for name, tensor in tensors_of(bench.folder).items()}
    renamed["model.visual.merger.mlp.2.bias"][5] = 50
    source = base / "model"
    source.mkdir()
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", *side_files(bench.folder)):
        (source / name).write_bytes((bench.folder / name).read_bytes())
    return replace(bench, folder=source).apply(base / "out", stage({"QuantizationModifier": {"scheme": "NVFP4"}}))


def test_a_modifier_is_a_table_of_one_name() -> None:
    read = stage({"SmoothQuantModifier": None}, {"GPTQModifier": {"scheme": "W8A8"}})
    assert read.calls == [("SmoothQuantModifier", {}), ("GPTQModifier", {"scheme": "W8A8"})]
    with pytest.raises(ValidationError, match=r"names 2 modifiers \(A, B\); write each as an entry of its own, such as `- GPTQ"):
        stage({"A": {}, "B": {}})
    with pytest.raises(ValidationError, match="names no modifier"):
        stage({})
    with pytest.raises(ValidationError, match=r"'os\.system' is no name of a modifier or argument"):
        stage({"os.system": {}})
    with pytest.raises(ValidationError, match="'bits 4' is no name"):
        stage({"GPTQModifier": {"bits 4": 1}})
    with pytest.raises(ValidationError, match="at least 1 item"):
        stage()


def test_a_recipe_says_where_a_modifier_is_wrong(tmp_path: Path) -> None:
    def two(recipe: dict[str, Any]) -> None:
        recipe["stages"][0]["modifiers"] = [{"A": {}, "B": {}}]

    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: stages\.0\.modifiers\.0: names 2 modifiers"):
        make_plan(job_with(tmp_path / "job", two).recipe, {}, Store(tmp_path / "store"))


def test_without_its_environment_the_plan_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_with(tmp_path / "job", unchanged)
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path / "runtimes"))
    with pytest.raises(MissingError, match=r"llmcompressor is not installed .*; run `compress runtime install llmcompressor`"):
        make_plan(job.recipe, {}, Store(job.store))


def test_the_plan_leaves_sizes_open_and_the_library_in_the_key(tmp_path: Path) -> None:
    job = job_with(tmp_path / "job", unchanged)
    plan = make_plan(job.recipe, {}, Store(job.store))
    assert {step.name: step.expected_bytes for step in plan.steps if isinstance(step, ApplyStage | ExportArtifact)} == {
        "llmcompressor": None,
        "export vllm-awq": None,
        "export vllm-compressed-tensors": None,
    }
    assert stage(GPTQ).versions()["llmcompressor/llmcompressor"] == "0.14.0.1"


def test_a_quantizing_stage_before_or_after_is_told_of(bench: Bench, tmp_path: Path) -> None:
    def after_awq(recipe: dict[str, Any]) -> None:
        recipe["stages"].insert(0, {"stage": "awq", "bits": 4, "group_size": 32})

    with pytest.raises(
        RecipeError, match=r"stages\.1: .*: the weights are quantized already, by their author or by a stage before it"
    ):
        make_plan(job_with(tmp_path / "job", after_awq).recipe, {}, Store(tmp_path / "store"))
    config = {**bench.checkpoint.config, "quantization_config": {"quant_method": "awq"}}
    (fault,) = stage(GPTQ).plan(spec_of(replace(bench.checkpoint, config=config), bench.family)).faults
    assert fault.startswith(f"{bench.folder}: the weights are quantized already")


def test_a_stage_after_one_that_only_the_run_can_tell_of_is_checked_again(tmp_path: Path) -> None:
    def before_awq(recipe: dict[str, Any]) -> None:
        recipe["stages"] = [
            {"stage": "llmcompressor", "modifiers": [{"SmoothQuantModifier": {}}]},
            {"stage": "awq", "bits": 4, "group_size": 32},
        ]

    plan = make_plan(job_with(tmp_path / "job", before_awq).recipe, {}, Store(tmp_path / "store"))
    expected = {step.name: step.expected_bytes for step in plan.steps}
    assert expected["llmcompressor"] is None
    assert expected["awq"] is not None
    assert expected["export vllm-awq"] is not None


def test_a_whole_recipe(finished: tuple[Job, Report]) -> None:
    job, report = finished
    assert report.gate.verdict == "pass"
    assert report.versions["llmcompressor/llmcompressor"] == "0.14.0.1"
    assert [row.artifact for row in report.rows] == ["original", "vllm-awq", "vllm-compressed-tensors"]
    for row in report.rows[1:]:
        assert row.fidelity is not None
        assert 0 < row.fidelity["text"].kl_mean < 0.5
    assert (Path(report.run) / "logs" / "llmcompressor" / "llmcompressor.log").stat().st_size > 0
    artifact = open_checkpoint(Path(report.rows[2].path))
    source = open_checkpoint(job.folder / "model")
    schemes = quantized_linears(artifact)
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    linears += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert set(schemes) == {f"model.layers.{block}.{linear}" for block in range(3) for linear in linears}
    assert {(scheme.bits, scheme.group_size, scheme.symmetric) for scheme in schemes.values()} == {(4, 32, True)}
    packed = {f"{name}.weight_{part}" for name in schemes for part in ("packed", "scale", "shape")}
    assert set(artifact.tensors) == set(source.tensors) - {f"{name}.weight" for name in schemes} | packed


def test_what_is_not_quantized_stays_as_it_was(finished: tuple[Job, Report]) -> None:
    job, report = finished
    artifact = Path(report.rows[2].path)
    before, after = tensors_of(job.folder / "model"), tensors_of(artifact)
    same = before.keys() & after.keys()
    assert any("visual" in name for name in same)
    assert [name for name in same if not torch.equal(before[name], after[name])] == []
    carried = side_files(job.folder / "model")
    assert len(carried) >= 5
    for name in carried:
        assert (artifact / name).read_bytes() == (job.folder / "model" / name).read_bytes()
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    settings = config.pop("quantization_config")
    assert config == json.loads((job.folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert {"lm_head", "visual.merger.mlp.0", "visual.blocks.1.attn.qkv"} <= set(settings["ignore"])


def test_names_on_disk_are_the_sources(bench: Bench, four_bit_floats: Path) -> None:
    names = set(open_checkpoint(four_bit_floats).tensors)
    expected = {bench.family.module_name(name) for name in bench.checkpoint.tensors}
    assert {name for name in names if "weight_" not in name and "global_scale" not in name} < expected
    owners = {name.rpartition(".")[0] for name in names if name.endswith("weight_packed")}
    assert owners == {name.removesuffix(".weight") for name in expected - names if name.startswith("model.language_model.layers.")}
    config = json.loads((four_bit_floats / "config.json").read_text(encoding="utf-8"))
    assert "model.visual.merger.mlp.0" in config["quantization_config"]["ignore"]


def largest_input(folder: Path, calibration: Path, module: str, *, images: bool) -> float:
    """Return the largest magnitude that goes into a module over the samples, by the model's own forward."""
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(folder, dtype="auto").eval()
    seen: list[Tensor] = []

    def look(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].abs().max())

    model.get_submodule(module).register_forward_pre_hook(look)
    with torch.no_grad():
        for batch in load_batches(calibration, folder, 1):
            inputs = batch.inputs()
            if images or "pixel_values" not in inputs:
                model(**inputs)
    return float(max(seen))


def test_the_library_sees_text_and_images(bench: Bench, four_bit_floats: Path) -> None:
    module = "model.language_model.layers.0.self_attn.q_proj"
    stored = 448 * 6 / float(tensors_of(four_bit_floats)[f"{module}.input_global_scale"])
    source = four_bit_floats.parent / "model"
    assert stored == pytest.approx(largest_input(source, bench.calibration, module, images=True), rel=0.01)
    assert stored > 1.5 * largest_input(source, bench.calibration, module, images=False)


def test_what_only_vllm_reads_is_passed_on_and_refused_elsewhere(bench: Bench, four_bit_floats: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    context = ExportContext(four_bit_floats, tmp_path / "out", bench.family, Silent())
    VllmExport(format="vllm", layout="compressed-tensors").apply(context)
    actual, original = (open_checkpoint(folder).config for folder in (tmp_path / "out", four_bit_floats))
    names, before = (set(config["quantization_config"].pop("ignore")) for config in (actual, original))
    assert actual == original
    assert names >= before, before - names
    assert (tmp_path / "out" / "model.safetensors").samefile(four_bit_floats / "model.safetensors")
    with pytest.raises(CheckpointError, match="nvfp4-pack-quantized, which layout awq cannot hold; set layout: compressed-tensors"):
        VllmExport(format="vllm", layout="awq").apply(context)
    opening = OpenContext.at(tmp_path / "out", tmp_path, Silent())
    message = "the format nvfp4-pack-quantized cannot be read here, only by vLLM; evaluate it with runtime: vllm"
    with pytest.raises(CheckpointError, match=message), Transformers(runtime="transformers").open(opening):
        pass


def test_rotated_weights_are_still_the_same_model_with_images_too(bench: Bench, tmp_path: Path) -> None:
    out = bench.apply(tmp_path / "out", stage({"SpinQuantModifier": {"rotations": ["R1", "R2"]}}))
    assert open_checkpoint(out).config == bench.checkpoint.config
    before, after = dense(bench.folder), dense(out)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {"model.language_model.embed_tokens.weight", "model.visual.merger.mlp.2.bias"} <= set(changed)
    calibration: list[Any] = list(load_batches(bench.calibration, bench.folder, 1))
    original, rotated = (logits(bench.folder, values, calibration).log_softmax(-1) for values in (before, after))
    assert float((original.exp() * (original - rotated)).sum(-1).max()) < 0.005


def test_rotations_that_cannot_be_laid_out_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="this model has other parts; use another modifier, or give transform_config"):
        fill_rotations(SimpleNamespace(rotations=("R1",)), None)
    with pytest.raises(UnknownNameError, match=r"R3, R4 rotate at run time, .*; leave R1 and R2, or give transform_config"):
        fill_rotations(SimpleNamespace(rotations=("R1", "R4", "R3")), {})


def test_an_unknown_modifier_names_the_known(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no modifier 'GPTQModifer'; it has AWQModifier, .*; did you mean GPTQModifier\?"):
        bench.apply(tmp_path / "out", stage({"GPTQModifer": {}}))


def test_a_wrong_argument_names_those_it_takes(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"GPTQModifier: bits: Extra inputs are not permitted; the arguments .* dampening_frac, "):
        bench.apply(tmp_path / "out", stage({"GPTQModifier": {"bits": 4}}))


def test_a_failure_tells_the_librarys_error_and_where_its_log_is(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 48}}}
    failing = stage({"QuantizationModifier": {"config_groups": groups}})
    logs = tmp_path / "logs"
    with pytest.raises(CheckpointError, match=r"failed with ValueError: .* not divisible by group_size") as caught:
        failing.apply(StageContext(bench.folder, tmp_path / "out", bench.calibration, bench.family, "cpu", 0, Silent(), logs=logs))
    assert f"leave out with `ignore` what it cannot work on. Its whole log is {logs / 'llmcompressor.log'}" in str(caught.value)
    assert "Traceback" in (logs / "llmcompressor.log").read_text(encoding="utf-8")


def test_modifiers_that_change_nothing_are_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"changed nothing: all 69 tensors .* are as they were; give them targets"):
        bench.apply(tmp_path / "out", stage({"SmoothQuantModifier": {"mappings": []}}))


def test_without_samples_it_does_not_run(bench: Bench, tmp_path: Path) -> None:
    context = StageContext(bench.folder, tmp_path, None, bench.family, "cpu", 0, Silent())
    with pytest.raises(DataError, match=r"llmcompressor: needs calibration samples; add calibration.sets"):
        stage(GPTQ).apply(context)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_filled_in_is_within_the_decoder(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(BUILDERS[name](tmp_path / "model"))
    family = family_of(checkpoint.config)
    defaults = Defaults(checkpoint, family)
    modules = {family.module_name(tensor).rpartition(".")[0] for tensor in checkpoint.tensors}
    left = [module for module in modules if any(matches(pattern, module) for pattern in defaults.ignore)]
    assert left
    assert all(module == family.head or not within(module, family.blocks) for module in left)
    mappings = defaults.mappings
    assert mappings["SmoothQuantModifier"]
    for mapping in mappings["AWQModifier"]:
        sources = [module for module in modules if matches(mapping["smooth_layer"], module)]
        assert sources
        assert all(module.startswith(f"{family.blocks}.") for module in sources)
        for linear in mapping["balance_layers"]:
            assert len([module for module in modules if matches(linear, module)]) == len(sources)
    assert (defaults.rotation is None) == (name in ("llava-next", "mllama", "blip-2", "clip"))
    for linears, source in mappings["SmoothQuantModifier"]:
        assert {"smooth_layer": source, "balance_layers": linears} in mappings["AWQModifier"]
        assert "norm" in source


def matches(pattern: str, module: str) -> bool:
    """Match as compressed-tensors does: a pattern from the name's start, anything else as it is."""
    return re.match(pattern[3:], module) is not None if pattern.startswith("re:") else pattern == module


def test_samples_with_images_come_first_and_others_are_given_none(tmp_path: Path) -> None:
    text, image = {"input_ids": torch.ones(1, 3)}, {"input_ids": torch.zeros(1, 2), "pixel_values": torch.ones(4, 5)}
    for number, inputs in enumerate((text, image, text)):
        save_file(inputs, tmp_path / f"{number:06}.safetensors")
    samples = Samples(tmp_path, same_inputs=True)
    first, second, _ = (samples[number] for number in range(len(samples)))
    assert first["pixel_values"] is not None
    assert torch.equal(cast("Tensor", first["input_ids"]), image["input_ids"])
    assert second["pixel_values"] is None
    assert torch.equal(cast("Tensor", second["input_ids"]), text["input_ids"])
    assert Samples(tmp_path, same_inputs=False)[1].keys() == text.keys()
