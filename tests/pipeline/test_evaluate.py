"""Judging artifacts that are there already, at one target and at several."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import compress
from compress.errors import CheckpointError, RecipeError, UsageError
from compress.report.model import Report
from tests.jobs import Job, content, make_job
from tests.preloaded import command_line

EVALUATION: dict[str, Any] = {
    "name": "check",
    "eval": {
        "runtime": {"runtime": "transformers"},
        "tasks": [
            {"task": "vqa", "definition": "scenes", "source": "test.jsonl"},
            {"task": "perplexity", "dataset": "text", "source": "test.txt", "window": 32},
        ],
    },
    "gate": {
        "perplexity": {"max_ratio": 1.5, "confidence": 0.95},
        "fidelity": {"max_kl": 0.5},
        "flips": {"max_share": 0.9, "confidence": 0.95},
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Report]:
    job = make_job(tmp_path_factory.mktemp("job"))
    (job.folder / "check.yaml").write_text(yaml.safe_dump(EVALUATION), encoding="utf-8")
    return job, compress.run(job.recipe, **job.places())


def path_of(report: Report, name: str) -> Path:
    return Path(next(row.path for row in report.rows if row.artifact == name))


def test_artifacts_are_judged_as_the_run_that_made_them_did(made: tuple[Job, Report], tmp_path: Path) -> None:
    job, report = made
    artifacts = [Path(row.path) for row in report.published]
    found = compress.evaluate(*artifacts, against=job.folder / "model", by=job.folder / "check.yaml", **job.places())
    assert [row.artifact for row in found.rows] == ["original", "vllm-awq", "vllm-compressed-tensors"]
    for before, after in zip(report.rows, found.rows, strict=True):
        assert (before.metrics, before.fidelity) == (after.metrics, after.fidelity)
        assert before.bits_per_weight == after.bits_per_weight
    assert found.gate.verdict == "pass"
    assert {check.check for check in found.gate.checks} == {"perplexity.max_ratio", "fidelity.max_kl", "flips.max_share"}
    assert found.published == ()
    folder = Path(found.run)
    assert all((folder / name).is_file() for name in ("report.json", "report.md", "report.html"))
    again = compress.evaluate(*artifacts, against=job.folder / "model", by=job.folder / "check.yaml", **job.places())
    assert all(timing.cached for timing in again.timings)
    by_recipe = compress.evaluate(artifacts[0], against=job.folder / "model", by=job.recipe, **job.places())
    assert {check.check for check in by_recipe.gate.checks} == {"perplexity.max_ratio", "size.max_ratio"}


def test_two_copies_of_one_artifact_have_no_flips_and_no_divergence(made: tuple[Job, Report], tmp_path: Path) -> None:
    job, report = made
    copy = tmp_path / "copy"
    shutil.copytree(path_of(report, "vllm-awq"), copy)
    settings = {"gate": {"flips": {"max_share": 0.5, "confidence": 0.95}, "fidelity": {"max_kl": 1e-6, "min_top1": 1.0}}}
    found = compress.evaluate(copy, against=path_of(report, "vllm-awq"), by=job.folder / "check.yaml", set=settings, **job.places())
    assert found.gate.verdict == "pass"
    fidelity = found.rows[1].fidelity
    assert fidelity is not None
    assert [(row.lost, row.gained, row.changed) for row in (fidelity["scenes"],)] == [(0, 0, 0)]
    assert all(row.kl_mean < 1e-6 for row in fidelity.values())
    assert found.rows[0].metrics == found.rows[1].metrics


def test_an_artifact_that_names_linears_as_on_disk_alone_is_told_of(made: tuple[Job, Report], tmp_path: Path) -> None:
    """As artifacts were written once: transformers takes their vision tower for quantized, with scales that are in no file."""
    job, report = made
    old = tmp_path / "old"
    shutil.copytree(path_of(report, "vllm-compressed-tensors"), old)
    config = json.loads((old / "config.json").read_text())
    kept = [name for name in config["quantization_config"]["ignore"] if not name.startswith("re:")]
    config["quantization_config"]["ignore"] = kept
    (old / "config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {"against": job.folder / "model", "by": job.folder / "check.yaml", **job.places()}
    (warning,) = compress.evaluate(old, **given).warnings
    assert warning.startswith(f"{old}/config.json: quantization_config does not say of visual.blocks.0.attn.proj and ")
    assert "by the name that transformers has for it (model.visual.blocks.0.attn.proj)" in warning
    assert warning.endswith("Run its recipe again: the export writes the names anew, from the same weights")
    assert compress.evaluate(path_of(report, "vllm-compressed-tensors"), **given).warnings == ()


def test_several_targets_stand_in_one_table_each_with_its_gate(made: tuple[Job, Report], tmp_path: Path) -> None:
    job, report = made
    targets = [
        {"name": "exact", "runtime": {"runtime": "transformers", "dtype": "float32"}},
        {"name": "half", "runtime": {"runtime": "transformers", "dtype": "bfloat16"}},
    ]
    gate = {**EVALUATION["gate"], "targets": {"half": {"fidelity": {"max_kl": 1e-9}}}}
    evaluation = {**EVALUATION, "eval": {"targets": targets, "tasks": EVALUATION["eval"]["tasks"]}, "gate": gate}
    (job.folder / "targets.yaml").write_text(yaml.safe_dump(evaluation), encoding="utf-8")
    artifact = path_of(report, "vllm-awq")
    found = compress.evaluate(artifact, against=job.folder / "model", by=job.folder / "targets.yaml", **job.places())
    name = artifact.name
    assert [(row.target, row.artifact) for row in found.rows] == [
        ("exact", "original"), ("exact", name), ("half", "original"), ("half", name),
    ]  # fmt: skip
    assert found.rows[0].metrics != found.rows[2].metrics
    verdicts = {(check.target, check.check, check.task): check.verdict for check in found.gate.checks}
    assert verdicts["exact", "fidelity.max_kl", "text"] == "pass"
    assert verdicts["half", "fidelity.max_kl", "text"] == "fail"
    assert verdicts["half", "perplexity.max_ratio", "text"] == "pass"
    assert found.gate.artifacts == {name: "fail"}
    assert "half" in (Path(found.run) / "report.md").read_text(encoding="utf-8")


def faults(job: Job, changes: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as raised:
        compress.run(job.recipe, set=changes, **job.places())
    return tuple(raised.value.faults)


def test_faults_of_targets_and_of_what_is_measured_there_are_told(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    here = {"name": "here", "runtime": {"runtime": "transformers"}}
    both = {**content(job)["eval"], "targets": [here]}
    assert "needs either runtime" in faults(job, {"eval": both})[0]
    neither = {"tasks": both["tasks"]}
    assert "needs either runtime" in faults(job, {"eval": neither})[0]
    (twice,) = faults(job, {"eval": {**neither, "targets": [here, here]}})
    assert "a second target called here; give one of them another name" in twice
    (limit,) = faults(job, {"gate": {"targets": {"there": {"size": {"max_ratio": 0.5}}}}})
    assert "gate.targets.there: no such target; those of eval are local" in limit
    (blind,) = faults(job, {"gate.grounding": {"confidence": 0.95}})
    assert "gate.grounding: nothing measures it; add eval.grounding" in blind
    (task,) = faults(job, {"eval.grounding": {"task": "text"}})
    assert "no task called text asks about images; those that do: scenes" in task
    (named,) = faults(job, {"gate.accuracy": {"min_recovery": 0.9, "confidence": 0.95, "tasks": {"text": 0.8}}})
    assert "gate.accuracy.tasks.text: no such task with scores; there are: scenes" in named
    (served,) = faults(job, {"eval.latency": {"concurrency": [1]}})
    assert "is measured of a server, and no target has one" in served


def test_an_artifact_that_is_none_and_two_of_one_name_are_refused(made: tuple[Job, Report], tmp_path: Path) -> None:
    job, report = made
    given: dict[str, Any] = {"against": job.folder / "model", "by": job.folder / "check.yaml", **job.places()}
    with pytest.raises(CheckpointError, match="nothing: no such folder"):
        compress.evaluate(tmp_path / "nothing", **given)
    artifact = path_of(report, "vllm-awq")
    with pytest.raises(UsageError, match=f"a second artifact called {artifact.name}"):
        compress.evaluate(artifact, artifact, **given)
    (job.folder / "odd.yaml").write_text(yaml.safe_dump({**EVALUATION, "speed": 1}), encoding="utf-8")
    with pytest.raises(RecipeError, match="speed: unknown key; allowed here: name, eval, gate"):
        compress.evaluate(artifact, against=job.folder / "model", by=job.folder / "odd.yaml", **job.places())


def test_the_command_ends_with_the_gates_verdict(made: tuple[Job, Report]) -> None:
    job, report = made
    command = command_line("eval", str(path_of(report, "vllm-awq")), "--against", str(job.folder / "model"))
    command += ["--by", str(job.folder / "check.yaml"), "--runs", str(job.runs), "--store", str(job.store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(str(job.runs))
    failed = subprocess.run([*command, "--set", "gate.fidelity.max_kl=1e-9"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "check: fail" in failed.stdout
