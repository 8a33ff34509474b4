"""Every command of the README and the documentation does what it says, offline, on tiny models in place of those it names."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.cli import main as cli
from tests.jobs import content, make_job, sentences, write_questions
from tests.published_hub import published_hub

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
STAND_INS = {
    "RECIPE": "recipes/demo.yaml",
    "recipe.yaml": "recipes/demo.yaml",
    "ARTIFACT…": "published/demo/vllm-awq",
    "ORIGINAL": "recipes/demo/model",
}
"""What the pages leave for the reader to fill in, filled in."""
ELSEWHERE = ("node", "g++", "./answer")
"""Programs whose libraries come from other registries than PyPI, so that a test without a network cannot run them."""
HUB_MODEL = "recipes/qwen-vl-awq.yaml"
MODELS = "/models/Qwen2.5-VL-7B-Instruct"
SMALL = [
    word
    for setting in (
        "stages.0.group_size=32",
        "stages.0.grid=2",
        "calibration.sets.0.tokens=32",
        "calibration.sets.0.samples=4",
        "calibration.sets.1.samples=4",
        "eval.runtime={runtime: transformers}",
        "eval.latency=null",
        "eval.grounding=null",
        "eval.tasks.1.window=32",
        "gate={size: {max_ratio: 0.9}}",
    )
    for word in ("--set", setting)
]
"""What makes the recipe for a GPU one for the tiny model: sizes, and the runtime that needs no server."""


@dataclass(frozen=True)
class Command:
    """One command of a page, without its comment: the words, and the line it stands on."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}:{' '.join(self.words[:3])}"


def commands() -> list[Command]:
    found: list[Command] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if block[1]:
                continue
            first = text[: block.start()].count("\n") + 2
            lines = block[2].replace("\\\n", "").splitlines()
            parsed = [words(line) for line in lines]
            if parsed and parsed[0] and known(parsed[0]):
                found += [Command(page.name, first, each) for each in parsed if each]
    return found


def words(line: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line, comments=True))
    except ValueError:  # what a program prints may hold a single quotation mark
        return ()


def known(command: tuple[str, ...]) -> bool:
    """Whether it is a command at all, and no output that stands in a block of its own."""
    program = next(word for word in command if "=" not in word.partition("_")[0] and not re.fullmatch(r"[A-Z_]+=.*", word))
    return program in ("compress", "make", "pip", "python", *ELSEWHERE) or program.startswith(".venv/bin/")


COMMANDS = commands()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """The folder that the pages suppose the reader in: a tiny recipe and model in the places of the demo's, and two runs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "recipes").mkdir()
    job = make_job(folder / "recipes/demo", layers=1)
    recipe: dict[str, Any] = {**content(job), "name": "demo", "publish": {"to": str(folder / "published")}}
    recipe["gate"]["size"] = {"max_ratio": 2.0}  # float32 graphs of so small a model are larger than itself
    for entry in (recipe["model"], *recipe["calibration"]["sets"], *recipe["eval"]["tasks"]):
        entry["source"] = f"demo/{entry['source']}"
    (folder / "recipes/demo.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.copy(ROOT / HUB_MODEL, folder / HUB_MODEL)
    (folder / "wiki.train.txt").write_text(sentences(0, 60), encoding="utf-8")
    (folder / "wiki.test.txt").write_text(sentences(1000, 30), encoding="utf-8")
    write_questions(folder, "questions.jsonl", range(300, 304))
    write_questions(folder, "held-out.jsonl", range(400, 406))
    for script in (ROOT / "recipes/demo").glob("*.py"):
        shutil.copy(script, folder / "recipes/demo")
    with pytest.MonkeyPatch.context() as patch, published_hub(tmp_path_factory.mktemp("hub")):
        patch.chdir(folder)
        patch.setenv("COMPRESS_STORE", str(folder / "store"))
        for name in ("a-20250112-101500-3fa9", "b-20250112-113000-77c1"):
            run(["run", "recipes/demo.yaml"])
            next((folder / "runs").glob("demo-*")).rename(folder / "runs" / name)
        yield folder


def run(arguments: list[str]) -> None:
    """Run one command of `compress` in this process; anything but success is a failure of the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 0


def test_there_are_commands_on_the_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "report.md", "onnx.md"} <= {command.page for command in COMMANDS}
    assert len(COMMANDS) >= 20


def compress(arguments: tuple[str, ...], desk: Path) -> None:
    filled = [STAND_INS.get(word, word).replace(MODELS, "recipes/demo/model") for word in arguments]
    laid_out = [path for word in filled for path in (sorted(map(str, desk.glob(word))) if "*" in word else [word])]
    if laid_out[:2] == ["run", HUB_MODEL]:
        offline = any(word.startswith("model.source=") for word in laid_out)
        laid_out = [*laid_out, *SMALL] if offline else ["plan", *laid_out[1:]]  # the model has 16 GB, and its recipe is for a GPU
    run([word.removeprefix(str(desk) + "/") for word in laid_out])


def make(arguments: tuple[str, ...], desk: Path) -> None:
    del desk
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", text, re.MULTILINE) for target in arguments)
    assert "demo: $(VENV)/.user\n\t$(BIN)/compress run recipes/demo.yaml\n" in text  # which tests/test_demo.py runs


def pip(arguments: tuple[str, ...], desk: Path) -> None:
    del desk
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    verb, target = arguments
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", target)
    assert verb == "install"
    assert extra is not None
    assert extra[1] is None or extra[1] in project["optional-dependencies"]


def python(arguments: tuple[str, ...], desk: Path) -> None:
    if not (desk / arguments[0]).exists():
        assert f'"""{arguments[0]} ' in (ROOT / "docs/formats/onnx.md").read_text(
            encoding="utf-8"
        )  # run by tests/test_docs_onnx.py
        return
    subprocess.run([sys.executable, *arguments], check=True, cwd=desk)


def pytest_of_the_project(arguments: tuple[str, ...], desk: Path) -> None:
    del desk
    paths = [word for word in arguments if word.startswith("tests")]
    assert all((ROOT / path).exists() for path in paths)


RUNNERS: dict[str, Callable[[tuple[str, ...], Path], None]] = {
    "compress": compress,
    "make": make,
    "pip": pip,
    "python": python,
    ".venv/bin/pytest": pytest_of_the_project,
}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.words[0] not in ELSEWHERE], ids=str)
def test_a_command_of_the_pages_works(command: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = command.words
    while re.fullmatch(r"[A-Z_]+=.*", program):
        monkeypatch.setenv(*program.split("=", 1))
        program, *arguments = arguments
    RUNNERS[program](tuple(arguments), desk)


def test_the_python_of_the_readme_works(desk: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["report"].gate.verdict == "pass"
    assert names["report"].rows[1].path == str(desk / "published/demo/vllm-awq")
