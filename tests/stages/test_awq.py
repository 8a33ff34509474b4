import gc
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from compress.checkpoints.artifact import side_files
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.checkpoints.spec import spec_of
from compress.errors import CheckpointError, DataError, MissingError
from compress.progress import Silent
from compress.stages.quantization.awq import Awq
from compress.stages.stage import StageContext
from tests.engine.test_replay import batches
from tests.quantized import round_checkpoint
from tests.stages.bench import Bench, dense, logits, prepare, tensors_of
from tests.tiny import build_qwen2_5_vl, build_qwen2_vl


def awq(**fields: Any) -> Awq:
    return Awq.model_validate({"stage": "awq", "bits": 4, "group_size": 32, **fields})


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(2, 8, False), (3, 128, False), (4, 64, True), (8, 2, False), (4, -1, False), (3, -1, True)],
)
def test_every_width_and_group_that_divides(bench: Bench, tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    stage = awq(bits=bits, group_size=group_size, symmetric=symmetric, grid=4)
    written = open_checkpoint(bench.apply(tmp_path / "out", stage))
    assert bench.plan(stage).faults == ()
    assert written.weight_bytes == bench.plan(stage).max_bytes
    schemes = quantized_linears(written)
    assert schemes == bench.plan(stage).after[0].schemes
    assert len(schemes) == 3 * 7
    original, result = dense(bench.folder), dense(tmp_path / "out")
    assert result.keys() == original.keys()
    assert (logits(bench.folder, result, batches(bench.folder))).isfinite().all()


def kl(original: Tensor, other: Tensor) -> float:
    expected, actual = original.log_softmax(-1), other.log_softmax(-1)
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


@pytest.mark.parametrize("bits", [3, 4])
def test_predictions_are_closer_to_the_original_than_rounding_to_nearest(tmp_path: Path, bits: int) -> None:
    bench = prepare(tmp_path, build_qwen2_5_vl(tmp_path / "model", spread=0.03))
    tensors = tensors_of(bench.folder)
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[::32] *= 12  # a few channels stand out, as in trained models
    save_file(tensors, bench.folder / "model.safetensors", metadata={"format": "pt"})
    calibration: list[Any] = list(batches(bench.folder))
    original = logits(bench.folder, None, calibration)
    stage = awq(bits=bits)
    awq_divergence = kl(original, logits(bench.folder, dense(bench.apply(tmp_path / "awq", stage)), calibration))
    round_checkpoint(bench.folder, tmp_path / "nearest", stage.component_schemes()["decoder"])
    nearest = kl(original, logits(bench.folder, dense(tmp_path / "nearest"), calibration))
    assert awq_divergence < 0.8 * nearest


def test_what_is_not_targeted_is_bit_identical(bench: Bench, tmp_path: Path) -> None:
    before, after = tensors_of(bench.folder), tensors_of(bench.apply(tmp_path / "out", awq(grid=4)))
    quantized = {name for name in before if name not in after}
    assert len(quantized) == 3 * 7
    assert all(".layers." in name for name in quantized)
    changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    assert all("layernorm" in name or name.endswith("v_proj.bias") for name in changed)
    assert {name for name in before if "visual" in name or "lm_head" in name} <= after.keys()
    carried = side_files(bench.folder)
    assert len(carried) >= 5
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (bench.folder / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not (tmp_path / "out" / ".blocks").exists()


def test_every_part_can_be_targeted(bench: Bench, tmp_path: Path) -> None:
    stage = awq(targets=("vision", "projector", "decoder", "lm_head"), group_size=16, bits=8, grid=4)
    assert bench.plan(stage).faults == ()
    out = bench.apply(tmp_path / "out", stage)
    names = {bench.family.module_name(name) for name in quantized_linears(open_checkpoint(out))}
    for expected in (
        "lm_head",
        "model.visual.blocks.1.mlp.down_proj",
        "model.visual.merger.mlp.2",
        "model.language_model.layers.0.mlp.up_proj",
    ):
        assert expected in names
    calibration: list[Any] = list(batches(bench.folder))
    assert kl(logits(bench.folder, None, calibration), logits(bench.folder, dense(out), calibration)) < 0.01


def test_the_second_family(tmp_path: Path) -> None:
    bench = prepare(tmp_path, build_qwen2_vl(tmp_path / "model", tied=True, hidden=64, intermediate=96, heads=4, kv_heads=1))
    out = bench.apply(tmp_path / "out", awq(group_size=32, grid=4, targets=("decoder", "vision")))
    calibration: list[Any] = list(batches(bench.folder))
    original, result = dense(bench.folder), dense(out)
    head = {"lm_head.weight": original["model.language_model.embed_tokens.weight"]}
    assert kl(logits(bench.folder, {**original, **head}, calibration), logits(bench.folder, {**result, **head}, calibration)) < 0.1


def test_two_runs_write_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    first, second = (bench.apply(tmp_path / name, awq(grid=4)) for name in ("first", "second"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()


class KilledError(Exception):
    pass


class Dying(Silent):
    """Ends the work in the middle, after two blocks."""

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        done: list[int] = []

        def advance(count: int) -> None:
            done.append(count)
            if len(done) == 2:
                raise KilledError

        yield advance


def test_a_killed_run_goes_on_at_its_block_and_ends_the_same(bench: Bench, tmp_path: Path) -> None:
    full, target = bench.apply(tmp_path / "whole", awq(grid=4)), tmp_path / "killed"
    target.mkdir()
    with pytest.raises(KilledError):
        awq(grid=4).apply(StageContext(bench.folder, target, bench.calibration, bench.family, "cpu", 0, Dying()))
    commits = sorted((target / ".blocks").glob("*.json"))
    assert [path.name[-len("layers.0.done.json") :] for path in commits] == ["layers.0.done.json", "layers.1.done.json"]
    commits[1].write_bytes(commits[1].read_bytes()[:100])  # damaged, so made anew
    (target / ".config.json.0123abcd").write_text("{")  # what a write that is killed may leave
    (target / ".shard-00007.data").write_bytes(b"half")
    (target / "additional_chat_templates").mkdir()
    before = commits[0].stat().st_mtime_ns
    stamps: list[int] = []

    class Stamping(Silent):
        @contextmanager
        def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
            yield lambda count: stamps.append(commits[0].stat().st_mtime_ns)

    awq(grid=4).apply(StageContext(bench.folder, target, bench.calibration, bench.family, "cpu", 0, Stamping()))
    assert set(stamps) == {before}
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in full.iterdir())
    assert (target / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()


def test_a_group_that_does_not_divide_names_the_layer_and_what_would(bench: Bench) -> None:
    other, fault = bench.plan(awq(group_size=48)).faults
    assert fault.startswith("model.language_model.layers.0.")
    assert "(and 17 more layers as wide): its input width 128 does not divide by group_size 48" in fault
    assert "use group_size 32, 64 or -1, or add '*.gate_proj', '*.k_proj', '*.o_proj', '*.q_proj', '*.up_proj', '*.v_proj'" in fault
    assert "layers.0.mlp.down_proj (and 2 more layers as wide): its input width 256" in other
    assert bench.plan(awq(group_size=256, ignore=("*.self_attn.*", "*.gate_proj", "*.up_proj"))).faults == ()


def test_what_is_left_out_keeps_its_bits(bench: Bench, tmp_path: Path) -> None:
    out = bench.apply(tmp_path / "out", awq(grid=4, ignore=("*.v_proj", "*.layers.1.*")))
    before, after = tensors_of(bench.folder), tensors_of(out)
    for name in before:
        if name.endswith(("v_proj.weight", "v_proj.bias")) or ".layers.1." in name:
            assert torch.equal(after[name], before[name]), name
    assert len(quantized_linears(open_checkpoint(out))) == 2 * 6


def test_targets_and_patterns_that_match_nothing_are_faults(tmp_path: Path, bench: Bench) -> None:
    (fault,) = bench.plan(awq(ignore=("*.fc9",))).faults
    assert fault.startswith("ignore: '*.fc9' matches none of the targeted layers, such as model.language_model.layers.0.")
    assert bench.plan(awq(ignore=("*",))).faults == ("ignore: leaves no layer to work on; remove a pattern",)
    tied = open_checkpoint(build_qwen2_5_vl(tmp_path, tied=True))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for checkpoint in (tied, open_checkpoint(tmp_path)):  # the second holds a copy of the embeddings beside them
        (fault,) = awq(targets=("decoder", "lm_head")).plan(spec_of(checkpoint, bench.family)).faults
        assert "lm_head matches nothing" in fault
        assert "its output head is the embedding's own matrix; remove it" in fault
    tensors["lm_head.weight"] += 1  # as PEFT leaves it
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert awq(targets=("decoder", "lm_head")).plan(spec_of(open_checkpoint(tmp_path), bench.family)).faults == ()


def test_a_quantized_checkpoint_is_refused(bench: Bench, tmp_path: Path) -> None:
    round_checkpoint(bench.folder, tmp_path / "nearest", awq().component_schemes()["decoder"])
    checkpoint = open_checkpoint(tmp_path / "nearest")
    (fault,) = awq().plan(spec_of(checkpoint, bench.family)).faults
    assert ": quantized already; start from the model's original, target other components, or remove one of the two stages" in fault


@pytest.mark.parametrize("place", ["layers.1.mlp.up_proj.weight", "visual.merger.mlp.0.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, place: str) -> None:
    bench = prepare(tmp_path, build_qwen2_5_vl(tmp_path / "model"))
    file = bench.folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith(place)]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite values"):
        bench.apply(tmp_path / "out", awq(grid=1))
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("names", [("norm",), ("norm", "v_proj", "mlp.down_proj", "lm_head")])
def test_a_checkpoint_of_several_types_keeps_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    bench = prepare(tmp_path, build_qwen2_5_vl(tmp_path / "model"))
    before = tensors_of(bench.folder)
    before = {name: value.float() * 1.001 if any(part in name for part in names) else value for name, value in before.items()}
    save_file(before, bench.folder / "model.safetensors", metadata={"format": "pt"})
    stage = awq(bits=8, group_size=16, grid=4, targets=("decoder", "vision", "lm_head"))
    out = bench.apply(tmp_path / "out", stage)
    after = tensors_of(out)
    assert {name: after[name].dtype for name in before if name in after} == {
        name: value.dtype for name, value in before.items() if name in after
    }
    assert any(not torch.equal(before[name], after[name]) for name in before if name in after and "layernorm" in name)
    for name in quantized_linears(open_checkpoint(out)):
        assert after[f"{name}.weight_scale"].dtype == before[f"{name}.weight"].dtype
    assert open_checkpoint(out).weight_bytes == bench.plan(stage).max_bytes
    calibration: list[Any] = list(batches(bench.folder))
    assert kl(logits(bench.folder, None, calibration), logits(bench.folder, dense(out), calibration)) < 0.01


class OutOfMemory(Silent):
    """Ends the work as a device that is full does, after its first part."""

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        def advance(count: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        yield advance


def test_a_device_that_is_full_is_named_with_the_part_and_what_helps(bench: Bench, tmp_path: Path) -> None:
    context = StageContext(bench.folder, tmp_path, bench.calibration, bench.family, "cpu", 0, OutOfMemory())
    message = (
        r"awq: cpu has \d+\.\d GiB of memory, too little for model\.language_model\.layers\.0\. .*"
        r"use a larger device, or none \(CUDA_VISIBLE_DEVICES=\); or give calibration\.sets fewer tokens per sample"
    )
    with pytest.raises(MissingError, match=message):
        awq(grid=1).apply(context)


def test_the_libraries_that_make_image_inputs_are_part_of_its_key() -> None:
    assert {"torch", "torchvision", "transformers", "tokenizers", "pillow"} <= set(Awq.libraries)


def test_without_calibration_it_says_so(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"add calibration\.sets"):
        awq().apply(StageContext(bench.folder, tmp_path, None, bench.family, "cpu", 0, Silent()))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 5, "2, 3, 4, 8 or 'auto'"),
        ("group_size", 0, "positive number of input channels, or -1"),
        ("targets", (), "at least 1 item"),
    ],
)
def test_fields_are_checked(field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        awq(**{field: value})


class Weighing(Silent):
    """Notes after every twelfth of the work how many bytes all tensors in the process have."""

    def __init__(self) -> None:
        self.live: list[int] = []

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        done: list[int] = []

        def advance(count: int) -> None:
            done.append(count)
            if len(done) % (total // 12) == 0:
                self.live.append(live_bytes())

        yield advance


def live_bytes() -> int:
    """Return the size of the memory, mapped files included, that tensors refer to."""
    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if not tensor.is_meta}
    return sum(storages.values())


def test_weights_are_never_all_in_memory(tmp_path: Path) -> None:
    bench = prepare(tmp_path, build_qwen2_5_vl(tmp_path / "model", layers=12))
    gc.collect()
    before, weighing = live_bytes(), Weighing()
    (tmp_path / "out").mkdir()
    awq(grid=1).apply(StageContext(bench.folder, tmp_path / "out", bench.calibration, bench.family, "cpu", 0, weighing))
    assert len(weighing.live) >= 24
    assert max(weighing.live) - before < bench.checkpoint.weight_bytes / 3
