import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from compress.checkpoints.special_tokens import required_end_tokens
from compress.data.tables import parquet_of, read_rows
from compress.errors import CheckpointError, DataError
from compress.eval import TASKS
from compress.eval.definition import Kind
from compress.eval.measure import MeasureContext, measure
from compress.eval.results import AdapterItem, Measurement, QuestionItem, read_items, read_measurement
from compress.eval.tasks.choice import Choice
from compress.eval.tasks.perplexity import Perplexity
from compress.eval.tasks.question_task import QuestionTask
from compress.eval.tasks.vqa import Vqa
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, Session
from compress.runtimes.transformers.runtime import Transformers
from tests.tiny import TEXT, build_qwen2_5_vl, picture

QUESTIONS = 10
WINDOW = 48


class Listener(Silent):
    """Progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Puzzle(QuestionTask):
    """A second task that takes definitions of the kind `vqa`."""

    task_revision: ClassVar[int] = 1
    kind: ClassVar[Kind] = "vqa"

    task: Literal["puzzle"]

    def note(self) -> str:
        return ""


@dataclass(frozen=True)
class World:
    """An original and a slightly changed artifact, both open, with questions and text for them."""

    original: Session
    artifact: Session
    checkpoint: Path
    tasks: tuple[Vqa, Perplexity]
    data: dict[str, tuple[Path, ...]]
    folder: Path

    def context(self, name: str, against: Path | None) -> MeasureContext:
        target, logs = self.folder / name, self.folder
        return MeasureContext(
            original_checkpoint=self.checkpoint,
            data=self.data,
            output_dir=target,
            original_measurement=against,
            progress=Silent(),
            logs=logs,
        )


def write_questions(path: Path, answers: list[list[str]]) -> Path:
    for number in range(QUESTIONS):
        (path.parent / f"{number}.png").write_bytes(picture(number, 56, 56))
    rows = [
        {"id": f"q{number}", "image": f"{number}.png", "question": f"How many squares, {number}?", "answer": answers[number]}
        for number in range(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def disturb(source: Path, target: Path) -> Path:
    """Copy a checkpoint with noise on every weight of the decoder."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if "layers" in name:
            tensors[name] = tensor + 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor)
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    checkpoint = build_qwen2_5_vl(folder / "model")
    changed = disturb(checkpoint, folder / "changed")
    file = write_questions(folder / "questions.jsonl", [["never said"]] * QUESTIONS)
    text = folder / "text.txt"
    text.write_text(TEXT)
    vqa = Vqa.model_validate({"task": "vqa", "definition": "scenes", "source": str(file)})
    perplexity = Perplexity.model_validate({"task": "perplexity", "dataset": "text", "source": str(text), "window": WINDOW})
    runtime = Transformers(runtime="transformers")
    with (
        runtime.open(OpenContext.at(artifact=checkpoint, logs=folder, progress=Silent())) as original,
        runtime.open(OpenContext.at(artifact=changed, logs=folder, progress=Silent())) as artifact,
    ):
        tasks = (vqa, perplexity)
        world = World(original, artifact, checkpoint, tasks, {"scenes": (file,), "text": (text,)}, folder)
        measure(original, [vqa], world.context("first", None))
        answers = [item.said for item in read_measurement(folder / "first").questions("scenes")]
        write_questions(file, [[answers[n], "other"] if n < 6 else ["never said"] for n in range(QUESTIONS)])
        yield world


@pytest.fixture(scope="module")
def original(world: World) -> Measurement:
    return measure(world.original, world.tasks, world.context("original", None))


def test_figures_and_messages_name_tasks_not_the_kind_of_their_definitions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Puzzle.model_validate({"task": "puzzle", "definition": "scenes", "source": str(world.data["scenes"][0])})
    measurement = measure(world.original, [task], world.context("puzzle", None))
    assert [(each.name, each.metrics.task, each.metrics.metric) for each in measurement.tasks] == [
        ("scenes", "puzzle", "exact_match")
    ]
    monkeypatch.setitem(TASKS, "puzzle", f"{__name__}:Puzzle")
    with pytest.raises(ValidationError, match="the definition scenes is of a vqa; write task: vqa or puzzle"):
        Choice.model_validate({"task": "choice", "definition": "scenes", "by": "generation"})


