"""The step of a run that compares an artifact with the checkpoint it came from, and what stops before or in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import compress
from compress.cli.main import main
from compress.errors import RecipeError, StoreError, VerificationError
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.export.onnx.graphs import GRAPHS
from compress.export.onnx.graphs.layer_builder import LayerBuilder
from compress.export.onnx.graphs.qwen_vision import vision_encoder
from compress.families.resolve import family_at
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.progress import Silent
from compress.report.model import Report
from tests.jobs import Job, make_job
from tests.tiny import build_llava, build_qwen2_5_vl

ONNX = [{"format": "onnx"}]
SETTINGS = {
    "stages": [{"stage": "rtn", "bits": 4, "group_size": 32}],
    "export": ONNX,
    "eval": {"runtime": {"runtime": "onnxruntime"}, "tasks": [{"task": "vqa", "definition": "scenes", "source": "test.jsonl"}]},
    "gate": {"size": {"max_ratio": 4.0}},
}


def ungrounded(parts: LayerBuilder) -> None:
    """Emit a vision encoder whose output is all zeros: what an exporter might do wrong, and no file check can see."""
    vision_encoder(parts)
    nodes = parts.graph.nodes
    output = next(node for node in nodes if node.output[0] == "image_features")
    output.input[0] = parts.graph.op("Mul", output.input[0], parts.graph.const(np.zeros(1, np.float32)))
    nodes.append(nodes.pop(nodes.index(output)))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def finished(job: Job) -> Report:
    return compress.run(job.recipe, set=SETTINGS, **job.places())


@pytest.fixture
def broken_export(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rows = {**GRAPHS["qwen2.5-vl"], "vision_encoder": f"{__name__}:ungrounded"}
    monkeypatch.setitem(GRAPHS, "qwen2.5-vl", rows)
    yield


def test_a_run_verifies_each_artifact_before_it_is_measured(job: Job, finished: Report) -> None:
    assert [timing.step for timing in finished.timings][-3:] == ["export onnx", "verify onnx", "measure onnx"]
    found = finished.verifications["onnx"]
    assert found.roundings == ("float32", "inputs in blocks")
    assert [part.component for part in found.components] == ["vision encoder", "embeddings", "decoder", "decoder"]
    page = (Path(finished.run) / "report.md").read_text(encoding="utf-8")
    assert "Parts of the artifact against the checkpoint it was exported from" in page
    assert "| onnx | vision encoder | as it runs | 4 | " in page
    assert "| artifact | same with right image | same with wrong image | same with no image |" in page
    assert 'id="verification"' in (Path(finished.run) / "report.html").read_text(encoding="utf-8")
    (card,) = job.published.rglob("onnx/README.md")
    assert "Answers of the artifact against the checkpoint's:" in card.read_text(encoding="utf-8")
    stored = json.loads((Path(finished.run) / "report.json").read_text(encoding="utf-8"))
    assert stored["verifications"]["onnx"]["components"][0]["component"] == "vision encoder"
    again = compress.run(job.recipe, set=SETTINGS, **job.places())
    assert all(timing.cached for timing in again.timings)
    assert again.verifications == finished.verifications


def test_what_an_artifact_is_made_with_is_part_of_the_verifications_key(job: Job, tmp_path: Path) -> None:
    keys = {
        make_plan(job.recipe, {**SETTINGS, "export": [{"format": "onnx", **fields}]}, Store(tmp_path)).steps[-2].key
        for fields in ({}, {"dtype": "float16"}, {"accuracy_level": 0}, {"head_bits": 8})
    }
    assert len(keys) == 4


@pytest.mark.usefixtures("broken_export", "finished")
def test_a_blind_artifact_stops_the_run_names_the_part_and_is_tried_again(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        f"--set={key}={json.dumps(value)}"
        for key, value in {**SETTINGS, "export": [{"format": "onnx", "accuracy_level": 0}]}.items()
    ]
    arguments = ["run", str(job.recipe), "--runs", str(tmp_path / "runs"), "--store", str(job.store), *more]
    published = list(job.published.rglob("*"))
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == VerificationError.exit_code == 1
        told = capsys.readouterr().err
        assert "vision_encoder.onnx: the vision encoder differs from the checkpoint's" in told
        assert "Run again with --fresh" in told
    assert list(job.published.rglob("*")) == published
    steps = [entry.step for entry in Store(job.store).entries()]
    assert steps.count("export onnx-exact") == 1
    assert "verify onnx-exact" not in steps
    assert not list((job.store / "aside").iterdir())
    run = sorted((tmp_path / "runs").iterdir())[-1]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events[-1]["event"] == "stopped"
    assert events[-1]["error"].startswith("VerificationError")
    assert not any(event.get("step") == "measure onnx-exact" for event in events)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"stage": "rtn", "bits": 3, "group_size": 32}, r"MatMulNBits holds 4 or 8 bits, not 3; set bits: 4 or 8, or format: vllm"),
        ({"stage": "fp8"}, r"8-bit floats have no operator on CPUs; use stage: int8, awq or gptq, or format: vllm"),
        ({"stage": "rtn", "bits": 4, "group_size": 8}, r"groups of 8 input channels .* set group_size: 32, 64 or 128"),
        ({"stage": "rtn", "bits": 4, "group_size": 32, "kv_cache": "fp8"}, r"no place for the scales of keys and values"),
    ],
)
def test_a_scheme_without_an_operator_is_refused_in_the_plan(job: Job, tmp_path: Path, stage: dict[str, object], told: str) -> None:
    with pytest.raises(RecipeError, match=rf"export\.0: .*{told}"):
        make_plan(job.recipe, {**SETTINGS, "stages": [stage]}, Store(tmp_path))


def test_a_family_without_graphs_is_refused_in_the_plan(job: Job, tmp_path: Path) -> None:
    model = build_llava(tmp_path / "model", text={"model_type": "phi3", "pad_token_id": 0})
    with pytest.raises(RecipeError) as caught:
        make_plan(job.recipe, {**SETTINGS, "model.source": str(model)}, Store(tmp_path))
    (fault,) = caught.value.faults
    assert "export.0: there are ONNX graphs for qwen2-vl, qwen2.5-vl, " in fault
    assert "is none of them; use format: vllm" in fault


def test_widths_that_only_the_run_chooses_are_refused_where_one_has_no_operator(job: Job, tmp_path: Path) -> None:
    stage = {
        "stage": "gptq",
        "bits": "auto",
        "budget": {"bits_per_weight": 4.5},
        "group_size": 32,
        "widths": [3, 4, 8],
        "symmetric": True,
    }
    with pytest.raises(RecipeError, match=r"export\.0: .*holds 4 or 8 bits, not 3"):
        make_plan(job.recipe, {**SETTINGS, "stages": [stage]}, Store(tmp_path))
    plan = make_plan(
        job.recipe, {**SETTINGS, "stages": [{**stage, "widths": [4, 8], "budget": {"bits_per_weight": 6}}]}, Store(tmp_path)
    )
    assert "verify onnx" in [step.name for step in plan.steps]


@pytest.mark.parametrize("graph", ["vision_encoder", "embed_tokens", "decoder_model_merged"])
def test_a_disk_that_fills_while_weights_are_written_is_told_and_nothing_is_kept(tmp_path: Path, graph: str) -> None:
    if not Path("/dev/full").exists():
        pytest.fail("this test needs a system with /dev/full")
    source, store = build_qwen2_5_vl(tmp_path / "model"), Store(tmp_path / "store")
    with (
        store.lock("key", lambda: None),
        pytest.raises(StoreError, match=r"No space left on device; free some space, or name a folder on another disk"),
        store.write("key", "export onnx") as target,
    ):
        (target / f"{graph}.onnx_data").symlink_to("/dev/full")
        Onnx(format="onnx").apply(ExportContext(source, target, family_at(source), Silent()))
    assert store.entries() == []
    assert [path.name for path in store.folder.rglob("*") if not path.is_dir()] == ["key.lock"]
