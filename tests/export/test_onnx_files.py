"""Damaged artifacts of graphs are refused before anything is measured."""

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import CheckpointError
from compress.pipeline.plan import plan_evaluation
from compress.pipeline.store import Store
from tests.jobs import Job, make_job
from tests.verification.artifacts import export_onnx
from tests.verification.test_verification import SETTINGS


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = make_job(tmp_path / "job", layers=1)
    export_onnx(made.folder / "model", made.folder / "artifact")
    return made


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "harm", "told"),
    [
        ("decoder_model_merged.onnx_data", Path.unlink, r"decoder_model_merged.onnx: its data file .* is missing; put it beside"),
        ("vision_encoder.onnx_data", truncate, r"vision_encoder.onnx_data: truncated: .*; copy it again, or export it again$"),
        ("embed_tokens.onnx", Path.unlink, r"embed_tokens.onnx: missing; export it again, or copy the whole folder$"),
        ("vision_encoder.onnx", truncate, r"vision_encoder.onnx: truncated, or no ONNX file \(.*\); export it again$"),
        ("config.json", Path.unlink, r"config.json: missing"),
    ],
)
def test_a_damaged_artifact_is_refused_in_the_plan(job: Job, name: str, harm: Callable[[Path], None], told: str) -> None:
    artifact = job.folder / "artifact"
    store, original = Store(job.store), str(job.folder / "model")
    (planned,) = plan_evaluation(job.recipe, SETTINGS, store, artifacts=[artifact], original=original).artifacts
    assert planned.artifact == "artifact"
    harm(artifact / name)
    with pytest.raises(CheckpointError, match=rf"^{artifact}/{told}"):
        plan_evaluation(job.recipe, SETTINGS, store, artifacts=[artifact], original=original)
