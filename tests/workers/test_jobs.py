"""A job in another environment gives an outcome: what its script returns, or what ended it; its log shows how far it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from compress.errors import ServerError
from compress.progress import Silent
from compress.runtimes.runtime import Environment
from compress.workers import worker
from compress.workers.worker import LogProgress, WorkerJob, launch_guarded, python_command, run_job, run_worker, variables_with

SCRIPT = """
import os, sys
from dataclasses import dataclass

@dataclass
class Row:
    value: "int"

def main(job):
    for pass_ in range(2):
        for done in (1, 3):
            print(f"read: {done}/3", end="\\r", flush=True)
    if job["fail"] == "kill":
        os.kill(os.getpid(), 9)
    if job["fail"]:
        raise KeyError(job["fail"])
    return {"row": Row(job["value"]).value, "isolated": sys.flags.isolated, "given": os.environ.get("GIVEN")}

def describe(error, job):
    return type(error).__name__, f"{error} of {job['value']}"
"""


class Bars(Silent):
    """Notes the progress that is reported: name, total, unit, and what was done."""

    def __init__(self) -> None:
        self.tasks: list[list[object]] = []

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        self.tasks.append([name, total, unit, 0])
        row = self.tasks[-1]

        def advance(units: int) -> None:
            row[3] = int(str(row[3])) + units

        yield advance


@pytest.fixture(autouse=True)
def own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(name: str) -> Environment:
        return Environment(name=name, python=Path(sys.executable), versions={})

    monkeypatch.setattr(worker, "require", require)


def job_in(folder: Path, fail: str = "", check: Callable[[], None] = lambda: None) -> WorkerJob:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    content = {"value": 7, "fail": fail}
    bars = LogProgress(re.compile(rb"read: (\d+)/(\d+)"), "models", "read", "parts")
    return WorkerJob("library", script, content, variables_with({"GIVEN": "yes"}), folder / "library.log", bars, check=check)


def test_the_outcome_is_what_the_script_returns(tmp_path: Path) -> None:
    assert run_job(job_in(tmp_path), tmp_path, Silent()) == {"row": 7, "isolated": 1, "given": "yes"}


def test_an_error_is_described_by_the_script_and_stays_in_the_log(tmp_path: Path) -> None:
    assert run_job(job_in(tmp_path, "here"), tmp_path, Silent()) == {"failed": "KeyError", "message": "'here' of 7"}
    assert "Traceback" in (tmp_path / "library.log").read_text(encoding="utf-8")


def test_a_job_that_is_killed_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"(?s)^library was ended before it was done; .*memory: .*signal 9 \(SIGKILL\)"):
        run_job(job_in(tmp_path, "kill"), tmp_path, Silent())


def test_a_bar_that_starts_anew_is_a_further_task(tmp_path: Path) -> None:
    run_job(job_in(tmp_path), tmp_path, bars := Bars())
    read = ["library: read", 3, "parts", 3]
    assert bars.tasks == [["library: load", 1, "models", 1], read, read]


def test_a_job_ends_with_what_it_depends_on(tmp_path: Path) -> None:
    def check() -> None:
        raise ServerError("the server ended")

    with pytest.raises(ServerError, match="the server ended"):
        run_job(job_in(tmp_path, check=check), tmp_path, Silent())


def test_another_environment_is_given_none_of_this_ones_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "OURS", "KEPT"):
        monkeypatch.setenv(name, "x")
    variables = variables_with({"ADDED": "y"}, ("OURS",))
    assert variables["ADDED"] == "y"
    assert variables["KEPT"] == "x"
    assert variables.keys().isdisjoint({"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "OURS"})
    assert python_command("library", "x.py") == [sys.executable, "-I", "-u", "x.py"]


def test_another_launcher_starts_the_same_worker(tmp_path: Path) -> None:
    launched: list[Sequence[str]] = []

    def launch(command: Sequence[str], variables: Mapping[str, str], sink: BinaryIO) -> subprocess.Popen[bytes]:
        launched.append(command)
        return launch_guarded([*command, "launched"], variables, sink)

    command = [sys.executable, "-c", "import sys; print(sys.argv[1])"]
    with run_worker("the worker", command, os.environ, tmp_path / "log", launch) as started:
        started.process.wait(600)
        assert started.read_log().startswith("launched\n")
    assert launched == [command]
