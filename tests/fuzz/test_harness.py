"""The harness sees what it is there to see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.harness import Harness, leaked, make_decoys


@pytest.fixture(scope="module")
def decoys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoys(tmp_path_factory.mktemp("elsewhere") / "decoys")


@pytest.fixture(scope="module")
def harness(decoys: Path) -> Iterator[Harness]:
    with Harness(["compress.cli.main"], decoys) as started:
        yield started


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def take(size: int) -> None:
    assert len(bytearray(size)) == size


def read(path: str) -> None:
    Path(path).read_bytes()


def fail() -> None:
    raise ValueError("on purpose")


HERE = "tests.fuzz.test_harness"


def test_a_command_of_ours_is_in_order(harness: Harness) -> None:
    outcome = harness.command("schema")
    assert outcome.faults({0}, []) == []
    assert outcome.stdout.startswith("{")


def test_an_exit_code_and_a_traceback_are_seen(harness: Harness) -> None:
    assert harness.command("plan").faults({0}, []) == ["exit code 2"]
    assert harness.call(f"{HERE}:fail").faults({0}, [])[:2] == ["exit code 70", "it says 'Traceback (most recent call last)'"]


def test_processor_time_and_memory_are_measured(harness: Harness) -> None:
    burnt = harness.call(f"{HERE}:burn", 0.5)
    assert burnt.seconds >= 0.5
    taken = harness.call(f"{HERE}:take", 1_200_000_000)
    assert taken.faults({0}, []) == [f"{taken.grown / 1e9:.2f} GB"]
    assert 1_100_000_000 < taken.grown < 1_500_000_000


def test_files_opened_elsewhere_and_decoys_are_seen(harness: Harness, decoys: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("own", encoding="utf-8")
    assert harness.call(f"{HERE}:read", str(own)).faults({0}, [tmp_path]) == []
    assert harness.call(f"{HERE}:read", str(own)).faults({0}, []) == [f"it opened {own.resolve()}"]
    link = tmp_path / "link"
    link.symlink_to(decoys / "secret.txt")
    outcome = harness.call(f"{HERE}:read", str(link))
    assert set(outcome.faults({0}, [tmp_path])) == {f"it opened {(decoys / 'secret.txt').resolve()}"}
    assert outcome.decoys == (str(decoys / "secret.txt"),)


def test_a_copy_of_a_decoy_is_found(decoys: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_bytes((decoys / "secret.txt").read_bytes())
    assert leaked(decoys, [tmp_path]) == [tmp_path / "copy.txt"]
