"""InternVL3's graphs beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig

from compress.errors import CheckpointError
from tests.export.onnx_graphs import written
from tests.export.onnx_seeing import MARKS, PROMPTS, difference, rebuilt, seeing
from tests.tiny import build_internvl


@pytest.mark.parametrize(
    ("changes", "vision"),
    [
        ({}, {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False, "hidden_act": "gelu_pytorch_tanh"}),
        ({}, {"use_mean_pooling": False, "use_absolute_position_embeddings": False, "use_mask_token": True}),
        ({"vision_feature_layer": -2, "projector_hidden_act": "relu"}, {"use_mean_pooling": False}),
        ({"vision_feature_layer": 2, "downsample_ratio": 0.25}, {"use_mean_pooling": False}),
    ],
    ids=["norms", "normed at the end", "an inner layer", "larger squares"],
)
def test_other_towers_and_layers(changes: dict[str, Any], vision: dict[str, Any], tmp_path: Path) -> None:
    source = build_internvl(tmp_path / "source")
    config = cast("Any", AutoConfig).from_pretrained(source)
    for owner, keys in ((config, changes), (config.vision_config, vision)):
        for key, value in keys.items():
            setattr(owner, key, value)
    folder = rebuilt(source, tmp_path / "model", config)
    model = seeing(folder, tmp_path / "onnx", MARKS["internvl3"])
    pixels = model.pixels([(200, 90), (57, 300)])
    assert difference(model.features(pixels), model.expected_features(pixels)) < 2e-5


@torch.no_grad()
def test_positions_of_long_rows_are_those_of_transformers(tmp_path: Path) -> None:
    folder = build_internvl(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}  # as published, for more than 16 tokens
    config["text_config"] |= {"max_position_embeddings": 16, "rope_parameters": scaling}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = seeing(folder, tmp_path / "onnx", MARKS["internvl3"])
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[0]]  # transformers stays with the longest row that it has seen
    rows = [model.row(*prompt) for prompt in prompts]
    assert [len(row.embeds) > 16 for row in rows] == [False, True, True]
    batched = model.graphs.logits(rows, steps=0)
    for prompt, actual in zip(prompts, batched, strict=True):
        assert difference(actual, model.expected_logits(*prompt)) < 5e-5
    model.expected_logits(*prompts[0])  # a short row makes it forget
    inputs = model.inputs(*prompts[-1])
    ids = inputs.pop("input_ids")
    start = model.model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :-2]}, input_ids=ids[:, :-2], use_cache=True)
    actual = model.graphs.logits([rows[-1]], steps=2)[0]
    for position in (-2, -1):
        step = model.model(input_ids=ids[:, [position]], past_key_values=start.past_key_values)
        assert difference(actual[position], step.logits[0, 0].numpy()) < 5e-5
    assert difference(actual[-1], batched[-1][-1]) > 1e-3  # the cache keeps keys as they were rotated


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("vision_feature_layer", 3, "vision_feature_layer is 3, of a tower of 2 blocks"),
        ("vision_feature_select_strategy", "full", "'full' and downsample_ratio 0.5 leave no whole squares of a tile of 4 by 4"),
        ("downsample_ratio", 0.33, "'default' and downsample_ratio 0.33 leave no whole squares of a tile of 4 by 4"),
    ],
)
def test_what_a_tower_cannot_give_is_told(key: str, value: Any, fault: str, tmp_path: Path) -> None:
    folder = build_internvl(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{folder}/config.json: .*{fault}"):
        written(folder, tmp_path / "onnx")