@pytest.fixture(scope="module")
def artifact(world: World, original: Measurement) -> Measurement:
    assert original.tasks
    return measure(world.artifact, world.tasks, world.context("artifact", world.folder / "original"))


def metrics(measurement: Measurement, name: str) -> Any:
    return next(task.metrics for task in measurement.tasks if task.name == name)


def test_the_original_is_measured_and_its_predictions_are_kept(world: World, original: Measurement) -> None:
    folder = world.folder / "original"
    assert metrics(original, "scenes").score == 0.6
    assert all(task.fidelity is None for task in original.tasks)
    assert Measurement.model_validate_json((folder / "measurement.json").read_text()) == original
    items = read_measurement(folder).questions("scenes")
    assert [item.id for item in items] == [f"q{number}" for number in range(QUESTIONS)]
    assert [item.score for item in items] == [1] * 6 + [0] * 4
    assert items[3].prompt == "How many squares, 3?"
    assert items[3].accepted == (items[3].said.strip(), "other")
    assert (folder / "record" / "scenes").is_dir()
    assert (folder / "record" / "text").is_dir()


def test_an_answer_that_ended_is_scored_with_its_end_token(world: World, original: Measurement, tmp_path: Path) -> None:
    assert original.tasks
    cut_off = read_measurement(world.folder / "original").questions("scenes")[0]
    assert len(cut_off.token_ids) == 4  # as many as may be said: it did not end, and gets no end token
    end = cut_off.token_ids[2]
    talker = disturb(world.checkpoint, tmp_path / "talker")
    (talker / "model.safetensors").write_bytes((world.checkpoint / "model.safetensors").read_bytes())
    (talker / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 0]}))
    runtime = Transformers(runtime="transformers")
    with runtime.open(OpenContext.at(artifact=talker, logs=tmp_path, progress=Silent())) as session:
        context = replace(world.context("talker", None), original_checkpoint=talker)
        measure(session, world.tasks[:1], context)
    ended = read_measurement(world.folder / "talker").questions("scenes")[0]
    assert ended.token_ids == cut_off.token_ids[: cut_off.token_ids.index(end) + 1]
    assert ended.tokens == len(ended.token_ids) < 4


def test_a_checkpoint_without_an_end_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert required_end_tokens(tmp_path) == (7,)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no eos_token_id in generation_config.json or config.json"):
        required_end_tokens(tmp_path)


def test_perplexity_is_that_of_the_windows_each_on_its_own(world: World, original: Measurement) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    tokenizer = cast("Any", AutoTokenizer).from_pretrained(world.checkpoint)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(world.checkpoint, dtype=torch.float32)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    perplexity = metrics(original, "text")
    assert perplexity.windows == len(windows) > 3
    assert perplexity.tokens == len(windows) * (WINDOW - 1)
    assert perplexity.window == WINDOW
    assert perplexity.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_an_artifact_is_compared_item_by_item(world: World, original: Measurement, artifact: Measurement) -> None:
    before, after = read_measurement(world.folder / "original"), read_measurement(world.folder / "artifact")
    fidelity = {task.name: task.fidelity for task in artifact.tasks}
    scenes, text = fidelity["scenes"], fidelity["text"]
    assert scenes is not None
    assert text is not None
    old, new = before.questions("scenes"), after.questions("scenes")
    assert scenes.lost == sum(a.score > b.score for a, b in zip(old, new, strict=True))
    assert scenes.gained == sum(b.score > a.score for a, b in zip(old, new, strict=True))
    assert scenes.changed is not None
    assert scenes.changed >= (scenes.lost or 0) + (scenes.gained or 0)
    assert scenes.changed > 0
    assert text.changed is None
    assert scenes.tokens == sum(item.tokens for item in old) == sum(item.tokens for item in new)
    for name, summary in (("scenes", scenes), ("text", text)):
        items = [item for item in after.items[name] if not isinstance(item, AdapterItem)]
        kl = [item.kl or 0.0 for item in items]
        same = [item.same_top or 0 for item in items]
        assert summary.kl_mean == pytest.approx(sum(kl) / summary.tokens)
        assert summary.top1_agreement == pytest.approx(sum(same) / summary.tokens)
        assert summary.kl_mean > 0
        assert summary.kl_p99 > summary.kl_mean
        assert summary.kl_interval is not None
        assert summary.kl_interval[0] < summary.kl_mean < summary.kl_interval[1]
    assert metrics(artifact, "text").perplexity != metrics(original, "text").perplexity


