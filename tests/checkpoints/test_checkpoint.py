"""What a checkpoint's folder may hold: files that lie in it, a config of the right types, no more depth than tensors."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from compress.checkpoints.artifact import check_side_files, copy_side_files
from compress.checkpoints.checkpoint import open_checkpoint, read_header
from compress.checkpoints.layouts import linear_shape
from compress.data.prompts import load_processor
from compress.errors import CheckpointError
from compress.runtimes.unpack import dense_tensors
from tests.preloaded import command_line
from tests.tiny import build_qwen2_5_vl

TWO = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}


def write(folder: Path, config: dict[str, Any] | str, header: object = None) -> Path:
    """Write a checkpoint of a config and a header over eight bytes of data."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    text = json.dumps(TWO if header is None else header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.json"
    path.write_text('{"password": "hunter2"}')
    return path


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "vocab.json", "any.py"]
)
def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path: Path, secret: Path, name: str) -> None:
    folder = write(tmp_path / "model", {})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"model/{name}: leads out of its folder, to .*secret\.json"):
        open_checkpoint(folder)


def in_templates(folder: Path, secret: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").symlink_to(secret)


def templates(folder: Path, secret: Path) -> None:
    (folder / "additional_chat_templates").symlink_to(secret.parent)


def two_links(folder: Path, secret: Path) -> None:
    (folder / "first").symlink_to(secret)
    (folder / "tokenizer.json").symlink_to("first")


@pytest.mark.parametrize("spoil", [in_templates, templates, two_links])
def test_links_below_and_over_others_are_refused_when_opened_and_when_copied(
    tmp_path: Path, secret: Path, spoil: Callable[[Path, Path], None]
) -> None:
    folder = write(tmp_path / "model", {})
    spoil(folder, secret)
    target = tmp_path / "target"
    target.mkdir()
    readers: list[Callable[[Path], object]] = [
        open_checkpoint,
        check_side_files,
        load_processor,
        partial(copy_side_files, target=target),
    ]
    for read in readers:
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            read(folder)
    assert not any("hunter2" in path.read_text() for path in target.rglob("*") if path.is_file())


def test_a_snapshot_and_links_within_the_folder_are_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", {"model_type": "x"})
    blobs = tmp_path / "models--acme--demo/blobs"
    snapshot = tmp_path / "models--acme--demo/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in whole.iterdir():
        path.rename(blobs / f"digest-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/digest-of-{path.name}")
    (snapshot / "again.json").symlink_to("config.json")
    assert list(open_checkpoint(snapshot).tensors) == ["a", "b"]
    (tmp_path / "named").symlink_to(snapshot)
    assert list(open_checkpoint(tmp_path / "named").tensors) == ["a", "b"]


def test_a_pipe_in_place_of_a_template_is_not_waited_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {})
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is no regular file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"vision_config": {"depth": 10**9}},
        {"vision_config": {"deepstack_visual_indexes": [0] * 100}},
    ],
)
def test_a_model_deeper_than_its_tensors_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .* is (a list of )?1[0,]+, and the checkpoint has 2 tensors"):
        open_checkpoint(write(tmp_path / "model", config))


def test_what_only_looks_like_depth_is_left_alone(tmp_path: Path) -> None:
    config = {
        "max_window_layers": 80,
        "num_hidden_layers": 2,
        "vision_feature_layer": -2,
        "quantization_config": {"ignore": ["x"] * 100},
    }
    assert open_checkpoint(write(tmp_path / "model", config)).tensors


