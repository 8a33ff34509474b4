"""Every family with every method: from the source checkpoint to an artifact that answers in the in-process runtime."""

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoints.checkpoint import Checkpoint, open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.checkpoints.spec import spec_of
from compress.data.prompts import Prompt
from compress.engine.products import float32_products
from compress.engine.replay import Replay, WalkConfig
from compress.engine.statistics import observe
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.families import FAMILIES, within
from compress.families.resolve import family_at
from compress.progress import Silent
from compress.recipe.schema import load_row
from compress.runtimes.runtime import ImageInput, OpenContext
from compress.runtimes.transformers.model import load_model
from compress.runtimes.transformers.runtime import Transformers
from compress.stages import STAGES
from compress.stages.linears import select
from compress.stages.stage import Stage
from tests.families.samples import LONG, SHORT, batches, load_plain
from tests.families.test_selection import INTENDED
from tests.stages.bench import Bench, prepare, tensors_of
from tests.tiny import BUILDERS, picture

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"bits": 4, "group_size": 32, "grid": 4}, "awq"),
    "gptq": ({"bits": 4, "group_size": 32, "grid": 4, "symmetric": True}, "gptq"),
    "int8": ({"grid": 4}, "compressed-tensors"),
}
"""The settings of each method, and the layout that its result is exported in."""

PARTS = re.compile(r"\.(weight|weight_packed|weight_scale|weight_shape|weight_zero_point|qweight|qzeros|scales|g_idx|input_scale)$")


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    base = tmp_path_factory.mktemp("matrix")
    return prepare(base, BUILDERS[request.param](base / "model"))


def outputs(folder: Path) -> Tensor:
    """Return what the model makes of prompts with and without images, as the in-process runtime loads it; float64 logits."""
    model = load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))
    family, rows = family_at(folder), list[Tensor]()
    for batch in batches(folder)[:2]:
        inputs = batch.inputs()
        with torch.no_grad():
            output = model.get_submodule(family.entry(inputs))(**inputs)
        if family.head is None:
            rows.append(output.pooler_output if "pooler_output" in output else output.text_embeds)
        else:
            rows.append(output.logits[inputs["attention_mask"].bool()])
    return torch.cat([row.double().flatten() for row in rows])


def answers(folder: Path) -> list[Any]:
    """Return what the in-process runtime says to prompts with an image and without, or how it tells classes apart."""
    family = family_at(folder)
    with Transformers(runtime="transformers").open(OpenContext.at(folder, folder / "logs", Silent())) as session:
        if family.head is None:
            pictures = [ImageInput(str(seed), picture(seed)) for seed in (1, 2)]
            return session.classify(pictures, [["red"], ["a blue square"]], Silent()).round(3).tolist()
        prompts = [Prompt("image", SHORT, (picture(1),)), Prompt("text", LONG)]
        return [answer.token_ids for answer in session.answer(prompts, 6, Silent())]


def shapes(checkpoint: Checkpoint, names: set[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of all tensors but those of the named linears' own."""
    kept = {name: entry for name, entry in checkpoint.tensors.items() if PARTS.sub("", name) not in names}
    return {name: (entry.dtype, entry.shape) for name, entry in kept.items()}


@pytest.mark.parametrize("method", METHODS)
def test_from_the_source_to_answers(source: Bench, method: str, tmp_path: Path) -> None:
    fields, layout = METHODS[method]
    stage = cast("Stage", load_row(STAGES, method).model_validate({"stage": method, **fields}))
    compressed = source.apply(tmp_path / "compressed", stage)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    VllmExport.model_validate({"format": "vllm", "layout": layout}).apply(
        ExportContext(compressed, artifact, source.family, Silent())
    )

    original, exported = source.checkpoint, open_checkpoint(artifact)
    quantized = set(quantized_linears(open_checkpoint(compressed)))
    family = source.family
    linears = {name for name, part in load_plain(source.folder).named_modules() if isinstance(part, nn.Linear)}
    intended = {name for name in linears if re.fullmatch(INTENDED[family.name][0], name)}
    assert {family.module_name(name) for name in quantized} == intended
    assert shapes(exported, quantized) == shapes(original, quantized)
    assert {PARTS.sub("", name) for name in exported.tensors} == {PARTS.sub("", name) for name in original.tensors}
    before, after = tensors_of(source.folder), tensors_of(artifact)
    outside = [name for name in before if not within(family.module_name(name), family.blocks)]
    assert outside
    assert all(torch.equal(after[name], before[name]) for name in outside)

    expected, actual = outputs(source.folder), outputs(artifact)
    lost = float((actual - expected).square().mean() / expected.square().mean())
    assert 0 < lost < (0.05 if method == "int8" else 0.35)  # random weights amplify what rounding changes; noise would be at 2
    assert answers(artifact) == answers(compressed)


def test_statistics_are_those_of_the_layer_of_that_name(source: Bench, tmp_path: Path) -> None:
    calibration = batches(source.folder)[1:3]
    family, checkpoint = source.family, source.checkpoint
    linears = select(spec_of(checkpoint, family), ("decoder", "vision", "projector"), ()).linears
    padded = family.name == "mllama"  # whose tower fills tiles up, with rows that do not count
    names = [linear.name for linear in linears if not linear.name.endswith(family.cross_attention_linears or ("\n",))]
    names = [name for name in names if not (padded and family.inside_vision(name))]
    model, plain = load_plain(source.folder), dict[str, Tensor]()

    def counting(name: str) -> Any:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).float()
            plain[name] = plain.get(name, torch.zeros(())) + rows.t() @ rows

        return count

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(counting(name))
    with torch.no_grad(), float32_products("cpu"):  # the kernels that the walk takes here
        for batch in calibration:
            model(**batch.inputs())
    replay = Replay(WalkConfig(checkpoint, family, calibration, "cpu", tmp_path))
    seen = set[str]()
    for units in (replay.vision_units(), replay.decoder_units()):
        for visit in replay.walk(units):
            local = {name.removeprefix(visit.name).lstrip("."): name for name in names if within(name, visit.name)}
            if "" in local:  # a part that is a linear itself
                seen.update(local.values())
                continue
            statistics = observe(visit, local)
            for relative, name in local.items():
                actual = statistics[relative].mean_hessian() * statistics[relative].tokens
                torch.testing.assert_close(actual, plain[name], rtol=2e-3, atol=2e-3 * float(plain[name].abs().max()))
                seen.add(name)
    assert seen == set(names)
