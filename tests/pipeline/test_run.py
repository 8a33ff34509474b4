import json
import os
import random
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch

import compress
from compress.checkpoints.artifact import folder_digests
from compress.errors import CheckpointError, DataError, RecipeError
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.report.model import Report
from compress.workers.environment import install
from tests.jobs import Job, make_job, sentences
from tests.preloaded import command_line, wait_for_killed_commands

OPENED: list[str] = []
"""The question files that were opened since the first run began, each time."""


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(".jsonl") and "/store/" not in str(arguments[0]):
        OPENED.append(Path(arguments[0]).name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Report]:
    job = make_job(tmp_path_factory.mktemp("job"))
    (job.folder / "model" / "LICENSE").write_text("Permission is granted.")
    (job.folder / "model" / "README.md").write_text("---\nlicense: other\nlicense_name: own-terms\n---\n# Tiny\n")
    sys.addaudithook(_note_opened)
    return job, compress.run(job.recipe, **job.places())


def test_a_run_ends_with_a_verdict_a_table_and_published_artifacts(finished: tuple[Job, Report]) -> None:
    job, report = finished
    assert report.gate.verdict == "pass"
    assert [row.artifact for row in report.rows] == ["original", "vllm-awq", "vllm-compressed-tensors"]
    original, *artifacts = report.rows
    assert original.size_ratio == 1.0
    assert original.fidelity is None
    for row in artifacts:
        assert 0.3 < row.size_ratio < 0.9
        assert 4 < row.bits_per_weight < 16
        assert row.fidelity is not None
        assert 0 < row.fidelity["text"].kl_mean < 1
    for published in report.published:
        folder = Path(published.path)
        assert folder.parent.parent == job.published
        record = json.loads((folder / "compress.json").read_text(encoding="utf-8"))
        digests = folder_digests(folder)
        del digests["compress.json"]
        assert record["files"] == digests
        assert record["gate"]["verdict"] == "pass"
        assert len(record["calibration"]["samples"]) == 8
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "| original |" in card
        assert card.startswith("---\nlicense: other\nlicense_name: own-terms\n")
        assert "Its licence is the original's: own-terms. Its terms of use are in [LICENSE](LICENSE)." in card
        assert (folder / "LICENSE").read_text() == "Permission is granted."
        assert "by force" not in card
        (loaded,) = (line for line in card.splitlines() if line.startswith("- transformers ("))
        assert loaded.startswith(f"- transformers (torch {version('torch')}, transformers {version('transformers')}, ")
        assert loaded.endswith("), in process, from weights that compress itself unpacked: nothing of `from_pretrained` was tried")
        assert "vllm (" not in card


def test_a_question_file_is_read_once(finished: tuple[Job, Report]) -> None:
    job, _ = finished
    assert (job.folder / "test.jsonl").is_file()
    assert [OPENED.count(name) for name in ("calibration.jsonl", "test.jsonl")] == [1, 1]


def test_both_layouts_hold_the_same_model(finished: tuple[Job, Report]) -> None:
    _, report = finished
    awq, packed = report.rows[1:]
    assert awq.metrics == packed.metrics
    assert awq.fidelity == packed.fidelity


def test_the_run_folder_tells_what_happened(finished: tuple[Job, Report]) -> None:
    _, report = finished
    folder = Path(report.run)
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert stored["schema"] == 1
    assert stored["rows"][1]["artifact"] == "vllm-awq"
    assert {"step", "seconds", "peak_host_bytes", "peak_device_bytes", "cached"} == set(stored["timings"][0])
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# tiny: pass")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events[0]["event"] == "started"
    assert events[-1] == {**events[-1], "event": "finished", "verdict": "pass"}
    assert [event["step"] for event in events if event["event"] == "step-finished"] == [row["step"] for row in stored["timings"]]
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8"))["steps"]


