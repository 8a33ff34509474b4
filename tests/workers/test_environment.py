"""Environments are made from locks by uv; here from a lock that names one small wheel, built on the spot."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compress.errors import MissingError, StoreError, UsageError
from compress.progress import Silent
from compress.workers import environment
from compress.workers.environment import LOCKS, Lock, find, install, require, runtimes_home

SHIPPED = Path(environment.__file__).parent / "locks"


class Counted(Silent):
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int]] = []
        self.done = 0

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        self.tasks.append((name, total))

        def advance(count: int) -> None:
            self.done += count

        with super().task(name, total, unit):
            yield advance


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runtimes"
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(folder))
    return folder


@pytest.fixture
def toy(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A runtime named `toy` whose environment holds the distribution toy-cpu 1.5; returns its name."""
    del home
    wheel = tmp_path / "toy_cpu-1.5-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_runtime.py", "ANSWER = 42\n")
        archive.writestr("toy_cpu-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-cpu\nVersion: 1.5\n")
        archive.writestr("toy_cpu-1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy_cpu-1.5.dist-info/RECORD", "toy_runtime.py,,\n")
    add_lock(tmp_path / "toy.txt", f"# a lock\ntoy-cpu @ file://{wheel}\nnever==1 ; sys_platform == 'never'\n", monkeypatch)
    return "toy"


def add_lock(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(text, encoding="utf-8")
    row = Lock(module="toy_runtime", cpu=str(path), cuda=str(path), distributions=("toy", "toy-cpu"), aliases=(("toy-cpu", "toy"),))
    monkeypatch.setitem(LOCKS, "toy", row)


def test_installed_environment_is_found_and_runs(toy: str, home: Path) -> None:
    assert find(toy) is None
    progress = Counted()
    made = install(toy, progress)
    assert find(toy) == require(toy) == made
    assert made.python.is_relative_to(home)
    assert made.versions == {"toy": "1.5+cpu", "toy-cpu": "1.5"}
    assert (progress.tasks, progress.done) == ([("install toy", 1)], 1)
    code = "import toy_runtime, importlib.metadata as m; print(toy_runtime.ANSWER, m.version('toy'))"
    assert subprocess.check_output([made.python, "-c", code], text=True).split() == ["42", "1.5+cpu"]


def test_second_install_makes_nothing(toy: str) -> None:
    first = install(toy, Silent())
    progress = Counted()
    assert install(toy, progress) == first
    assert progress.tasks == []


def test_half_made_environment_is_made_anew(toy: str) -> None:
    python = install(toy, Silent()).python
    folder = python.parent.parent
    (folder / "compress-environment.json").unlink()
    (folder / "left-over").touch()
    assert find(toy) is None
    assert install(toy, Silent()).python == python
    assert not (folder / "left-over").exists()


def test_another_lock_is_another_environment(toy: str, tmp_path: Path) -> None:
    first = install(toy, Silent())
    lock = tmp_path / "toy.txt"
    lock.write_text(lock.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert find(toy) is None
    assert install(toy, Silent()).python != first.python


def test_two_installs_at_once_make_one(toy: str) -> None:
    watchers = [Counted(), Counted()]
    with ThreadPoolExecutor(2) as pool:
        made = [future.result() for future in [pool.submit(install, toy, watcher) for watcher in watchers]]
    assert made[0] == made[1]
    assert sorted(len(watcher.tasks) for watcher in watchers) == [0, 1]


def test_failed_install_shows_what_uv_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del home
    add_lock(tmp_path / "toy.txt", "absent @ file:///nowhere/absent-1-py3-none-any.whl\n", monkeypatch)
    with pytest.raises(MissingError, match=r"(?s)toy could not be installed into .*absent-1-py3-none-any\.whl.*run it again"):
        install("toy", Silent())
    assert find("toy") is None


def test_unreachable_index_is_said_to_be_that(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del home
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    add_lock(tmp_path / "toy.txt", "surely-not-cached-toy==1.0\n", monkeypatch)
    with pytest.raises(MissingError, match="package index was not reached: check the network, or set UV_DEFAULT_INDEX"):
        install("toy", Silent())


def test_home_that_cannot_be_written(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path / "file" / "runtimes"))
    with pytest.raises(StoreError, match=r"cannot be written there .* set COMPRESS_RUNTIMES to another folder"):
        install(toy, Silent())


def test_missing_runtime_says_how_to_install_it(home: Path) -> None:
    with pytest.raises(MissingError, match=rf"vllm is not installed .*{home}.*`compress runtime install vllm`"):
        require("vllm")


def test_module_in_this_interpreter_serves_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del home
    monkeypatch.setitem(LOCKS, "numbers", Lock(module="numpy", cpu="vllm-cpu.txt", cuda="vllm-cuda.txt", distributions=("numpy",)))
    environment = require("numbers")
    assert list(environment.versions) == ["numpy"]
    code = "import numpy; print(numpy.__version__)"
    assert subprocess.check_output([environment.python, "-c", code], text=True).strip() == environment.versions["numpy"]


def test_unknown_runtime_names_the_known() -> None:
    with pytest.raises(UsageError, match=r"no runtime 'vlm' .* vllm"):
        find("vlm")


def test_home_follows_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMPRESS_RUNTIMES", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert runtimes_home() == tmp_path / "vlm-compress" / "runtimes"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert runtimes_home() == Path.home() / ".local" / "share" / "vlm-compress" / "runtimes"


@pytest.mark.parametrize("row", LOCKS.values(), ids=LOCKS)
def test_shipped_locks_pin_everything_and_hold_no_address(row: Lock) -> None:
    for name in (row.cpu, row.cuda):
        lines = [line for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        pins = [Requirement(line) for line in lines]
        assert all(str(pin.specifier).startswith("==") and pin.url is None for pin in pins)
        assert {pin.name for pin in pins} & set(row.distributions[:2])
