"""How rows may be laid out, how they give their images, and what is refused of them."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from compress.calibration.sets import VqaSet
from compress.data.questions import Question, open_questions, source_digest
from compress.data.sources import Columns, RowFilter
from compress.data.tables import read_lines, read_parquet, read_text
from compress.data.texts import read_documents, read_joined
from compress.errors import CompressError, DataError
from tests.tiny import picture

PNG = picture(0)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(PNG)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write(folder: Path, rows: list[dict[str, Any]], name: str = "q.jsonl", *, listed: bool = False) -> Path:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    path = folder / name
    path.write_text(json.dumps(rows, indent=1) if listed else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "image": "0.png", "question": "What is it?", "answer": "red", **changes}


def read(path: Path, rows: RowFilter | None = None, folder: Path | None = None) -> list[Question]:
    return list(open_questions([path], Columns(), rows or RowFilter()).read(None, folder))


# a list of rows


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_a_list_of_questions_is_read_as_its_lines_are(tmp_path: Path, name: str) -> None:
    rows = [row(), row(id="b", image=["0.png", "1.png"], question='A "quoted\\" [one], {two}?'), row(id="c", answer=["x", "y"])]
    lines = read(write(tmp_path, rows, "lines.jsonl"))
    path = write(tmp_path, rows, name, listed=True)
    actual = read(path)
    assert [(each.images, each.question, each.answers) for each in actual] == [
        (each.images, each.question, each.answers) for each in lines
    ]
    assert [each.origin for each in actual] == [f"{name}:{number}" for number in (1, 2, 3)]
    assert len(open_questions([path], Columns())) == 3
    before = source_digest(path, Columns())
    (tmp_path / "1.png").write_bytes(picture(7))
    assert source_digest(path, Columns()) != before


def test_texts_may_stand_in_a_list(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text('\ufeff [ {"text": "One ."},\n {"text": " "}, {"text": "Two , [three] ."} ]\n')
    assert [(each.text, each.origin) for each in read_documents(path)] == [
        ("One .", "texts.json:1"),
        ("Two , [three] .", "texts.json:3"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x"}', "rows.json: is cut off: its list has no end"),
        ('[{"text": "x}]', "rows.json: is cut off: its list has no end"),
        ('[{"text": "x"},]', "rows.json:2: is no JSON object"),
        ('[{"text": "x"}] [', "rows.json: goes on after its list; write one list of all rows"),
        ('[{"text": "x"}, 3]', "rows.json:2: is no JSON object; write one {…} with named fields for each row"),
        ('[{"text": "x"}, {"text": }]', "rows.json:2: not readable as JSON"),
        ('[{"text": "x"}, {"text": ]}]', "rows.json: goes on after its list"),
        ('{\n "text": "x"\n}', "rows.json:1: not readable as JSON .*; write one list of all rows, or one object"),
        ('{"text": ' + "[" * 2000 + "]" * 2000 + "}", "rows.json:1: nests too deep"),
        ('{"text": 1e999}', "rows.json:1: not readable as JSON"),
        ('{"text": "\\u0000"}', "rows.json:1: not readable as JSON"),
    ],
)
def test_faults_of_a_list(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(path))


# conversations

LLAVA: dict[str, Any] = {
    "id": "000000033471",
    "image": "0.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "White and red."},
        {"from": "human", "value": "Is it parked?"},
        {"from": "gpt", "value": "No."},
    ],
}
SWIFT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "<image>What differs from <image>?"},
        {"role": "assistant", "content": "The colour."},
    ],
    "images": ["0.png", "1.png"],
}


def said(question: Question) -> tuple[str, tuple[str, ...], int]:
    return question.question, question.answers, len(question.images)


def test_conversations_as_llava_and_swift_write_them(tmp_path: Path) -> None:
    (question,) = read(write(tmp_path, [LLAVA]))
    assert (question.id, *said(question)) == ("000000033471", "What are the colors of the bus?", ("White and red.",), 1)
    two = {**SWIFT, "messages": [{"role": "user", "content": "<image> <image> What?"}]}
    parts = [{"type": "image", "image": "2.png"}, {"type": "text", "text": "Which?"}]
    single = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "Red"}]}]}
    address = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text_of(PNG)}"}}
    sent = {"messages": [{"role": "user", "content": ["Tell: ", address]}]}
    unmarked = {"messages": [{"role": "user", "content": "How many?"}], "images": ["0.png", "1.png"]}
    actual = read(write(tmp_path, [SWIFT, two, single, sent, unmarked]))
    assert [said(question) for question in actual] == [
        ("<image 1>What differs from <image 2>?", ("The colour.",), 2),
        ("What?", (), 2),
        ("Which?", ("Red",), 1),
        ("Tell:", (), 1),
        ("How many?", (), 2),
    ]
    assert actual[0].images == (picture(0), picture(1))
    assert actual[2].images == (picture(2),)


def test_a_question_has_the_images_of_its_own_marks(tmp_path: Path) -> None:
    turns = ["<image>First?", "A", "<image><image>Second?", "B"]
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
    (question,) = read(write(tmp_path, [{"messages": messages, "images": ["1.png", "0.png", "2.png"]}]))
    assert (question.question, question.images) == ("First?", (picture(1),))


def test_conversations_in_parquet(tmp_path: Path) -> None:
    images = [{"bytes": picture(number), "path": None} for number in range(2)]
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
    path = tmp_path / "q.parquet"
    pq.write_table(cast("Any", pa).table({"conversations": [turns] * 2, "image": images}), path)
    actual = list(open_questions([path], Columns(answer="answers")).read())
    assert [said(question) for question in actual] == [("What is it?", ("A bus.",), 1)] * 2
    assert [question.images[0] for question in actual] == [picture(0), picture(1)]
    messages = [[{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bus."}]]
    pq.write_table(cast("Any", pa).table({"messages": messages, "images": [[images[1]]]}), path)
    (question,) = read(path)
    assert (said(question), question.images) == (("What?", ("A bus.",), 1), (picture(1),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "q.jsonl:1: has 1 marks <image> and 0 images; give each image its mark, or leave all out"),
        ({"image": ["0.png", "1.png"]}, "q.jsonl:1: has 1 marks <image> and 2 images"),
        ({"conversations": "hello"}, "q.jsonl:1: 'conversations' is no list of turns"),
        ({"conversations": [{"value": "x"}]}, "q.jsonl:1: 'conversations' has a turn without a speaker"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "q.jsonl:1: nobody asks anything in 'conversations'"),
        ({"conversations": [{"from": "human", "value": {"x": 1}}]}, "has a turn that holds neither text nor images"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, r"q.jsonl:1: the question \('question'\) is empty"),
    ],
)
def test_faults_of_a_conversation(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, [{**LLAVA, **changes}]))


# images


@pytest.mark.parametrize(
    "image",
    [
        f"data:image/png;base64,{text_of(PNG)}",
        f"DATA:;base64,{text_of(PNG)}",
        text_of(PNG),
        text_of(PNG).rstrip("="),
        base64.encodebytes(PNG).decode(),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
        {"bytes": text_of(PNG), "path": None},
    ],
)
def test_images_written_out_are_those_of_files(tmp_path: Path, image: Any) -> None:
    path = write(tmp_path, [row(image=image), row(id="b", image=[image, "1.png"])])
    assert [each.images for each in read(path)] == [(PNG,), (PNG, picture(1))]
    assert len(source_digest(path, Columns())) == 64
    if isinstance(image, str):
        table = tmp_path / "q.parquet"
        pq.write_table(cast("Any", pa).table({"image": [image], "question": ["What?"], "answer": ["red"]}), table)
        assert read(table)[0].images == (PNG,)


def test_base64_that_begins_like_a_path_is_no_path(tmp_path: Path) -> None:
    assert text_of(jpeg()).startswith("/9j/")
    assert read(write(tmp_path, [row(image=text_of(jpeg()))]))[0].images == (jpeg(),)
    nested = tmp_path / "Images" / "train2017" / "000000000000000000000000000001"
    nested.mkdir(parents=True)
    (nested / "7").write_bytes(PNG)
    assert read(write(tmp_path, [row(image=str((nested / "7").relative_to(tmp_path)))]))[0].images == (PNG,)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,????", "q.jsonl:1: image 0: is no base64"),
        ("data:image/png;base64," + text_of(bytes(range(256)) * 99), "q.jsonl:1: image 0: cannot be read as an image"),
        ("https://example.com/cat.png", "image https://example.com/cat.png: is an address, and nothing is fetched from there"),
        ("x" * 5000, "image x{80}…: cannot be read .File name too long.; correct the path"),
        ([{"bytes": 3}], "image 0: holds no image's bytes"),
    ],
)
def test_faults_of_images_are_one_short_line(tmp_path: Path, image: Any, message: str) -> None:
    path = write(tmp_path, [row(image=image)])
    with pytest.raises(DataError, match=message) as actual:
        read(path)
    assert len(str(actual.value)) < 700
    assert len(str(actual.value).splitlines()) == 1


def test_images_stay_below_their_files_folder(tmp_path: Path) -> None:
    inner, secret = tmp_path / "data", tmp_path / "secret.png"
    inner.mkdir()
    secret.write_bytes(PNG)
    (inner / "link.png").symlink_to(secret)
    (inner / "up").symlink_to(tmp_path)
    for image in ("../secret.png", str(secret), "link.png", "up/secret.png", {"path": "../secret.png"}, "../absent.png"):
        path = write(inner, [row(image=image)])
        message = rf"q.jsonl:1: image .*: leads out of {inner}; put the image there, or set image_folder"
        with pytest.raises(DataError, match=message):
            read(path)
        with pytest.raises(DataError, match=message):
            source_digest(path, Columns())
        if image != "../absent.png":
            assert read(path, folder=tmp_path)[0].images == (PNG,)
            assert source_digest(path, Columns(), image_folder=tmp_path)
    (inner / "same.png").symlink_to(inner / "0.png")
    assert read(write(inner, [row(image="same.png")]))[0].images == (PNG,)
    with pytest.raises(DataError, match=f"leads out of {inner};"):
        read(write(inner, [row(image="../secret.png")]), folder=inner)


def test_paths_are_looked_for_in_the_recipes_folder_and_beside_the_file(tmp_path: Path) -> None:
    coco, data = tmp_path / "coco", tmp_path / "data"
    for folder in (coco, data):
        folder.mkdir()
    path = write(data, [row(image="7.png"), row(id="b", image=str(coco / "7.png"))])
    (coco / "7.png").write_bytes(picture(7))
    assert [each.images for each in read(path, folder=coco)] == [(picture(7),)] * 2
    recipe = {"dataset": "vqa", "source": "data/q.jsonl", "samples": 1, "image_folder": "coco"}
    assert VqaSet.model_validate(recipe, context={"base": tmp_path}).image_folder == str(coco)
    with pytest.raises(ValueError, match="image_folder"):
        VqaSet.model_validate({**recipe, "image_folder": "data/q.jsonl"}, context={"base": tmp_path})


def test_an_image_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"image pipe.png: no such file"):
        read(write(tmp_path, [row(image="pipe.png")]))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe.jsonl: is no regular file; name a copy of it"):
        read(tmp_path / "pipe.jsonl")


# limits


def many(count: int) -> list[dict[str, Any]]:
    return [row(id=number) for number in range(count)]


@pytest.mark.parametrize(
    ("limit", "value", "rows", "message"),
    [
        ("rows_file_bytes", 100, many(3), r"q.jsonl: has \d+ bytes \(limit rows_file_bytes = 100, set by COMPRESS_LIMIT_ROWS_FILE"),
        ("rows", 2, many(3), r"q.jsonl: has more than 2 lines \(limit rows = 2, set by COMPRESS_LIMIT_ROWS\); name a part of it"),
        ("line_bytes", 100, [row(question="x" * 90)], r"q.jsonl:1: has \d+ bytes \(limit line_bytes = 100"),
        ("row_values", 9, [row(answer=[1] * 9)], r"q.jsonl:1: holds too many values \(limit row_values = 9"),
        ("question_characters", 9, [row(question="x" * 10)], r"q.jsonl:1: the question has 10 characters \(limit question_char"),
        ("question_characters", 20, [row(answer="x" * 21)], r"q.jsonl:1: an answer has 21 characters \(limit question_characters"),
        ("id_characters", 5, [row(id="x" * 6)], r"q.jsonl:1: the id has 6 characters \(limit id_characters = 5, set by"),
        ("question_answers", 2, [row(answer=["a"] * 3)], r"q.jsonl:1: its answers: there are 3 \(limit question_answers = 2, set"),
        ("question_images", 2, [row(image=["0.png"] * 3)], r"q.jsonl:1: has more than 2 images \(limit question_images = 2"),
        ("image_bytes", 9, [row()], r"q.jsonl:1: image 0.png: has \d+ bytes \(limit image_bytes = 9"),
        ("image_bytes", 9, [row(image=text_of(PNG))], r"q.jsonl:1: image 0: has \d+ bytes \(limit image_bytes = 9"),
        ("json_depth", 3, [row(other=[[["x"]]])], r"q.jsonl:1: nests too deep \(limit json_depth = 3"),
    ],
)
def test_what_exceeds_a_limit_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, rows: list[dict[str, Any]], message: str
) -> None:
    assert read(write(tmp_path, rows, "before.jsonl"))
    monkeypatch.setenv(f"COMPRESS_LIMIT_{limit.upper()}", str(value))
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, rows))
    if limit in {"rows", "line_bytes", "row_values"}:
        with pytest.raises(DataError, match=rf"limit {limit} = {value}"):
            read(write(tmp_path, rows, "q.json", listed=True))


def parquet(path: Path, rows: int, group: int) -> Path:
    images = [{"bytes": PNG, "path": None}] * rows
    table = cast("Any", pa).table({"image": images, "question": ["What?"] * rows, "answer": [["red", "blue"]] * rows})
    pq.write_table(table, path, row_group_size=group, use_dictionary=False, compression="none", write_statistics=False)
    return path


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("rows", 5, r"q.parquet: declares 6 rows \(limit rows = 5, set by COMPRESS_LIMIT_ROWS\); name a part of it"),
        ("parquet_group_bytes", 500, r"q.parquet: row group 1: declares [\d,]+ bytes \(limit parquet_group_bytes = 500"),
        ("parquet_group_values", 7, r"q.parquet: row group 1: declares 8 values of answer.list.* \(limit parquet_group_values = 7"),
        ("parquet_chunks", 7, r"q.parquet: declares 8 chunks of columns \(limit parquet_chunks = 7"),
    ],
)
def test_a_parquet_file_is_refused_by_what_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    path = parquet(tmp_path / "q.parquet", 6, 4)
    assert len(read(path)) == 6
    monkeypatch.setenv(f"COMPRESS_LIMIT_{limit.upper()}", str(value))
    with pytest.raises(DataError, match=message):
        read(path)


def test_only_the_row_groups_that_are_asked_for_are_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "q.parquet", 6, 2)
    content = path.read_bytes()
    start = content.index(PNG)
    path.write_bytes(content[:start] + bytes(len(PNG)) + content[start + len(PNG) :])
    with pytest.raises(DataError, match=r"q.parquet:1: image 0: cannot be read as an image"):
        read(path)
    assert [each.id for each in open_questions([path], Columns()).read({4, 5})] == ["5", "6"]
    assert [number for number, _ in read_parquet(path, ["question"], {2, 5})] == [2, 5]


def test_limits_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One line .\n" + "x" * 200 + "\n")
    pq.write_table(cast("Any", pa).table({"text": ["x" * 300]}), tmp_path / "text.parquet", use_dictionary=False)
    assert len(list(read_lines(path))) == 2
    monkeypatch.setenv("COMPRESS_LIMIT_LINE_BYTES", "200")
    with pytest.raises(DataError, match=r"text.txt:2: is longer than 200 bytes \(limit line_bytes = 200"):
        list(read_documents(path))
    monkeypatch.setenv("COMPRESS_LIMIT_TEXT_BYTES", "200")
    with pytest.raises(DataError, match=r"text.txt: has 212 bytes \(limit text_bytes = 200"):
        read_text(path)
    with pytest.raises(DataError, match=r"text.parquet: declares \d+ bytes of text \(limit text_bytes = 200"):
        read_joined(tmp_path / "text.parquet")


def allocated() -> int:
    return int(cast("Any", pa).total_allocated_bytes())


def test_a_value_repeated_in_a_parquet_file_is_not_held_for_every_row(tmp_path: Path) -> None:
    """A dictionary's entry stands once in the file, however many rows have it: 20 MB would become 800 MB."""
    path = tmp_path / "text.parquet"
    pq.write_table(cast("Any", pa).table({"text": ["x" * 20_000_000] * 40}), path)
    assert path.stat().st_size < 2_000_000
    before, peak = allocated(), 0
    for number, _ in read_parquet(path, ["text"]):
        peak = max(peak, allocated() - before)
        if number == 20:
            break
    assert peak < 300_000_000


