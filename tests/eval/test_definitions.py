import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from compress.calibration.sets import VqaSet as CalibrationVqa
from compress.data.questions import Question
from compress.errors import DataError, RecipeError
from compress.eval.definition import find_definition, read_definition, shipped_definitions
from compress.eval.metrics import load_metric
from compress.eval.results import QuestionItem
from compress.eval.tasks.caption import Caption
from compress.eval.tasks.choice import Choice
from compress.eval.tasks.question_task import QuestionTask
from compress.eval.tasks.vqa import Vqa
from tests.tiny import picture

CHOICE: dict[str, Any] = {
    "name": "quiz",
    "version": 1,
    "task": "choice",
    "prompt": "{question} {options} Which?",
    "max_new_tokens": 4,
    "metric": "letter",
}
TEXT, LIST, IMAGE, STRUCTS = "text", ["one", "two"], {"bytes": picture(0, 32, 32), "path": None}, [{"answer": "red"}] * 10
ROWS: dict[str, dict[str, Any]] = {
    # a row of each dataset as it stands on the hub, by the dataset's card
    "vqav2": {
        "question_type": "what", "multiple_choice_answer": "red", "answers": STRUCTS, "image_id": 7, "answer_type": "other",
        "question_id": 7000, "question": "What colour?", "image": IMAGE,
    },
    "textvqa": {
        "image_id": "a", "question_id": 34602, "question": "what brand?", "question_tokens": LIST, "image": IMAGE,
        "answers": ["dakota"] * 10, "set_name": "val",
    },
    "docvqa": {
        "questionId": "49153", "question": "What is it?", "question_types": LIST, "image": IMAGE, "docId": 14465,
        "answers": ["0.28"], "data_split": "val",
    },
    "chartqa": {"type": "human_test", "question": "How many?", "answer": "14", "image": IMAGE},
    "pope": {
        "id": "0", "question_id": "1", "question": "Is there a snowboard?", "answer": "yes", "image_source": "COCO_val2014_1",
        "image": IMAGE, "category": "adversarial",
    },
    "mmmu": {
        "id": "validation_Math_1", "question": "<image 1> Is it <image 2>?", "options": "['$3$', 'it\\'s \"4\"', '<image 2>']",
        "image_1": IMAGE, "image_2": IMAGE, **{f"image_{n}": None for n in range(3, 8)}, "answer": "C",
        "topic_difficulty": "Hard", "question_type": "multiple-choice", "subfield": TEXT,
    },
    "ai2d": {"question": "Which one?", "options": ["3", "2", "1", "0"], "answer": "2", "image": IMAGE},
    "flickr8k": {"image": IMAGE, **{f"caption_{n}": f"A dog, {n}." for n in range(5)}},
}  # fmt: skip
ANSWERS = {
    "vqav2": ("red",) * 10, "textvqa": ("dakota",) * 10, "docvqa": ("0.28",), "chartqa": ("14",), "pope": ("yes",), "mmmu": ("C",),
    "ai2d": ("C",), "flickr8k": tuple(f"A dog, {n}." for n in range(5)),
}  # fmt: skip


def task_of(name: str, folder: Path, **fields: Any) -> QuestionTask:
    kind = read_definition(find_definition(name, folder)).task
    row: type[QuestionTask] = {"vqa": Vqa, "choice": Choice, "caption": Caption}[kind]
    by = {"by": "generation"} if kind == "choice" else {}
    return row.model_validate({"task": kind, "definition": name, **by, **fields}, context={"base": folder})


