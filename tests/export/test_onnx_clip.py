"""CLIP's two graphs beside transformers, and beside this project's own in-process runtime where a stage rounded something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from compress.checkpoints.checkpoint import open_checkpoint
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_of
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.quantized import round_checkpoint, scheme
from tests.specs import planned
from tests.tiny import build_clip

_ORT: Any = onnxruntime

Embeddings = tuple[NDArray[np.float32], NDArray[np.float32]]

IMAGE = "vision_model.embeddings.patch_embedding.weight"
TOKENS = "text_model.embeddings.token_embedding.weight"
LENGTHS = (12, 3, 7, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("clip"))


def inputs(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Three images, and texts of several lengths, padded with a token that is a word's."""
    random = torch.Generator().manual_seed(0)
    vocabulary = open_checkpoint(folder).config["text_config"]["vocab_size"]
    ids = torch.randint(0, vocabulary - 2, (len(LENGTHS), max(LENGTHS)), generator=random)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, length - 1], mask[row, :length] = vocabulary - 1, 1
    return torch.randn(3, 3, 56, 56, generator=random), {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def expected(folder: Path) -> Embeddings:
    model: Any = load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))
    pixels, texts = inputs(folder)
    towers = model.get_image_features(pixel_values=pixels), model.get_text_features(**texts)
    return towers[0].pooler_output.numpy(), towers[1].pooler_output.numpy()


def onnx_export(settings: dict[str, Any]) -> Onnx:
    return Onnx.model_validate({"format": "onnx", "dtype": "float32", **settings})


def export(folder: Path, target: Path, **settings: Any) -> Path:
    target.mkdir()
    exporter = onnx_export(settings)
    exporter.apply(ExportContext(folder, target, family_of(open_checkpoint(folder).config), Silent()))
    return target


def run(target: Path, name: str, **feeds: Any) -> NDArray[Any]:
    path = str(target / f"{name}.onnx")
    onnx.checker.check_model(path, full_check=True)
    options = _ORT.SessionOptions()
    options.intra_op_num_threads = 1
    session = _ORT.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def embeddings(folder: Path, target: Path) -> Embeddings:
    pixels, texts = inputs(folder)
    words = {name: values.numpy() for name, values in texts.items()}
    return run(target, "vision_model", pixel_values=pixels.numpy()), run(target, "text_model", **words)


def assert_same(actual: Embeddings, reference: Embeddings, tolerance: float) -> None:
    for one, other in zip(actual, reference, strict=True):
        assert one.shape == other.shape
        assert one.dtype == np.float32
        assert np.abs(one - other).max() < tolerance * np.abs(other).max()


