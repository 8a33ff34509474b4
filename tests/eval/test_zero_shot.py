import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from compress.data.images import decode_image
from compress.errors import DataError, RecipeError
from compress.eval.measure import MeasureContext, measure
from compress.eval.results import ImageItem, ScoreMetrics, read_measurement
from compress.eval.tasks.zero_shot import ZeroShot
from compress.gate.gate import Gate, MeasuredModel
from compress.gate.judge import judge
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.runtimes.runtime import ImageInput, OpenContext
from compress.runtimes.transformers.runtime import Transformers
from tests.jobs import content, make_job
from tests.pictures import encoded
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_clip, picture

IMAGES = 12


@dataclass
class Heard(Silent):
    warnings: list[str] = field(default_factory=lambda: list[str]())

    def warn(self, message: str) -> None:
        self.warnings.append(message)


CLASSES = ("red", "green", "blue")
TEMPLATES = ("a photo of a {class} square.", "{class}")


def write_images(folder: Path, labels: list[Any], name: str = "images.jsonl") -> Path:
    for number in range(len(labels)):
        (folder / f"{number}.png").write_bytes(picture(number, 56, 56))
    path = folder / name
    path.write_text("".join(json.dumps({"image": f"{n}.png", "answer": label}) + "\n" for n, label in enumerate(labels)))
    return path


def task_for(source: Path, **fields: Any) -> ZeroShot:
    values = {"task": "zero-shot", "source": str(source), "classes": CLASSES, "templates": TEMPLATES, **fields}
    return ZeroShot.model_validate(values, context={"base": source.parent})


@dataclass(frozen=True)
class Measured:
    folder: Path
    original: Path
    artifact: Path
    task: ZeroShot


def measure_one(checkpoint: Path, original: Path, task: ZeroShot, target: Path, against: Path | None) -> Path:
    context = MeasureContext(original, {task.name: (Path(task.source),)}, target, against, Silent(), target)
    with Transformers(runtime="transformers").open(OpenContext.at(checkpoint, target, Silent())) as session:
        measure(session, [task], context)
    return target


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("zero-shot")
    model = build_clip(folder / "model")
    round_checkpoint(model, folder / "rounded", scheme(bits=3))
    task = task_for(write_images(folder, [CLASSES[number % 3] for number in range(IMAGES - 1)] + [1]))
    original = measure_one(model, model, task, folder / "original", None)
    artifact = measure_one(folder / "rounded", model, task, folder / "artifact", original)
    return Measured(folder, original, artifact, task)


def test_items_and_figures_are_what_the_likelihoods_say(measured: Measured) -> None:
    before, after = (read_measurement(folder) for folder in (measured.original, measured.artifact))
    pictures = [ImageInput(str(number), picture(number, 56, 56)) for number in range(IMAGES)]
    texts = [[template.replace("{class}", name) for template in TEMPLATES] for name in CLASSES]
    log_probs = list[Any]()
    for checkpoint in ("model", "rounded"):
        context = OpenContext.at(measured.folder / checkpoint, measured.folder, Silent())
        with Transformers(runtime="transformers").open(context) as session:
            log_probs.append(session.classify(pictures, texts, Silent()))
    labels = [number % 3 for number in range(IMAGES - 1)] + [1]
    for likelihoods, measurement in zip(log_probs, (before, after), strict=True):
        assert [item.score for item in measurement.scored("zero-shot")] == [
            int(row.argmax()) == label for row, label in zip(likelihoods, labels, strict=True)
        ]
        metrics = measurement.tasks["zero-shot"].metrics
        assert isinstance(metrics, ScoreMetrics)
        assert metrics.score == np.mean(likelihoods.argmax(axis=1) == labels)
        assert metrics.items == IMAGES
    kl = (np.exp(log_probs[0]) * (log_probs[0] - log_probs[1])).sum(axis=1)
    fidelity = after.tasks["zero-shot"].fidelity
    assert fidelity is not None
    assert (fidelity.unit, fidelity.tokens) == ("image", IMAGES)
    assert fidelity.kl_mean == pytest.approx(kl.mean(), abs=1e-9) and kl.mean() > 0
    assert fidelity.top1_agreement == np.mean(log_probs[0].argmax(axis=1) == log_probs[1].argmax(axis=1))
    assert before.tasks["zero-shot"].fidelity is None
    items = [item for item in after.items["zero-shot"] if isinstance(item, ImageItem)]
    assert [item.kl for item in items] == pytest.approx(kl.tolist(), abs=1e-9)
    assert items[-1].accepted == ("green",)


def test_the_gate_judges_it_as_any_accuracy(measured: Measured) -> None:
    limits = {"accuracy": {"min_recovery": 0.9, "confidence": 0.95}, "fidelity": {"max_kl": 1e-9, "min_top1": 0.01}}
    original = MeasuredModel("original", 100, read_measurement(measured.original))
    same = MeasuredModel("same", 100, read_measurement(measured.original))
    verdict = judge(Gate.model_validate({"accuracy": limits["accuracy"]}), original, [same])
    assert [(check.task, check.value) for check in verdict.checks] == [("zero-shot", 1.0)]
    artifact = MeasuredModel("artifact", 50, read_measurement(measured.artifact))
    verdict = judge(Gate.model_validate({"fidelity": limits["fidelity"]}), original, [artifact])
    reasons = [check.reason for check in verdict.checks]
    assert [check.verdict for check in verdict.checks] == ["fail", "pass"]
    assert "nats per image, 12 images; the limit is 1e-09" in reasons[0]
    assert "the same top class for" in reasons[1] and "% of images, 12 images" in reasons[1]