def write_definition(folder: Path, **changes: Any) -> Path:
    path = folder / f"{CHOICE['name']}.yaml"
    content = {key: value for key, value in {**CHOICE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    (folder / "0.png").write_bytes(picture(0, 32, 32))
    (folder / "1.png").write_bytes(picture(1, 32, 32))
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quiz(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> list[Question]:
    source = write_rows(folder, rows)
    write_definition(folder, source="rows.jsonl", **changes)
    return task_of("quiz.yaml", folder).questions([source])


def row(**changes: Any) -> dict[str, Any]:
    values = {"id": "a", "image": "0.png", "question": "Which?", "options": ["x", "y", "z"], "answer": "B", **changes}
    return {key: value for key, value in values.items() if value is not None}


def test_what_is_shipped() -> None:
    assert set(shipped_definitions()) == {*ROWS, "scenes", "questions"}
    assert shipped_definitions("choice") == ["ai2d", "mmmu"]
    for name in shipped_definitions():
        definition = read_definition(find_definition(name, Path()))
        assert (definition.name, definition.source is None) == (name, name in {"scenes", "questions"})


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_shipped_definition_reads_its_dataset_as_it_stands_on_the_hub(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(cast("Any", pa).Table.from_pylist([ROWS[name]]), path)
    task = task_of(name, tmp_path)
    (question,) = task.questions([path])
    assert task.accepted(question) == ANSWERS[name]
    assert len(question.images) == (2 if name == "mmmu" else 1)
    assert question.category == {"vqav2": "other", "chartqa": "human_test", "pope": "adversarial", "mmmu": "Hard"}.get(name)
    prompt = task.prompt_text(question)
    assert question.question in prompt
    assert "{" not in prompt
    if name == "mmmu":
        assert "\nA. $3$\nB. it's \"4\"\nC. <image 2>\n\nAnswer with the option's letter" in prompt
    assert task.note().count(f"{name}, version {read_definition(find_definition(name, tmp_path)).version}") == 1


def test_pope_is_told_apart_by_category_and_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [ROWS["pope"], {**ROWS["pope"], "category": "random"}]
    pq.write_table(cast("Any", pa).Table.from_pylist(rows), path)
    assert [question.id for question in task_of("pope", tmp_path).questions([path])] == ["adversarial/1", "random/1"]


def test_figures_of_pope_stand_beside_the_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    references = ["yes", "yes", "no", "no"]
    rows = [{**ROWS["pope"], "question_id": str(n), "answer": text, "category": "ab"[n // 2]} for n, text in enumerate(references)]
    pq.write_table(cast("Any", pa).Table.from_pylist(rows), path)
    task = task_of("pope", tmp_path)
    questions = task.questions([path])
    scorer = task.scorer(questions)
    answers = ["Yes", "No.", "yes, there is one", "no"]
    items = [
        QuestionItem(
            id=question.id, digest=question.digest, cluster="", accepted=task.accepted(question), said=text,
            score=scorer(question, text), prompt="", token_ids=(), tokens=0, nll=0.0,
        )
        for question, text in zip(questions, answers, strict=True)
    ]  # fmt: skip
    assert [item.score for item in items] == [1, 0, 0, 1]
    expected = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_share": 0.5, "category=a": 0.5, "category=b": 0.5}
    assert task.figures(questions, items) == expected
    assert load_metric(task.metric_name).binary
    assert not load_metric(task_of("docvqa", tmp_path).metric_name).binary


def test_a_single_answer_counts_as_that_of_ten_people(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [row(options=None, answer="red")])
    task = task_of("textvqa", tmp_path, source="rows.jsonl")
    (question,) = task.questions([path])
    scorer = task.scorer([question])
    assert [scorer(question, answer) for answer in ("Red.", "blue")] == [1.0, 0.0]
    with pytest.raises(DataError, match=r"task textvqa: rows.jsonl:1: question a has no accepted answer; add one"):
        task.questions([write_rows(tmp_path, [row(options=None, answer=[])])])


def test_questions_of_ones_own_need_nothing_but_their_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [row(options=None, answer="three red ones")])
    fields = {"task": "vqa", "source": "rows.jsonl"}
    task = Vqa.model_validate(fields, context={"base": tmp_path})
    (question,) = task.questions([path])
    assert (task.name, task.metric_name, task.resolved_definition().max_new_tokens) == ("questions", "exact_match", 16)
    assert task.prompt_text(question) == "Which?\nAnswer the question using a single word or phrase."
    assert [task.scorer([question])(question, answer) for answer in ("3 red ones", "red")] == [1.0, 0.0]
    overrides = {"prompt": "In short: {question}", "metric": "anls", "max_new_tokens": 40}
    changed = Vqa.model_validate({**fields, **overrides}, context={"base": tmp_path})
    assert (changed.prompt_text(question), changed.metric_name, load_metric(changed.metric_name).binary) == (
        "In short: Which?",
        "anls",
        False,
    )
    assert 0.5 < changed.scorer([question])(question, "three red one") < 1
    assert "at most 40 tokens, prompt 'In short: {question}' (questions, version 1, with the recipe's own" in changed.note()
    assert changed.settings()["definition"] | overrides == changed.settings()["definition"] != task.settings()["definition"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "What?"}, r"prompt: must have \{question\} where each question belongs"),
        ({"metric": "bleu"}, "metric: of a vqa must be one of exact_match, relaxed, anls"),
        ({"max_new_tokens": 0}, "max_new_tokens\n  Input should be greater than 0"),
        ({"source": None}, "the definition questions names no data; give source, a JSONL or parquet file"),
    ],
)
def test_what_a_recipe_says_of_its_questions_is_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_rows(tmp_path, [row()])
    with pytest.raises(ValidationError, match=message):
        Vqa.model_validate({"task": "vqa", "source": "rows.jsonl", **changes}, context={"base": tmp_path})


def test_rows_that_do_not_count_are_left_out_before_any_are_drawn(tmp_path: Path) -> None:
    rows = [row(id=number, kind="open" if number % 2 else "choice") for number in range(6)]
    rows[1]["answer"] = "anything, for it does not count"
    source = write_rows(tmp_path, rows)
    write_definition(tmp_path, source="rows.jsonl", where={"kind": "choice"})
    task = task_of("quiz.yaml", tmp_path)
    assert [question.id for question in task.questions([source])] == ["0", "2", "4"]
    sample = task_of("quiz.yaml", tmp_path, samples=2).questions([source])
    assert len(sample) == 2 and {question.id for question in sample} <= {"0", "2", "4"}
    assert task.settings()["rows"] == {"where": {"kind": ["choice"]}, "text_only": False}
    write_definition(tmp_path, source="rows.jsonl", where={"kind": ["choice", "open"]})
    assert len(list(task_of("quiz.yaml", tmp_path, samples=6).data.columns.named("options"))) == 1


def test_no_row_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: no row is left where 'kind' is 'a' or '7'; correct where"):
        quiz(tmp_path, [row(kind="b")], where={"kind": ["a", 7]})
    with pytest.raises(DataError, match=r"rows.jsonl:1: has no field 'sort', only id, image"):
        quiz(tmp_path, [row(kind="b")], where={"sort": "b"})


def test_a_row_without_an_image_is_refused_or_a_question_of_text_alone(tmp_path: Path) -> None:
    for nothing in (None, list[str]()):
        with pytest.raises(DataError, match=r"rows.jsonl:2: has no (field 'image'|image)"):
            quiz(tmp_path, [row(), row(id="b", image=nothing)])
        questions = quiz(tmp_path, [row(), row(id="b", image=nothing)], text_only=True)
        assert [len(question.images) for question in questions] == [1, 0]


def test_images_and_options_in_columns_of_their_own(tmp_path: Path) -> None:
    columns = {"image": ["first", "second"], "options": ["A", "B", "C"], "category": "subject"}
    fields = {"id": "a", "first": "0.png", "question": "Which?", "answer": "B", "subject": "art", "A": "x", "B": "y", "C": ""}
    (question,) = quiz(tmp_path, [fields], columns=columns)
    assert (len(question.images), question.options, question.category) == (1, ("x", "y"), "art")
    (question,) = quiz(tmp_path, [{**fields, "second": ["1.png"], "C": "z"}], columns=columns)
    assert (len(question.images), question.options) == (2, ("x", "y", "z"))


def test_options_tell_questions_apart(tmp_path: Path) -> None:
    one, other = quiz(tmp_path, [row(), row(id="b", options=["x", "y", "w"])])
    assert one.digest != other.digest


@pytest.mark.parametrize(
    ("labels", "options", "answer", "right"),
    [
        ("letter", ["x", "y"], "B", "B"),
        ("index", ["1", "2", "0"], "2", "C"),
        ("index", ["1", "2", "0"], 0, "A"),
        ("text", ["1", "2", "0"], "2", "B"),
    ],
)
def test_the_right_option_by_letter_index_or_text(tmp_path: Path, labels: str, options: list[str], answer: Any, right: str) -> None:
    (question,) = quiz(tmp_path, [row(options=options, answer=answer)], labels=labels)
    assert task_of("quiz.yaml", tmp_path).accepted(question) == (right,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "D"}, r"rows.jsonl:1: question a has 'D' as its answer, not the letter of one of its 3 options; correct it"),
        ({"answer": ["A", "B"]}, "question a has 'A', 'B' as its answer"),
        ({"answer": None}, "question a has nothing as its answer"),
        ({"options": ["x"]}, "question a has 1 options, and a choice is of 2 to 26"),
        ({"options": "['x', 'y'"}, r"rows.jsonl:1: its options \('options'\) are no list; write one"),
        ({"options": "__import__('os')"}, r"its options \('options'\) are no list"),
        ({"options": None}, "rows.jsonl:1: has no field 'options', only id, image, question, answer"),
    ],
)
def test_a_choice_that_cannot_be_made_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        quiz(tmp_path, [row(**changes)])


