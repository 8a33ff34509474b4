from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress.data.texts import Document, pieces, read_documents, read_joined
from compress.errors import DataError

RAW = " \n = Title = \n \n First line . \n Second line . \n\n\n Last \n"


def write_rows(folder: Path, kind: str, rows: list[str | None], column: str = "text") -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(cast("Any", pa).table({column: rows, "n": list(range(len(rows)))}), path)
    else:
        path.write_text("".join(json.dumps({column: row}) + "\n\n" for row in rows))
    return path


def test_blocks_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    path.write_text(RAW)
    assert list(read_documents(path)) == [
        Document("= Title =", "a.tokens:2"),
        Document("First line . \n Second line .", "a.tokens:4"),
        Document("Last", "a.tokens:8"),
    ]
    assert read_joined(path) == RAW


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_of_a_table(tmp_path: Path, kind: str) -> None:
    path = write_rows(tmp_path, kind, ["", " = Title = \n", " Body . \n"])
    assert [document.text for document in read_documents(path)] == ["= Title =", "Body ."]
    assert [document.origin for document in read_documents(path)] == (
        ["rows.parquet:2", "rows.parquet:3"] if kind == "parquet" else ["rows.jsonl:3", "rows.jsonl:5"]
    )
    assert read_joined(path) == "\n\n".join(["", " = Title = \n", " Body . \n"])


def test_pieces_put_together_are_the_document() -> None:
    document = Document("one\ntwo\n\n three", "a:1")
    actual = list(pieces(document))
    assert "".join(piece.text for piece in actual) == document.text + "\n\n"
    assert {piece.origin for piece in actual} == {"a:1"}


def test_a_very_long_line_is_cut_before_white_space() -> None:
    for text in ("word " * 50_000 + "end", "x" * 250_000, f"{'x' * 99_999} {'y' * 100_000}"):
        actual = [piece.text for piece in pieces(Document(text, "a:1"))]
        assert "".join(actual) == f"{text}\n\n"
        assert 2 < len(actual) < 5
        assert all(len(part) <= 100_000 for part in actual)
        if " word" in text:
            assert all(part.startswith(" word") for part in actual[1:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": \n',
            r"a.jsonl:2: not readable as JSON \(.* at line 1, column 10\); correct or remove the line",
        ),
        ("a.jsonl", "[1]\n", "a.jsonl:1: is no JSON object"),
        ("a.jsonl", '{"body": "x", "n": 1}\n', r"a.jsonl:1: has no field 'text', only body, n; name the right one as column"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: field 'text' is no text but int"),
        ("a.parquet", "no parquet", "a.parquet: is no whole parquet file"),
        ("a.txt", b"\xff\xfe", "a.txt: byte 0 is not UTF-8"),
        ("a.txt", None, "a.txt: no such file; check the path in the recipe"),
        ("a.parquet", None, "a.parquet: no such file; check the path in the recipe"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["texts", "texts.parquet", "texts.jsonl"])
def test_a_folder_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: is a folder; name the file in it"):
        list(read_documents(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", "One ."), ("a.jsonl", '{"text": "One ."}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert [document.text for document in read_documents(tmp_path / name)] == ["One ."]
    assert read_joined(tmp_path / "a.txt") == "One ."


def test_missing_column_of_a_parquet_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path, "parquet", ["x"], column="body")
    with pytest.raises(DataError, match=r"rows.parquet: has no column 'text', only body, n; name the right one"):
        list(read_documents(path))
    assert [document.text for document in read_documents(path, "body")] == ["x"]
