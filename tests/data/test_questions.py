from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress.data.question_rows import QuestionRows
from compress.data.questions import Question, open_questions, source_digest
from compress.data.sources import Columns, RowFilter
from compress.errors import DataError
from tests.tiny import picture


def write_jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "q.jsonl") -> Path:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(folder: Path, columns: dict[str, list[Any]], name: str = "q.parquet") -> Path:
    path = folder / name
    pq.write_table(cast("Any", pa).table(columns), path, row_group_size=2)
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "image": "0.png", "question": "What is it?", "answer": "red", **changes}


def test_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path,
        [row(), row(id=7, image=["0.png", "1.png"], question=" Which? ", answer=["one", 1, " "]), {**row(id="c"), "answer": None}],
    )
    first, second, third = open_questions([path], Columns()).read()
    assert first == Question("a", (picture(0),), "What is it?", ("red",), "q.jsonl:1")
    assert (second.id, second.images, second.question) == ("7", (picture(0), picture(1)), "Which?")
    assert second.answers == ("one", "1")
    assert third.answers == ()
    assert len(open_questions([path], Columns())) == 3


def test_parquet_as_on_the_hub(tmp_path: Path) -> None:
    images = [{"bytes": picture(number), "path": None} for number in range(3)]
    answers = [[{"answer": "red", "answer_id": 1}, {"answer": "rot", "answer_id": 2}], [], [{"answer": "blue", "answer_id": 1}]]
    columns = {"question_id": [5, 6, 7], "image": images, "query": ["a?", "b?", "c?"], "answers": answers}
    path = write_parquet(tmp_path, columns)
    names = Columns(id="question_id", question="query", answer="answers")
    first, second, third = open_questions([path], names).read()
    assert first == Question("5", (picture(0),), "a?", ("red", "rot"), "q.parquet:1")
    assert second.answers == ()
    assert third.origin == "q.parquet:3"


def test_a_file_in_the_usual_form_needs_no_renaming(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, [row(), row(id="b", image="1.png")])
    renamed = Columns(id="question_id", answer="answers")
    assert list(open_questions([path], renamed).read()) == list(open_questions([path], Columns()).read())
    assert source_digest(path, renamed) == source_digest(path, Columns())
    with pytest.raises(DataError, match=r"q.jsonl:1: has no field 'question_id', only image, question; add it, or rename it"):
        open_questions([write_jsonl(tmp_path, [{"image": "0.png", "question": "x?"}])], renamed)


def test_chosen_questions_over_several_files(tmp_path: Path) -> None:
    one = write_parquet(
        tmp_path, {"image": [[{"bytes": picture(0)}]] * 3, "question": ["a?", "b?", "c?"], "answer": ["1", "2", "3"]}
    )
    two = write_parquet(
        tmp_path,
        {"image": [[{"bytes": picture(0)}, {"bytes": picture(1)}]] * 2, "question": ["d?", "e?"], "answer": ["4", "5"]},
        "r.parquet",
    )
    actual = list(open_questions([one, two], Columns()).read({1, 2, 4}))
    assert [question.question for question in actual] == ["b?", "c?", "e?"]
    assert [question.id for question in actual] == ["0:2", "0:3", "1:2"]
    assert len(actual[2].images) == 2


def test_images_of_questions_not_chosen_are_not_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, [row(image="absent.png"), row(id="b")])
    assert [question.id for question in open_questions([path], Columns()).read({1})] == ["b"]


