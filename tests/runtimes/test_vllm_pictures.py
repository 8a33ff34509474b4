"""A real vLLM server and the in-process runtime see the pictures that people have alike: the demo model's answers tell."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from compress.data.images import decode_image
from compress.eval.measure import MeasureContext, measure
from compress.eval.results import ItemizedMeasurement, ScoreMetrics, read_measurement
from compress.eval.tasks.vqa import Vqa
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, Runtime
from compress.runtimes.transformers.runtime import Transformers
from compress.runtimes.vllm.runtime import Vllm
from compress.workers.environment import install
from tests.pictures import encoded, everyday
from tests.runtimes.agreement import FEW_BLOCKS

PRELOADED = ("vllm",)

DEMO = Path(__file__).parent.parent.parent / "recipes" / "demo"
MODEL = DEMO / "model"
COUNT = 48
IN_PROCESS = Transformers(runtime="transformers", dtype="float32", device="cpu")


def write_task(folder: Path, rows: Sequence[dict[str, str]], images: Sequence[bytes]) -> Vqa:
    """Write questions, each about a picture of its own; return the task that asks them."""
    folder.mkdir()
    lines: list[str] = []
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        (folder / f"{number}.image").write_bytes(image)
        lines.append(json.dumps({**row, "image": f"{number}.image"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    fields = {"task": "vqa", "definition": "scenes", "source": str(folder / "rows.jsonl")}
    return Vqa.model_validate(fields, context={"base": folder})


def measured(runtime: Runtime, task: Vqa, folder: Path) -> ItemizedMeasurement:
    """Return what the demo model answers to a task's questions in a runtime."""
    folder.mkdir()
    context = MeasureContext(MODEL, {task.name: (Path(task.data.source),)}, folder, None, Silent(), folder)
    with runtime.open(OpenContext.at(MODEL, folder, Silent())) as session:
        measure(session, [task], context)
    return read_measurement(folder)


def answers(measured: ItemizedMeasurement) -> dict[str, str]:
    return {item.id: item.said for item in measured.questions("scenes") if item.fault is None}


@pytest.mark.slow
def test_48_pictures_of_every_kind_are_answered_alike(tmp_path: Path) -> None:
    """Turned by EXIF, transparent, of a palette: vLLM is given the files as they are, and decodes them itself.

    A reader that looks at the pixels as they are stored is told something else, so that to see them alike is no accident.
    """
    install("vllm", Silent())
    table = cast("Any", parquet).read_table(DEMO / "test.parquet").slice(0, COUNT).to_pylist()
    rows: list[dict[str, str]] = [{key: row[key] for key in ("id", "question", "answer")} for row in table]
    images = list(everyday([decode_image(row["image"]["bytes"], row["id"]) for row in table]))
    task = write_task(tmp_path / "pictures", rows, images)
    stored = [encoded(Image.open(io.BytesIO(image)).convert("RGBA").convert("RGB")) for image in images]
    inside = measured(IN_PROCESS, task, tmp_path / "inside")
    careless = measured(IN_PROCESS, write_task(tmp_path / "stored", rows, stored), tmp_path / "careless")
    vllm = Vllm(runtime="vllm", dtype="float32", max_model_len=512, kv_cache_gib=1, arguments=FEW_BLOCKS)
    served = measured(vllm, task, tmp_path / "served")
    assert len(answers(inside)) == COUNT
    assert answers(served) == answers(inside)
    assert served.tasks["scenes"].metrics == inside.tasks["scenes"].metrics
    metrics = inside.tasks["scenes"].metrics
    assert isinstance(metrics, ScoreMetrics) and 0 < metrics.score < 1
    expected, actual = ([item.nll for item in found.questions("scenes")] for found in (inside, served))
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    assert sum(answer != answers(careless)[name] for name, answer in answers(inside).items()) >= 4
