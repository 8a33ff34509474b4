"""Linears, output head and embeddings in a graph, by how they are held; each beside the same matrix in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from compress.checkpoints.checkpoint import open_checkpoint
from compress.errors import CheckpointError
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.export.onnx.graphs.graph import Float, Graph
from compress.export.onnx.graphs.layer_builder import LayerBuilder, Source
from compress.export.onnx.graphs.write import Precision
from compress.families.resolve import family_at
from compress.numerics.rounding import quantize
from compress.numerics.scheme import Activations, Scheme
from compress.progress import Silent
from tests.export.onnx_graphs import written
from tests.quantized import INPUT_SCALE, exact_weights, round_checkpoint, scheme
from tests.specs import planned
from tests.tiny import build_qwen2_5_vl

_ORT: Any = onnxruntime

LINEAR = "model.language_model.layers.0.self_attn.q_proj"
ON_DISK = "model.layers.0.self_attn.q_proj"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def linear(folder: Path, target: Path, dtype: Float = "float32") -> Path:
    """Write a graph that multiplies a `value` by a checkpoint's linear."""
    parts = LayerBuilder(Graph("linear", dtype), Source.of(open_checkpoint(folder), family_at(folder)), accuracy_level=0)
    graph = parts.graph
    rows, columns = parts.quantized_shape(LINEAR)
    found = parts.linear(graph.input("value", graph.dtype, ["tokens", columns]), LINEAR)
    graph.output("product", found, graph.dtype, ["tokens", rows])
    target.mkdir()
    path = graph.save(target, {})
    onnx.checker.check_model(str(path), full_check=True)
    return path


def held(source: Path, folder: Path, how: Scheme) -> tuple[NDArray[Any], NDArray[Any]]:
    """Write a checkpoint with its decoder rounded; return the matrix [out, in] and the bias of the linear that is looked at."""
    schemes = round_checkpoint(source, folder, how)
    bias = load_file(source / "model.safetensors")[f"{ON_DISK}.bias"]
    return exact_weights(source, schemes)[ON_DISK].double().numpy(), bias.double().numpy()


@pytest.mark.parametrize(
    "how",
    [scheme(4, 32), scheme(4, 16), scheme(4, -1), scheme(8, 32), scheme(8, -1, symmetric=True), scheme(8, 96)],
    ids=["odd blocks", "even blocks", "whole rows", "8 bits", "8 bits symmetric", "a group of three blocks"],
)
def test_blocks_are_the_checkpoint_s_own_integers(how: Scheme, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "model", hidden=96, intermediate=192, layers=1, heads=2, kv_heads=1)
    weight, bias = held(source, tmp_path / "quantized", how)
    value = np.random.default_rng(0).normal(size=(5, 96))
    session: Any = _ORT.InferenceSession(str(linear(tmp_path / "quantized", tmp_path / "onnx")))
    [found] = session.run(None, {"value": value.astype(np.float32)})
    assert np.abs(found - (value @ weight.T + bias)).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sums_of_integers_may_be_larger_than_float16_holds(dtype: Float, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "model", hidden=512, layers=1)
    weight, bias = held(source, tmp_path / "quantized", Scheme(8, -1, symmetric=True, activations="token"))
    value = np.concatenate([np.sign(weight[:3]), np.zeros((1, 512))])  # as large as a sum can be, and nothing at all
    codes = np.abs(weight / np.abs(weight).max(axis=1, keepdims=True) * 127).sum(axis=1)
    assert (127 * codes[:3] > np.finfo(np.float16).max).all()
    wanted = value @ weight.T + bias
    # ONNX's own evaluator: on a CPU, ONNX Runtime computes float16 in float32, where nothing overflows
    evaluator: Any = ReferenceEvaluator(str(linear(tmp_path / "quantized", tmp_path / "onnx", dtype)))
    [found] = evaluator.run(None, {"value": value.astype(dtype)})
    assert np.abs(found - wanted).max() < {"float32": 1e-5, "float16": 1e-3}[dtype] * np.abs(wanted).max()


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_inputs_are_rounded_to_the_nearest_of_255_codes(activations: Activations, tmp_path: Path) -> None:
    """Each token's largest value becomes 127, or a fixed scale says what does."""
    source = build_qwen2_5_vl(tmp_path / "model", layers=1)
    weight, bias = held(source, tmp_path / "quantized", Scheme(8, -1, symmetric=True, activations=activations))
    value = np.random.default_rng(0).normal(size=(5, weight.shape[1])).astype(np.float32)
    steps = np.abs(value).max(axis=1, keepdims=True) / 127 if activations == "token" else INPUT_SCALE
    evaluator: Any = ReferenceEvaluator(str(linear(tmp_path / "quantized", tmp_path / "onnx")))
    [found] = evaluator.run(None, {"value": value})
    assert np.abs(found - ((value / steps).round() * steps @ weight.T + bias)).max() < 1e-5


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{ON_DISK}.weight"][3, 5] = 70_000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    context = ExportContext(folder, tmp_path / "onnx", family_at(folder), Silent())
    context.target.mkdir()
    with pytest.raises(CheckpointError, match=rf"^{LINEAR}: has values beyond 65504, .*; set dtype: float32$"):
        Onnx(format="onnx", dtype="float16").apply(context)


