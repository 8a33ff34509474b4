"""Llama 3.2 Vision's graphs beside transformers: what the cross-attention blocks read, and logits with images and without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.export.onnx.graphs.write import Precision
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.export.onnx_graphs import Array, Graphs, Row, written
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_mllama

LAYERS, CROSSED = 5, (1, 4)
TILES, PLACES = 4, 5
STEPS = 2
NAMES = [f"past_key_values.{layer}.{part}" for layer in CROSSED for part in ("key", "value")]


@dataclass(frozen=True)
class Asked:
    """A prompt, how many tiles each of its images has, and before which token each stands: it is seen from there on."""

    ids: tuple[int, ...]
    tiles: tuple[int, ...] = ()
    at: tuple[int, ...] = ()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what transformers takes, as its processor gives it."""
        ids = torch.tensor([self.ids])
        if not self.tiles:
            return {"input_ids": ids}
        count = len(self.tiles)
        random = torch.Generator().manual_seed(sum(self.ids))
        pixels = torch.zeros(1, count, TILES, 3, 28, 28)
        mask = torch.zeros(1, count, TILES, dtype=torch.int64)
        cross_mask = torch.zeros(1, len(self.ids), count, TILES, dtype=torch.int64)
        for image, (tiles, first) in enumerate(zip(self.tiles, self.at, strict=True)):
            pixels[0, image, :tiles] = torch.randn(tiles, 3, 28, 28, generator=random)
            mask[0, image, :tiles] = 1
            cross_mask[0, first : self.at[image + 1] if image + 1 < count else None, image, :tiles] = 1
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "aspect_ratio_ids": torch.tensor([[1 + 2 * tiles % 8 for tiles in self.tiles]]),
            "aspect_ratio_mask": mask,
            "cross_attention_mask": cross_mask,
        }


ONE = Asked((2, 40, 41, 42, 43, 44, 45), tiles=(3,), at=(2,))
TWO = Asked((2, 90, 91, 92, 93, 94, 95, 96, 97, 98), tiles=(1, 4), at=(1, 5))
NONE = Asked((2, 17, 18, 19, 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mllama(tmp_path_factory.mktemp("mllama"), layers=LAYERS)


@pytest.fixture(scope="module")
def graphs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return written(folder, tmp_path_factory.mktemp("graphs") / "onnx")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return loaded(folder)


def loaded(folder: Path) -> Any:
    return load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))


@torch.no_grad()
def expected(model: Any, asked: Asked) -> tuple[dict[str, Array], Array]:
    """Return the keys and values of the blocks of cross-attention, and the logits of a prompt by itself."""
    outputs = model(**asked.inputs(), use_cache=True)
    layers = outputs.past_key_values.layers
    cached = [each for layer in CROSSED for each in (layers[layer].keys, layers[layer].values)] if asked.tiles else []
    return {name: each.numpy() for name, each in zip(NAMES, cached, strict=False)}, outputs.logits[0].numpy()


def states(graphs: Graphs, asked: Asked, dtype: Any = np.float32) -> dict[str, Array]:
    inputs = {name: value.numpy() for name, value in asked.inputs().items()}
    return graphs.run(
        "vision_encoder",
        pixel_values=inputs["pixel_values"].astype(dtype),
        aspect_ratio_ids=inputs["aspect_ratio_ids"],
        aspect_ratio_mask=inputs["aspect_ratio_mask"],
    )


def row(graphs: Graphs, asked: Asked) -> Row:
    cross_mask = asked.inputs().get("cross_attention_mask", torch.zeros(1, len(asked.ids), 0, 0, dtype=torch.int64))
    return Row(graphs.embed(asked.ids), cross_mask[0].flatten(1).numpy())


def logits(graphs: Graphs, asked: list[Asked], steps: int = STEPS, dtype: Any = np.float32) -> list[Array]:
    """Return the logits of prompts in one batch, the fewer images of a prompt padded."""
    longest = max(len(each.tiles) for each in asked)
    crossed = {name: np.zeros((len(asked), 2, longest * TILES * PLACES, 32), dtype) for name in NAMES}
    for index, each in enumerate(asked):
        if each.tiles:
            for name, value in states(graphs, each, dtype).items():
                crossed[name][index, :, : value.shape[2]] = value[0]
    return graphs.logits([row(graphs, each) for each in asked], steps, crossed)