def test_an_id_that_stands_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3: id 'a' was given before, in rows.jsonl:1; give each question its own"):
        quiz(tmp_path, [row(), row(id="b"), row()])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"colour": "red"}, "quiz.yaml:7: colour: unknown key; allowed here: name, version, task, source"),
        ({"task": "riddle"}, "quiz.yaml:3: task: Input should be 'vqa', 'choice' or 'caption'"),
        ({"metric": "anls"}, r"quiz.yaml:6: metric: of a choice must be one of letter \(got anls\)"),
        ({"task": "vqa", "prompt": "{question}"}, None),
        ({"task": "vqa", "prompt": "{question}", "metric": "bleu"}, "metric: of a vqa must be one of exact_match, relaxed, anls"),
        ({"task": "vqa"}, r"quiz.yaml:4: prompt: has \{options\}, which are those of a choice; remove it"),
        ({"task": "vqa", "prompt": "{question}", "labels": "index"}, "labels: are those of a choice, and this is a vqa"),
        ({"prompt": "Which?"}, r"prompt: must have \{question\} where each question belongs"),
        ({"task": "caption", "metric": "cider", "prompt": " "}, "prompt: is empty; write what the model is asked"),
        ({"task": "caption", "metric": "cider", "prompt": "Describe it."}, None),
        ({"columns": {"question": None}}, "columns: question is null: name the column with the questions"),
        ({"columns": {"options": []}}, "columns.options"),
        ({"columns": {"choices": "options"}}, "columns.choices: unknown key"),
        ({"source": "nowhere.jsonl"}, r"source: no file or folder at .*nowhere.jsonl"),
        ({"where": {"kind": []}}, "where.kind: .* should have at least 1 item"),
        ({"labels": "number"}, "labels: Input should be 'letter', 'index' or 'text'"),
    ],
)
def test_faults_of_a_definition(tmp_path: Path, changes: dict[str, Any], fault: str | None) -> None:
    path = write_definition(tmp_path, **changes)
    if fault is None:
        assert read_definition(path).task == changes["task"]
        return
    with pytest.raises(RecipeError, match=fault):
        read_definition(path)


