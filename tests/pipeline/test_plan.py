"""What a plan says of what it would make."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

import compress
from compress.cli.commands.plan import print_plan
from compress.errors import DataError, RecipeError, StoreError
from compress.pipeline.plan import Plan, make_plan
from compress.pipeline.plan_notes import full_vocabulary
from compress.pipeline.store import Store
from compress.recipe.model import read_recipe
from compress.runtimes.vllm.runtime import Vllm, positions_of
from tests.jobs import Job, make_job
from tests.tiny import build_mllama

SYMMETRIC = {"stages.0.symmetric": True, "export": [{"format": "vllm", "layout": "compressed-tensors"}]}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), layers=1)


def plan_with(job: Job, **settings: object) -> tuple[Plan, str]:
    """Return the plan of a changed recipe, and what is shown of it."""
    store = Store(job.store)
    plan = make_plan(job.recipe, {**SYMMETRIC, **settings}, store)
    console = Console(file=io.StringIO(), width=250)
    print_plan(plan, store, console)
    assert isinstance(console.file, io.StringIO)
    assert plan.summary(store)["notes"] == list(plan.notes)
    return plan, console.file.getvalue()


def test_what_needs_a_gpu_is_said_once_in_the_plan(job: Job) -> None:
    zero_points = {"stages.0.symmetric": False}
    plan, output = plan_with(job, **zero_points)
    assert plan.notes == ()
    assert "note:" not in output
    plan, output = plan_with(job, **zero_points, **{"stages.0.bits": 3})
    (note,) = plan.notes
    assert note.endswith("(and 6 more): vLLM's build for CPUs runs weights of 4 bits, not 3: this artifact needs a GPU")
    assert output.count(f"note: {note}") == 1


def test_what_a_stage_says_of_its_settings_is_in_the_plan(job: Job) -> None:
    plan, output = plan_with(job, **{"stages.0.symmetric": True})
    (note,) = plan.notes
    assert note.startswith("awq: symmetric grids of 4 bits or fewer")
    assert " ".join(output.split()).count(f"note: {note}") == 1  # the terminal breaks its lines


@pytest.mark.parametrize(("vocabulary", "told"), [(152_064, 1), (600, 0)])
def test_what_the_whole_vocabulary_costs_is_told_where_it_is_much(job: Job, vocabulary: int, told: int) -> None:
    recipe = read_recipe(job.recipe, {"eval.runtime": {"runtime": "vllm", "url": "http://127.0.0.1:1"}})[0]
    notes = full_vocabulary(recipe, {"text_config": {"vocab_size": vocabulary}})
    assert len(notes) == told
    for note in notes:
        assert note.startswith(
            "at local every model scores 320 tokens of each task over the whole vocabulary, in about 3.21 GB of "
        )


def test_what_depends_on_the_widths_a_run_chooses_is_said_so(job: Job) -> None:
    stage = {
        "stage": "gptq",
        "bits": "auto",
        "budget": {"bits_per_weight": 6},
        "group_size": 32,
        "widths": [4, 8],
    }
    plan, _ = plan_with(job, stages=[stage])
    (note,) = plan.notes
    assert note.startswith("where the stage chooses so: ")
    assert "vLLM's build for CPUs runs weights of 4 bits, not 8" in note


def test_the_last_vllm_that_serves_a_model_is_said_in_the_plan(job: Job, tmp_path: Path) -> None:
    plan, output = plan_with(job, **{"model.source": str(build_mllama(tmp_path / "model")), "stages.0.symmetric": False})
    (note,) = plan.notes
    assert note.startswith(
        "vLLM served MllamaForConditionalGeneration up to version 0.10.2 and no later one does: serve it with that"
    )
    assert note.endswith("evaluate it with runtime: transformers")
    assert f"note: {note}" in output


def test_scales_of_keys_and_values_are_refused_where_the_layout_has_no_place(job: Job) -> None:
    layouts = [{"format": "vllm", "layout": "awq"}]
    with pytest.raises(RecipeError, match="layout awq has no place for the scales of keys and values"):
        plan_with(job, **{"stages.0.kv_cache": "fp8", "export": layouts})
    plan, _ = plan_with(job, **{"stages.0.kv_cache": "fp8"})
    expected = {step.name: step.expected_bytes for step in plan.steps}
    sizes = [expected[step] for step in ("awq", "export vllm-compressed-tensors")]
    assert sizes[0] == sizes[1]


def test_calibration_without_images_where_they_are_needed_is_refused_in_the_plan(job: Job, tmp_path: Path) -> None:
    text = [{"dataset": "text", "source": str(job.folder / "calibration.txt"), "samples": 4, "tokens": 32}]
    with pytest.raises(RecipeError, match=r"stages.0: awq observes layers of qwen2.5-vl that only images reach"):
        plan_with(job, **{"calibration.sets": text, "stages.0.targets": ["decoder", "vision"]})
    plan_with(job, **{"calibration.sets": text})
    mllama = {"model.source": str(build_mllama(tmp_path)), "calibration.sets": text}
    with pytest.raises(RecipeError, match=r"stages.0: awq observes layers of mllama that only images reach"):
        plan_with(job, **mllama)
    plan_with(job, **mllama, stages=[{"stage": "rtn", "bits": 4, "group_size": 32, "symmetric": True, "targets": ["vision"]}])


def test_a_place_that_is_taken_is_known_before_anything_is_made(job: Job, tmp_path: Path) -> None:
    target = tmp_path / "tiny" / "vllm-compressed-tensors"
    target.mkdir(parents=True)
    plan_with(job, **{"publish.to": str(tmp_path)})
    (target / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(StoreError, match=r"vllm-compressed-tensors: holds something else than a published artifact; move it away"):
        plan_with(job, **{"publish.to": str(tmp_path)})
    with pytest.raises(StoreError, match="holds something else"):
        compress.run(job.recipe, set={**SYMMETRIC, "publish.to": str(tmp_path)}, **job.places())
    assert not job.runs.exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match=r"file: cannot be written"):
        plan_with(job, **{"publish.to": str(tmp_path / "file")})


def questions(job: Job, name: str, count: int, **change: object) -> str:
    """Write a file of questions about an image that is there, each with the changed fields; return its path."""
    row = {"image": "images/200.png", "question": "What is this?", "answer": "red", **change}
    rows = [{name: value for name, value in row.items() if value is not None} for _ in range(count)]
    path = job.folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_items_of_the_power_figures_are_those_there_are(job: Job) -> None:
    gate = {"gate.accuracy": {"min_recovery": 0.97, "confidence": 0.95}}
    task = {"task": "vqa", "definition": "scenes", "source": questions(job, "eight.jsonl", 8)}
    plan, output = plan_with(job, **gate, **{"eval.tasks.0": {**task, "samples": 5000}})
    assert plan.items == {"scenes": 8}
    (note,) = plan.power
    assert note.startswith("scenes: 8 items (5,000 are asked for, and its data hold no more) resolve nothing")
    assert f"note: {note}" in " ".join(output.split())
    plan, _ = plan_with(job, **gate, **{"eval.tasks.0": {**task, "samples": 3}})
    assert plan.items == {"scenes": 3}
    assert plan.power[0].startswith("scenes: 3 items resolve nothing")
    plan, _ = plan_with(job, **gate, **{"eval.tasks.0": task})
    assert plan.power[0].startswith("scenes: 8 items resolve nothing")
    assert plan.summary(Store(job.store))["items"] == {"scenes": 8}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": None}, r"bad.jsonl:1: has no field 'question'"),
        ({"answer": None}, r"question .* has no"),
        ({"image": "images/none.png"}, r"none.png: no such file"),
        ({"image": "test.txt"}, r"test.txt: .*image"),
    ],
    ids=["question", "answer", "image", "no picture"],
)
def test_a_question_that_cannot_be_asked_is_told_in_the_plan(job: Job, change: dict[str, object], said: str) -> None:
    source = questions(job, "bad.jsonl", 2, **change)
    with pytest.raises(DataError, match=said):
        plan_with(job, **{"eval.tasks.0.source": source})


def test_a_text_that_cannot_be_read_is_told_in_the_plan(job: Job) -> None:
    path = job.folder / "rows.jsonl"
    path.write_text('{"words": "some text"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*text"):
        plan_with(job, **{"eval.tasks.1.source": str(path)})


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (
            {"max_ratio": 0.05},
            r"will take 0\.\d+ times the original's bytes, and gate.size.max_ratio allows 0.05",
        ),
        ({"max_bits_per_weight": 2}, r"will take [\d.]+ bits per weight, and gate.size.max_bits_per_weight allows 2"),
        ({"max_bytes": 10_000}, r"will take [\d,]+ bytes, and gate.size.max_bytes allows 10,000"),
    ],
)
def test_a_limit_on_size_that_cannot_be_kept_is_told(job: Job, limit: dict[str, float], said: str) -> None:
    plan, output = plan_with(job, **{"gate.size": limit})
    (note,) = plan.gate_notes
    assert re.search(rf"^the gate cannot pass: vllm-compressed-tensors {said}; ", note)
    assert f"warning: {note}" in output
    assert plan.summary(Store(job.store))["gate"] == [note]
    assert plan_with(job)[0].gate_notes == ()


def test_what_is_predicted_is_what_the_gate_sees(job: Job) -> None:
    """A limit just above the size that the gate finds is kept, one just below the predicted is told."""
    settings = {
        **SYMMETRIC,
        "eval.tasks": [
            {"task": "perplexity", "dataset": "text", "source": str(job.folder / "test.txt"), "window": 32, "samples": 4}
        ],
    }
    report = compress.run(job.recipe, set={**settings, "publish": None}, **job.places())
    ratio = report.rows[1].size_ratio
    above, below = (plan_with(job, **{"gate.size": {"max_ratio": ratio * share}})[0].gate_notes for share in (1.0, 0.9))
    assert above == ()
    assert len(below) == 1


def test_more_tokens_than_a_model_has_positions_are_refused_in_the_plan(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((job.folder / "model" / "config.json").read_text(encoding="utf-8"))
    positions = config["text_config"]["max_position_embeddings"]
    for length in (positions, positions + 1):
        faults = Vllm(runtime="vllm", max_model_len=length).length_faults(config, 32)
        assert bool(faults) == (length > positions)
    settings = {"eval.runtime": {"runtime": "vllm", "max_model_len": positions + 1}}
    with pytest.raises(
        RecipeError, match=rf"eval.runtime: max_model_len is {positions + 1:,}, and the model has {positions:,} positions"
    ):
        plan_with(job, **settings)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert Vllm(runtime="vllm", max_model_len=positions + 1).length_faults(config, 32) == []


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (None, 1000),
        ({"type": "mrope", "mrope_section": [1, 2, 2]}, 1000),
        ({"rope_type": "yarn", "factor": 4.0}, 1000),
        ({"rope_type": "linear", "factor": 4.0}, 4000),
        ({"type": "dynamic", "factor": 2}, 2000),
        ({"type": "dynamic", "factor": None}, 1000),
    ],
)
def test_positions_are_vllms(rope: dict[str, object] | None, positions: int) -> None:
    text = {"model_type": "qwen2", "max_position_embeddings": 1000, "rope_scaling": rope}
    assert positions_of({"model_type": "qwen2_vl", "text_config": text}) == positions


def test_windows_that_do_not_fit_a_server_are_refused_in_the_plan(job: Job) -> None:
    settings = {"eval.runtime": {"runtime": "vllm", "max_model_len": 64}}
    with pytest.raises(
        RecipeError, match=r"eval.runtime: windows of 64 tokens and the one that vLLM adds do not fit into 64; .*max_model_len: 65"
    ):
        plan_with(job, **settings, **{"eval.tasks.1.window": 64})
