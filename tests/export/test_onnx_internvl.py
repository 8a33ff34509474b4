"""InternVL3's graphs beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from compress.errors import CheckpointError
from compress.export.graphs.write import Precision
from tests.export.onnx_graphs import written
from tests.export.onnx_seeing import Seeing, difference, seeing
from tests.export.onnx_seeing import Sizes as Pictures
from tests.quantized import round_checkpoint, scheme
from tests.tiny import Sizes, build_internvl
from tests.tiny.parts import fill

MARK = "<IMG_CONTEXT>\n"
PROMPTS: tuple[tuple[str, Pictures], ...] = (
    ("How many circles are there?", [(200, 90), (57, 300)]),
    ("Is there a red square?", []),
    ("What colour is the largest shape?", [(56, 56)]),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    folder = tmp_path_factory.mktemp("internvl3")
    return seeing(build_internvl(folder / "model"), folder / "onnx", MARK)


@pytest.mark.parametrize(
    "sizes", [[(112, 112)], [(200, 90), (57, 300)], [(333, 120), (30, 31), (120, 333), (1000, 40)]], ids=["one", "two", "four"]
)
def test_features_are_those_of_transformers(model: Seeing, sizes: Pictures) -> None:
    pixels = model.pixels(sizes)
    assert difference(model.features(pixels), model.expected_features(pixels)) < 1e-5


def test_logits_are_those_of_transformers(model: Seeing) -> None:
    rows = [model.row(*prompt) for prompt in PROMPTS]
    for prompt, ours in zip(PROMPTS, model.graphs.logits(rows, steps=2), strict=True):
        assert difference(ours, model.expected_logits(*prompt)) < 3e-5


def test_a_picture_changes_the_answer(model: Seeing) -> None:
    question = PROMPTS[0][0]
    last = [model.graphs.logits([model.row(question, [size])], steps=0)[0][-1] for size in ((112, 112), (200, 90))]
    assert difference(*last) > 0.1


def test_attention_is_fused(model: Seeing) -> None:
    vision, decoder = model.graphs.operators("vision_encoder"), model.graphs.operators("decoder_model_merged")
    assert vision.count("MultiHeadAttention") == 2
    assert decoder.count("GroupQueryAttention") == 3
    assert "Softmax" not in vision + decoder


def test_half_precision_is_near(tmp_path: Path) -> None:
    model = seeing(build_internvl(tmp_path / "model"), tmp_path / "onnx", MARK, Precision("float16"))
    for prompt in PROMPTS:
        expected = model.expected_logits(*prompt)
        [ours] = model.graphs.logits([model.row(*prompt)], steps=1)
        assert difference(ours, expected) < 0.01 * np.abs(expected).max()


def test_weights_of_four_bits_are_the_checkpoint_s_own(tmp_path: Path) -> None:
    folder = tmp_path / "int4"
    held = round_checkpoint(
        build_internvl(tmp_path / "model"), folder, scheme(4, 32), vision=lambda _: scheme(4, 32, symmetric=True)
    )
    assert any(name.endswith("attention.projection_layer") for name in held)
    model = seeing(folder, tmp_path / "onnx", MARK, Precision("float32", accuracy_level=0))
    rows = [model.row(*prompt) for prompt in PROMPTS]
    for prompt, ours in zip(PROMPTS, model.graphs.logits(rows, steps=2), strict=True):
        assert difference(ours, model.expected_logits(*prompt)) < 1e-4
    assert "MatMul" not in model.graphs.operators("vision_encoder")


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
@torch.no_grad()
def test_other_towers_and_layers(changes: dict[str, Any], vision: dict[str, Any], tmp_path: Path) -> None:
    source = build_internvl(tmp_path / "source")
    config = cast("Any", AutoConfig).from_pretrained(source)
    for owner, keys in ((config, changes), (config.vision_config, vision)):
        for key, value in keys.items():
            setattr(owner, key, value)
    made = cast("Any", AutoModelForImageTextToText).from_config(config)
    fill(made, Sizes())
    made.save_pretrained(tmp_path / "model")
    for file in source.glob("*"):
        if not (tmp_path / "model" / file.name).exists():
            file.rename(tmp_path / "model" / file.name)
    model = seeing(tmp_path / "model", tmp_path / "onnx", MARK)
    pixels = model.pixels([(200, 90), (57, 300)])
    assert difference(model.features(pixels), model.expected_features(pixels)) < 2e-5


@torch.no_grad()
def test_positions_of_long_rows_are_those_of_transformers(tmp_path: Path) -> None:
    folder = build_internvl(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}  # as published, for more than 16 tokens
    config["text_config"] |= {"max_position_embeddings": 16, "rope_parameters": scaling}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = seeing(folder, tmp_path / "onnx", MARK)
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[0]]  # transformers stays with the longest row that it has seen
    rows = [model.row(*prompt) for prompt in prompts]
    assert [len(row.embeds) > 16 for row in rows] == [False, True, True]
    found = model.graphs.logits(rows, steps=0)
    for prompt, ours in zip(prompts, found, strict=True):
        assert difference(ours, model.expected_logits(*prompt)) < 5e-5
    model.expected_logits(*prompts[0])  # a short row makes it forget
    inputs = model.inputs(*prompts[-1])
    ids = inputs.pop("input_ids")
    start = model.model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :-2]}, input_ids=ids[:, :-2], use_cache=True)
    ours = model.graphs.logits([rows[-1]], steps=2)[0]
    for place in (-2, -1):
        step = model.model(input_ids=ids[:, [place]], past_key_values=start.past_key_values)
        assert difference(ours[place], step.logits[0, 0].numpy()) < 5e-5
    assert difference(ours[-1], found[-1][-1]) > 1e-3  # the cache keeps keys as they were rotated


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
