"""The graphs of Qwen2-VL, Qwen2.5-VL and Qwen3-VL beside transformers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from compress.export.onnx.graphs.write import Precision
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.export.onnx_graphs import Array, Graphs, Row, written
from tests.quantized import round_checkpoint, scheme
from tests.tiny import BUILDERS, picture

NAMES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
DEMO = Path(__file__).parents[2] / "recipes/demo/model"
Pictures = Sequence[tuple[int, int]]
Grids = Sequence[tuple[int, int, int]]

MARK = "<|vision_start|><|image_pad|><|vision_end|>"
STEPS = 2

PROMPTS: tuple[tuple[str, Pictures], ...] = (
    ("How many circles are there?", [(140, 84), (57, 170)]),
    ("Is there a red square?", []),
    ("What colour is the largest shape?", [(112, 112)]),
)
"""Questions, and the width and height of the pictures before each."""

GRIDS: tuple[Grids, ...] = (
    [(1, 16, 16)],
    [(1, 4, 4)],
    [(1, 18, 22)],
    [(1, 20, 20), (1, 2, 6)],
    [(1, 4, 10), (1, 16, 8), (1, 10, 34)],
    [(3, 6, 10), (1, 10, 4), (2, 18, 4)],
    [(1, 2, 2)] * 40,
    [(1, 4, 4), (1, 2, 4), (1, 14, 18), (4, 2, 2), (1, 18, 12), (1, 6, 4)],
)
"""Frames, rows and columns of images; windows are of 8 by 8 patches."""


@dataclass(frozen=True)
class Qwen:
    """A model and its processor, as transformers has them, and its graphs."""

    model: Any
    processor: Any
    graphs: Graphs

    def pixels(self, grids: Grids) -> dict[str, torch.Tensor]:
        """Return random patches of images of these grids."""
        width = self.graphs.sessions["vision_encoder"].get_inputs()[0].shape[1]
        count = sum(int(np.prod(grid)) for grid in grids)
        random = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": random, "image_grid_thw": torch.tensor(grids)}

    def features(self, inputs: dict[str, Any], dtype: Any = np.float32) -> list[Array]:
        """Return what the graph sees, [tokens, hidden], then what each level of deepstack does."""
        pixels, grids = inputs["pixel_values"].numpy().astype(dtype), inputs["image_grid_thw"].numpy()
        outputs = self.graphs.run("vision_encoder", pixel_values=pixels, image_grid_thw=grids)
        return [outputs["image_features"], *outputs.get("deepstack_features", ())]

    @torch.no_grad()
    def expected_features(self, inputs: dict[str, Any]) -> list[Array]:
        """Return what transformers sees."""
        outputs = self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        return [features.numpy() for features in (outputs.pooler_output, *getattr(outputs, "deepstack_features", ()))]

    def inputs(self, question: str, sizes: Pictures) -> dict[str, Any]:
        """Return what the processor makes of a prompt with pictures before the question."""
        images = [Image.open(io.BytesIO(picture(seed, *size))) for seed, size in enumerate(sizes)]
        return dict(self.processor(text=MARK * len(sizes) + question, images=images or None, return_tensors="pt"))

    def row(self, question: str, sizes: Pictures, dtype: Any = np.float32) -> Row:
        """Return a prompt as the decoder takes it, images in their places."""
        inputs = self.inputs(question, sizes)
        ids = inputs["input_ids"][0].numpy()
        embeds = self.graphs.embed(ids.tolist())
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        positions, _ = self.model.model.get_rope_index(**{name: inputs.get(name) for name in names})
        levels = len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", ()))
        deepstack = np.zeros((levels, *embeds.shape), embeds.dtype)
        if sizes:
            standing = ids == self.model.config.image_token_id
            embeds[standing], *inner = self.features(inputs, dtype)
            for level, features in enumerate(inner):
                deepstack[level, standing] = features
        return Row(embeds, positions=positions[:, 0].numpy(), deepstack=deepstack)

    @torch.no_grad()
    def expected_logits(self, question: str, sizes: Pictures) -> Array:
        """Return transformers' logits of a prompt, [tokens, vocabulary]."""
        return self.model(**self.inputs(question, sizes)).logits[0].numpy()


def opened(folder: Path, target: Path, precision: Precision | None = None) -> Qwen:
    model = load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))
    return Qwen(model, AutoProcessor.from_pretrained(folder), written(folder, target, precision))


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("qwen") / "model", vision_blocks=3)


