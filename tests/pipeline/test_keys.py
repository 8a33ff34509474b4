"""A step's key holds what shapes its output, also where that lives in another environment or is another device."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.export import format as export_format
from compress.pipeline import plan
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.workers.environment import install
from tests.jobs import Job, make_job

_GENAI: dict[str, Any] = {"eval.runtime": {"runtime": "onnxruntime-genai"}}
_MODIFIERS = [{"stage": "llmcompressor", "modifiers": [{"QuantizationModifier": {"scheme": "W4A16", "targets": ["Linear"]}}]}]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), layers=1)


def keys_of(job: Job, settings: dict[str, Any]) -> dict[str, str]:
    return {step.name: step.key for step in make_plan(job.recipe, settings, Store(job.store)).steps}


def likeness(environment: Path, home: Path) -> Path:
    """Make what looks like an installed environment to whoever asks for its versions; return its packages' folder."""
    folder = home / environment.name
    for path in (environment / "compress-environment.json", environment / "bin" / "python"):
        (folder / path.relative_to(environment)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(environment)).touch()
    for path in environment.glob("lib/python*/site-packages/*.dist-info/METADATA"):
        place = folder / path.relative_to(environment)
        place.parent.mkdir(parents=True)
        shutil.copyfile(path, place)
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages


def upgrade(packages: Path, distribution: str) -> None:
    """Let a distribution have another version."""
    (found,) = (path for path in packages.iterdir() if path.name.partition("-")[0] == distribution)
    metadata = (found / "METADATA").read_text(encoding="utf-8")
    lines = ["Version: 999.0" if line.startswith("Version: ") else line for line in metadata.splitlines()]
    (found / "METADATA").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("environment", "distribution", "settings", "changed"),
    [
        (
            "onnxruntime-genai",
            "onnx_ir",
            {**_GENAI, "export": [{"format": "onnx-genai"}]},
            {"export onnx-genai", "verify onnx-genai", "measure original", "measure onnx-genai"},
        ),
        (
            "onnxruntime-genai",
            "onnx_ir",
            {**_GENAI, "export": [{"format": "onnx-genai", "decoder": "own"}]},
            {"verify onnx-genai-own", "measure original", "measure onnx-genai-own"},
        ),
        (
            "llmcompressor",
            "compressed_tensors",
            {"stages": _MODIFIERS, "export": [{"format": "vllm", "layout": "compressed-tensors"}]},
            {"llmcompressor", "export vllm-compressed-tensors", "measure vllm-compressed-tensors"},
        ),
        (
            "vllm",
            "torch",
            {"eval.runtime": {"runtime": "vllm"}, "export": [{"format": "vllm", "layout": "awq"}]},
            {"measure original", "measure vllm-awq"},
        ),
    ],
    ids=["builder", "runtime", "converter", "server"],
)
def test_what_another_environment_holds_belongs_to_the_keys(
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str,
    distribution: str,
    settings: dict[str, Any],
    changed: set[str],
) -> None:
    packages = likeness(install(environment, Silent()).python.parents[1], tmp_path)
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path))
    before = keys_of(job, settings)
    upgrade(packages, distribution)
    after = keys_of(job, settings)
    assert {name for name in before if before[name] != after[name]} == changed


def test_another_device_is_another_output_where_it_computes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"export": [{"format": "onnx"}], "eval.runtime": {"runtime": "onnxruntime"}}
    before = keys_of(job, settings)
    monkeypatch.setattr(export_format, "processor", lambda: "another processor")
    other = keys_of(job, settings)
    assert {name for name in before if before[name] != other[name]} == {"verify onnx"}
    devices: list[dict[str, str]] = []
    monkeypatch.setattr(plan, "default_device", lambda: "cuda")
    for name in ("NVIDIA A", "NVIDIA B"):
        monkeypatch.setattr(plan, "gpus", lambda name=name: (name,))
        devices.append(keys_of(job, settings))
    first, second = devices
    assert {name for name in first if first[name] != second[name]} == {
        "awq",
        "measure original",
        "export onnx",
        "verify onnx",
        "measure onnx",
    }
