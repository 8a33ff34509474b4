"""Artifacts whose config.json says otherwise of AWQ's and GPTQ's words than their tensors, or what is not read here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from compress.checkpoints.awq_gptq_config import check_packed_config
from compress.checkpoints.checkpoint import open_checkpoint
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.export.vllm.limits import Layout
from compress.families.resolve import family_of
from compress.progress import Silent
from compress.runtimes.unpack import dense_tensors
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_qwen2_5_vl


@pytest.fixture(scope="module")
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout: Layout = request.param
    folder = tmp_path_factory.mktemp(layout)
    source = build_qwen2_5_vl(folder / "source", layers=1)
    round_checkpoint(source, folder / "rounded", scheme(4, 32, symmetric=layout == "gptq"))
    (folder / layout).mkdir()
    family = family_of(json.loads((source / "config.json").read_text(encoding="utf-8")))
    VllmExport(format="vllm", layout=layout).apply(ExportContext(folder / "rounded", folder / layout, family, Silent()))
    return folder / layout


def changed(artifact: Path, folder: Path, **keys: object) -> Path:
    shutil.copytree(artifact, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= keys
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return dict(dense_tensors(open_checkpoint(folder), torch.float32, torch.device("cpu")))


@pytest.mark.parametrize(
    ("artifact", "key", "value"),
    [
        ("awq", "bits", 5),
        ("awq", "bits", 8),
        ("awq", "bits", "4"),
        ("awq", "group_size", 64),
        ("awq", "group_size", 0),
        ("awq", "group_size", -1),
        ("awq", "group_size", "x"),
        ("awq", "version", "gemv"),
        ("awq", "zero_point", False),
        ("gptq", "bits", 8),
        ("gptq", "bits", 3),
        ("gptq", "group_size", 128),
        ("gptq", "group_size", None),
        ("gptq", "checkpoint_format", "gptq_v2"),
        ("gptq", "dynamic", {"-:.*down.*": {}}),
    ],
    indirect=["artifact"],
)
def test_what_does_not_fit_is_refused_by_the_config_alone(artifact: Path, key: str, value: object, tmp_path: Path) -> None:
    folder = changed(artifact, tmp_path / "changed", **{key: value})
    with pytest.raises(
        CheckpointError, match=rf"changed/config\.json: quantization_config: .*{key if key != 'group_size' else ''}"
    ):
        check_packed_config(open_checkpoint(folder))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: "):
        read(folder)


@pytest.mark.parametrize("artifact", ["awq", "gptq"], indirect=True)
def test_a_sound_artifact_is_read_and_an_order_of_its_own_is_not(artifact: Path, tmp_path: Path) -> None:
    check_packed_config(open_checkpoint(artifact))
    before = read(artifact)
    folder = changed(artifact, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.scales")).removesuffix(".scales")
    groups = len(tensors[f"{name}.scales"])
    order = (torch.arange(groups * 32) // 32).to(torch.int32)
    save_file({**tensors, f"{name}.g_idx": order}, folder / "model.safetensors", metadata={"format": "pt"})
    same = read(folder)
    assert same.keys() == before.keys()
    assert all(torch.equal(same[each], before[each]) for each in before)
    save_file({**tensors, f"{name}.g_idx": order.flip(0).contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: its groups are of inputs in another order \(g_idx"):
        read(folder)