def test_the_original_against_itself_has_no_divergence(world: World, original: Measurement) -> None:
    same = measure(world.original, world.tasks, world.context("again", world.folder / "original"))
    assert len(same.tasks) == len(world.tasks) > 0
    for task, first in zip(same.tasks, original.tasks, strict=True):
        assert task.metrics == first.metrics
        assert task.fidelity is not None
        assert task.fidelity.kl_mean < 1e-6
        assert task.fidelity.top1_agreement == 1
        assert (task.fidelity.lost or 0, task.fidelity.gained or 0, task.fidelity.changed or 0) == (0, 0, 0)


def test_measuring_twice_writes_the_same_bytes(world: World, artifact: Measurement) -> None:
    assert artifact.tasks
    measure(world.artifact, world.tasks, world.context("twice", world.folder / "original"))
    for name in ("measurement.json", "items-scenes.parquet", "items-text.parquet"):
        assert (world.folder / "twice" / name).read_bytes() == (world.folder / "artifact" / name).read_bytes()


def test_other_questions_than_the_originals_are_refused(world: World, original: Measurement, tmp_path: Path) -> None:
    assert original.tasks
    other = write_questions(tmp_path / "questions.jsonl", [["red"]] * QUESTIONS)
    other.write_text(other.read_text().replace("squares, 4", "circles, 4"))
    context = replace(world.context("refused", world.folder / "original"), data={"scenes": (other,)})
    with pytest.raises(DataError, match="task scenes: item q4 has another content when the original was measured"):
        measure(world.artifact, world.tasks[:1], context)
    other.write_text("".join(other.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(DataError, match="task scenes: 4 items, and 10 when the original was measured"):
        measure(world.artifact, world.tasks[:1], context)


def test_another_text_than_the_originals_is_refused(world: World, original: Measurement, tmp_path: Path) -> None:
    assert original.tasks
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("castle", "palace"))
    context = replace(world.context("refused-text", world.folder / "original"), data={"text": (other,)})
    with pytest.raises(DataError, match=r"task text: item window-\d+ has another content"):
        measure(world.artifact, world.tasks[1:], context)


def test_a_text_shorter_than_a_window_is_refused(world: World, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    context = replace(world.context("short", None), data={"text": (short,)})
    with pytest.raises(DataError, match=r"short.txt has \d+ tokens, not one window of 48; take a longer text"):
        measure(world.original, world.tasks[1:], context)


def test_a_question_without_an_accepted_answer_is_named(world: World, tmp_path: Path) -> None:
    file = write_questions(tmp_path / "questions.jsonl", [["red"]] * 7 + [[]] + [["red"]] * 2)
    with pytest.raises(DataError, match=r"questions.jsonl:8: question q7 has no accepted answer"):
        world.tasks[0].questions((file,))


def test_a_question_with_a_special_token_is_named(world: World, tmp_path: Path) -> None:
    file = write_questions(tmp_path / "questions.jsonl", [["red"]] * QUESTIONS)
    file.write_text(file.read_text().replace("squares, 4", "<|image_pad|>, 4"))
    context = replace(world.context("special", None), data={"scenes": (file,)})
    with pytest.raises(DataError, match=r"task scenes: questions.jsonl:5: question q4: holds '<\|image_pad\|>', a special token"):
        measure(world.original, world.tasks[:1], context)


def test_what_reads_like_a_special_token_in_a_text_is_text(world: World, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("An <|image_pad|> in the middle . " * 20)
    image = json.loads((world.checkpoint / "config.json").read_text())["image_token_id"]
    windows = world.tasks[1].windows([text], world.checkpoint)
    assert not any(image in window.token_ids for window in windows)
    measurement = measure(world.original, world.tasks[1:], replace(world.context("like", None), data={"text": (text,)}))
    assert metrics(measurement, "text").windows == len(windows) > 3


def test_a_checkpoint_without_a_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((world.checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"has no tokenizer; add its tokenizer.json, or fetch the checkpoint again"):
        world.tasks[1].windows(world.data["text"], tmp_path)


def test_a_task_without_files_is_refused(world: World) -> None:
    with pytest.raises(DataError, match="task scenes: was given no files"):
        measure(world.original, world.tasks[:1], replace(world.context("nothing", None), data={}))


def test_predictions_that_are_not_finite_name_the_item(world: World, tmp_path: Path) -> None:
    broken = disturb(world.checkpoint, tmp_path / "broken")
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    head = next(name for name in tensors if name.endswith("lm_head.weight"))
    tensors[head][0, 0] = math.inf
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    runtime = Transformers(runtime="transformers")
    with (
        runtime.open(OpenContext.at(artifact=broken, logs=tmp_path, progress=Silent())) as session,
        pytest.raises(CheckpointError, match="task text: item window-00000: the model's predictions are not finite"),
    ):
        measure(session, world.tasks[1:], world.context("broken", None))


def test_samples_draw_questions_by_seed_in_the_files_order(world: World) -> None:
    files = world.data["scenes"]

    def sample_ids(seed: int) -> list[str]:
        task = world.tasks[0].model_copy(update={"samples": 4, "seed": seed})
        return [question.id for question in task.questions(files)]

    assert sample_ids(1) == sample_ids(1) == sorted(sample_ids(1))
    assert len(sample_ids(1)) == 4
    assert len({tuple(sample_ids(seed)) for seed in range(5)}) > 1


def test_fewer_items_than_asked_for_are_all_used_with_a_warning(world: World) -> None:
    listener = Listener()
    tasks = [world.tasks[0].model_copy(update={"samples": 500}), world.tasks[1].model_copy(update={"samples": 2})]
    measurement = measure(world.original, tasks, replace(world.context("few", None), progress=listener))
    assert listener.warnings == ["task scenes: the data hold 10 questions, samples asks for 500; all of them are used"]
    assert metrics(measurement, "scenes").items == QUESTIONS
    assert metrics(measurement, "text").windows == 2


def test_damaged_items_are_refused(world: World, original: Measurement, tmp_path: Path) -> None:
    assert original.tasks
    content = (world.folder / "original" / "items-scenes.parquet").read_bytes()
    (tmp_path / "items-scenes.parquet").write_bytes(content[:-50])
    with pytest.raises(DataError, match=r"items-scenes.parquet: cannot be read"):
        read_items(tmp_path, "scenes")
    rows = read_rows(world.folder / "original" / "items-scenes.parquet")
    (tmp_path / "items-scenes.parquet").write_bytes(parquet_of([{**row, "score": None} for row in rows]))
    with pytest.raises(DataError, match=r"items-scenes.parquet: row 1: no item of a measurement"):
        read_items(tmp_path, "scenes")
    with pytest.raises(DataError, match=r"measurement.json: cannot be read"):
        read_measurement(tmp_path)
    assert isinstance(read_items(world.folder / "original", "scenes")[0], QuestionItem)


def test_contents_are_what_is_asked(world: World) -> None:
    questions, nothing = world.tasks[0].contents(world.data["scenes"])
    assert [question.id for question in questions] == [f"q{number}" for number in range(QUESTIONS)]
    assert list(nothing) == []
    nothing, documents = world.tasks[1].contents(world.data["text"])
    assert list(nothing) == []
    assert [document.text for document in documents] == [TEXT.strip()]
