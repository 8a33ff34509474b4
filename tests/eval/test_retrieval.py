import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from numpy.typing import NDArray

from compress.data.images import decode_image
from compress.data.questions import Question
from compress.errors import CheckpointError, DataError, UsageError
from compress.eval.measure import MeasureContext, measure
from compress.eval.results import ImageItem, ItemizedMeasurement, ScoreMetrics, read_measurement
from compress.eval.tasks.retrieval import Pool, Retrieval, image_scores, ranks, recalls
from compress.progress import Silent
from compress.runtimes.runtime import Embeddings, Embeds, ImageInput, OpenContext, capable
from compress.runtimes.transformers.runtime import Transformers
from tests.pictures import encoded
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_clip, build_qwen2_5_vl, picture

CAPTIONS = [
    ["a red square", "the largest shape"], ["a green circle"], ["two blue triangles", "blue", "a yellow square"], ["a red square"],
    ["a castle"], ["purple and orange"], ["the river"], ["one white circle", "black"],
]  # fmt: skip


def write_rows(folder: Path, captions: list[list[str]], name: str = "rows.jsonl") -> Path:
    for number in range(len(captions)):
        (folder / f"{number}.png").write_bytes(picture(number, 56, 56))
    path = folder / name
    path.write_text("".join(json.dumps({"image": f"{n}.png", "answer": texts}) + "\n" for n, texts in enumerate(captions)))
    return path


def task_for(source: Path, **fields: Any) -> Retrieval:
    values = {"task": "retrieval", "source": str(source), **fields}
    return Retrieval.model_validate(values, context={"base": source.parent})


def measure_one(checkpoint: Path, original: Path, task: Retrieval, target: Path, against: Path | None) -> Path:
    context = MeasureContext(original, {task.name: (Path(task.source),)}, target, against, Silent(), target)
    with Transformers(runtime="transformers").open(OpenContext.at(checkpoint, target, Silent())) as session:
        measure(session, [task], context)
    return target


@dataclass(frozen=True)
class World:
    folder: Path
    before: ItemizedMeasurement
    after: ItemizedMeasurement
    task: Retrieval


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("retrieval")
    model = build_clip(folder / "model")
    round_checkpoint(model, folder / "rounded", scheme(bits=3))
    task = task_for(write_rows(folder, CAPTIONS))
    original = measure_one(model, model, task, folder / "original", None)
    artifact = measure_one(folder / "rounded", model, task, folder / "artifact", original)
    return World(folder, read_measurement(original), read_measurement(artifact), task)


def cosines(checkpoint: Path) -> tuple[NDArray[np.float64], float, list[str]]:
    """Return the cosines of all images and captions, computed one image and one caption at a time, and the scale."""
    texts = list(dict.fromkeys(text for captions in CAPTIONS for text in captions))
    pictures = [ImageInput(str(number), picture(number, 56, 56)) for number in range(len(CAPTIONS))]
    with Transformers(runtime="transformers").open(OpenContext.at(checkpoint, checkpoint, Silent())) as session:
        images = [session.embed([image], ["x"], Silent()) for image in pictures]
        words = [session.embed(pictures[:1], [text], Silent()).texts[0] for text in texts]
    near = [[float(one.images[0].astype(np.float64) @ word.astype(np.float64)) for word in words] for one in images]
    return np.array(near), images[0].scale, texts


