from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForImageTextToText

from compress.calibration.batches import Exchange, QuestionBatch, WindowBatch, load_batches
from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import linear_shape, quantized_linears
from compress.checkpoints.spec import spec_of
from compress.data.prompts import Prompt
from compress.errors import CheckpointError, RecipeError
from compress.numerics.gptq import optimism
from compress.numerics.scheme import Scheme
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.stages.blockwise.run import TOKENS_PER_BATCH
from compress.stages.linears import Linear, Target
from compress.stages.quantization.awq import Awq
from compress.stages.quantization.gptq import Gptq
from compress.stages.quantization.quantizer import IntegerQuantizer
from compress.stages.quantization.rounders.gptq import GptqRounder
from compress.stages.quantization.rtn import Rtn
from compress.stages.quantization.sensitivity_analysis import subsample
from compress.stages.quantization.widths import WIDTHS, Budget, MixedPrecision, Widths, read_widths
from compress.stages.stage import StageContext
from tests.engine.test_sensitivity import by_autograd
from tests.stages.bench import Bench, prepare, tensors_of
from tests.tiny import Builder, build_blip2, build_mllama, build_qwen2_5_vl, build_qwen3_vl

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"
STAGES: Mapping[str, type[IntegerQuantizer]] = {"awq": Awq, "gptq": Gptq, "rtn": Rtn}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    base = tmp_path_factory.mktemp("preparation")
    return prepare(base, build_qwen2_5_vl(base / "model"))


def stage_of(name: str, **fields: Any) -> IntegerQuantizer:
    quick = {} if name == "rtn" else {"grid": 4}
    return STAGES[name].model_validate({"stage": name, "bits": 4, "group_size": 32, **quick, **fields})


def auto(name: str = "awq", budget: float = 4.5, **fields: Any) -> IntegerQuantizer:
    return stage_of(name, **{"bits": "auto", "budget": {"bits_per_weight": budget}, **fields})


def widths_of(folder: Path) -> Widths:
    actual = read_widths(folder)
    assert actual is not None
    return actual


@pytest.mark.parametrize("name", list(STAGES))
def test_widths_keep_the_budget_and_what_is_written_has_them(bench: Bench, tmp_path: Path, name: str) -> None:
    stage = auto(name, targets=("decoder", "lm_head"))
    assert bench.plan(stage).faults == ()
    assert len(bench.plan(stage).after) > 1
    written = open_checkpoint(bench.apply(tmp_path / "out", stage))
    actual = widths_of(tmp_path / "out")
    widths = {layer: scheme.bits for layer, scheme in quantized_linears(written).items()}
    assert widths == {layer: width for layer, width in actual.by_layer.items() if width < 16}
    assert len(actual.by_layer) == 3 * 7 + 1
    assert len(actual.groups) == 3 * 4 + 1
    assert len({group.width for group in actual.groups}) > 1
    weights = {layer: linear_shape(bench.checkpoint, layer) for layer in actual.by_layer}
    taken = sum(
        entry.bytes for tensor, entry in written.tensors.items() if tensor.rpartition(".")[0] in weights and "bias" not in tensor
    )
    assert taken == sum(group.bytes for group in actual.groups)
    assert taken * 8 / sum(rows * columns for rows, columns in weights.values()) == pytest.approx(actual.bits_per_weight)
    assert 4.2 < actual.bits_per_weight <= 4.5
    assert written.weight_bytes <= (bench.plan(stage).max_bytes or 0)
    assert not (tmp_path / "out" / ".blocks").exists()


def test_the_predicted_loss_is_below_that_of_one_width_for_all(bench: Bench, tmp_path: Path) -> None:
    uniform = 4 + (16 + 4) / 32 + 8 * 16 / (128 * 64)  # codes, scales, zero points, and what is written of shapes
    actual = widths_of(bench.apply(tmp_path / "out", auto(budget=uniform)))
    assert actual.predicted_loss == pytest.approx(sum(group.predicted_loss for group in actual.groups))
    assert all(group.predicted_loss == group.losses[group.width] for group in actual.groups)
    assert actual.predicted_loss < 0.9 * sum(group.losses[4] for group in actual.groups)
    for group in actual.groups:
        assert group.losses[2] > group.losses[3] > group.losses[4] > group.losses[8] > group.losses[16] == 0