def test_a_calibration_set_takes_no_options() -> None:
    fields = {"dataset": "vqa", "source": "someone/quiz", "samples": 1, "columns": {"options": "options"}}
    with pytest.raises(ValidationError, match=r"columns.options and columns.category are for tasks of the evaluation; remove them"):
        CalibrationVqa.model_validate(fields)


def test_a_definition_is_for_its_own_kind_of_task(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="the definition mmmu is of a choice; write task: choice"):
        Vqa.model_validate({"task": "vqa", "definition": "mmmu"})
    with pytest.raises(ValidationError, match="no shipped one is called nothing: ai2d, mmmu"):
        Choice.model_validate({"task": "choice", "definition": "nothing", "by": "generation"}, context={"base": tmp_path})


def test_options_that_are_not_shown_cannot_be_named(tmp_path: Path) -> None:
    write_definition(tmp_path, prompt="{question}", source=str(write_rows(tmp_path, [row()])))
    with pytest.raises(ValidationError, match=r"prompt does not show the \{options\}; add them there, or write by: likelihood"):
        task_of("quiz.yaml", tmp_path)
    assert "text has the highest log-likelihood as the answer" in task_of("quiz.yaml", tmp_path, by="likelihood").note()
    with pytest.raises(ValidationError, match="length_normalized is of by: likelihood; remove it"):
        task_of("quiz.yaml", tmp_path, length_normalized=True)


def test_data_of_ones_own_bring_their_own_rows_and_columns(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [row(), row(id="b", image=["0.png", "1.png"], answer="C")])
    task = task_of("mmmu", tmp_path, source="rows.jsonl")
    assert [len(question.images) for question in task.questions([source])] == [1, 2]
    assert task.rows.where == {}
    assert task_of("mmmu", tmp_path).rows.where == {"question_type": ("multiple-choice",)}
    captions = write_rows(tmp_path, [{"image": "0.png", "answer": ["A dog.", "A cat."]}], "captions.jsonl")
    (question,) = task_of("flickr8k", tmp_path, source="captions.jsonl").questions([captions])
    assert (question.question, question.answers) == ("", ("A dog.", "A cat."))
