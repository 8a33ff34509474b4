"""The demo recipe as it ships: its model, its verdict, and vLLM saying what the in-process runtime says."""

from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress.data.prompts import Prompt
from compress.eval.results import ScoreMetrics, read_measurement
from compress.eval.tasks.vqa import Vqa as VqaTask
from compress.pipeline.runner import RunFolders
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.recipe.model import read_recipe
from compress.report.model import Report
from compress.runtimes.runtime import OpenContext
from compress.runtimes.vllm.runtime import Vllm
from compress.workers.environment import install
from tests.runtimes.agreement import KERNELS
from tests.tiny import build_qwen2_5_vl, build_qwen2_vl

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
MODEL = RECIPE.parent / "demo" / "model"

PRELOADED = ("vllm",)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> RunFolders:
    folder = tmp_path_factory.mktemp("demo")
    return RunFolders(runs=folder / "runs", store=folder / "store")


@pytest.fixture(scope="module")
def report(folders: RunFolders) -> Report:
    return compress.run(RECIPE, set={"publish.to": str(folders.runs / "published")}, runs=folders.runs, store=folders.store)


def test_the_model_is_small_and_right(report: Report) -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 6_000_000
    metrics = report.rows[0].metrics["scenes"]
    assert isinstance(metrics, ScoreMetrics) and metrics.task == "vqa"
    assert metrics.items == 400
    assert metrics.score >= 0.95


def test_the_gate_passes_and_both_layouts_are_published(report: Report) -> None:
    assert report.gate.verdict == "pass"
    assert [Path(row.path).name for row in report.published] == ["vllm-awq", "vllm-compressed-tensors"]
    for row in report.rows[1:]:
        assert row.fidelity is not None
        assert 0 < row.fidelity["text"].kl_mean < 0.05


def test_no_more_is_asked_once_it_is_settled(report: Report, folders: RunFolders) -> None:
    settings = {
        "gate.accuracy": {"min_recovery": 0.9, "confidence": 0.95, "sequential": 4},
        "eval.tasks": [{"task": "vqa", "definition": "scenes", "source": str(MODEL.parent / "test.parquet"), "samples": 400}],
        "gate.perplexity": None,
        "export": [{"format": "vllm", "layout": "awq"}],
        "publish.to": str(folders.runs / "settled"),
    }
    settled = compress.run(RECIPE, set=settings, runs=folders.runs, store=folders.store)
    assert settled.gate.verdict == "pass"
    (check,) = (check for check in settled.gate.checks if check.check == "accuracy.min_recovery")
    assert "settled after part 2 of 4" in check.reason
    original, artifact = (row.metrics["scenes"] for row in settled.rows)
    assert isinstance(original, ScoreMetrics)
    assert isinstance(artifact, ScoreMetrics)
    assert (original.items, artifact.items) == (400, 200)
    assert original.score == report.rows[0].metrics["scenes"].score  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_vllm_answers_as_the_in_process_runtime_does(
    report: Report, folders: RunFolders, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "awq":  # as users start it: every process imports vLLM, and the worker has one of its own
        monkeypatch.delenv("COMPRESS_RUNTIMES")
        monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
        monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    install("vllm", Silent())
    task = read_recipe(RECIPE, {})[0].eval.tasks[0]
    assert isinstance(task, VqaTask)
    questions = task.questions([Path(task.data.source)])[::4]
    prompts = [
        Prompt(question.id, task.resolved_definition().format_prompt(question.question), question.images) for question in questions
    ]
    row = next(row for row in report.rows if row.artifact == f"vllm-{layout}")
    assert folders.store is not None
    kept = [entry.folder for entry in Store(folders.store).entries() if entry.step == f"measure vllm-{layout}"]
    asked = [read_measurement(folder).questions("scenes") for folder in kept]
    here = {item.id: item.said for item in max(asked, key=len)}
    runtime = Vllm(runtime="vllm", dtype="float16", max_model_len=512, kv_cache_gib=1, kernels=KERNELS)
    with runtime.open(OpenContext.at(Path(row.path), tmp_path, Silent())) as session:
        there = {answer.id: answer.text for answer in session.answer(prompts, task.resolved_definition().max_new_tokens, Silent())}
    assert len(there) == 100
    assert sum(here[name] == said for name, said in there.items()) >= 98


@pytest.mark.parametrize("build", [build_qwen2_5_vl, build_qwen2_vl])
def test_another_checkpoint_goes_through_the_same_recipe(folders: RunFolders, tmp_path: Path, build: Callable[..., Path]) -> None:
    """Tied embeddings and other shapes; its random weights answer nothing, so the gate is left with size and perplexity."""
    build(tmp_path / "model", hidden=256, intermediate=704, heads=8, kv_heads=2, tied=True)
    settings = {
        "model.source": str(tmp_path / "model"),
        "calibration.sets.1.samples": 16,
        "eval.tasks.0.samples": 24,
        "eval.tasks.1.samples": 16,
        "gate": {"size": {"max_ratio": 0.8}, "perplexity": {"max_ratio": 1.2, "confidence": 0.95}},
        "publish.to": str(tmp_path / "published"),
    }
    report = compress.run(RECIPE, set=settings, runs=folders.runs, store=folders.store)
    assert report.gate.verdict == "pass"
    assert len(report.published) == 2
