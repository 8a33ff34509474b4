"""The whole way on a CUDA device: the same recipe, twice with the same bytes, and as good as on the CPU."""

from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoints.artifact import folder_digests
from tests.jobs import make_job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def test_a_run_on_cuda_is_repeatable_and_as_good_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    first = compress.run(job.recipe, **job.places())
    assert first.gate.verdict == "pass"
    assert any(timing.peak_device_bytes for timing in first.timings if timing.step == "awq")
    digests = {row.artifact: folder_digests(Path(row.path)) for row in first.rows[1:]}
    again = compress.run(job.recipe, fresh=True, **job.places())
    assert {row.artifact: folder_digests(Path(row.path)) for row in again.rows[1:]} == digests
    monkeypatch.setattr("compress.pipeline.plan.default_device", lambda: "cpu")
    here = compress.run(job.recipe, **job.places())
    fidelity = [report.rows[1].fidelity for report in (first, here)]
    assert fidelity[0] is not None
    assert fidelity[1] is not None
    assert fidelity[0]["text"].kl_mean == pytest.approx(fidelity[1]["text"].kl_mean, rel=0.1)