def test_the_predicted_losses_are_what_autograd_finds(tmp_path: Path) -> None:
    """At the width nearest to the budget a loss is measured token by token: here by transformers, autograd and plain rounding."""
    bench = prepare(tmp_path, build_qwen2_5_vl(tmp_path / "model", dtype=torch.float32))
    actual = widths_of(bench.apply(tmp_path / "out", auto("rtn", budget=5, targets=("decoder", "lm_head"))))
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(bench.folder, dtype=torch.float32)
    errors: dict[str, Tensor] = {}
    for layer in actual.by_layer:
        name = bench.family.module_name(f"{layer}.weight").removesuffix(".weight")
        groups = model.get_submodule(name).weight.detach().unflatten(1, (-1, 32))
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low) / 15
        zero = (-low / step).round()
        errors[name] = (((groups / step).round() + zero).clamp(0, 15) - zero).mul(step).sub(groups).flatten(1)
    batches = load_batches(bench.calibration, bench.folder, TOKENS_PER_BATCH)
    means = by_autograd(bench.folder, cast("Any", batches), list(errors), 0, errors)
    text, vision = 0, 0
    for batch in batches:
        image = batch.inputs()["input_ids"] == model.config.image_token_id
        text += int((batch.inputs()["attention_mask"].bool() & ~image).sum())
        vision += int(image.sum())
    for group in actual.groups:
        expected = 0.0
        for layer in group.layers:
            of_layer = means[bench.family.module_name(f"{layer}.weight").removesuffix(".weight")]
            expected += float(of_layer["text"]) / 2
            if "lm_head" not in layer:
                expected += float(of_layer["vision"]) * vision / text / 2
        assert group.losses[4] == pytest.approx(expected, rel=1e-3)