def test_other_images_than_the_originals_are_refused(measured: Measured, tmp_path: Path) -> None:
    other = task_for(write_images(tmp_path, ["red", "blue"]))
    with pytest.raises(DataError, match=r"task zero-shot: .* when the original was measured; measure the original again"):
        measure_one(measured.folder / "model", measured.folder / "model", other, tmp_path / "out", measured.original)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("yellow", r"image 2: its label \('answer'\) is 'yellow', none of the 3 classes nor the number of one; correct classes"),
        (3, r"image 2: its label \('answer'\) is '3', none of the 3 classes"),
        (["red", "green"], r"image 2: its label \('answer'\) is None"),
    ],
)
def test_a_label_that_is_no_class_is_named(tmp_path: Path, label: Any, message: str) -> None:
    task = task_for(write_images(tmp_path, ["red", label]))
    with pytest.raises(DataError, match=f"task zero-shot: images.jsonl:2: {message}"):
        task.pool([Path(task.source)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": ["one"]}, "at least 2"),
        ({"classes": ["one", "two", "one"]}, "classes names 'one' twice; remove one"),
        ({"templates": ["a photo"]}, "pattern"),
    ],
)
def test_settings_that_ask_nothing(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task_for(write_images(tmp_path, ["red"]), **fields)


def test_settings_shape_the_key_and_samples_are_drawn(tmp_path: Path) -> None:
    source = write_images(tmp_path, ["red"] * 6)
    task = task_for(source, samples=2, seed=3)
    drawn = [[question.id for question in each.pool([source]).questions] for each in (task, task_for(source, samples=2, seed=3))]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2
    assert task.settings() != task_for(source, samples=2, seed=4).settings()
    assert task.settings() != task_for(source, samples=2, seed=3, templates=["{class}"]).settings()
    assert "of whose 3 classes the right one is likeliest" in task.note()


def test_a_plan_refuses_what_model_or_runtime_cannot_do(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", layers=1)
    recipe = content(job)
    zero_shot = {"task": "zero-shot", "source": "test.jsonl", "classes": ["red", "blue"], "templates": ["{class}"]}
    recipe["eval"]["tasks"].append(zero_shot)
    job.recipe.write_text(yaml.safe_dump(recipe))
    message = r"eval.tasks.2: qwen2.5-vl writes text, which zero-shot does not measure; use vqa or perplexity"
    with pytest.raises(RecipeError, match=message):
        make_plan(job.recipe, {}, Store(job.store))
    build_clip(tmp_path / "clip")
    clip = {"model.source": str(tmp_path / "clip"), "gate": {"size": {"max_ratio": 1}}}
    with pytest.raises(
        RecipeError, match=r"eval.tasks.0: clip compares images with texts, which vqa does not measure; use zero-shot"
    ):
        make_plan(job.recipe, clip, Store(job.store))
    recipe["eval"] = {"runtime": {"runtime": "vllm"}, "tasks": [zero_shot]}
    job.recipe.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"eval.tasks.0: runtime vllm does not offer zero-shot; set eval.runtime to transformers"):
        make_plan(job.recipe, clip, Store(job.store))
    recipe |= {"export": [{"format": "onnx-genai"}]}
    recipe["eval"]["runtime"] = {"runtime": "onnxruntime-genai"}
    job.recipe.write_text(yaml.safe_dump(recipe))
    message = r"eval.tasks.0: .* does not offer zero-shot; what does \(transformers, onnxruntime\) runs no onnx-genai; use another"
    with pytest.raises(RecipeError, match=message):
        make_plan(job.recipe, clip, Store(job.store))


def test_an_image_that_cannot_be_decoded_counts_0_and_is_named(measured: Measured, tmp_path: Path) -> None:
    """The others are measured as without it; `told` are the warnings."""
    task = task_for(write_images(tmp_path, [*CLASSES, "red"]))
    cut = tmp_path / "2.png"
    image = encoded(decode_image(cut.read_bytes(), "2"), "JPEG")
    cut.write_bytes(image[: len(image) // 2])
    heard = Heard()
    for target, against in (("original", None), ("artifact", tmp_path / "original")):
        context = MeasureContext(
            measured.folder / "model", {task.name: (Path(task.source),)}, tmp_path / target, against, heard, tmp_path
        )
        (tmp_path / target).mkdir()
        with Transformers(runtime="transformers").open(OpenContext.at(measured.folder / "model", tmp_path, Silent())) as session:
            measure(session, [task], context)
    before, after = (read_measurement(tmp_path / name) for name in ("original", "artifact"))
    for measurement in (before, after):
        items = [item for item in measurement.items["zero-shot"] if isinstance(item, ImageItem)]
        assert [item.fault is None for item in items] == [True, True, False, True]
        assert measurement.tasks["zero-shot"].metrics.failed == 1
        assert (items[2].score, items[2].said) == (0.0, "")
        assert items[2].fault is not None and items[2].fault.startswith(f"{items[2].id}: cannot be read as an image (")
    prefix = "task zero-shot: 1 of 4 items could not be shown to the model and count as wrong; the first: "
    assert [message.startswith(prefix) for message in heard.warnings] == [True, True]
    fidelity = after.tasks["zero-shot"].fidelity
    assert fidelity is not None
    assert (fidelity.tokens, fidelity.kl_mean, fidelity.lost) == (3, 0.0, 0)