def assert_close(actual: Array, reference: Array, tolerance: float) -> None:
    assert actual.shape == reference.shape
    assert np.abs(actual - reference).max() < tolerance


@pytest.mark.parametrize("asked", [ONE, TWO], ids=["one image", "two images"])
def test_blocks_read_of_images_what_they_read_in_transformers(asked: Asked, graphs: Graphs, model: Any) -> None:
    references, _ = expected(model, asked)
    actual = states(graphs, asked)
    assert actual.keys() == references.keys() == set(NAMES)
    for name, reference in references.items():
        assert reference.shape == (1, 2, len(asked.tiles) * TILES * PLACES, 32)
        assert_close(actual[name], reference, 5e-5)


@pytest.mark.parametrize("asked", [ONE, TWO, NONE], ids=["one image", "two images", "no image"])
def test_logits_are_those_of_transformers(asked: Asked, graphs: Graphs, model: Any) -> None:
    (actual,) = logits(graphs, [asked])
    assert actual.dtype == np.float32
    assert_close(actual, expected(model, asked)[1], 5e-5)


def test_a_row_of_a_batch_is_what_it_is_alone(graphs: Graphs, model: Any) -> None:
    batch = [ONE, NONE, TWO]
    for asked, actual in zip(batch, logits(graphs, batch), strict=True):
        assert_close(actual, expected(model, asked)[1], 5e-5)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_prompt_without_images_takes_any_keys(length: int, graphs: Graphs, model: Any) -> None:
    random = np.random.default_rng(0)
    crossed = {name: random.normal(size=(1, 2, length, 32)) for name in NAMES}
    text = row(graphs, NONE)
    cross_mask = np.zeros((len(NONE.ids), min(length, 1)), np.int64)
    assert_close(graphs.logits([Row(text.embeds, cross_mask)], STEPS, crossed)[0], expected(model, NONE)[1], 5e-5)


def test_images_are_read_and_only_where_the_mask_says(graphs: Graphs) -> None:
    prompt, read = row(graphs, TWO), states(graphs, TWO)
    (before,) = graphs.logits([prompt], STEPS, read)
    changed = {name: np.concatenate([value[:, :, :-PLACES], value[:, :, -PLACES:] + 1], axis=2) for name, value in read.items()}
    (after,) = graphs.logits([prompt], STEPS, changed)
    moved = np.abs(after - before).max(axis=1)
    assert (moved[TWO.at[1] :] > 1e-3).all()  # they see the last tile of the second image
    assert moved[0] > 1e-3  # stands before any image and reads all


def test_attention_is_fused(graphs: Graphs) -> None:
    decoder, vision = graphs.operators("decoder_model_merged"), graphs.operators("vision_encoder")
    assert (decoder.count("GroupQueryAttention"), decoder.count("MultiHeadAttention")) == (LAYERS - len(CROSSED), len(CROSSED))
    assert vision.count("MultiHeadAttention") == 2 + 2
    assert not {"Softmax"} & {*decoder, *vision}


def test_half_precision_is_near(folder: Path, model: Any, tmp_path: Path) -> None:
    graphs = written(folder, tmp_path / "onnx", Precision("float16"))
    batch = [ONE, NONE, TWO]
    for asked, actual in zip(batch, logits(graphs, batch, dtype=np.float16), strict=True):
        reference = expected(model, asked)[1]
        assert np.isfinite(actual).all()
        assert_close(actual, reference, 0.03 * float(np.abs(reference).max()))


def test_weights_of_four_bits_are_the_checkpoint_s_own(folder: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "int4"
    schemes = round_checkpoint(folder, quantized, scheme(4, 32), vision=lambda _: scheme(4, 32, symmetric=True))
    assert any(name.endswith("cross_attn.k_proj") for name in schemes)
    graphs, model = written(quantized, tmp_path / "onnx", Precision("float32", accuracy_level=0)), loaded(quantized)
    for name, reference in expected(model, TWO)[0].items():
        assert_close(states(graphs, TWO)[name], reference, 1e-4)
    batch = [ONE, NONE, TWO]
    for asked, actual in zip(batch, logits(graphs, batch), strict=True):
        assert_close(actual, expected(model, asked)[1], 1e-4)
    assert "MatMul" not in graphs.operators("vision_encoder")
