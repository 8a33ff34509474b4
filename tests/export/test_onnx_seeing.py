"""What the graphs of every model whose features take the places of image tokens do as transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.export.onnx.graphs.write import Precision
from tests.export.onnx_seeing import MARKS, PROMPTS, Seeing, Sizes, difference, seeing
from tests.quantized import round_checkpoint, scheme
from tests.tiny import BUILDERS

USED_BLOCKS = {"internvl3": 2, "llava": 1, "llava-next": 1}
"""Of two blocks LLaVA's last is not looked at."""


@pytest.fixture(scope="module", params=MARKS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    folder = tmp_path_factory.mktemp(family)
    return seeing(BUILDERS[family](folder / "model"), folder / "onnx", MARKS[family])


@pytest.mark.parametrize(
    "sizes",
    [[(112, 112)], [(200, 90), (57, 300)], [(333, 120), (30, 31), (120, 333), (1000, 40)], [(1, 1), (2, 1), (1, 3)]],
    ids=["one", "two", "four", "smallest"],
)
def test_features_are_those_of_transformers(model: Seeing, sizes: Sizes) -> None:
    pixels = model.pixels(sizes)
    assert difference(model.features(pixels), model.expected_features(pixels)) < 1e-5


def test_logits_are_those_of_transformers(model: Seeing) -> None:
    rows = [model.row(*prompt) for prompt in PROMPTS]
    for prompt, actual in zip(PROMPTS, model.graphs.logits(rows, steps=2), strict=True):
        assert difference(actual, model.expected_logits(*prompt)) < 3e-5


def test_a_picture_changes_the_answer(model: Seeing) -> None:
    question = PROMPTS[0][0]
    last = [model.graphs.logits([model.row(question, [size])], steps=0)[0][-1] for size in ((112, 112), (200, 90))]
    assert difference(*last) > 0.1


def test_attention_is_fused(family: str, model: Seeing) -> None:
    vision, decoder = model.graphs.operators("vision_encoder"), model.graphs.operators("decoder_model_merged")
    assert vision.count("MultiHeadAttention") == USED_BLOCKS[family]
    assert decoder.count("GroupQueryAttention") == 3
    assert "Softmax" not in vision + decoder


def test_half_precision_is_near(family: str, tmp_path: Path) -> None:
    model = seeing(BUILDERS[family](tmp_path / "model"), tmp_path / "onnx", MARKS[family], Precision("float16"))
    for prompt in PROMPTS:
        expected = model.expected_logits(*prompt)
        [actual] = model.graphs.logits([model.row(*prompt)], steps=1)
        assert difference(actual, expected) < 0.01 * np.abs(expected).max()


def test_weights_of_four_bits_are_the_checkpoint_s_own(family: str, tmp_path: Path) -> None:
    source, folder = BUILDERS[family](tmp_path / "model"), tmp_path / "int4"
    round_checkpoint(source, folder, scheme(4, 32), vision=lambda _: scheme(4, 32, symmetric=True))
    model = seeing(folder, tmp_path / "onnx", MARKS[family], Precision("float32", accuracy_level=0))
    rows = [model.row(*prompt) for prompt in PROMPTS]
    for prompt, actual in zip(PROMPTS, model.graphs.logits(rows, steps=2), strict=True):
        assert difference(actual, model.expected_logits(*prompt)) < 1e-4
    assert "MatMul" not in model.graphs.operators("vision_encoder")