def rounded(weight: torch.Tensor, bits: int | None) -> NDArray[Any]:
    """Return a matrix rounded to nearest in symmetric blocks of 32, as it is where no bits are said."""
    how = Scheme(bits or 8, 32, symmetric=True)
    return (weight if bits is None else quantize(weight, how, torch.float32).dequantize()).double().numpy()


@pytest.mark.parametrize("says", ["tied", "untied", "tied, with a head of its own", "tied, with a copy of the embeddings"])
@pytest.mark.parametrize(("head_bits", "embedding_bits"), [(None, None), (8, 8), (4, 8), (8, None), (None, 8)])
def test_both_ends_are_rounded_by_choice_and_stored_once_where_they_are_one(
    says: str, head_bits: int | None, embedding_bits: int | None, tmp_path: Path
) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1, tied=says != "untied", dtype=torch.float32)
    tied = says in ("tied", "tied, with a copy of the embeddings")
    if "with" in says:
        held = load_file(folder / "model.safetensors")
        held[HEAD] = held[EMBEDDINGS].clone() if tied else torch.randn_like(held[EMBEDDINGS])
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    graphs = written(folder, tmp_path / "onnx", Precision("float32", 0, head_bits, embedding_bits))
    tensors = load_file(folder / "model.safetensors")
    words, head = tensors[EMBEDDINGS], tensors[EMBEDDINGS if tied else HEAD]
    ids = list(range(len(words)))
    assert np.abs(graphs.embed(ids) - rounded(words, embedding_bits)).max() < 1e-6
    state = np.random.default_rng(0).normal(size=(1, 2, words.shape[1]))
    assert np.abs(ends(graphs.folder, state) - state @ rounded(head, head_bits).T).max() < 1e-4
    one = tied and head_bits == embedding_bits
    assert ("embed_tokens.onnx_data" in files(graphs.folder / "decoder_model_merged.onnx")) == one
    export = Onnx.model_validate({"format": "onnx", "head_bits": head_bits, "embedding_bits": embedding_bits})
    expected = export.predict_bytes(planned(open_checkpoint(folder), family_at(folder), {}))
    stored = sum(path.stat().st_size for path in graphs.folder.glob("*.onnx_data"))
    assert expected <= stored < expected + 100_000


def files(path: Path) -> set[str]:
    """Return the data files that a graph reads."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def ends(folder: Path, state: NDArray[Any]) -> NDArray[Any]:
    """Return what a decoder's output head alone makes of states [batch, length, hidden]."""
    whole = onnx.load(folder / "decoder_model_merged.onnx")
    norm = next(node for node in reversed(whole.graph.node) if node.op_type.startswith("SkipSimplified"))
    extractor = onnx.utils.Extractor(whole)
    part = extractor.extract_model([norm.output[0], "num_logits_to_keep"], ["logits"])
    session: Any = _ORT.InferenceSession(part.SerializeToString())
    return session.run(None, {norm.output[0]: state.astype(np.float32), "num_logits_to_keep": np.array(0)})[0]
