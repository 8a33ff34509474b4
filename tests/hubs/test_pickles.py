"""Pickle checkpoints are read only as what they are allowed to be: tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors_torch

from compress.checkpoints.artifact import file_digest
from compress.checkpoints.checkpoint import open_checkpoint
from compress.errors import CheckpointError, CompressError
from compress.hubs.hub import (
    convert_pickle,
    fetch_model,
    open_pinned,
    resolve_model,
)
from compress.progress import Silent
from tests.pickles import save_pickles
from tests.tiny import build_qwen2_5_vl


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("count", [1, 2])
def test_pickle_converts_to_the_same_tensors(checkpoint: Path, tmp_path: Path, count: int) -> None:
    names = sorted(open_checkpoint(checkpoint).tensors)
    source, target = tmp_path / "pickled", tmp_path / "converted"
    source.mkdir()
    save_pickles(checkpoint, source, [names[place::count] for place in range(count)])
    pin = resolve_model(str(source), "huggingface", "main")
    assert pin.pickled
    with pytest.raises(CheckpointError, match=r"holds a pickle checkpoint, .* set model.allow_pickle: true"):
        open_pinned(pin)
    with pytest.raises(CheckpointError, match="holds a pickle checkpoint"):
        fetch_model(pin, Silent())
    assert open_pinned(pin, allow_pickle=True) is None
    convert_pickle(fetch_model(pin, Silent(), allow_pickle=True), target)
    converted = open_checkpoint(target)
    assert len({entry.file for entry in converted.tensors.values()}) == count
    expected = safetensors_torch.load_file(checkpoint / "model.safetensors")
    found = {name: tensor for path in target.glob("*.safetensors") for name, tensor in safetensors_torch.load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert file_digest(target / "tokenizer.json") == file_digest(checkpoint / "tokenizer.json")


@pytest.mark.parametrize("tied", [True, False])
def test_pickle_with_a_shared_head(tmp_path: Path, tied: bool) -> None:
    source, target = tmp_path / "pickled", tmp_path / "converted"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    embedding = torch.arange(12.0).reshape(4, 3)
    torch.save({"embed.weight": embedding, "lm_head.weight": embedding}, source / "pytorch_model.bin")
    convert_pickle(source, target)
    found = safetensors_torch.load_file(target / "model.safetensors")
    assert set(found) == ({"embed.weight"} if tied else {"embed.weight", "lm_head.weight"})
    assert all(torch.equal(tensor, embedding) for tensor in found.values())


class Harmful:
    """What a pickle can do when it is loaded without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": Harmful()}, "holds more than tensors, or is damaged, and is not loaded"),
        ({"step": 3}, "is no table of named tensors"),
        (b"PK\x03\x04 cut short", "cannot be read|holds more than tensors"),
        (None, "missing; fetch the checkpoint again"),
    ],
)
def test_bad_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CompressError, match=message):
        convert_pickle(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "harm").exists()
