"""The proof in the real runtime: sound artifacts of the demo model pass in vLLM, broken ones fail, each for its reason."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

import compress
from compress.progress import Silent
from compress.report.model import Report
from compress.workers.environment import install
from tests.runtimes.agreement import FEW_BLOCKS, KERNELS

PRELOADED = ("vllm",)

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "demo.yaml"
MODEL = DEMO.parent / "demo" / "model"
QUESTIONS, TEXT = (DEMO.parent / "demo" / name for name in ("test.parquet", "test.txt"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # a server starts nine times

EVALUATION = {
    "name": "verdicts",
    "eval": {
        "runtime": {
            "runtime": "vllm",
            "dtype": "float16",
            "max_model_len": 512,
            "kv_cache_gib": 1,
            "arguments": list(FEW_BLOCKS),
            "kernels": KERNELS,
            "whole_tokens": 96,
        },
        "tasks": [
            {"task": "vqa", "definition": "scenes", "source": str(QUESTIONS), "samples": 120},
            {"task": "perplexity", "dataset": "text", "source": str(TEXT), "window": 256, "samples": 12},
        ],
        "grounding": {"task": "scenes", "samples": 32},
    },
    "gate": {
        "accuracy": {"min_recovery": 0.95, "confidence": 0.95},
        "fidelity": {"max_kl": 0.005},
        "grounding": {"confidence": 0.95},
        "size": {"max_ratio": 0.9},
    },
}
LATENCY = {
    "eval.latency": {
        "concurrency": 2,
        "requests": 8,
        "warmup": 1,
        "rounds": 2,
        "resolution": [112, 112],
        "prompt_tokens": 16,
        "output_tokens": 8,
        "component_repeats": 0,
    },
    "gate.latency": {"max_p95_ratio": 1e12},  # two rounds on a busy machine give any interval, and its pace is not tested here
}


def broken(artifact: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy an artifact and change its tensors."""
    shutil.copytree(artifact, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def blind(tensors: dict[str, Tensor]) -> None:
    """Let the vision path give nothing."""
    names = [name for name in tensors if "merger.mlp.2" in name]
    assert names
    for name in names:
        tensors[name].zero_()


def scrambled(tensors: dict[str, Tensor]) -> None:
    """Give the groups of one decoder layer the scales of others."""
    names = [name for name in tensors if "layers.0." in name and name.endswith(".scales")]
    assert len(names) == 7
    for name in names:
        scales = tensors[name]
        order = torch.randperm(scales.numel(), generator=torch.Generator().manual_seed(0))
        tensors[name] = scales.flatten()[order].view(scales.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(EVALUATION), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    install("vllm", Silent())
    places: dict[str, Any] = {"runs": folder / "runs", "store": folder / "store"}
    few = [{"task": "vqa", "definition": "scenes", "source": str(QUESTIONS), "samples": 8}]
    made: dict[str, Path] = {}
    kinds = {
        "w4a16": ({"stage": "awq", "bits": 4, "group_size": 64}, "awq"),
        "w8a8": ({"stage": "int8"}, "compressed-tensors"),
    }
    for name, (stage, layout) in kinds.items():
        changes = {
            "name": name,
            "stages": [stage],
            "export": [{"format": "vllm", "layout": layout}],
            "eval": {"runtime": {"runtime": "transformers"}, "tasks": few},
            "gate": {"size": {"max_ratio": 0.9}},
            "calibration.sets.0.samples": 16,
            "calibration.sets.1.samples": 16,
            "publish.to": str(folder / "published"),
        }
        (published,) = compress.run(DEMO, set=changes, **places).published
        made[name] = Path(published.path).rename(folder / name)
    made["blind"] = broken(made["w4a16"], folder / "blind", blind)
    made["scrambled"] = broken(made["w4a16"], folder / "scrambled", scrambled)
    return compress.evaluate(*made.values(), against=MODEL, by=folder / "evaluation.yaml", **places)


def failed(report: Report, artifact: str) -> set[str]:
    return {check.check for check in report.gate.checks if check.artifact == artifact and check.verdict == "fail"}


def test_sound_artifacts_pass_and_broken_ones_fail(report: Report) -> None:
    assert report.gate.artifacts == {"w4a16": "pass", "w8a8": "pass", "blind": "fail", "scrambled": "fail"}
    assert report.gate.verdict == "fail"


def test_a_dead_vision_path_fails_for_not_looking_at_images(report: Report) -> None:
    assert "grounding" in failed(report, "blind")
    (check,) = (check for check in report.gate.checks if (check.artifact, check.check) == ("blind", "grounding"))
    assert "answers do not depend on the image" in check.reason
    assert "0.0 % of answers changed" in check.reason


def test_permuted_scales_fail_for_what_they_do_to_the_predictions_while_images_still_matter(report: Report) -> None:
    assert failed(report, "scrambled") == {"fidelity.max_kl"}
    checks = {check.check: check.verdict for check in report.gate.checks if check.artifact == "scrambled"}
    assert checks["grounding"] == "pass"


def test_an_artifact_has_latencies_beside_the_originals(report: Report, folder: Path) -> None:
    """What was answered is in the store: only the load of the two rounds is new."""
    assert report.gate.verdict == "fail"
    places: dict[str, Any] = {"runs": folder / "runs", "store": folder / "store"}
    loaded = compress.evaluate(folder / "w4a16", against=MODEL, by=folder / "evaluation.yaml", set=LATENCY, **places)
    assert loaded.gate.verdict == "pass"
    latency = loaded.latency["local"]
    assert set(latency.artifacts) == {"w4a16"}
    for model in (latency.original, latency.artifacts["w4a16"]):
        assert [point.point.concurrency for point in model.points] == [2]
        for point in model.points:
            assert (point.pooled.requests, point.pooled.failed, point.pooled.client) == (16, 0, "vllm bench serve")
            assert len(point.rounds) == 2
            assert point.figures["ttft_p95"].value > 0
    assert all(point.ratios["e2el_p95"].interval is not None for point in latency.artifacts["w4a16"].points)


def test_the_server_is_compared_with_itself(report: Report) -> None:
    noise = report.rows[0].noise
    assert noise is not None
    assert noise["scenes"].kl_mean < 1e-3
    assert (noise["scenes"].lost, noise["scenes"].gained) == (0, 0)