def test_a_second_run_makes_nothing_and_needs_no_torch(finished: tuple[Job, Report]) -> None:
    job, report = finished
    code = "import sys, compress.cli.main as cli\ntry: cli.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *job.arguments("--json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert all(timing["cached"] for timing in again["timings"])
    assert again["rows"] == json.loads(report.to_json())["rows"]
    assert done.stderr.strip().splitlines()[-1] == again["run"]


def test_changing_the_last_stage_reuses_all_before_it(finished: tuple[Job, Report]) -> None:
    job, _ = finished
    report = compress.run(job.recipe, set={"stages.0.clip": False}, **job.places())
    cached = {timing.step: timing.cached for timing in report.timings}
    assert cached == {
        "calibration": True,
        "overlap of calibration and evaluation": True,
        "awq": False,
        "measure original": True,
        "export vllm-awq": False,
        "measure vllm-awq": False,
        "export vllm-compressed-tensors": False,
        "measure vllm-compressed-tensors": False,
    }


def test_a_model_that_moved_is_known_by_its_content(finished: tuple[Job, Report], tmp_path: Path) -> None:
    job, _ = finished
    copy = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", str(job.folder / "model"), str(copy)], check=True)
    report = compress.run(job.recipe, set={"model.source": str(copy)}, **job.places())
    executed = [timing.step for timing in report.timings if not timing.cached]
    assert executed == ["export vllm-awq", "measure vllm-awq", "export vllm-compressed-tensors", "measure vllm-compressed-tensors"]


def test_a_gate_that_fails_publishes_nothing_unless_forced(finished: tuple[Job, Report], tmp_path: Path) -> None:
    job, _ = finished
    settings = {"gate.size.max_ratio": 0.1, "publish.to": str(tmp_path / "out")}
    report = compress.run(job.recipe, set=settings, **job.places())
    assert report.gate.verdict == "fail"
    assert report.published == ()
    assert not (tmp_path / "out").exists()
    forced = compress.run(job.recipe, set=settings, force=True, **job.places())
    assert [row.forced for row in forced.published] == [True, True]
    card = (tmp_path / "out" / "tiny" / "vllm-awq" / "README.md").read_text(encoding="utf-8")
    assert "Published by force: the gate's verdict was fail" in card


def test_fresh_makes_everything_again_with_the_same_bytes(finished: tuple[Job, Report]) -> None:
    job, report = finished
    before = {row.artifact: folder_digests(Path(row.path)) for row in report.rows}
    again = compress.run(job.recipe, fresh=True, **job.places())
    assert not any(timing.cached for timing in again.timings)
    assert {row.artifact: folder_digests(Path(row.path)) for row in again.rows} == before