def test_digest_is_that_of_question_and_images(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path, [row(), row(id="b", question="  what  IS it?"), row(id="c", image="1.png"), row(id="d", image=["0.png", "1.png"])]
    )
    digests = [question.digest for question in open_questions([path], Columns()).read()]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row(image="absent.png")],
            r"q.jsonl:1: image absent.png: no such file as .*absent.png; correct the path or remove the row",
        ),
        (
            [row(), row(id="b", image="bad.png")],
            r"q.jsonl:2: image bad.png: cannot be read as an image \(",
        ),
        ([row(image="cut.png")], r"q.jsonl:1: image cut.png: cannot be read as an image"),
        ([row(image=[])], "q.jsonl:1: has no image"),
        ([row(image=3)], "q.jsonl:1: image 0: holds no image's bytes"),
        ([row(), row(id="b", question=" ")], r"q.jsonl:2: the question \('question'\) is empty"),
        ([row(), row()], r"q.jsonl:2: id 'a' was given before, in q.jsonl:1; give each question its own"),
        ([row(), {"image": "0.png", "question": "x?"}], r"q.jsonl:2: has no field 'id', only image, question"),
        ([row(), {"id": "b", "question": "x?"}], r"q.jsonl:2: has no field 'image', only id, question; add it, or rename it"),
        ([row(id=None)], r"q.jsonl:1: the id \('id'\) is missing"),
        ([row(answer={"no": 1})], r"q.jsonl:1: an answer is neither text nor number \(None\)"),
        ([], r"q.jsonl: holds no questions; name a file with at least one"),
    ],
)
def test_faults_of_a_jsonl_file(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(picture(0)[:60])
    with pytest.raises(DataError, match=message):
        list(open_questions([write_jsonl(tmp_path, rows)], Columns()).read())


def test_faults_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_text("{")
    with pytest.raises(
        DataError, match=r"cut.jsonl:1: not readable as JSON \(.* at line 1, column 2\); correct or remove the line"
    ):
        list(open_questions([tmp_path / "cut.jsonl"], Columns()).read())
    with pytest.raises(DataError, match=r"q.parquet: has no column 'question', only id, image; name the right one under columns"):
        open_questions([write_parquet(tmp_path, {"id": ["a"], "image": ["x"]})], Columns())
    missing = {"id": ["a", "b"], "image": [{"bytes": picture(0)}, None], "question": ["a?", "b?"]}
    with pytest.raises(DataError, match=r"q.parquet:2: has no image"):
        list(open_questions([write_parquet(tmp_path, missing)], Columns()).read())
    (tmp_path / "q.csv").write_text("a")
    with pytest.raises(DataError, match=r"q.csv: questions are read from .jsonl, .json and .parquet files"):
        open_questions([tmp_path / "q.csv"], Columns())


@pytest.mark.parametrize("name", ["questions", "questions.jsonl", "questions.parquet"])
def test_a_folder_holds_no_questions_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    uses: list[Callable[[Path], object]] = [
        source_digest,
        lambda path: open_questions([path], Columns()),
        lambda path: list(open_questions([path], Columns()).read()),
    ]
    for use in uses:
        with pytest.raises(DataError, match=rf"{name}: is a folder; name the file in it"):
            use(tmp_path / name)


def test_source_digest_covers_the_images(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, [row(), row(id="b", image=["1.png"])])
    before, text_only = source_digest(path, Columns()), source_digest(path)
    (tmp_path / "1.png").write_bytes(picture(9))
    assert source_digest(path, Columns()) != before
    assert source_digest(path) == text_only
    with pytest.raises(DataError, match=r"absent.jsonl: no such file"):
        source_digest(tmp_path / "absent.jsonl")


def test_rows_are_checked_once_while_the_file_does_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Path] = []
    check_columns = QuestionRows.check_columns

    def counted(self: QuestionRows, rows: RowFilter) -> list[tuple[str, ...]]:
        checked.append(self.path)
        return check_columns(self, rows)

    monkeypatch.setattr(QuestionRows, "check_columns", counted)
    rows: list[dict[str, Any]] = [{"question": f"What is {number}?"} for number in range(3)]
    path = write_jsonl(tmp_path, rows)
    text_only = RowFilter(text_only=True)
    assert len(open_questions([path], Columns(), text_only)) == 3
    assert [question.id for question in open_questions([path], Columns(), text_only).read({0, 2})] == ["1", "3"]
    assert checked == [path]
    one = RowFilter(text_only=True, where={"question": ("What is 1?",)})
    assert len(open_questions([path], Columns(), one)) == 1
    write_jsonl(tmp_path, [*rows, {"question": "Another?"}])
    assert len(open_questions([path], Columns(), text_only)) == 4
    assert checked == [path] * 3


def test_opened_files_have_no_more_rows_than_one_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_LIMIT_ROWS", "5")
    text_only = RowFilter(text_only=True)
    paths = [tmp_path / name / "q.jsonl" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        write_jsonl(path.parent, [{"question": f"What is {number}?"} for number in range(3)]).replace(path)
    opened = [open_questions([path], Columns(), text_only) for path in (*paths, paths[0])]
    assert opened[0] is not opened[2]
