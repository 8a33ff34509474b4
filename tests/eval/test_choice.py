import json
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from compress.data.prompts import Prompt
from compress.errors import DataError
from compress.eval.measure import MeasureContext, measure
from compress.eval.results import ItemizedMeasurement, QuestionItem, ScoreMetrics, read_measurement
from compress.eval.tasks.choice import Choice
from compress.eval.tasks.question_task import QuestionSet
from compress.progress import Silent
from compress.runtimes.runtime import Generates, OpenContext, Passage, Scores
from compress.runtimes.transformers.runtime import Transformers
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_qwen2_5_vl, picture

ITEMS = 8
OPTIONS = ["it", "but", "a"]
"""Of one, two and one tokens; by the tiny model the second is likelier per token, and one of the others as a whole."""
SHOWN = "{question} {options} Which letter?"
HIDDEN = "{question}"


@dataclass(frozen=True)
class World:
    original: Any
    artifact: Any
    checkpoint: Path
    folder: Path

    def task(self, name: str, prompt: str, tokens: int = 3, **fields: Any) -> Choice:
        definition = {
            "name": name, "version": 3, "task": "choice", "source": "rows.jsonl", "columns": {"category": "subject"},
            "prompt": prompt, "max_new_tokens": tokens, "metric": "letter",
        }  # fmt: skip
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
        values = {"task": "choice", "definition": f"{name}.yaml", **fields}
        return Choice.model_validate(values, context={"base": self.folder})

    def measure(self, task: Choice, name: str, against: str | None = None, **fields: Any) -> ItemizedMeasurement:
        target, before = self.folder / name, None if against is None else self.folder / against
        context = MeasureContext(
            original_checkpoint=self.checkpoint, data={task.name: (self.folder / "rows.jsonl",)}, output_dir=target,
            original_measurement=before, progress=Silent(), logs=self.folder, **fields,
        )  # fmt: skip
        measure(self.original if before is None else self.artifact, [task], context)
        return read_measurement(target)

    def log_likelihoods(self, session: Any, task: Choice, options: Sequence[str]) -> list[list[tuple[float, int]]]:
        """Return the log-likelihood and the number of tokens of each option of each question, each scored alone."""
        from transformers import AutoTokenizer

        tokenizer = cast("Any", AutoTokenizer).from_pretrained(self.checkpoint)
        log_likelihoods = list[list[tuple[float, int]]]()
        for question in task.questions((self.folder / "rows.jsonl",)):
            (prompt,) = task.prompts(QuestionSet("one", [question], None, task.scorer([question])))
            ids = [tuple(tokenizer(option, add_special_tokens=False)["input_ids"]) for option in options]
            scores = [session.score([Passage("one", tokens, prompt)], None, None, Silent())[0] for tokens in ids]
            log_likelihoods.append(
                [(-float(score.negative_log_likelihood.sum()), len(tokens)) for score, tokens in zip(scores, ids, strict=True)]
            )
        return log_likelihoods


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("choice")
    checkpoint = build_qwen2_5_vl(folder / "model")
    round_checkpoint(checkpoint, folder / "rounded", scheme(bits=3))
    rows = [
        {
            "id": f"q{number}", "image": f"{number}.png", "question": f"What is in it, {number}?", "options": OPTIONS,
            "answer": "ABC"[number % 3], "subject": ["art", "music"][number % 2],
        }
        for number in range(ITEMS)
    ]  # fmt: skip
    for number in range(ITEMS):
        (folder / f"{number}.png").write_bytes(picture(number, 56, 56))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runtime = Transformers(runtime="transformers")
    with (
        runtime.open(OpenContext.at(checkpoint, folder, Silent())) as original,
        runtime.open(OpenContext.at(folder / "rounded", folder, Silent())) as artifact,
    ):
        yield World(original, artifact, checkpoint, folder)


def items_of(measured: ItemizedMeasurement, name: str) -> list[QuestionItem]:
    return [item for item in measured.items[name] if isinstance(item, QuestionItem)]


def score_metrics(measured: ItemizedMeasurement, name: str) -> ScoreMetrics:
    metrics = measured.tasks[name].metrics
    assert isinstance(metrics, ScoreMetrics)
    return metrics


