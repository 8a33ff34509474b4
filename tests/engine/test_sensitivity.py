from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from compress.checkpoints.checkpoint import open_checkpoint
from compress.engine.replay import Positions, WalkConfig
from compress.engine.sensitivity import Forward, OutputErrors, Sensitivity, balance, measure_sensitivity, share
from compress.engine.statistics import InputStatistics, TokenStatistics
from compress.errors import CheckpointError
from compress.families.resolve import family_of
from tests.engine.test_replay import Fixed, batches
from tests.tiny import build_qwen2_5_vl

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
BLOCKS = "model.language_model.layers"


def plan(folder: Path, calibration: list[Fixed]) -> WalkConfig:
    checkpoint = open_checkpoint(folder)
    return WalkConfig(checkpoint, family_of(checkpoint.config), calibration, "cpu", folder)


def keeping(outputs: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = (output, args[0].detach())

    return hook


def by_autograd(
    folder: Path, calibration: list[Fixed], linears: list[str], seed: int, errors: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Return mean squares by plain autograd through the whole model, by transformers alone, on the same drawn labels.

    They are those of the gradients by channel, or, with errors of the weights, of what these cost at each token.
    """
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    gradients: dict[str, dict[str, list[Tensor]]] = {name: {"text": [], "vision": []} for name in linears}
    for batch in calibration:
        inputs = batch.inputs()
        tokens = inputs["input_ids"].reshape(-1)
        image = tokens == model.config.image_token_id
        valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).reshape(-1).bool()
        outputs: dict[str, tuple[Tensor, Tensor]] = {}

        handles = [model.get_submodule(name).register_forward_hook(keeping(outputs, name)) for name in linears]
        logits = model(**inputs, use_cache=False).logits.view(len(tokens), -1)[valid & ~image]
        chances = logits.detach().softmax(-1)
        labels = (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, (output, given) in outputs.items():
            rows = cast("Tensor", output.grad).view(len(tokens), -1)
            if errors is not None:
                rows = (rows * (given.view(len(tokens), -1) @ errors[name].t())).sum(1, keepdim=True)
            gradients[name]["text"].append(rows[valid & ~image])
            gradients[name]["vision"].append(rows[valid & image])
    return {
        name: {kind: torch.cat(rows).square().mean(0) for kind, rows in kinds.items() if sum(map(len, rows))}
        for name, kinds in gradients.items()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_the_walk_in_reverse_equals_autograd_through_the_whole_model(tmp_path: Path, tied: bool) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path, dtype=torch.float32, tied=tied))
    linears = [f"{BLOCKS}.{block}.{kind}" for block in range(3) for kind in KINDS] + ["lm_head"]
    expected = by_autograd(tmp_path, calibration, linears, seed=3)
    measured = measure_sensitivity(plan(tmp_path, calibration), linears, seed=3)
    assert list(measured) == linears
    for name, kinds in expected.items():
        torch.testing.assert_close(measured[name].text, kinds["text"], rtol=1e-3, atol=1e-9)
        if name == "lm_head":
            assert measured[name].vision is None
        else:
            torch.testing.assert_close(measured[name].vision, kinds["vision"], rtol=1e-3, atol=1e-9)


def test_a_model_in_bfloat16_is_near_and_the_same_each_time(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path))
    linears = [f"{BLOCKS}.{block}.mlp.up_proj" for block in range(3)]
    expected = by_autograd(tmp_path, calibration, linears, seed=0)
    steps: list[int] = []
    measured = measure_sensitivity(plan(tmp_path, calibration), linears, 0, steps.append)
    again = measure_sensitivity(plan(tmp_path, calibration), linears, 0)
    assert sum(steps) == 6
    for name in linears:
        text, vision = cast("Tensor", measured[name].text), cast("Tensor", measured[name].vision)
        assert torch.equal(text, cast("Tensor", again[name].text))
        assert torch.equal(vision, cast("Tensor", again[name].vision))
        assert float(text.sum() / expected[name]["text"].sum()) == pytest.approx(1, rel=0.2)
        if name == linears[-1]:
            assert float(vision.sum()) == 0  # what comes out of the last block at a part of an image is read by nothing
        else:
            assert float(vision.sum() / expected[name]["vision"].sum()) == pytest.approx(1, rel=0.2)


def test_the_predicted_loss_is_that_of_the_measured_divergence(tmp_path: Path) -> None:
    """A change of the output head moves the predictions by what Fisher's information says."""
    calibration = batches(build_qwen2_5_vl(tmp_path, dtype=torch.float32))
    measured = measure_sensitivity(plan(tmp_path, calibration), ["lm_head"], seed=0)["lm_head"]
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(tmp_path, dtype=torch.float32).eval()
    error = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) * 2e-3
    statistics, divergence, predicted = InputStatistics(), 0.0, 0
    inputs: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        inputs.append(args[0])

    model.lm_head.register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in calibration:
            tokens = batch.inputs()["input_ids"].view(-1)
            text = batch.inputs()["attention_mask"].view(-1).bool() & (tokens != model.config.image_token_id)
            before = model(**batch.inputs(), use_cache=False).logits.view(len(tokens), -1)[text].log_softmax(-1)
            statistics.add(inputs[-1], Positions(text, torch.zeros_like(text)))
            after = (before + inputs[-1].view(len(tokens), -1)[text] @ error.t()).log_softmax(-1)
            divergence += float((before.exp() * (before - after)).sum())
            predicted += int(text.sum())
    assert measured.predicted_loss(OutputErrors.of(error, statistics)) == pytest.approx(divergence / predicted, rel=0.15)


def one_kind(rows: Tensor) -> TokenStatistics:
    sums = TokenStatistics(rows.shape[1], rows.device)
    sums.add(rows)
    return sums


def test_the_predicted_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    text, vision = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    statistics = InputStatistics(text=one_kind(text), vision=one_kind(vision))
    error = torch.randn(4, 6, generator=generator)
    squares = torch.rand(2, 4, generator=generator)
    sensitivity = Sensitivity(squares[0], squares[1], (1.0, 2.5))
    expected = ((text @ error.t()).square().mean(0) * squares[0]).sum() / 2
    expected += 2.5 * ((vision @ error.t()).square().mean(0) * squares[1]).sum() / 2
    errors, doubled = OutputErrors.of(error, statistics), OutputErrors.of(2 * error, statistics)
    assert sensitivity.predicted_loss(errors) == pytest.approx(float(expected), rel=1e-5)
    assert sensitivity.predicted_loss(doubled) == pytest.approx(4 * float(expected), rel=1e-5)
    assert Sensitivity(squares[0], None, (1.0, 0.0)).predicted_loss(errors) < float(expected)


def test_other_errors_relate_to_the_measured_loss_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    statistics = InputStatistics(text=one_kind(torch.randn(20, 6, generator=generator)), vision=one_kind(torch.ones(9, 6)))
    error = torch.randn(4, 6, generator=generator)
    reference, other = OutputErrors.of(error, statistics), OutputErrors.of(3 * error, statistics)
    sensitivity = Sensitivity(torch.rand(4, generator=generator), torch.rand(4, generator=generator), (1.0, 2.0), (0.3, 0.07))
    assert sensitivity.predicted_loss(reference, reference) == pytest.approx((0.3 + 2 * 0.07) / 2)
    assert sensitivity.predicted_loss(other, reference) == pytest.approx(9 * (0.3 + 2 * 0.07) / 2, rel=1e-5)
    unread = Sensitivity(torch.zeros(4), torch.zeros(4), (1.0, 2.0), (0.0, 0.0))
    assert unread.predicted_loss(other, reference) == 0
    # a reference that rounds without an error tells nothing of others
    exact = OutputErrors.of(torch.zeros(4, 6), statistics)
    lossless = replace(sensitivity, reference=(0.0, 0.0))
    assert lossless.predicted_loss(other, exact) == sensitivity.predicted_loss(other) > 0


def test_the_reference_error_is_measured_token_by_token(tmp_path: Path) -> None:
    """What a change costs at each token, by plain autograd through the whole model, on the same drawn labels."""
    calibration = batches(build_qwen2_5_vl(tmp_path, dtype=torch.float32))
    linears = [f"{BLOCKS}.1.{kind}" for kind in KINDS] + ["lm_head"]
    generator = torch.Generator().manual_seed(5)
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(tmp_path, dtype=torch.float32)
    errors = {name: torch.randn(model.get_submodule(name).weight.shape, generator=generator) for name in linears}
    seen: list[str] = []

    def reference(name: str, weight: Tensor) -> Tensor:
        assert torch.equal(weight, model.get_submodule(name).weight)
        seen.append(name)
        return errors[name]

    visited: list[str] = []
    forward = Forward(lambda visit: visited.append(visit.name), [1], reference)
    measured = measure_sensitivity(plan(tmp_path, calibration), linears, 3, forward=forward)
    assert visited == [f"{BLOCKS}.{block}" for block in range(3)] + ["lm_head"]
    assert sorted(seen) == sorted(linears)
    expected = by_autograd(tmp_path, [calibration[1]], linears, 3, errors)
    for name in linears:
        found = measured[name].reference
        assert found is not None
        assert found[0] == pytest.approx(float(expected[name]["text"]), rel=1e-3)
        if "vision" in expected[name]:
            assert found[1] == pytest.approx(float(expected[name]["vision"]), rel=1e-3, abs=1e-12)


def test_weights_of_the_modalities() -> None:
    statistics = InputStatistics(text=one_kind(torch.ones(20, 2)), vision=one_kind(torch.full((60, 2), 2.0)))
    statistics.weights = share(statistics, 0.75)
    torch.testing.assert_close(statistics.mean_hessian(), torch.full((2, 2), 0.75 * 1 + 0.25 * 4))
    sensitivities = [
        Sensitivity(torch.full((3,), 0.5), torch.full((3,), 0.1), (1.0, 3.0)),
        Sensitivity(torch.tensor([1.5]), torch.tensor([0.2]), (1.0, 3.0)),
    ]
    text, vision = balance(statistics, sensitivities)
    assert text / vision == pytest.approx(3.0 / 0.5)
    assert (20 * text + 60 * vision) / 80 == pytest.approx(1)
    assert balance(statistics, []) == (1.0, 1.0)
    assert balance(statistics, [Sensitivity(torch.ones(3), None, (1.0, 0.0))]) == (1.0, 1.0)
    alone = InputStatistics(text=statistics.text)
    assert balance(alone, sensitivities) == share(alone, 0.3) == (1.0, 1.0)


def test_a_layer_that_is_never_called_is_named(tmp_path: Path) -> None:
    calibration = batches(build_qwen2_5_vl(tmp_path))
    with pytest.raises(CheckpointError, match=f"{BLOCKS}.9.mlp.up_proj: no calibration sample calls it"):
        measure_sensitivity(plan(tmp_path, calibration), [f"{BLOCKS}.9.mlp.up_proj"], 0)