def test_scales_that_move_and_the_fit_to_the_samples_are_part_of_the_prediction(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearest = widths_of(bench.apply(tmp_path / "rtn", auto("rtn", budget=5)))
    scaled = widths_of(bench.apply(tmp_path / "awq", auto("awq", budget=5, clip=False)))
    ratios = [one.losses[4] / other.losses[4] for one, other in zip(scaled.groups, nearest.groups, strict=True)]
    # near those of plain rounding, as scales taken back leave the weight as it was; not equal, as they were chosen
    assert all(0.4 < ratio < 1.3 for ratio in ratios)
    assert sum(abs(ratio - 1) > 0.01 for ratio in ratios) > len(ratios) / 2
    fitted = widths_of(bench.apply(tmp_path / "gptq", auto("gptq", budget=5)))

    def as_on_the_samples(rounder: GptqRounder, channels: int, tokens: float) -> float:
        del rounder, channels, tokens
        return 1.0

    monkeypatch.setattr(GptqRounder, "optimism", as_on_the_samples)
    as_seen = widths_of(bench.apply(tmp_path / "seen", auto("gptq", budget=5)))
    tokens = sum(batch.tokens for batch in load_batches(bench.calibration, bench.folder, TOKENS_PER_BATCH))
    for one, other in zip(fitted.groups, as_seen.groups, strict=True):
        channels = 256 if "down_proj" in one.layers[0] else 128
        assert one.losses[3] / other.losses[3] == pytest.approx(optimism(channels, tokens), rel=0.1)


def test_layers_that_a_runtime_joins_have_one_width_and_others_are_fixed(bench: Bench, tmp_path: Path) -> None:
    targets = ("decoder", {"component": "vision", "bits": 8, "group_size": 16})
    stage = auto(budget=3.6, targets=targets, ignore=("*.layers.0.*",), widths=(3, 4))
    out = bench.apply(tmp_path / "out", stage)
    actual = widths_of(out)
    joined = {layer.rpartition(".")[2]: group for group in actual.groups for layer in group.layers if ".layers.1." in layer}
    assert joined["q_proj"] is joined["k_proj"] is joined["v_proj"]
    assert joined["gate_proj"] is joined["up_proj"]
    assert set(actual.by_layer.values()) <= {3, 4}
    schemes = quantized_linears(open_checkpoint(out))
    assert {scheme.bits for layer, scheme in schemes.items() if "visual" in layer} == {8}
    assert not any(".layers.0." in layer for layer in schemes)


@pytest.mark.parametrize("fixed", ["lm_head", "decoder"])
def test_a_component_with_bits_of_its_own_is_no_part_of_the_choice(bench: Bench, tmp_path: Path, fixed: str) -> None:
    targets = tuple({"component": name, "bits": 8} if name == fixed else name for name in ("decoder", "lm_head"))
    stage = auto("gptq", balance="auto", targets=targets, budget=5)
    out = bench.apply(tmp_path / "out", stage)
    chosen = widths_of(out).by_layer
    assert ("lm_head" in chosen) == (fixed == "decoder")
    assert {scheme.bits for layer, scheme in quantized_linears(open_checkpoint(out)).items() if layer not in chosen} == {8}


def test_a_budget_in_bytes_is_for_the_whole_checkpoint(bench: Bench, tmp_path: Path) -> None:
    limit = bench.checkpoint.weight_bytes * 6 // 10
    stage = stage_of("awq", bits="auto", budget={"bytes": limit})
    written = open_checkpoint(bench.apply(tmp_path / "out", stage))
    assert 0.97 * limit < written.weight_bytes <= limit
    assert bench.plan(stage).max_bytes == limit
    small = stage_of("awq", bits="auto", budget={"bytes": 1000})
    (fault,) = bench.plan(small).faults
    assert fault.startswith("budget: 1000 is too little; the smallest possible with widths 2, 3, 4, 8, 16 is ")
    least = int(fault.partition("16 is ")[2].partition(" bytes")[0])
    assert not bench.plan(stage_of("awq", bits="auto", budget={"bytes": least})).faults
    assert bench.plan(stage_of("awq", bits="auto", budget={"bytes": least - 1})).faults


class KilledError(Exception):
    pass


class Watching(Silent):
    """Notes which pieces of work were begun, and ends the one called `last` after so many steps."""

    def __init__(self, last: str = "", steps: int = 0) -> None:
        self.last = last
        self.steps = steps
        self.begun: list[str] = []

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        self.begun.append(name)
        done: list[int] = []

        def advance(count: int) -> None:
            done.append(count)
            if name == self.last and len(done) == self.steps:
                raise KilledError

        yield advance


def test_a_killed_run_does_not_measure_again_and_ends_the_same(bench: Bench, tmp_path: Path) -> None:
    stage, target = auto(balance="auto"), tmp_path / "killed"
    full = bench.apply(tmp_path / "whole", stage)
    target.mkdir()
    work = ["awq: sensitivity", "awq", "awq: write"]
    kills = [(work[0], 2, work[:1]), (work[0], 5, work[:1]), (work[1], 2, work[:2]), (work[2], 5, work[1:])]
    rounded: dict[Path, int] = {}
    for last, steps, begun in kills:
        watching = Watching(last, steps)
        with pytest.raises(KilledError):
            stage.apply(StageContext(bench.folder, target, bench.calibration, bench.family, "cpu", 0, watching))
        assert watching.begun == begun
        errors = {path: path.stat().st_mtime_ns for path in target.glob(".blocks/preparation/*.layers.*")}
        assert errors.items() >= rounded.items() and len(errors) >= 2
        rounded = errors
    last = Watching()
    stage.apply(StageContext(bench.folder, target, bench.calibration, bench.family, "cpu", 0, last))
    assert last.begun == work[1:]
    for name in ("model.safetensors", "config.json", WIDTHS):
        assert (target / name).read_bytes() == (full / name).read_bytes()


def test_sensitivities_are_measured_on_samples_of_each_kind() -> None:
    windows = [WindowBatch((str(number),), np.zeros((2, 50), dtype=np.int32), token_types=False) for number in range(20)]
    questions = [QuestionBatch((Exchange(Prompt("q", "What?", ()), None, 100),), None)]
    assert subsample([*windows, *questions], 10_000) == list(range(21))
    assert subsample([*windows, *questions], 400) == [2, 7, 12, 17, 20]
    assert subsample(windows, 1) == [10]


@pytest.mark.parametrize("build", [build_mllama, build_blip2, build_qwen3_vl])
def test_other_families(tmp_path: Path, build: Builder) -> None:
    bench = prepare(tmp_path, build(tmp_path / "model"))
    stage = auto("gptq", budget=5, balance="auto", group_size=16)
    assert bench.plan(stage).faults == ()
    out = bench.apply(tmp_path / "out", stage)
    actual = widths_of(out)
    assert actual.by_layer.keys() == {linear.disk_name for linear in stage.select(spec_of(bench.checkpoint, bench.family)).linears}
    assert actual.bits_per_weight <= 5
    widths = {layer: scheme.bits for layer, scheme in quantized_linears(open_checkpoint(out)).items()}
    assert widths == {layer: width for layer, width in actual.by_layer.items() if width < 16}
    joined = [group.layers for group in actual.groups if len(group.layers) == 3]
    assert all([layer.rpartition(".")[2] for layer in layers] == ["q_proj", "k_proj", "v_proj"] for layers in joined)
    assert len(joined) == int(bench.checkpoint.text_config["num_hidden_layers"])


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_every_balance_gives_other_codes(bench: Bench, tmp_path: Path, name: str) -> None:
    packed: list[bytes] = []
    for number, balance in enumerate(("tokens", 0.0, 0.5, 1.0, "auto")):
        out = bench.apply(tmp_path / str(number), stage_of(name, balance=balance, ignore=("*.layers.[02].*",)))
        tensors = tensors_of(out)
        (codes,) = [tensor for key, tensor in tensors.items() if key.endswith("layers.1.mlp.up_proj.weight_packed")]
        packed.append(codes.numpy().tobytes())
        assert read_widths(out) is None
    assert len(set(packed)) == len(packed)


def test_the_balance_of_layers_that_see_images_alone_is_nothing(bench: Bench, tmp_path: Path) -> None:
    plain, other = (
        tensors_of(bench.apply(tmp_path / str(balance), stage_of("gptq", group_size=16, targets=("vision",), balance=balance)))
        for balance in ("tokens", "auto")
    )
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bits": "auto"}, "bits: auto needs a budget"),
        ({"budget": {"bits_per_weight": 4}}, "budget and widths go with bits: auto, not 4"),
        ({"widths": [4]}, "budget and widths go with bits: auto, not 4"),
        ({"bits": "auto", "budget": {}}, "give bits_per_weight or bytes, and not both"),
        ({"bits": "auto", "budget": {"bits_per_weight": 4, "bytes": 9}}, "give bits_per_weight or bytes, and not both"),
        ({"bits": "auto", "budget": {"bits_per_weight": 4}, "widths": [16]}, "16 alone leaves every layer as it is"),
        ({"bits": "auto", "budget": {"bits_per_weight": 4}, "widths": [5]}, "Input should be 2, 3, 4, 8 or 16"),
        ({"balance": 1.5}, "less than or equal to 1"),
    ],
)
def test_fields_that_do_not_fit_each_other(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        stage_of("awq", **fields)


def test_what_auto_cannot_do_is_a_fault(bench: Bench, tmp_path: Path) -> None:
    (fault,) = bench.plan(auto(targets=("decoder", "vision"))).faults
    assert fault.endswith("bits: auto is for the decoder and lm_head; give bits to vision ({component: vision, bits: 8})")
    (fault,) = bench.plan(auto(budget=2.0)).faults
    assert fault.startswith("budget: 2.0 is too little; the smallest possible with widths 2, 3, 4, 8, 16 is 2.57 bits per weight")
    (fault,) = bench.plan(auto(targets=({"component": "decoder", "activations": "token"},))).faults
    assert "with activations decoder has to have 8 bits, not auto" in fault
    (fault,) = bench.plan(auto(targets=({"component": "decoder", "bits": 4},))).faults
    assert fault.startswith("targets: each has bits of its own, so that bits: auto has nothing to choose")
    (fault,) = bench.plan(stage_of("rtn", balance=0.5)).faults
    assert fault == "balance: rtn reads no statistics of what layers are given; remove it"
    with pytest.raises(CheckpointError, match="leaves every layer as it is; lower it, or remove the stage"):
        bench.apply(tmp_path / "out", auto("rtn", budget=16))


def test_a_layout_that_cannot_hold_a_width_is_refused_in_the_plan(tmp_path: Path) -> None:
    settings = {"stages.0.bits": "auto", "stages.0.budget": {"bits_per_weight": 5}}
    with pytest.raises(RecipeError, match=r"export\.0: .*: layout awq holds 4 bits, not 2; set layout: compressed-tensors"):
        make_plan(DEMO, settings, Store(tmp_path))
    plan = make_plan(DEMO, {**settings, "stages.0.widths": [4, 16]}, Store(tmp_path))
    sizes = {step.name: step.expected_bytes for step in plan.steps}
    expected = sizes["awq"]
    assert expected is not None
    assert sizes["export vllm-awq"] is None


@pytest.mark.parametrize(("loss", "widths"), [(1.0, {4}), (5.0, {3, 4, 8})])
def test_one_width_for_all_is_kept_where_little_is_gained(loss: float, widths: set[int]) -> None:
    names = [f"blocks.{number}.o_proj" for number in range(40)]
    linears = [Linear("decoder", name, name, 256, 256, "BF16") for name in names]
    schemes: dict[Target, Scheme] = {"decoder": Scheme(0, 64, symmetric=False)}
    mixed_precision = MixedPrecision(linears, (3, 4, 8), schemes, Budget(bits_per_weight=4.4), other_bytes=0)
    losses = {name: {3: 1.05, 4: 1.0, 8: 0.99} for name in names}
    # eight bits for this one are paid for by three bits for a few others: 2 or 12 % of all losses
    losses[names[0]] = {3: 60.0, 4: loss, 8: 0.0}
    chosen = mixed_precision.choose(losses)
    assert set(chosen.by_layer.values()) == widths
    assert chosen.by_layer[names[0]] == max(widths)
