import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from compress.errors import DataError
from compress.eval.measure import MeasureContext, measure
from compress.eval.metrics.cider import Cider
from compress.eval.results import QuestionItem, ScoreMetrics, read_measurement
from compress.eval.tasks.caption import Caption
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.runtime import Transformers
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_qwen2_5_vl, picture

IMAGES = 6


def write_rows(folder: Path, captions: list[list[str]]) -> Path:
    for number in range(len(captions)):
        (folder / f"{number}.png").write_bytes(picture(number, 56, 56))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"image": f"{n}.png", "captions": texts}) + "\n" for n, texts in enumerate(captions)))
    return path


def task_for(folder: Path, **changes: Any) -> Caption:
    definition = {
        "name": "scenes", "version": 1, "task": "caption", "source": "rows.jsonl", "prompt": "Describe it.", "max_new_tokens": 8,
        "columns": {"question": None, "answer": "captions"}, "metric": "cider", **changes,
    }  # fmt: skip
    (folder / "scenes.yaml").write_text(yaml.safe_dump(definition))
    return Caption.model_validate({"task": "caption", "definition": "scenes.yaml"}, context={"base": folder})


def test_captions_are_scored_beside_those_of_all_images(tmp_path: Path) -> None:
    model = build_qwen2_5_vl(tmp_path / "model")
    round_checkpoint(model, tmp_path / "rounded", scheme(bits=3))
    source = write_rows(tmp_path, [[f"nothing alike {number}"] for number in range(IMAGES)])
    task = task_for(tmp_path)

    def measured(checkpoint: Path, name: str, against: Path | None) -> tuple[list[QuestionItem], Any]:
        context = MeasureContext(model, {task.name: (source,)}, tmp_path / name, against, Silent(), tmp_path)
        with Transformers(runtime="transformers").open(OpenContext.at(checkpoint, tmp_path, Silent())) as session:
            measure(session, [task], context)
        measurement = read_measurement(tmp_path / name)
        return [item for item in measurement.items["scenes"] if isinstance(item, QuestionItem)], measurement.tasks["scenes"]

    answers = [item.said for item in measured(model, "first", None)[0]]
    captions = [[text, "a dog runs through deep snow"] if n % 2 else ["a castle on a hill"] for n, text in enumerate(answers)]
    write_rows(tmp_path, captions)
    before, original = measured(model, "original", None)
    after, artifact = measured(tmp_path / "rounded", "artifact", tmp_path / "original")
    cider = Cider(captions)
    for items, task_measurement in ((before, original), (after, artifact)):
        assert [item.score for item in items] == [
            cider.score(item.said, texts) for item, texts in zip(items, captions, strict=True)
        ]
        assert isinstance(task_measurement.metrics, ScoreMetrics)
        assert (task_measurement.metrics.task, task_measurement.metrics.metric, task_measurement.metrics.binary) == (
            "caption",
            "cider",
            False,
        )
        assert task_measurement.metrics.score == pytest.approx(np.mean([item.score for item in items]), rel=1e-12)
    assert [item.score > 1 for item in before] == [bool(n % 2) for n in range(IMAGES)]
    assert [item.accepted for item in before] == [tuple(texts) for texts in captions]
    assert {item.prompt for item in before} == {"Describe it."}
    assert artifact.fidelity is not None
    assert artifact.fidelity.kl_mean > 0
    assert artifact.fidelity.lost == sum(b.score < a.score for a, b in zip(before, after, strict=True)) > 0


def test_one_image_gives_no_figure(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [["a dog"]])
    task = task_for(tmp_path)
    with pytest.raises(
        DataError, match="task scenes: CIDEr weighs words by the images that have them, and there is one; name more"
    ):
        task.scorer(task.questions([source]))


def test_an_image_without_a_caption_is_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [["a dog"], []])
    with pytest.raises(DataError, match=r"task scenes: rows.jsonl:2: question 2 has no accepted answer; add one"):
        task_for(tmp_path).questions([source])


def test_captions_are_the_same_when_their_words_are(tmp_path: Path) -> None:
    write_rows(tmp_path, [["a dog"]])
    task = task_for(tmp_path)
    assert task.same("A dog, running.", "a dog running")
    assert not task.same("A dog.", "A cat.")


def test_rows_may_have_questions_of_their_own(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [["a dog"]])
    source.write_text(json.dumps({"image": "0.png", "captions": ["a dog"], "question": "What is there?"}) + "\n")
    task = task_for(tmp_path, prompt="In short: {question}", columns={"answer": "captions"})
    (question,) = task.questions([source])
    assert task.prompt_text(question) == "In short: What is there?"