def test_a_sample_in_calibration_and_evaluation_stops_the_run(finished: tuple[Job, Report]) -> None:
    job, _ = finished
    shared = {"eval.tasks.0.source": str(job.folder / "calibration.jsonl")}
    done = subprocess.run(
        command_line(*job.arguments(*(f"--set={path}={value}" for path, value in shared.items()))),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "of the evaluation is calibration sample q10" in done.stderr
    assert "calibration.jsonl:" in done.stderr


def test_a_paragraph_in_calibration_and_evaluation_stops_the_run(finished: tuple[Job, Report]) -> None:
    job, _ = finished
    mixed = job.folder / "mixed.txt"
    mixed.write_text(sentences(2000, 30) + "\n" + sentences(0, 60), encoding="utf-8")
    with pytest.raises(DataError, match=r"a paragraph of the evaluation's text .* is part of calibration sample"):
        compress.run(job.recipe, set={"eval.tasks.1.source": str(mixed)}, **job.places())


def test_warnings_are_said_again_when_a_step_is_cached(finished: tuple[Job, Report]) -> None:
    job, _ = finished
    path = job.folder / "shared-image.jsonl"
    path.write_text('{"id": "s", "image": "images/101.png", "question": "Another question?", "answer": "red"}\n', encoding="utf-8")
    reports = [compress.run(job.recipe, set={"eval.tasks.0.source": str(path)}, **job.places()) for _ in range(2)]
    assert "an image of question s" in reports[0].warnings[0]
    assert reports[0].warnings == reports[1].warnings


def test_how_a_file_is_read_is_part_of_the_key(finished: tuple[Job, Report], tmp_path: Path) -> None:
    job, _ = finished
    keys: list[str] = []
    for suffix in ("txt", "jsonl"):
        path = tmp_path / f"data.{suffix}"
        path.write_text('{"text": "one line that is text and JSON at once"}\n', encoding="utf-8")
        plan = make_plan(job.recipe, {"eval.tasks.1.source": str(path)}, Store(tmp_path))
        keys += [step.key for step in plan.steps if step.name == "measure original"]
    assert keys[0] != keys[1]


def test_a_second_quantizing_stage_is_refused_in_the_plan(finished: tuple[Job, Report], tmp_path: Path) -> None:
    job, _ = finished
    awq = {"stage": "awq", "bits": 4, "group_size": 32}
    with pytest.raises(RecipeError, match=r"stages.1: model.*: quantized already; start from the model's original"):
        make_plan(job.recipe, {"stages": [awq, awq]}, Store(tmp_path))


def test_how_a_runtime_is_run_changes_no_key(finished: tuple[Job, Report], tmp_path: Path) -> None:
    job, _ = finished
    install("vllm", Silent())
    runtime = {"eval.runtime": {"runtime": "vllm"}}
    slower = {"eval.runtime": {"runtime": "vllm", "startup_seconds": 1200}}
    other = {"eval.runtime": {"runtime": "vllm", "dtype": "float16"}}
    keys = [[step.key for step in make_plan(job.recipe, settings, Store(tmp_path)).steps] for settings in (runtime, slower, other)]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def test_weights_with_nan_are_named_and_nothing_is_kept(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    path = job.folder / "model" / "model.safetensors"
    tensors = safetensors.load_file(path)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = torch.nan
    safetensors.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinite values"):
        compress.run(job.recipe, **job.places())
    assert [path.name for path in (job.store / "aside").iterdir()] == []


def test_a_group_size_that_does_not_divide_is_refused_in_the_plan(finished: tuple[Job, Report]) -> None:
    job, _ = finished
    with pytest.raises(RecipeError) as caught:
        compress.run(job.recipe, set={"stages.0.group_size": 48}, **job.places())
    fault = caught.value.faults[0]
    assert "stages.0:" in fault
    assert "does not divide by group_size 48; use group_size" in fault
    assert "ignore" in fault


@pytest.mark.slow
def test_runs_that_are_killed_ten_times_end_as_one_that_was_not(finished: tuple[Job, Report], tmp_path: Path) -> None:
    """SIGKILL at ten random moments, each told by how many lines of progress had been printed."""
    job, _ = finished
    report = compress.run(job.recipe, **job.places())
    undisturbed = {row.artifact: folder_digests(Path(row.path)) for row in report.published}
    shutil.rmtree(job.published)
    chance = random.Random(20240917)
    killed = 0
    arguments = command_line("run", str(job.recipe), "--runs", str(tmp_path / "runs"), "--store", str(tmp_path / "store"))
    while killed < 10:
        extra = ["--fresh"] if killed % 3 == 2 else []
        process = subprocess.Popen([*arguments, *extra], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        assert process.stderr is not None
        for _ in range(chance.randrange(1, 14)):
            if not process.stderr.readline():
                break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_for_killed_commands()
        process.stderr.close()
        killed += 1
    arguments[0] = sys.executable  # another hash seed: the forks of one process share theirs
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: pass\n")
    assert "measure vllm-awq" in done.stderr
    assert {path.name: folder_digests(path) for path in (job.published / "tiny").glob("[!.]*")} == undisturbed