# text alone


def test_rows_of_text_alone_where_they_are_asked_for(tmp_path: Path) -> None:
    rows = [row(), {"id": "b", "question": "Two and two?", "answer": "four"}, row(id="c", image=[])]
    path = write(tmp_path, rows)
    with pytest.raises(DataError, match=r"q.jsonl:2: has no field 'image'"):
        read(path)
    assert [len(each.images) for each in read(path, RowFilter(text_only=True))] == [1, 0, 0]
    spoken = {**LLAVA, "conversations": [{"from": "human", "value": "Two and two?"}], "image": None}
    with pytest.raises(DataError, match=r"q.jsonl:1: has no field 'image', only id, question, answer"):
        read(write(tmp_path, [spoken]))
    assert read(write(tmp_path, [spoken]), RowFilter(text_only=True))[0].question == "Two and two?"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "txt"])
def test_whatever_a_file_holds_the_error_is_ours(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"q.{suffix}"
    odd = [b"", b"\x00" * 50, b"PAR1", b"\xff\xfe{", b"[", b"[]", b"{}", b"null", b'{"question": 1, "image": 2}', b"\xef\xbb\xbf"]
    for content in odd:
        path.write_bytes(content)
        with pytest.raises(CompressError):
            read(path)


def test_options_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, [row(options=["a", "b", "c"])])
    columns = Columns(options="options")
    assert next(iter(open_questions([path], columns).read())).options == ("a", "b", "c")
    monkeypatch.setenv("COMPRESS_LIMIT_QUESTION_ANSWERS", "2")
    with pytest.raises(DataError, match=r"q.jsonl:1: its options: there are 3 \(limit question_answers = 2"):
        list(open_questions([path], columns).read())
