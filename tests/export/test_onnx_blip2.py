"""BLIP-2's graphs beside transformers: image features, and logits of prompts with an image and without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from compress.export.onnx.graphs.write import Precision
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.export.onnx_graphs import Array, Graphs, Row, written
from tests.quantized import round_checkpoint, scheme
from tests.tiny import Sizes, build_blip2
from tests.tiny.parts import fill

TEXTS = ((2, 40, 41, 42, 43, 44, 45, 46), (2, 90, 91), (2, 17, 18, 19, 20))
"""Of these the first and the last have an image before them."""

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_blip2(tmp_path_factory.mktemp("blip2"))


@pytest.fixture(scope="module")
def graphs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return written(folder, tmp_path_factory.mktemp("graphs") / "onnx")


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def loaded(folder: Path) -> Any:
    return load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))


def features(graphs: Graphs, dtype: Any = np.float32) -> Array:
    return graphs.run("vision_encoder", pixel_values=pixels().numpy().astype(dtype))["image_features"]


def rows(graphs: Graphs, states: Array) -> list[Row]:
    embeds = [graphs.embed(text) for text in TEXTS]
    return [Row(np.concatenate([states[0], embeds[0]])), Row(embeds[1]), Row(np.concatenate([states[1], embeds[2]]))]


@torch.no_grad()
def expected(folder: Path) -> tuple[Array, list[Array]]:
    """Image features, and the logits of each text by itself."""
    model = loaded(folder)
    states = model.get_image_features(pixels()).pooler_output
    standing = [model.config.image_token_index] * model.config.num_query_tokens
    logits = [
        model(pixel_values=pixels()[image : image + 1], input_ids=torch.tensor([[*standing, *text]])).logits[0]
        for image, text in ((0, TEXTS[0]), (1, TEXTS[2]))
    ]
    logits.insert(1, model.language_model(input_ids=torch.tensor([TEXTS[1]])).logits[0])
    return states.numpy(), [text.numpy() for text in logits]


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < tolerance


def test_features_and_logits_are_those_of_transformers(folder: Path, graphs: Graphs) -> None:
    states, logits = expected(folder)
    assert np.abs(states[0] - states[1]).max() > 0.1
    assert_close(features(graphs), states, 1e-5)
    for actual, reference in zip(graphs.logits(rows(graphs, features(graphs)), STEPS), logits, strict=True):
        assert actual.dtype == np.float32
        assert_close(actual, reference, 2e-5)


def test_a_row_of_a_batch_is_what_it_is_alone(graphs: Graphs) -> None:
    batch = rows(graphs, features(graphs))
    for row, together in zip(batch, graphs.logits(batch, STEPS), strict=True):
        assert_close(graphs.logits([row], 0)[0], together, 2e-5)


def test_heads_are_fused_and_the_head_is_the_embeddings_own(graphs: Graphs) -> None:
    decoder, vision = graphs.operators("decoder_model_merged"), graphs.operators("vision_encoder")
    assert decoder.count("GroupQueryAttention") == 3
    assert vision.count("MultiHeadAttention") == 2 + 2 + 1  # the tower's blocks, the Q-Former's, and one that looks at the image
    assert not {"Softmax"} & {*decoder, *vision}
    size = {path.name: path.stat().st_size for path in graphs.folder.glob("*.onnx_data")}
    assert size["decoder_model_merged.onnx_data"] + size["embed_tokens.onnx_data"] < 1.05 * _decoder_bytes()


def _decoder_bytes() -> int:
    sizes = Sizes()
    block = 4 * sizes.hidden**2 + 2 * sizes.hidden * sizes.intermediate
    return 4 * (sizes.layers * block + (sizes.vocabulary + sizes.context) * sizes.hidden)


def test_half_precision_is_near(folder: Path, tmp_path: Path) -> None:
    graphs = written(folder, tmp_path / "onnx", Precision("float16"))
    states, logits = expected(folder)
    image_features = features(graphs, np.float16)
    assert image_features.dtype == np.float16
    assert_close(image_features, states, 0.01 * float(np.abs(states).max()))
    for actual, reference in zip(graphs.logits(rows(graphs, image_features), STEPS), logits, strict=True):
        assert_close(actual, reference, 0.02 * float(np.abs(reference).max()))


def test_weights_of_four_bits_are_the_checkpoint_s_own(folder: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "int4"
    schemes = round_checkpoint(folder, quantized, scheme(4, 32), vision=lambda _: scheme(4, 32, symmetric=True))
    assert any(name.endswith("self_attn.qkv") for name in schemes)
    graphs = written(quantized, tmp_path / "onnx", Precision("float32", accuracy_level=0))
    states, logits = expected(quantized)
    assert_close(features(graphs), states, 2e-5)
    for actual, reference in zip(graphs.logits(rows(graphs, features(graphs)), STEPS), logits, strict=True):
        assert_close(actual, reference, 5e-5)
    assert "MatMul" not in graphs.operators("vision_encoder") + graphs.operators("decoder_model_merged")


@torch.no_grad()
def test_embeddings_may_be_narrower_than_the_decoder(folder: Path, tmp_path: Path) -> None:
    config: Any = Blip2Config.from_pretrained(folder)
    config.text_config.word_embed_proj_dim = 64
    model = Blip2ForConditionalGeneration(config)
    fill(model, Sizes())
    model.save_pretrained(tmp_path / "narrow")
    graphs = written(tmp_path / "narrow", tmp_path / "onnx")
    reference = loaded(tmp_path / "narrow").language_model(input_ids=torch.tensor([TEXTS[0]])).logits[0]
    assert graphs.embed(TEXTS[0]).shape == (len(TEXTS[0]), 64)
    assert_close(graphs.logits([Row(graphs.embed(TEXTS[0]))], STEPS)[0], reference.numpy(), 2e-5)