def change_config(folder: Path, key: str, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[key] |= values
    (folder / "config.json").write_text(json.dumps(config))


def test_both_towers_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    target = export(folder, tmp_path / "onnx")
    assert {path.name for path in target.glob("*.onnx*")} == {
        *("vision_model.onnx", "vision_model.onnx_data"),
        *("text_model.onnx", "text_model.onnx_data"),
    }
    assert_same(embeddings(folder, target), expected(folder), 1e-5)


def test_a_text_in_a_batch_is_what_it_is_alone(folder: Path, tmp_path: Path) -> None:
    target = export(folder, tmp_path / "onnx")
    pixels, texts = inputs(folder)
    images, words = embeddings(folder, target)
    alone = run(target, "vision_model", pixel_values=pixels[1:2].numpy())
    np.testing.assert_allclose(alone, images[1:2], atol=1e-5)
    for row, length in enumerate(LENGTHS):
        cut = {name: values[row : row + 1, :length].numpy() for name, values in texts.items()}
        np.testing.assert_allclose(run(target, "text_model", **cut), words[row : row + 1], atol=1e-5)


def test_a_text_ends_where_the_config_says(tmp_path: Path) -> None:
    folder = build_clip(tmp_path / "clip")
    former = expected(folder)
    change_config(folder, "text_config", eos_token_id=int(inputs(folder)[1]["input_ids"][0, 1]))
    texts, reference = inputs(folder)[1], expected(folder)
    assert (texts["input_ids"] == texts["input_ids"][0, 1]).any(dim=1).tolist() == [True, False, False, False]
    assert not np.allclose(reference[1][0], former[1][0])
    assert_same(embeddings(folder, export(folder, tmp_path / "onnx")), reference, 1e-5)


def test_weights_of_four_bits_are_the_checkpoint_s_own(folder: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "int4"
    round_checkpoint(folder, quantized, scheme(4, 32), vision=lambda _: scheme(4, 32, symmetric=True))
    target = export(quantized, tmp_path / "onnx", accuracy_level=0)
    assert_same(embeddings(quantized, target), expected(quantized), 1e-4)
    kinds = [node.op_type for node in onnx.load(str(target / "vision_model.onnx"), load_external_data=False).graph.node]
    assert kinds.count("MatMul") == 0
    assert kinds.count("MatMulNBits") > 0


@pytest.mark.parametrize(("activations", "operator"), [("token", "MatMulInteger"), ("tensor", "DequantizeLinear")])
def test_integers_of_eight_bits_give_what_the_checkpoint_gives(
    activations: Any, operator: str, folder: Path, tmp_path: Path
) -> None:
    quantized, w8a8 = tmp_path / "int8", Scheme(bits=8, group_size=-1, symmetric=True, activations=activations)
    round_checkpoint(folder, quantized, w8a8, vision=lambda _: w8a8)
    target = export(quantized, tmp_path / "onnx")
    # a value between two codes may fall to either side, as sums are not made in the same order
    assert_same(embeddings(quantized, target), expected(quantized), 1e-2)
    graph = onnx.load(str(target / "vision_model.onnx"), load_external_data=False).graph
    assert operator in {node.op_type for node in graph.node}


def test_embeddings_and_patches_may_be_rounded_too(tmp_path: Path) -> None:
    folder = build_clip(tmp_path / "clip")
    target = export(folder, tmp_path / "onnx", embedding_bits=8)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, group in ((IMAGE, -1), (TOKENS, 32)):
        matrix = tensors[name].float()
        rounded = quantize(matrix.flatten(1), Scheme(8, group, symmetric=True), torch.float32)
        tensors[name] = rounded.dequantize().view(matrix.shape)
    former = expected(folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference = expected(folder)
    assert not np.allclose(former[0], reference[0], atol=1e-5)
    assert not np.allclose(former[1], reference[1], atol=1e-5)
    assert_same(embeddings(folder, target), reference, 1e-4)


def written(target: Path) -> int:
    """The bytes of all weights, without what lies between them."""
    total = 0
    for path in target.glob("*.onnx"):
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            total += sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")
    return total


@pytest.mark.parametrize("settings", [{}, {"dtype": "float16"}, {"embedding_bits": 8}], ids=str)
def test_the_expected_size_is_what_is_written(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    target = export(folder, tmp_path / "onnx", **settings)
    checkpoint = open_checkpoint(folder)
    spec = planned(checkpoint, family_of(checkpoint.config), {})
    assert onnx_export(settings).predict_bytes(spec) == pytest.approx(written(target), rel=0.001)


def test_half_precision_is_near(folder: Path, tmp_path: Path) -> None:
    target = export(folder, tmp_path / "onnx", dtype="float16")
    pixels, texts = inputs(folder)
    run_graph: Callable[..., NDArray[Any]] = run
    words = {name: values.numpy() for name, values in texts.items()}
    images = run_graph(target, "vision_model", pixel_values=pixels.numpy().astype(np.float16))
    assert images.dtype == np.float16
    reference = expected(folder)
    assert np.abs(images - reference[0]).max() < 0.01 * np.abs(reference[0]).max()
    assert np.abs(run_graph(target, "text_model", **words) - reference[1]).max() < 0.01 * np.abs(reference[1]).max()
