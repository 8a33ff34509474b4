"""vLLM serves every layout and scheme that its build for CPUs has kernels for, and answers as the in-process runtime does."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.numerics.scheme import Scheme
from tests.quantized import scheme
from tests.runtimes.agreement import TOKEN, Case, compare, make_artifact, serving
from tests.tiny import build_qwen2_5_vl

PRELOADED = ("vllm",)

CASES = {
    "gptq": Case("gptq", scheme(4, 32, symmetric=True), "float16"),
    "W8A8, inputs rounded token by token": Case("compressed-tensors", TOKEN, "float32"),
    "W8A8, inputs rounded by a fixed scale": Case(
        "compressed-tensors", Scheme(8, -1, symmetric=True, activations="tensor"), "float32"
    ),
    "FP8": Case("compressed-tensors", Scheme(8, -1, symmetric=True, type="float", activations="token"), "float32"),
    "4 bits, the vision tower in W8A8": Case("compressed-tensors", scheme(4, 64), "float16", vision=TOKEN),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_vllm_answers_as_the_in_process_runtime(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    artifact = make_artifact(build_qwen2_5_vl(tmp_path / "source"), tmp_path, case)
    agreement = compare(artifact, serving(case), tmp_path / "logs")
    assert agreement.clear == (), agreement
    assert agreement.same >= agreement.compared * 2 // 3, agreement
