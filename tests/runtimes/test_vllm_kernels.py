"""What vLLM's build for CPUs cannot multiply on a processor is said before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compress
from compress import hardware
from compress.checkpoints.checkpoint import read_config
from compress.checkpoints.quantization_config import KernelKind, kernel_kinds_in, products_of
from compress.errors import MissingError
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.export.vllm.limits import Layout
from compress.families.resolve import family_of
from compress.numerics.scheme import Scheme
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.runtimes.runtime import OpenContext
from compress.runtimes.vllm import runtime as vllm
from compress.runtimes.vllm.runtime import Vllm
from compress.runtimes.vllm.start import plain_environment
from compress.workers.environment import install
from tests.jobs import make_job
from tests.quantized import round_checkpoint, scheme
from tests.runtimes.agreement import SILENT, TOKEN
from tests.tiny import build_qwen2_5_vl

PRELOADED = ("vllm",)

FOUR: frozenset[KernelKind] = frozenset({"4-bit weights"})
NONE: frozenset[KernelKind] = frozenset()
EIGHT: frozenset[KernelKind] = frozenset({"8-bit inputs"})
EIGHT_BITS = Scheme(8, -1, symmetric=True, activations="tensor")
FLOATS = Scheme(8, -1, symmetric=True, type="float", activations="token")


@pytest.fixture
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine's processor have the features that the test asks for."""
    monkeypatch.setattr(vllm, "processor_features", lambda: frozenset(request.param))
    install("vllm", SILENT)


def test_the_processor_of_this_machine_is_told_with_what_it_can_do() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert hardware.processor() in cpuinfo
    for feature in hardware.processor_features():
        assert f" {feature} " in cpuinfo.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "four", "eight"),
    [
        (("avx2", "fma"), True, True),
        (("avx2", "avx512f"), False, True),
        (("avx2", "avx_vnni"), True, False),
        (("avx2", "avx512f", "avx512_vnni"), False, False),
        ((), False, False),
    ],
    indirect=["processor"],
)
def test_what_a_processor_lacks_is_told_of_what_needs_it(processor: None, four: bool, eight: bool) -> None:
    runtime = Vllm(runtime="vllm")
    assert bool(runtime.kernel_faults(FOUR)) == four
    assert bool(runtime.kernel_notes(EIGHT)) == eight
    assert not runtime.kernel_faults(EIGHT)
    assert not runtime.kernel_notes(FOUR)
    assert not runtime.kernel_faults(NONE)
    elsewhere, reference = Vllm(runtime="vllm", url="http://127.0.0.1:1"), Vllm(runtime="vllm", kernels="reference")
    assert not elsewhere.kernel_faults(FOUR)
    assert not elsewhere.kernel_notes(EIGHT)
    assert not reference.kernel_faults(FOUR)
    assert not reference.kernel_notes(NONE)
    (note,) = reference.kernel_notes(EIGHT)
    assert "multiplied in plain torch (kernels: reference)" in note


@pytest.mark.slow
@pytest.mark.parametrize("processor", [("avx2",)], indirect=True)
def test_a_run_that_cannot_be_measured_here_is_refused_before_its_first_step(processor: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, layers=1)
    settings = {"export": [{"format": "vllm", "layout": "compressed-tensors"}], "eval.runtime": {"runtime": "vllm"}}
    plan = make_plan(job.recipe, settings, Store(job.store))
    (fault,) = plan.kernel_faults
    assert "no kernel for 4-bit weights on a processor without AVX-512" in fault
    assert "set kernels: reference" in fault
    with pytest.raises(MissingError, match="no kernel for 4-bit weights"):
        compress.run(job.recipe, set=settings, runs=job.folder / "runs", store=job.store)
    assert not list(Store(job.store).entries())


@pytest.mark.parametrize(
    ("layout", "quantized", "needs"),
    [
        ("awq", scheme(4, 32), FOUR),
        ("gptq", scheme(4, 32, symmetric=True), FOUR),
        ("gptq", scheme(8, 32, symmetric=True), NONE),
        ("compressed-tensors", scheme(4, 32), FOUR),
        ("compressed-tensors", scheme(3, 32), NONE),
        ("compressed-tensors", TOKEN, EIGHT),
        ("compressed-tensors", EIGHT_BITS, EIGHT),
        ("compressed-tensors", FLOATS, NONE),
    ],
)
@pytest.mark.slow
def test_an_artifact_needs_what_its_scheme_needs(
    layout: Layout, quantized: Scheme, needs: frozenset[KernelKind], tmp_path: Path
) -> None:
    source, rounded, artifact = build_qwen2_5_vl(tmp_path / "source"), tmp_path / "rounded", tmp_path / "artifact"
    round_checkpoint(source, rounded, quantized)
    artifact.mkdir()
    family = family_of(json.loads((source / "config.json").read_text(encoding="utf-8")))
    VllmExport(format="vllm", layout=layout).apply(ExportContext(rounded, artifact, family, SILENT))
    assert products_of([quantized]) == kernel_kinds_in(read_config(artifact)) == needs


@pytest.mark.slow
@pytest.mark.parametrize("processor", [("avx2",)], indirect=True)
def test_a_server_that_could_not_multiply_is_not_started(processor: None, tmp_path: Path) -> None:
    config = build_qwen2_5_vl(tmp_path / "model") / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config.write_text(json.dumps(settings), encoding="utf-8")
    context = OpenContext.at(config.parent, tmp_path / "logs", SILENT)
    with pytest.raises(MissingError, match="no kernel for 4-bit weights"), Vllm(runtime="vllm").open(context):
        pass
    assert not (tmp_path / "logs").exists()


def test_a_server_reports_nothing_and_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    variables = plain_environment()
    assert {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items() <= variables.items()
    assert "HF_TOKEN" not in variables