@pytest.mark.parametrize(
    ("name", "prompt", "scored", "normalized"),
    [
        ("letters", SHOWN, ["A", "B", "C"], False),
        ("texts", HIDDEN, OPTIONS, False),
        ("texts-per-token", HIDDEN, OPTIONS, True),
    ],
)
def test_the_likeliest_option_is_taken(world: World, name: str, prompt: str, scored: list[str], normalized: bool) -> None:
    task = world.task(name, prompt, by="likelihood", length_normalized=normalized)
    before, after = world.measure(task, f"{name}-original"), world.measure(task, f"{name}-artifact", f"{name}-original")
    for session, measured in ((world.original, before), (world.artifact, after)):
        log_likelihoods = world.log_likelihoods(session, task, scored)
        chosen = [int(np.argmax([total / (count if normalized else 1) for total, count in options])) for options in log_likelihoods]
        items = items_of(measured, name)
        assert [item.said for item in items] == ["ABC"[index] for index in chosen]
        assert [item.score for item in items] == [float(index == number % 3) for number, index in enumerate(chosen)]
        metrics = score_metrics(measured, name)
        assert (metrics.task, metrics.metric, metrics.binary, metrics.items) == ("choice", "likelihood", True, ITEMS)
        assert metrics.score == np.mean([item.score for item in items])
        assert metrics.details == {
            "subject=art": np.mean([item.score for item in items[::2]]),
            "subject=music": np.mean([item.score for item in items[1::2]]),
        }
    old, new = items_of(before, name), items_of(after, name)
    artifact_scores = world.log_likelihoods(world.artifact, task, scored)
    for item, artifact_item, options in zip(old, new, artifact_scores, strict=True):
        total, count = options["ABC".index(item.said)]  # what the original chose is what its predictions are compared on
        assert (artifact_item.nll, artifact_item.tokens) == (pytest.approx(-total, rel=1e-5), count)
    fidelity = after.tasks[name].fidelity
    assert fidelity is not None
    assert fidelity.tokens == sum(item.tokens for item in new) and fidelity.kl_mean > 0
    assert fidelity.changed == sum(a.said != b.said for a, b in zip(old, new, strict=True))


def test_ways_to_choose_differ(world: World) -> None:
    """The tests above would not see a length that is never divided by: the tiny model chooses otherwise per token."""
    task = world.task("ways", HIDDEN, by="likelihood")
    log_likelihoods = world.log_likelihoods(world.original, task, OPTIONS)
    plain = [int(np.argmax([total for total, _ in options])) for options in log_likelihoods]
    assert plain != [int(np.argmax([total / count for total, count in options])) for options in log_likelihoods]