def test_items_and_figures_are_what_the_cosines_say(world: World) -> None:
    likelihoods = list[NDArray[np.float64]]()
    for name, measurement in (("model", world.before), ("rounded", world.after)):
        near, scale, texts = cosines(world.folder / name)
        logits = scale * near
        likelihoods.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        items = [item for item in measurement.items["retrieval"] if isinstance(item, ImageItem)]
        metrics = measurement.tasks["retrieval"].metrics
        assert isinstance(metrics, ScoreMetrics)
        expected: dict[str, list[bool]] = {key: [] for key in metrics.details}
        for number, captions in enumerate(CAPTIONS):
            order: list[str] = [texts[index] for index in np.argsort(-near[number]).tolist()]
            for cutoff in (1, 5, 10):
                expected[f"image_to_text_recall@{cutoff}"].append(bool(set(order[:cutoff]) & set(captions)))
            backward = list[bool]()
            for caption in captions:
                images = [int(index) for index in np.argsort(-near[:, texts.index(caption)])]
                first = min(images.index(image) for image, other in enumerate(CAPTIONS) if caption in other)
                backward.append(first < 1)
                for cutoff in (1, 5, 10):
                    expected[f"text_to_image_recall@{cutoff}"].append(first < cutoff)
            assert items[number].score == pytest.approx((float(order[0] in captions) + np.mean(backward)) / 2)
            assert items[number].said == order[0]
            probabilities = [np.exp(likelihoods[-1][number, texts.index(caption)]) for caption in captions]
            assert items[number].nll == pytest.approx(-np.log(sum(probabilities)), abs=1e-5)
        assert metrics.details == pytest.approx({key: np.mean(values) for key, values in expected.items()})
        assert (metrics.metric, metrics.binary, metrics.items) == ("recall@1", False, len(CAPTIONS))
        assert metrics.score == pytest.approx(np.mean([item.score for item in items]))
    kl = (np.exp(likelihoods[0]) * (likelihoods[0] - likelihoods[1])).sum(axis=1)
    fidelity = world.after.tasks["retrieval"].fidelity
    assert fidelity is not None
    assert (fidelity.unit, fidelity.tokens) == ("image", len(CAPTIONS))
    assert fidelity.kl_mean == pytest.approx(kl.mean(), abs=1e-5) and kl.mean() > 1e-4
    assert fidelity.top1_agreement == np.mean(likelihoods[0].argmax(axis=1) == likelihoods[1].argmax(axis=1))
    assert world.before.tasks["retrieval"].fidelity is None


def pool_of(captions: list[list[str]]) -> Pool:
    texts = list(dict.fromkeys(text for each in captions for text in each))
    questions = [Question(str(n), (b"",), "", tuple(each), f"rows:{n}") for n, each in enumerate(captions)]
    return Pool(questions, tuple(texts), np.array([[text in each for text in texts] for each in captions]))


def test_ranks_worked_out_by_hand() -> None:
    pool = pool_of([["p", "q"], ["r"], ["s"]])
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[3, 9, 1], [5, 4, 8], [6, 7, 2], [1, 2, 9]], dtype=np.float32)  # cosines of p, q, r, s with each image
    captions, images_of = ranks(pool, Embeddings(images, texts, 1.0))
    assert captions.tolist() == [1, 1, 0]  # r is nearer to image 0 than q; p is nearer to image 1 than r
    assert images_of.tolist() == [1, 1, 0, 0]  # p is nearer to image 1 than to its own, q to image 2
    assert image_scores(pool, captions, images_of).tolist() == [0.0, 0.5, 1.0]
    figures = recalls(pool, captions, images_of)
    assert (figures["image_to_text_recall@1"], figures["text_to_image_recall@1"]) == (pytest.approx(1 / 3), 0.5)
    assert figures["image_to_text_recall@5"] == figures["text_to_image_recall@10"] == 1.0


def test_a_model_that_sees_no_difference_finds_nothing() -> None:
    pool = pool_of([["p"], ["q"], ["r"]])
    same = Embeddings(np.ones((3, 2), dtype=np.float32), np.ones((3, 2), dtype=np.float32), 1.0)
    assert recalls(pool, *ranks(pool, same))["image_to_text_recall@1"] == 0
    assert recalls(pool, *ranks(pool, same))["text_to_image_recall@1"] == 0


