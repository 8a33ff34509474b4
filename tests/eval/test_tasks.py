from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.data.questions import Question
from compress.errors import RecipeError
from compress.eval import TASKS
from compress.eval.definition import read_definition
from compress.eval.tasks.perplexity import Perplexity
from compress.eval.tasks.task import Task, cluster_of
from compress.eval.tasks.vqa import Vqa
from compress.recipe.schema import load_row

GOOD = """\
name: colours
version: 2
source: someone/colours
split: validation
columns: {id: number, answer: answers}
prompt: "Look closely. {question}"
max_new_tokens: 8
metric: exact_match
"""


@pytest.fixture
def definition(tmp_path: Path) -> Path:
    path = tmp_path / "colours.yaml"
    path.write_text(GOOD)
    return path


def make_vqa(base: Path, **fields: Any) -> Vqa:
    return Vqa.model_validate({"task": "vqa", **fields}, context={"base": base})


def test_questions_with_the_same_images_are_a_cluster() -> None:
    def asked(number: int, *images: bytes) -> Question:
        return Question(str(number), images, f"What is in scene {number}?", ("red",), f"q.jsonl:{number}")

    first, second = cluster_of(asked(1, b"one")), cluster_of(asked(2, b"one"))
    assert first == second
    assert (
        len(
            {
                first,
                cluster_of(asked(3, b"other")),
                cluster_of(asked(4, b"one", b"other")),
                cluster_of(asked(5)),
                cluster_of(asked(6)),
            }
        )
        == 5
    )


def test_every_row_of_the_table_is_a_task_of_its_own_name() -> None:
    for name in TASKS:
        row = load_row(TASKS, name)
        assert issubclass(row, Task)
        assert row.__name__.lower() == name.replace("-", "")


def test_a_definition_is_found_by_name_or_relative_to_the_recipe(definition: Path) -> None:
    task = make_vqa(definition.parent, definition="colours.yaml")
    assert task.definition == str(definition)
    assert task.name == "colours"
    assert make_vqa(definition.parent, definition="textvqa").name == "textvqa"
    with pytest.raises(
        ValidationError, match=r"no definition file at .*nowhere, .* shipped one is called nowhere: chartqa, docvqa, .*vqav2"
    ):
        make_vqa(definition.parent, definition="nowhere")


def test_all_faults_of_a_definition_are_told_with_their_lines(definition: Path) -> None:
    definition.write_text(GOOD.replace("version: 2", "version: two").replace("max_new_tokens: 8", "tokens: 8"))
    with pytest.raises(RecipeError) as caught:
        read_definition(definition)
    faults = "\n".join(caught.value.faults)
    assert "colours.yaml:2: version: Input should be a valid integer" in faults
    assert "colours.yaml:7: tokens: unknown key; allowed here: name, version, task, source" in faults
    assert "max_new_tokens: Field required" in faults
    with pytest.raises(ValidationError, match=r"colours.yaml:2: version"):
        make_vqa(definition.parent, definition="colours.yaml")


def test_a_definition_is_called_as_its_file(definition: Path) -> None:
    definition.write_text(GOOD.replace("name: colours", "name: colors"))
    with pytest.raises(RecipeError, match=r"colours.yaml:1: name: must be colours, as the file is called"):
        read_definition(definition)


def test_a_prompt_without_the_question_is_refused(definition: Path) -> None:
    definition.write_text(GOOD.replace("{question}", "What is it?"))
    with pytest.raises(RecipeError, match=r"colours.yaml:6: prompt: must have \{question\} where each question belongs"):
        read_definition(definition)


def test_braces_in_a_question_stay(definition: Path) -> None:
    assert read_definition(definition).format_prompt("What is {x}?") == "Look closely. What is {x}?"


def test_a_definition_without_data_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="the definition scenes names no data; give source, a JSONL or parquet file"):
        make_vqa(tmp_path, definition="scenes")
    (tmp_path / "held-out.jsonl").write_text("")
    task = make_vqa(tmp_path, definition="scenes", source="held-out.jsonl")
    assert task.data.source == str(tmp_path / "held-out.jsonl")


def test_another_source_brings_its_own_columns(definition: Path) -> None:
    own = make_vqa(definition.parent, definition="colours.yaml", split="test").data
    assert (own.source, own.split, own.columns.id, own.columns.answer) == ("someone/colours", "test", "number", "answers")
    (definition.parent / "mine.jsonl").write_text("")
    other = make_vqa(definition.parent, definition="colours.yaml", source="mine.jsonl").data
    assert (other.columns.id, other.columns.answer) == ("id", "answer")
    named = make_vqa(definition.parent, definition="colours.yaml", source="mine.jsonl", columns={"id": "number"}).data
    assert (named.columns.id, named.columns.answer) == ("number", "answer")


def test_settings_hold_what_the_definition_says_and_no_path(definition: Path) -> None:
    task = make_vqa(definition.parent, definition="colours.yaml", samples=5)
    settings = task.settings()
    assert settings["definition"] == {
        "name": "colours",
        "version": 2,
        "task": "vqa",
        "labels": "letter",
        "prompt": "Look closely. {question}",
        "max_new_tokens": 8,
        "metric": "exact_match",
    }
    assert (settings["samples"], settings["seed"], settings["columns"]["id"]) == (5, 0, "number")
    assert str(definition.parent) not in str(settings)
    definition.write_text(GOOD.replace("closely", "twice"))
    assert task.settings() != settings
    assert "prompt 'Look twice. {question}' (colours, version 2)" in task.note()


def test_wikitext_is_the_published_one_or_a_local_copy(tmp_path: Path) -> None:
    published = Perplexity.model_validate({"task": "perplexity", "dataset": "wikitext", "window": 2048})
    assert (published.name, published.data.source) == ("wikitext", "Salesforce/wikitext")
    assert (published.data.subset, published.data.split) == ("wikitext-2-raw-v1", "test")
    larger = Perplexity.model_validate(
        {"task": "perplexity", "dataset": "wikitext", "subset": "wikitext-103-raw-v1", "window": 2048, "samples": 7}
    )
    assert (larger.data.source, larger.data.subset) == ("Salesforce/wikitext", "wikitext-103-raw-v1")
    assert "windows of 2,048 tokens that do not overlap, the first 7 of them" in larger.note()
    (tmp_path / "test.txt").write_text("words")
    local = Perplexity.model_validate(
        {"task": "perplexity", "dataset": "wikitext", "source": "test.txt", "window": 16, "name": "mine"},
        context={"base": tmp_path},
    )
    assert (local.name, local.data.source) == ("mine", str(tmp_path / "test.txt"))
    assert local.settings()["window"] == 16


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"dataset": "text", "window": 16}, "needs source: a text, parquet or JSONL file, or a hub dataset"),
        ({"dataset": "wikitext", "window": 1}, "greater than or equal to 2"),
        ({"dataset": "wikitext"}, "Field required"),
        ({"dataset": "wikitext", "window": 16, "samples": 0}, "greater than 0"),
        ({"dataset": "wikitext", "window": 16, "name": "../up"}, "String should match pattern"),
        ({"dataset": "wikitext", "window": 16, "stride": 8}, "Extra inputs are not permitted"),
    ],
)
def test_faults_of_a_perplexity_task(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Perplexity.model_validate({"task": "perplexity", **fields})
