"""Data files as strangers may make them: sound ones, changed by a seed; and what a run does with each."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.data.overlap import check_overlap
from compress.data.questions import source_digest
from compress.data.sources import Columns, QuestionSource, RowFilter
from compress.data.texts import read_documents, read_joined
from compress.errors import CompressError
from compress.eval.tasks.task import draw_questions
from compress.progress import Silent
from tests.tiny import picture

KINDS = ("jsonl", "list", "conversations", "parquet", "chats", "text", "texts.jsonl", "texts.parquet")
"""The sound files that are changed."""

Pa = cast("Any", pa)


def consume(path: str, kind: str, model: str, target: str) -> int:
    """Do with a data file what a run does before anything is asked; return the exit code that the command line would give."""
    file = Path(path)
    try:
        if "text" in kind:
            source_digest(file)
            spec = TextSet(dataset="text", source=path, samples=1, tokens=8)
            collect(CalibrationSelection(0, (PinnedSet(spec, (file,)),)), Path(model), Path(target), Silent())
            read_joined(file)
            check_overlap(Path(target), (), read_documents(file))
        else:
            source_digest(file, Columns())
            asked = VqaSet(dataset="vqa", source=path, samples=1, text_only=True)
            collect(CalibrationSelection(0, (PinnedSet(asked, (file,)),)), Path(model), Path(target), Silent())
            source = QuestionSource.model_construct(source=path, columns=Columns(options="options"))
            check_overlap(Path(target), draw_questions([file], source, None, 0, RowFilter(where={})), ())
    except CompressError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def sound(folder: Path, kind: str) -> Path:
    """Write a file that is read without fault; return it."""
    images = [picture(number, 56, 56) for number in range(2)]
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(image)
    rows = [
        {"id": n, "image": f"{n}.png", "question": f"What is {n}?", "answer": ["a", "b"], "options": ["a", "b"]} for n in (0, 1)
    ]
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
    texts = [f"Paragraph {number} says that nothing of it is said elsewhere, and more than that." for number in range(6)]
    path = folder / {"list": "q.json", "conversations": "q.jsonl", "chats": "q.parquet", "text": "text.txt"}.get(
        kind, f"q.{kind.rpartition('.')[2]}"
    )
    match kind:
        case "jsonl" | "list" | "conversations":
            if kind == "conversations":
                rows = [{"id": n, "image": text_of(images[n]), "conversations": turns, "options": ["a"]} for n in (0, 1)]
            path.write_text(json.dumps(rows) if kind == "list" else lines(rows), encoding="utf-8")
        case "parquet":
            structs = [{"bytes": image, "path": None} for image in images]
            columns = {"image": structs, "question": ["a?", "b?"], "answer": ["a", "b"], "options": [["a", "b"]] * 2}
            pq.write_table(Pa.table(columns), path, row_group_size=1)
        case "chats":
            talk = [[{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bus."}]] * 2
            pq.write_table(Pa.table({"messages": talk, "images": [[images[0]], [images[1]]], "options": [["a"]] * 2}), path)
        case "text":
            path.write_text("\n\n".join(texts), encoding="utf-8")
        case "texts.jsonl":
            path.write_text(lines([{"text": text} for text in texts]), encoding="utf-8")
        case _:
            pq.write_table(Pa.table({"text": texts}), path)
    return path


def lines(rows: list[dict[str, Any]]) -> str:
    """Return rows as JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def text_of(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode()


@cache
def bomb(side: int) -> bytes:
    """Return a small PNG whose header says that it is large, and whose pixels are all there."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer, packed = zlib.compressobj(9), bytearray()
    for _ in range(side):
        packed += packer.compress(bytes(1 + side))
    packed += packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", bytes(packed)) + chunk(b"IEND", b"")


def change(path: Path, kind: str, decoys: Path, seed: int) -> Path:
    """Change a sound file by a seed: its bytes, a field of a row, or the whole of it; return where it is."""
    chance = random.Random(seed)
    ways: list[Callable[[Path, Path, random.Random], None]] = [_bytes, _cut, _whole]
    if path.suffix in {".jsonl", ".json"}:
        ways += [_field] * 6
    if path.suffix == ".parquet":
        ways += [_bytes] * 3 + [_columns] * 3
    chance.choice(ways)(path, decoys, chance)
    return path


def _bytes(path: Path, decoys: Path, chance: random.Random) -> None:
    del decoys
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 2, 8, 64))):
        place = chance.randrange(len(content))
        content[place : place + chance.choice((0, 1, 1, 4))] = chance.choice(
            (b"", bytes([chance.randrange(256)]), b"\xff\xff\xff\x7f", b"\x00", b'"', b"[", b"{", b"\n", b"\\")
        )
    path.write_bytes(bytes(content))


def _cut(path: Path, decoys: Path, chance: random.Random) -> None:
    del decoys
    content = path.read_bytes()
    place = chance.randrange(len(content))
    path.write_bytes(chance.choice((content[:place], content[place:], content + content[place:], content * 2)))


def _whole(path: Path, decoys: Path, chance: random.Random) -> None:
    """Put something else in its place: nothing, too much, a link, a folder."""
    many = chance.choice((1_000, 100_000, 3_000_000))
    content = chance.choice(
        (
            *(b"", b"[" * many, b"{}\n" * many, b"\n" * many, b'"' * many, b'{"a":' * 2000 + b"1" + b"}" * 2000, b"\xff" * many),
            *(
                b"[" + b"[]," * many + b"[]]",
                b'{"text": [' + b"[]," * many + b"1]}",
                b'{"question": "' + b"x" * many + b'"}',
                b"PAR1" * many,
            ),
            *(
                b"1" * 5000,
                b"NaN",
                b"null",
                b"[1, 2]",
                b'{"text": "\\ud800"}',
                b'[{"text": 1e999}]',
                b"word " * many,
                b"\xef\xbb\xbf" * 3,
            ),
        )
    )
    match chance.randrange(6):
        case 0:
            path.unlink()
            path.symlink_to(chance.choice((decoys, path.parent / "nowhere", path)))
        case 1:
            path.unlink()
            path.mkdir()
        case _:
            path.write_bytes(content)


def odd_values(decoys: Path, chance: random.Random) -> Any:
    """Return a value that no field expects."""
    secret = decoys / "secret.txt"
    image = picture(chance.randrange(9), 28, 28)
    deep: Any = []
    for _ in range(chance.choice((3, 70, 900))):
        deep = [deep]
    values: list[Any] = [
        *(
            None,
            True,
            -1,
            0,
            1.5,
            10**30,
            "",
            " ",
            "\x1b[2J\x1b]0;owned\x07",
            "\u202ename",
            "x" * 200_000,
            "?" * 10_000,
            deep,
            {},
            [],
        ),
        *(
            str(secret),
            f"../{decoys.name}/secret.txt",
            f"file://{secret}",
            "http://127.0.0.1:1/a.png",
            "/dev/zero",
            "/etc/passwd",
            ".",
        ),
        *(
            "a/" * 3000,
            "\u0000",
            "link.png",
            "pipe",
            [f"{secret}", "0.png"],
            {"bytes": None, "path": str(secret)},
            {"bytes": "AAAA"},
        ),
        *(
            text_of(image),
            f"data:image/png;base64,{text_of(image)}",
            "data:image/svg+xml,<svg/>",
            "data:,",
            "data:;base64,%%%",
            "data:",
        ),
        *(
            text_of(bomb(300)),
            text_of(bomb(20_000)),
            text_of(image[:40]),
            text_of(b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9),
            ["0.png"] * 300,
        ),
        *(
            [[]] * 50_000,
            {str(number): number for number in range(50_000)},
            "['a', 'b'",
            "(" * 5000,
            "[" * 200,
            "9" * 9000,
            [[["a"]]],
        ),
        *([{"from": "human"}], [{"role": "user", "content": ["<image>" * 5000]}], [{"role": 3}], "<image>", ["a"] * 5_000),
    ]
    return chance.choice(values)


def _field(path: Path, decoys: Path, chance: random.Random) -> None:
    text = path.read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    if not (path.parent / "link.png").is_symlink():
        (path.parent / "link.png").symlink_to(decoys / "secret.txt")
    for _ in range(chance.choice((1, 1, 2))):
        row = chance.choice(rows)
        field = chance.choice([*row, "image", "question", "answer", "options", "conversations", "messages", "images", "id"])
        match chance.randrange(4):
            case 0:
                row.pop(field, None)
            case 1:
                row[field] = [row.get(field), odd_values(decoys, chance)]
            case _:
                row[field] = odd_values(decoys, chance)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines(rows), encoding="utf-8")


def _columns(path: Path, decoys: Path, chance: random.Random) -> None:
    """Write a parquet file with a column of another kind."""
    table = cast("Any", pq.read_table(path))
    name = chance.choice(list[str](table.column_names))
    rows = int(table.num_rows)
    large = chance.choice((1_000, 3_000_000))
    values: list[Any] = [
        *([None] * rows, [1.5] * rows, [b"\xff\xfe\x00"] * rows, [b""] * rows, ["x" * large] * rows, [[None] * large] * rows),
        *(
            [{"bytes": None, "path": str(decoys / "secret.txt")}] * rows,
            [{"a": {"b": [1]}}] * rows,
            [[["a"]]] * rows,
            [True] * rows,
        ),
        *([bomb(300)] * rows, [bomb(20_000)] * rows, [str(decoys / "secret.txt")] * rows, [[{"from": 1, "value": "x"}]] * rows),
    ]
    places = list[str](table.column_names)
    columns: dict[str, Any] = {column: table.column(column) for column in places}
    columns[name] = Pa.array(chance.choice(values))
    if chance.randrange(4) == 0:
        columns[chance.choice(("text", "image", "conversations", "question"))] = columns.pop(name)
    buffer = io.BytesIO()
    pq.write_table(Pa.table(columns), buffer, compression=chance.choice(("none", "snappy", "zstd")))
    path.write_bytes(buffer.getvalue())