def test_a_caption_of_two_images_finds_either() -> None:
    pool = pool_of([["p"], ["p"]])
    captions, images_of = ranks(pool, Embeddings(np.eye(2, dtype=np.float32), np.array([[0.1, 0.2]], dtype=np.float32), 1.0))
    assert (captions.tolist(), images_of.tolist()) == ([0, 0], [0])


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([["a dog"], []], r"task retrieval: rows.jsonl:2: image 2: has no caption; write one, or name their column"),
        ([["a dog"]], "task retrieval: there is one image, and nothing to find it among"),
    ],
)
def test_data_that_cannot_be_searched_are_named(tmp_path: Path, captions: list[list[str]], message: str) -> None:
    source = write_rows(tmp_path, captions)
    with pytest.raises(DataError, match=message):
        task_for(source).pool([source])


def test_captions_in_columns_of_their_own(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [["x"], ["y"]])
    rows = [{"image": f"{n}.png", "caption_0": f"a {n}", "caption_1": f"b {n}"} for n in range(2)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = task_for(source, columns={"answer": ["caption_0", "caption_1"]}).pool([source])
    assert pool.texts == ("a 0", "b 0", "a 1", "b 1")
    assert pool.matches.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_other_captions_than_the_originals_are_refused(world: World, tmp_path: Path) -> None:
    other = task_for(write_rows(tmp_path, [["a blue square"], *CAPTIONS[1:]]))
    with pytest.raises(DataError, match="task retrieval: item 1 has another content when the original was measured"):
        measure_one(world.folder / "model", world.folder / "model", other, tmp_path / "out", world.folder / "original")


def test_embeddings_that_are_not_finite_are_refused(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (world.folder / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    tensors["visual_projection.weight"][0, 0] = float("inf")
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="task retrieval: the model's embeddings are not finite"):
        measure_one(broken, world.folder / "model", world.task, tmp_path / "out", None)


def test_a_model_that_writes_is_refused(tmp_path: Path) -> None:
    model = build_qwen2_5_vl(tmp_path / "model", layers=1)
    with (
        Transformers(runtime="transformers").open(OpenContext.at(model, tmp_path, Silent())) as session,
        pytest.raises(UsageError, match="does not offer a comparison of images with texts; measure another task"),
    ):
        capable(session, Embeds)


def test_settings_and_note_say_what_is_searched(world: World) -> None:
    task = task_for(Path(world.task.source), samples=4, seed=2)
    assert task.settings() != world.task.settings()
    assert "mean over images, at most 4 drawn with seed 2, of having one of its captions nearest" in task.note()
    assert task.needs == (Embeds,)
    assert len(task.pool([Path(task.source)]).questions) == 4


def test_an_image_that_could_not_be_shown_is_near_nothing() -> None:
    pool = pool_of([["a"], ["b"], ["c"]])
    images, texts = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    images[1] = np.nan
    captions, images_of = ranks(pool, Embeddings(images, texts, 1.0))
    assert captions.tolist() == [0, 2, 0]
    assert images_of.tolist() == [0, 2, 0]


def test_an_image_that_cannot_be_decoded_counts_0(world: World, tmp_path: Path) -> None:
    task = task_for(write_rows(tmp_path, CAPTIONS))
    path = tmp_path / "1.png"
    image = encoded(decode_image(path.read_bytes(), "1"), "JPEG")
    path.write_bytes(image[: len(image) // 2])
    original = measure_one(world.folder / "model", world.folder / "model", task, tmp_path / "original", None)
    measurement = read_measurement(
        measure_one(world.folder / "model", world.folder / "model", task, tmp_path / "artifact", original)
    )
    items = [item for item in measurement.items["retrieval"] if isinstance(item, ImageItem)]
    assert [index for index, item in enumerate(items) if item.fault is not None] == [1]
    assert (items[1].score, items[1].said) == (0.0, "")
    fidelity = measurement.tasks["retrieval"].fidelity
    assert fidelity is not None
    assert (fidelity.tokens, fidelity.kl_mean, fidelity.lost) == (len(CAPTIONS) - 1, 0.0, 0)