@pytest.fixture(scope="module")
def qwen(built: Path) -> Qwen:
    return opened(built, built.with_name("onnx"))


def assert_close(actual: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    """Assert that arrays differ by no more than a share of the largest value."""
    for left, right in zip(actual, expected, strict=True):
        assert left.shape == right.shape
        assert np.abs(left - right).max() < tolerance * np.abs(right).max()


@pytest.mark.parametrize("grids", GRIDS, ids=lambda grids: f"{len(grids)}x{grids[0]}")
def test_features_are_those_of_transformers_for_images_of_any_size(qwen: Qwen, grids: Grids) -> None:
    inputs = qwen.pixels(grids)
    assert_close(qwen.features(inputs), qwen.expected_features(inputs), 5e-6)


def test_rows_of_a_batch_and_decoded_tokens_have_the_logits_of_transformers(qwen: Qwen) -> None:
    rows = [qwen.row(*prompt) for prompt in PROMPTS]
    assert len({len(row.embeds) for row in rows}) == len(rows)
    assert_close(qwen.graphs.logits(rows, STEPS), [qwen.expected_logits(*prompt) for prompt in PROMPTS], 1e-5)


def test_a_picture_changes_the_answer(qwen: Qwen) -> None:
    question = PROMPTS[0][0]
    last = [qwen.graphs.logits([qwen.row(question, [size])], 0)[0][-1] for size in ((112, 112), (56, 84))]
    assert np.abs(last[0] - last[1]).max() > 0.1


def test_attention_is_fused_and_holds_no_mask_of_all_patches_by_all(qwen: Qwen) -> None:
    path = qwen.graphs.folder / "vision_encoder.onnx"
    graph = onnx.load(str(path), load_external_data=False).graph
    fused = [node for node in graph.node if node.op_type == "MultiHeadAttention"]
    assert len(fused) == 3
    assert not any(name for node in fused for name in node.input[3:])
    assert qwen.graphs.operators("decoder_model_merged").count("GroupQueryAttention") == 3
    assert "Softmax" not in qwen.graphs.operators("vision_encoder") + qwen.graphs.operators("decoder_model_merged")


def test_the_shape_of_every_value_is_known(qwen: Qwen) -> None:
    paths = list(qwen.graphs.folder.glob("*.onnx"))
    assert len(paths) == 3
    for path in paths:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), strict_mode=True, data_prop=True)
        inferred = {value.name for value in model.graph.value_info}
        declared = {value.name for value in (*model.graph.input, *model.graph.initializer)}
        assert {name for node in model.graph.node for name in node.input if name} <= inferred | declared


def test_half_precision_is_near(built: Path, tmp_path: Path) -> None:
    qwen = opened(built, tmp_path / "onnx", Precision("float16"))
    inputs = qwen.pixels(GRIDS[3])
    assert_close(qwen.features(inputs, np.float16), qwen.expected_features(inputs), 0.005)
    rows = [qwen.row(*prompt, np.float16) for prompt in PROMPTS]
    assert_close(qwen.graphs.logits(rows, STEPS), [qwen.expected_logits(*prompt) for prompt in PROMPTS], 0.01)


def test_weights_of_four_bits_are_the_checkpoint_s_own(built: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "int4"
    schemes = round_checkpoint(built, quantized, scheme(4, 32), vision=lambda _: scheme(4, 32, symmetric=True))
    assert any(name.endswith("attn.qkv") for name in schemes)
    qwen = opened(quantized, tmp_path / "onnx", Precision("float32", accuracy_level=0))
    inputs = qwen.pixels(GRIDS[4])
    assert_close(qwen.features(inputs), qwen.expected_features(inputs), 1e-5)
    rows = [qwen.row(*prompt) for prompt in PROMPTS]
    assert_close(qwen.graphs.logits(rows, STEPS), [qwen.expected_logits(*prompt) for prompt in PROMPTS], 1e-5)


def test_the_demo_model_sees_and_writes_as_in_transformers(tmp_path: Path) -> None:
    qwen = opened(DEMO, tmp_path / "onnx")
    inputs = qwen.pixels([(1, 18, 22), (1, 10, 6)])
    assert_close(qwen.features(inputs), qwen.expected_features(inputs), 2e-5)
    rows = [qwen.row(*prompt) for prompt in PROMPTS]
    assert_close(qwen.graphs.logits(rows, STEPS), [qwen.expected_logits(*prompt) for prompt in PROMPTS], 2e-5)