def say_only(checkpoint: Path, target: Path, word: str, session: Any, prompt: Prompt) -> Path:
    """Copy a checkpoint with an output head that finds one token likeliest, by what the model thinks at the end of a prompt."""
    from transformers import AutoTokenizer

    (token,) = cast("Any", AutoTokenizer).from_pretrained(checkpoint)(word, add_special_tokens=False)["input_ids"]
    record = target.parent / f"{target.name}-record"
    session.score([Passage("one", (token,), prompt)], record, None, Silent())
    thought = safetensors.torch.load_file(record / "hidden-000000.safetensors")["0"][0]
    shutil.copytree(checkpoint, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[token] = thought.to(head)
    tensors["lm_head.weight"] = head
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_an_answer_in_own_words_counts_by_the_option_that_it_names(world: World) -> None:
    task = world.task("words", SHOWN, tokens=1, by="generation")
    questions = task.questions((world.folder / "rows.jsonl",))
    prompt = Prompt("one", task.prompt_text(questions[0]), questions[0].images)
    assert prompt.text == "What is in it, 0? A. it\nB. but\nC. a Which letter?"
    parrot = say_only(world.checkpoint, world.folder / "parrot", "B", world.original, prompt)
    with Transformers(runtime="transformers").open(OpenContext.at(parrot, world.folder, Silent())) as session:
        items = items_of(replace(world, original=session).measure(task, "words"), "words")
    assert {item.said for item in items} == {"B"}
    assert [item.score for item in items] == [float(number % 3 == 1) for number in range(ITEMS)]
    assert [item.accepted for item in items] == [("ABC"[number % 3],) for number in range(ITEMS)]


def test_the_original_asked_again_is_its_own_noise(world: World) -> None:
    for by in ("likelihood", "generation"):
        task = world.task(f"noise-{by}", SHOWN, by=by)
        noise = world.measure(task, f"noise-{by}", noise_samples=3).tasks[task.name].noise
        assert noise is not None
        assert noise.kl_mean < 1e-6 and noise.top1_agreement == 1
        assert (noise.lost, noise.gained, noise.changed) == (0, 0, 0)


@dataclass(frozen=True)
class AfterTwo:
    """Settles after the second of four parts."""

    looks: int = 4

    def cumulative_items(self, items: int) -> list[int]:
        return [items * look // self.looks for look in range(1, self.looks + 1)]

    def is_decided(self, original: Sequence[Any], artifact: Sequence[Any], look: int) -> bool:
        assert [item.id for item in original] == [item.id for item in artifact]
        assert len(artifact) == self.cumulative_items(ITEMS)[look - 1]
        return look == 2


@pytest.mark.parametrize("by", ["likelihood", "generation"])
def test_items_are_drawn_in_parts_until_it_is_settled(world: World, by: str) -> None:
    task = world.task(f"parts-{by}", SHOWN, by=by)
    all_at_once = {item.id: item for item in items_of(world.measure(task, f"whole-{by}"), task.name)}
    before = world.measure(task, f"parts-{by}-original", stopping={task.name: AfterTwo()})
    after = world.measure(task, f"parts-{by}-artifact", f"parts-{by}-original", stopping={task.name: AfterTwo()})
    old, new = items_of(before, task.name), items_of(after, task.name)
    assert (len(old), len(new)) == (ITEMS, ITEMS // 2)
    assert [item.id for item in new] == [item.id for item in old][: ITEMS // 2] != sorted(all_at_once)[: ITEMS // 2]
    assert [item.said for item in old] == [all_at_once[item.id].said for item in old]
    assert (before.tasks[task.name].look, before.tasks[task.name].looks) == (None, 4)
    assert (after.tasks[task.name].look, after.tasks[task.name].looks) == (2, 4)
    assert score_metrics(after, task.name).items == ITEMS // 2
    fidelity = after.tasks[task.name].fidelity
    assert fidelity is not None and fidelity.kl_mean > 0


@contextmanager
def changed(world: World, old: str, new: str) -> Generator[None]:
    """Change the first place where something stands in the data, for a while."""
    path = world.folder / "rows.jsonl"
    before = path.read_text()
    path.write_text(before.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_text(before)


def test_other_options_than_the_originals_are_refused(world: World) -> None:
    task = world.task("same", SHOWN, by="likelihood")
    world.measure(task, "same-original")
    with (
        changed(world, '"but"', '"not"'),
        pytest.raises(DataError, match="task same: item q0 has another content when the original was measured"),
    ):
        world.measure(task, "same-artifact", "same-original")


def test_an_option_without_text_cannot_be_scored(world: World) -> None:
    task = world.task("empty", HIDDEN, by="likelihood")
    with (
        changed(world, '"but"', '""'),
        pytest.raises(DataError, match=r"rows.jsonl:1: question q0: option B is empty; write its text, or show \{options\}"),
    ):
        world.measure(task, "empty-original")


@pytest.mark.parametrize("by", ["likelihood", "generation"])
def test_a_question_that_fails_counts_as_wrong_and_is_told(world: World, by: str) -> None:
    task = world.task(f"fails-{by}", SHOWN, by=by)
    with changed(world, "What is in it, 3?", "What is it? " * 1000):
        before = world.measure(task, f"{task.name}-original", noise_samples=4)
        after = world.measure(task, f"{task.name}-artifact", f"{task.name}-original")
    for measurement in (before, after):
        items = items_of(measurement, task.name)
        assert [item.id for item in items if item.fault] == ["q3"]
        assert "the model takes 2048" in str(items[3].fault)
        assert (items[3].said, items[3].score, items[3].tokens) == ("", 0.0, 0)
        metrics = score_metrics(measurement, task.name)
        assert (metrics.items, metrics.failed) == (ITEMS, 1)
        assert metrics.score == sum(item.score for item in items) / ITEMS
    fidelity = after.tasks[task.name].fidelity
    assert fidelity is not None
    assert fidelity.tokens == sum(item.tokens for item in items_of(after, task.name))


def test_likelihoods_are_needed_only_where_they_choose(world: World) -> None:
    assert world.task("needs", SHOWN, by="likelihood").needs == (Scores,)
    assert world.task("needs", SHOWN, by="generation").needs == (Generates,)
    assert world.task("needs", SHOWN, by="generation").settings() != world.task("needs", SHOWN, by="likelihood").settings()
