"""An export is held against what transformers itself makes of the checkpoint: a mistake of either, or of both alike, is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import CheckpointError, VerificationError
from compress.export.onnx.graphs import linears, vocabulary
from compress.families import FAMILIES, Family
from compress.families.resolve import family_at
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes import activations
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers import model as transformers_model
from compress.verification.independent import load_independently
from tests.families.samples import load_plain
from tests.quantized import round_checkpoint, scheme
from tests.tiny import BUILDERS, build_qwen2_5_vl
from tests.verification.artifacts import export_onnx, verify

TOKEN = Scheme(8, -1, symmetric=True, activations="token")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("independence") / "source", layers=2)


@pytest.fixture(scope="module")
def rounded(source: Path) -> Path:
    round_checkpoint(source, source.parent / "rounded", TOKEN)
    return source.parent / "rounded"


@pytest.fixture(scope="module")
def merged(source: Path) -> Path:
    """Return a checkpoint whose config says that the head is the embeddings, beside a head of its own, as PEFT leaves it."""
    folder = source.parent / "merged"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def rounded_merged(merged: Path) -> Path:
    round_checkpoint(merged, merged.parent / "rounded merged", scheme(4, 32))
    return merged.parent / "rounded merged"


@pytest.mark.parametrize("name", ["merged", "rounded_merged"])
def test_a_head_of_its_own_beside_a_config_that_says_tied(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint = request.getfixturevalue(name)
    assert verify(export_onnx(checkpoint, tmp_path / "onnx"), tmp_path / "onnx", checkpoint).components


@pytest.mark.parametrize("name", ["merged", "rounded_merged"])
def test_a_head_that_all_of_this_program_takes_for_the_embeddings(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config alone is believed, by writer and reader alike."""
    checkpoint = request.getfixturevalue(name)
    for module in (vocabulary, transformers_model):
        monkeypatch.setattr(module, "head_is_tied", _as_the_config_says)
    export = export_onnx(checkpoint, tmp_path / "onnx")
    with pytest.raises(VerificationError, match="the decoder differs from the checkpoint's"):
        verify(export, tmp_path / "onnx", checkpoint)


def test_a_head_that_the_writer_alone_takes_for_the_embeddings(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(vocabulary, "head_is_tied", _as_the_config_says)
        export = export_onnx(merged, tmp_path / "onnx")
    with pytest.raises(VerificationError, match="the decoder differs from the checkpoint's"):
        verify(export, tmp_path / "onnx", merged)


def _as_the_config_says(checkpoint: Checkpoint, family: Family) -> bool:
    return family.says_tied(checkpoint.config)


def test_tensors_that_all_of_this_program_takes_for_each_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, exchanged = Family.module_name, {"mlp.gate_proj": "mlp.up_proj", "mlp.up_proj": "mlp.gate_proj"}

    def exchange(family: Family, disk_name: str) -> str:
        name = honest(family, disk_name)
        part = next((part for part in exchanged if part in name), None)
        return name.replace(part, exchanged[part]) if part and "language_model" in name else name

    monkeypatch.setattr(Family, "module_name", exchange)
    export = export_onnx(source, tmp_path / "onnx")
    with pytest.raises(VerificationError, match="the decoder differs from the checkpoint's"):
        verify(export, tmp_path / "onnx", source)


def test_inputs_that_the_reader_alone_rounds_otherwise(rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = export_onnx(rounded, tmp_path / "onnx")
    honest = activations.fake_quantize_activations

    def coarse(inputs: Tensor, kind: Any, sort: Any, bits: int, scale: Tensor | None) -> Tensor:
        return honest(inputs, kind, sort, bits - 5, scale)

    monkeypatch.setattr(activations, "fake_quantize_activations", coarse)
    with pytest.raises(VerificationError, match=r"the decoder differs from the checkpoint's.*as it runs"):
        verify(export, tmp_path / "onnx", rounded)


def test_inputs_that_the_graphs_alone_round_otherwise(rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_MAX_CODE", 3.0)
    export = export_onnx(rounded, tmp_path / "onnx")
    with pytest.raises(VerificationError, match=r"the decoder differs from the checkpoint's.*as it runs"):
        verify(export, tmp_path / "onnx", rounded)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_from_pretrained_gives(family: str, tmp_path: Path) -> None:
    plain = BUILDERS[family](tmp_path / "source")
    schemes = round_checkpoint(plain, tmp_path / "rounded", scheme(4, 32))
    expected = dict(load_plain(plain, "float32").named_parameters())
    for folder, changed in ((plain, set[str]()), (tmp_path / "rounded", {f"{name}.weight" for name in schemes})):
        context = OpenContext.at(folder, folder, Silent())
        actual = dict(load_independently(context, torch.float32, torch.device("cpu")).named_parameters())
        record = family_at(folder)
        assert actual.keys() == expected.keys()
        differing = {name for name in actual if not torch.equal(actual[name], expected[name])}
        assert differing == {record.module_name(name) for name in changed}


def test_a_weight_that_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    without.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"}
            save_file(tensors, without / file.name, {"format": "pt"})
        else:
            (without / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"without: transformers finds no weight for model\.language_model\.norm\.weight"):
        load_independently(OpenContext.at(without, without, Silent()), torch.float32, torch.device("cpu"))
