"""The demo CLIP and its recipe as they ship: encoders of 8 and 4 bits in ONNX Runtime find what their checkpoints find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import compress
from compress.checkpoints.checkpoint import open_checkpoint
from compress.eval.results import ScoreMetrics
from compress.eval.tasks.zero_shot import ZeroShot
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_of
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.recipe.model import read_recipe
from compress.report.model import Report
from compress.runtimes.onnxruntime.runtime import Onnxruntime
from compress.runtimes.runtime import ImageInput, OpenContext, Runtime
from compress.runtimes.transformers.runtime import Transformers
from tests.quantized import round_checkpoint

RECIPE = Path(__file__).parent.parent / "recipes" / "demo-clip.yaml"
MODEL = RECIPE.parent / "demo" / "clip" / "model"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("demo-clip")
    return compress.run(RECIPE, set={"publish.to": str(folder / "published")}, runs=folder / "runs", store=folder / "store")


def test_the_model_is_small_and_right(report: Report) -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 6_000_000
    metrics = report.rows[0].metrics["zero-shot"]
    assert isinstance(metrics, ScoreMetrics)
    assert metrics.items == 600
    assert metrics.score >= 0.9


def test_two_encoders_in_integers_find_the_same_and_are_published(report: Report) -> None:
    assert report.gate.verdict == "pass"
    before, after = (row.metrics["zero-shot"] for row in report.rows)
    assert isinstance(before, ScoreMetrics)
    assert isinstance(after, ScoreMetrics)
    assert after.score >= before.score - 0.01
    (published,) = (Path(row.path) for row in report.published)
    encoders = {path.name: path.stat().st_size for path in published.glob("*.onnx*")}
    assert encoders.keys() == {f"{name}_model.onnx{part}" for name in ("vision", "text") for part in ("", "_data")}
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "library_name: onnxruntime\npipeline_tag: zero-shot-image-classification\n" in card
    weights = (MODEL / "model.safetensors").stat().st_size  # of two bytes each
    assert 3.5 * sum(encoders.values()) < 2 * weights


def classify(runtime: Runtime, artifact: Path, logs: Path) -> NDArray[np.float64]:
    task: Any = read_recipe(RECIPE, {})[0].eval.tasks[0]
    assert isinstance(task, ZeroShot)
    questions = task.images([Path(task.data.source)], "class")[::4]
    pictures = [ImageInput(question.id, question.images[0]) for question in questions]
    with runtime.open(OpenContext.at(artifact, logs, Silent())) as session:
        return session.classify(pictures, [task.class_texts(name) for name in task.classes], Silent())


@pytest.mark.parametrize("bits", [None, 4], ids=["float32", "int4"])
def test_both_runtimes_name_the_same_classes(bits: int | None, tmp_path: Path) -> None:
    source = MODEL
    if bits is not None:
        held, source = Scheme(bits, 32, symmetric=True), tmp_path / "rounded"
        round_checkpoint(MODEL, source, held, vision=lambda _: held)
    artifact = tmp_path / "onnx"
    artifact.mkdir()
    export = Onnx.model_validate({"format": "onnx", "dtype": "float32"})
    export.apply(ExportContext(source, artifact, family_of(open_checkpoint(source).config), Silent()))
    here = classify(Onnxruntime(runtime="onnxruntime", threads=1), artifact, tmp_path)
    there = classify(Transformers(runtime="transformers", dtype="float32"), source, tmp_path)
    same = float((here.argmax(axis=1) == there.argmax(axis=1)).mean())
    assert same >= (1.0 if bits is None else 0.99)
