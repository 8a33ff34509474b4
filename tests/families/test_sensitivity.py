from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import spec_of
from compress.engine.replay import WalkConfig
from compress.engine.sensitivity import measure_sensitivity
from compress.errors import CheckpointError
from compress.families import Family
from compress.families.resolve import family_at
from compress.stages.linears import select
from tests.families.samples import Fixed, batches, load_plain
from tests.tiny import BUILDERS, build_clip


def keeping(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        outputs[name] = output

    return hook


def by_autograd(
    folder: Path, family: Family, calibration: Sequence[Fixed], linears: Sequence[str]
) -> tuple[dict[str, list[Tensor]], int]:
    """Return each linear's sums of squared gradients at text and at image rows, by plain autograd, and the predicted tokens."""
    model, generator = load_plain(folder, "float32"), torch.Generator().manual_seed(0)
    cast("nn.Module", model).requires_grad_(False)
    model.get_submodule(family.embeddings).weight.requires_grad_(True)
    outputs: dict[str, Tensor] = {}
    for name in linears:
        model.get_submodule(name).register_forward_hook(keeping(outputs, name))
    sums = {name: [torch.zeros(()), torch.zeros(())] for name in linears}
    predicted = 0
    images = () if family.cross_attention_linears else family.placeholders(open_checkpoint(folder).config)
    for batch in calibration:
        inputs = batch.inputs()
        valid = inputs["attention_mask"].bool()
        vision = torch.isin(inputs["input_ids"], torch.tensor(images, dtype=torch.int64))
        outputs.clear()
        logits = model.get_submodule(family.entry(inputs))(**inputs, use_cache=False).logits[valid & ~vision]
        chances = logits.detach().softmax(-1)
        labels = (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        predicted += len(labels)
        for name, output in outputs.items():
            squares = cast("Tensor", output.grad).flatten(0, -2).square()
            if any(name.endswith(reader) for reader in family.cross_attention_linears):
                sums[name][1] = sums[name][1] + squares.sum(0)
            else:
                sums[name][0] = sums[name][0] + squares[(valid & ~vision).view(-1)].sum(0)
                sums[name][1] = sums[name][1] + squares[(valid & vision).view(-1)].sum(0)
    return sums, predicted


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "clip"])
def test_every_linear_of_the_decoder_is_as_sensitive_as_autograd_says(name: str, tmp_path: Path) -> None:
    calibration = batches(BUILDERS[name](tmp_path, dtype=torch.float32))
    checkpoint, family = open_checkpoint(tmp_path), family_at(tmp_path)
    linears = [linear.name for linear in select(spec_of(checkpoint, family), ("decoder",), ()).linears]
    expected, predicted = by_autograd(tmp_path, family, calibration, linears)
    actual = measure_sensitivity(WalkConfig(checkpoint, family, calibration, "cpu", tmp_path), linears, seed=0)
    largest = max(float(part.max()) for parts in expected.values() for part in parts) / predicted
    assert expected.keys() == set(linears) != set()
    for linear, (text, vision) in expected.items():
        measured = actual[linear]
        for values, share, total in zip((measured.text, measured.vision), measured.per_token, (text, vision), strict=True):
            mean = torch.zeros(()) if values is None else values * share
            torch.testing.assert_close(mean, total / predicted if values is not None else mean, rtol=1e-3, atol=largest * 1e-7)
            assert values is not None or not total.any()


def test_a_model_without_an_output_head_says_so(tmp_path: Path) -> None:
    calibration: list[Any] = batches(build_clip(tmp_path))
    plan = WalkConfig(open_checkpoint(tmp_path), family_at(tmp_path), calibration, "cpu", tmp_path)
    with pytest.raises(CheckpointError, match="clip has no output head, so nothing tells what its predictions depend on"):
        measure_sensitivity(plan, [], 0)
