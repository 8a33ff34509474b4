"""The page about ONNX artifacts: its Python scripts run and say what the runtime says, its tables name what the graphs have."""

import re
import runpy
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest

from compress.data.prompts import Prompt
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.export.onnx.graphs import GRAPHS
from compress.families.resolve import family_at
from compress.progress import Silent
from compress.runtimes.onnxruntime.runtime import Onnxruntime
from compress.runtimes.runtime import ImageInput, OpenContext
from tests.tiny import BUILDERS, picture

PARQUET: Any = parquet
SILENT = Silent()
ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "demo"
PAGE = (ROOT / "docs" / "formats" / "onnx.md").read_text(encoding="utf-8")
BLOCKS = {block.split("\n")[0].split()[0].strip('"'): block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}
"""The page's scripts, by the names that their first lines give them."""

ALIKE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava", "llava-next", "internvl3")
"""The families that the page says its script is for."""


def export(source: Path, target: Path, **fields: Any) -> Path:
    target.mkdir()
    settings = Onnx.model_validate({"format": "onnx", **fields})
    settings.apply(ExportContext(source, target, family_at(source), SILENT))
    return target


@contextmanager
def opened(artifact: Path, logs: Path) -> Generator[Any]:
    with Onnxruntime(runtime="onnxruntime").open(OpenContext.at(artifact, logs, SILENT)) as session:
        yield session


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a script of the page prints, given its name and arguments."""

    def run(name: str, *arguments: str) -> str:
        script = tmp_path / name
        script.write_text(BLOCKS[name], encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_script_answers_what_the_demo_model_has_learnt(dtype: str, tmp_path: Path, say: Any) -> None:
    artifact = export(DEMO / "model", tmp_path / "artifact", dtype=dtype)
    rows = PARQUET.read_table(DEMO / "test.parquet").slice(0, 4).to_pylist()
    shown = tmp_path / "picture.png"
    assert len(rows) == 4
    for row in rows:
        shown.write_bytes(row["image"]["bytes"])
        assert say("answer.py", str(artifact), str(shown), row["question"]) == f"{row['answer']}\n"


@pytest.mark.parametrize("name", ALIKE)
def test_the_script_answers_as_the_runtime_does(name: str, tmp_path: Path, say: Any) -> None:
    artifact = export(BUILDERS[name](tmp_path / "model"), tmp_path / "artifact")
    shown, question = tmp_path / "picture.png", "How many circles are there in the picture?"
    shown.write_bytes(picture(1, 140, 84))
    with opened(artifact, tmp_path / "logs") as session:
        answer = session.answer([Prompt("one", question, (shown.read_bytes(),))], 64, SILENT)[0]
    assert len(answer.token_ids) > 4
    assert say("answer.py", str(artifact), str(shown), question) == f"{answer.text}\n"


def test_the_script_for_clip_ranks_texts_as_the_runtime_does(tmp_path: Path, say: Any) -> None:
    artifact = export(BUILDERS["clip"](tmp_path / "model"), tmp_path / "artifact")
    shown, texts = tmp_path / "picture.png", ["a red circle", "a picture", "two blue squares on a table"]
    shown.write_bytes(picture(1, 140, 84))
    with opened(artifact, tmp_path / "logs") as session:
        known = session.classify([ImageInput("one", shown.read_bytes())], [[text] for text in texts], SILENT)[0]
    lines = [line.split(" ", 1) for line in say("clip.py", str(artifact), str(shown), *texts).splitlines()]
    assert [text for _, text in lines] == texts
    np.testing.assert_allclose([float(share) for share, _ in lines], np.exp(known), atol=1e-4)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_tables_name_what_the_graphs_have(name: str, tmp_path: Path) -> None:
    artifact = export(BUILDERS[name](tmp_path / "model"), tmp_path / "artifact")
    assert len(GRAPHS[name]) > 0
    for graph in GRAPHS[name]:
        model: Any = onnx.load(artifact / f"{graph}.onnx", load_external_data=False).graph
        assert declared(model.input) == described(name, graph)[0]
        assert declared(model.output) == described(name, graph)[1]


def declared(values: Any) -> set[str]:
    """The names of a graph's values, blocks counted as i."""
    return {re.sub(r"\.\d+\.", ".i.", value.name) for value in values}


def described(family: str, graph: str) -> tuple[set[str], set[str]]:
    """The names that the page's tables give to a graph's inputs and outputs."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    if graph == "embed_tokens":
        found = re.search(r"`embed_tokens\.onnx` of all families: (.*?) → (.*)", PAGE)
        assert found is not None
        return values(found[1]), values(found[2])
    if graph == "decoder_model_merged":
        start = next(place for place, row in enumerate(rows) if row[0] == "input")
        between = next(place for place, row in enumerate(rows) if row[0] == "output")
        inputs = {word for row in rows[start + 2 : between] if family in row[2] or row[2] == "all" for word in values(row[0])}
        outputs = {word for row in rows[between + 2 : between + 4] for word in values(row[0])}
        return inputs, outputs
    owner = f"`{graph}.onnx`" if family == "clip" else family
    row = next(row for row in rows if len(row) == 3 and owner in row[0].split(", "))
    return values(row[1]), values(row[2])


def values(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+(?:\.i\.[a-z]+)?)`", cell))