def test_more_tensors_than_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_LIMIT_TENSORS", "1")
    with pytest.raises(CheckpointError, match=r"names 2 tensors \(limit tensors = 1, set by COMPRESS_LIMIT_TENSORS\)"):
        open_checkpoint(write(tmp_path / "model", {}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000, "nests too deep"),
        ('{"a": ' + "9" * 5000 + "}", "an integer of 5,000 digits"),
        ('{"model_type": "\\ud800"}', "surrogate"),
        ('{"a": "\\u0000"}', "NUL"),
        ('{"a": 1e999}', "infinite"),
        ({"text_config": 5}, "text_config must be a table, not such a number"),
        ({"text_config": {"num_hidden_layers": "x"}}, "text_config.num_hidden_layers must be a whole number above 0, not a text"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number above 0"),
        ({"hidden_size": 10**30}, "hidden_size must be a whole number above 0"),
        ({"image_token_id": [1]}, "image_token_id must be a whole number, not a list"),
        ({"quantization_config": ["x"]}, "quantization_config must be a table"),
        ({"quantization_config": {"config_groups": {"a": {"targets": ["Linear"]}}}}, r"config_groups\.a\.weights must be a table"),
        ({"quantization_config": {"ignore": ["re:((.*)*)*x$"]}}, r"a pattern in it takes too long \(limit trial_seconds"),
        ({"architectures": [7]}, "architectures must be a list of texts"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_a_config_of_the_wrong_types_is_one_message(
    tmp_path: Path, config: dict[str, Any] | str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_LIMIT_TRIAL_SECONDS", "1")
    header = {"a" * 60 + "b": TWO["a"], "b": TWO["b"]}
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        open_checkpoint(write(tmp_path / "model", config, header))


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
    ],
)
def test_a_header_of_the_wrong_types_is_one_message(tmp_path: Path, entry: object) -> None:
    folder = write(tmp_path / "model", {}, {"a": entry, "b": TWO["b"]})
    with pytest.raises(CheckpointError, match=r"the header's entry for a is malformed"):
        read_header(folder / "model.safetensors")


def test_a_shape_that_is_none_is_one_message(tmp_path: Path) -> None:
    header = {"x.weight_packed": TWO["a"], "x.weight_shape": {"dtype": "I32", "shape": [1], "data_offsets": [4, 8]}}
    with pytest.raises(CheckpointError, match="x has no shape of a matrix"):
        linear_shape(open_checkpoint(write(tmp_path / "model", {}, header)), "x")


def test_an_artifact_whose_codes_do_not_fit_its_shape_is_one_message(tmp_path: Path) -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "symmetric": True, "group_size": 32}}
    config = {
        "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": group}}
    }
    folder = tmp_path / "model"
    tensors = {
        "x.weight_packed": torch.zeros(2, 4, dtype=torch.int32),
        "x.weight_scale": torch.ones(2, 1),
        "x.weight_shape": torch.tensor([10**9, 10**9]),
    }
    write(folder, config)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"x: its packed weight \[2, 4\] holds no matrix \[1000000000, 1000000000\] of 4 bits"
    ):
        list(dense_tensors(open_checkpoint(folder), torch.float32, torch.device("cpu")))


def test_a_generation_config_of_the_wrong_types_is_one_message(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {})
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be a whole number, or a list of them"):
        load_processor(folder)


def test_a_template_that_does_not_end_is_refused_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_LIMIT_TRIAL_SECONDS", "1")
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(f"{loop}{loop}")
    with pytest.raises(CheckpointError, match=r"its chat template takes too long \(limit trial_seconds = 1"):
        load_processor(folder)


def test_an_audio_tokenizer_elsewhere_is_refused(tmp_path: Path, secret: Path) -> None:
    folder = write(tmp_path / "model", {})
    elsewhere = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": str(secret.parent)}
    (folder / "processor_config.json").write_text(json.dumps({"audio_tokenizer": elsewhere}))
    with pytest.raises(CheckpointError, match="names an audio tokenizer"):
        load_processor(folder)


def test_json_output_ends_with_1_for_nothing_but_the_verdict(tmp_path: Path, secret: Path) -> None:
    folder = write(tmp_path / "model", {"text_config": []})
    (tmp_path / "recipe.yaml").write_text("a: &a [*a]\n")
    for arguments in (
        ["plan", str(tmp_path / "recipe.yaml")],
        ["eval", str(folder), "--against", str(folder), "--by", str(secret)],
    ):
        done = subprocess.run(command_line(*arguments, "--json"), capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert json.loads(done.stdout)["exit_code"] == 2
        assert "Traceback" not in done.stderr
