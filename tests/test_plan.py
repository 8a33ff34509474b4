"""What a plan says of what it would make."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import compress
from compress.errors import RecipeError, StoreError
from compress.plan import Plan, make_plan, show
from compress.store import Store
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
    show(plan, store, console)
    assert isinstance(console.file, io.StringIO)
    assert plan.summary(store)["notes"] == list(plan.notes)
    return plan, console.file.getvalue()


def test_what_needs_a_gpu_is_said_once_in_the_plan(job: Job) -> None:
    plan, shown = plan_with(job)
    assert plan.notes == ()
    assert "note:" not in shown
    plan, shown = plan_with(job, **{"stages.0.bits": 3})
    (note,) = plan.notes
    assert note.endswith("(and 6 more): vLLM's build for CPUs runs weights of 4 bits, not 3: this artifact needs a GPU")
    assert shown.count(f"note: {note}") == 1


def test_what_depends_on_the_widths_a_run_chooses_is_said_so(job: Job) -> None:
    stage = {
        "stage": "gptq",
        "bits": "auto",
        "budget": {"bits_per_weight": 6},
        "group_size": 32,
        "widths": [4, 8],
        "symmetric": True,
    }
    plan, _ = plan_with(job, stages=[stage])
    (note,) = plan.notes
    assert note.startswith("where the stage chooses so: ")
    assert "vLLM's build for CPUs runs weights of 4 bits, not 8" in note


def test_the_last_vllm_that_serves_a_model_is_said_in_the_plan(job: Job, tmp_path: Path) -> None:
    plan, shown = plan_with(job, **{"model.source": str(build_mllama(tmp_path / "model"))})
    (note,) = plan.notes
    assert note.startswith(
        "vLLM served MllamaForConditionalGeneration up to version 0.10.2 and no later one does: serve it with that"
    )
    assert note.endswith("evaluate it with runtime: transformers")
    assert f"note: {note}" in shown


def test_scales_of_keys_and_values_are_refused_where_the_layout_has_no_place(job: Job) -> None:
    layouts = [{"format": "vllm", "layout": "awq"}]
    with pytest.raises(RecipeError, match="layout awq has no place for the scales of keys and values"):
        plan_with(job, **{"stages.0.kv_cache": "fp8", "export": layouts})
    plan, _ = plan_with(job, **{"stages.0.kv_cache": "fp8"})
    sizes = [plan.by_name[step].expected_bytes for step in ("awq", "export vllm-compressed-tensors")]
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
    place = tmp_path / "tiny" / "vllm-compressed-tensors"
    place.mkdir(parents=True)
    plan_with(job, **{"publish.to": str(tmp_path)})
    (place / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(StoreError, match=r"vllm-compressed-tensors: holds something else than a published artifact; move it away"):
        plan_with(job, **{"publish.to": str(tmp_path)})
    with pytest.raises(StoreError, match="holds something else"):
        compress.run(job.recipe, set={**SYMMETRIC, "publish.to": str(tmp_path)}, **job.places())
    assert not job.runs.exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match=r"file: cannot be written"):
        plan_with(job, **{"publish.to": str(tmp_path / "file")})
