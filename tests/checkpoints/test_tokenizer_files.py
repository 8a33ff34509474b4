"""A question is never cut, whatever a tokenizer's files say of lengths, and no artifact carries what would cut it elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.calibration.batches import Exchange, load_processor, process
from compress.checkpoints.artifact import copy_side_files, side_files
from compress.checkpoints.tokenizer_files import cutting_settings, uncut_folder
from compress.data.prompts import Prompt, load_tokenizer
from compress.data.prompts import load_processor as load_any_processor
from compress.families.resolve import family_at
from compress.pipeline.plan import make_plan
from compress.pipeline.store import Store
from compress.runtimes.inputs import Encoder
from tests.jobs import make_job
from tests.tiny import build_qwen2_5_vl, picture

TRUNCATION = {"direction": "Right", "max_length": 30, "strategy": "LongestFirst", "stride": 0}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
FIXED = PADDING | {"strategy": {"Fixed": 500}}
SHORT = PADDING | {"strategy": {"Fixed": 30}}
LONGEST = PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": 64}
HARMFUL: list[tuple[str, dict[str, Any], list[str]]] = [
    ("tokenizer.json", {"truncation": TRUNCATION}, ["truncation"]),
    ("tokenizer.json", {"padding": FIXED}, ["padding"]),
    ("tokenizer.json", {"truncation": TRUNCATION, "padding": SHORT}, ["truncation", "padding"]),
    ("tokenizer_config.json", {"max_length": 30}, ["max_length"]),
    ("tokenizer_config.json", {"padding": "max_length"}, ["padding"]),
    ("tokenizer_config.json", {"max_length": 30, "truncation": True, "stride": 2}, ["max_length", "truncation"]),
]
PROMPT = Prompt("q", "How many shapes are there in this picture, and which are red? " * 3, (picture(0, 56, 56),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("model") / "plain")


def changed(model: Path, folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Return a copy of a model whose tokenizer's file `name` holds further settings."""
    shutil.copytree(model, folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | settings))
    return folder


def tokens(folder: Path) -> list[list[int]]:
    """Return the tokens of one question, and of a text, as measurements and calibration read them."""
    processor = load_any_processor(folder)
    ((encoded,),) = Encoder(processor, family_at(folder), 0, 4096).prompts([PROMPT], 4, {})
    calibrated = process(load_processor(folder), [Exchange(PROMPT, None), Exchange(PROMPT, "red")])
    asked = calibrated["input_ids"][0][calibrated["attention_mask"][0] > 0]
    text = load_tokenizer(folder)(PROMPT.text)["input_ids"]
    several = processor.tokenizer([PROMPT.text, "short"])["input_ids"]
    return [encoded.sequences["input_ids"][0].tolist(), asked.tolist(), text, *several]


@pytest.mark.parametrize(("name", "settings", "found"), HARMFUL)
def test_a_question_is_whole_whatever_the_tokenizer_says(
    model: Path, tmp_path: Path, name: str, settings: dict[str, Any], found: list[str]
) -> None:
    folder = changed(model, tmp_path / "changed", name, settings)
    expected = tokens(model)
    assert len(expected[0]) > 60
    assert tokens(folder) == expected
    assert cutting_settings(folder) == {name: found}


@pytest.mark.parametrize(("name", "settings", "found"), HARMFUL)
def test_an_artifact_carries_nothing_that_cuts(
    model: Path, tmp_path: Path, name: str, settings: dict[str, Any], found: list[str]
) -> None:
    """The settings alone are left out; the other files are the source's byte for byte."""
    folder, target = changed(model, tmp_path / "changed", name, settings), tmp_path / "artifact"
    target.mkdir()
    copy_side_files(folder, target)
    assert cutting_settings(target) == {}
    content, carried = (json.loads((place / name).read_text()) for place in (folder, target))
    assert {key: value for key, value in carried.items() if key not in found} == {
        key: value for key, value in content.items() if key not in found
    }
    assert all(carried.get(key) is None for key in found)
    for other in set(side_files(folder)) - {name}:
        assert (folder / other).read_bytes() == (target / other).read_bytes()


def test_a_harmless_tokenizer_is_carried_as_it_is(model: Path, tmp_path: Path) -> None:
    folder, target = changed(model, tmp_path / "changed", "tokenizer.json", {"padding": LONGEST}), tmp_path / "artifact"
    target.mkdir()
    copy_side_files(folder, target)
    assert (folder / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    assert tokens(folder) == tokens(model)
    with uncut_folder(folder) as served:
        assert served == folder


def test_a_server_is_given_a_folder_that_cuts_nothing(model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "changed", "tokenizer.json", {"truncation": TRUNCATION})
    before = (folder / "tokenizer.json").read_bytes()
    with uncut_folder(folder) as served:
        assert json.loads((served / "tokenizer.json").read_text())["truncation"] is None
        assert sorted(path.name for path in served.iterdir()) == sorted(path.name for path in folder.iterdir())
        assert (served / "model.safetensors").resolve() == (folder / "model.safetensors").resolve()
    assert not served.exists()
    assert (folder / "tokenizer.json").read_bytes() == before


def test_the_plan_tells(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", layers=1)
    path = job.folder / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": TRUNCATION}))
    (note,) = [note for note in make_plan(job.recipe, {}, Store(job.store)).notes if "tokenizer.json" in note]
    assert note.startswith("tokenizer.json holds truncation, by which prompts would be cut")
