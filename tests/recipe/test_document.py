from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.recipe.document import override, parse_setting, read_document


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_place_knows_its_line(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "name: a\nstages:\n  - stage: awq\n    bits: 4\n"))
    assert document.whereabouts(("stages", 0, "bits")) == "recipe.yaml:4"
    assert document.whereabouts(("stages", 0, "group_size")) == "recipe.yaml:3"
    assert document.whereabouts(("gate",)) == "recipe.yaml:1"


def test_a_key_that_stands_twice_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:3: name: stands twice"):
        read_document(write(tmp_path, "name: a\nstages: []\nname: b\n"))


@pytest.mark.parametrize("text", ["a: [1, 2", "- 1\n- 2\n", "", "a: !!python/object:os.system {}"])
def test_what_is_no_mapping_of_plain_data_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml"):
        read_document(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing.yaml: no such file"):
        read_document(tmp_path / "nothing.yaml")


def test_overrides_replace_values_and_are_named_in_messages(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "stages:\n  - {stage: awq, bits: 4}\n"))
    override(document, {"stages.0.bits": 3, "gate.size.max_ratio": 0.5})
    assert document.data == {"stages": [{"stage": "awq", "bits": 3}], "gate": {"size": {"max_ratio": 0.5}}}
    assert document.whereabouts(("stages", 0, "bits")) == "--set stages.0.bits=3"


def test_overrides_that_lead_nowhere_are_all_told(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "name: a\nstages:\n  - {stage: awq}\n"))
    with pytest.raises(RecipeError) as caught:
        override(document, {"stages.5.bits": 3, "name.first": 1})
    assert caught.value.faults == (
        "--set stages.5.bits: stages has 1 item, numbered from 0; 5 names none of them",
        "--set name.first: name is 'a', which holds no first",
    )


def test_a_value_that_is_no_yaml_is_told_how_to_write_it() -> None:
    with pytest.raises(RecipeError, match=r"found undefined alias 'down_proj'; put quotes around what is a text"):
        parse_setting("stages.0.ignore.0=*down_proj")
    assert parse_setting('stages.0.ignore=["*down_proj"]') == ("stages.0.ignore", ["*down_proj"])


def test_a_source_given_by_override_is_looked_up_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = read_document(write(tmp_path, "model: {source: org/name}\n"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    override(document, {"model.source": "here"})
    assert document.data["model"]["source"] == str(tmp_path / "here")


def test_a_source_inside_an_overriding_mapping_is_looked_up_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = read_document(write(tmp_path, "calibration: {sets: [{dataset: text}]}\n"))
    (tmp_path / "text.txt").write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    override(document, {"calibration.sets.0": {"dataset": "text", "source": "text.txt"}, "model.source": tmp_path})
    assert document.data["calibration"]["sets"] == [{"dataset": "text", "source": str(tmp_path / "text.txt")}]
    assert document.data["model"]["source"] == str(tmp_path)


def test_settings_are_read_as_yaml() -> None:
    assert parse_setting("stages.0.bits=3") == ("stages.0.bits", 3)
    assert parse_setting("a.b=[x, 1]") == ("a.b", ["x", 1])
    with pytest.raises(RecipeError, match="must be PATH=VALUE"):
        parse_setting("stages.0.bits")


def test_a_path_after_set_that_is_not_there_is_looked_for_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "recipe.yaml").write_text("model: {source: model}\n")
    monkeypatch.chdir(tmp_path / "here")
    document = read_document(tmp_path / "recipe.yaml")
    override(document, {"model.source": "questions.jsonl"})
    assert document.data["model"]["source"] == str(tmp_path / "here" / "questions.jsonl")
    (tmp_path / "questions.jsonl").write_text("")
    override(document, {"model.source": "questions.jsonl"})
    assert document.data["model"]["source"] == "questions.jsonl"  # which is then taken from the recipe's folder
    override(document, {"model.source": "org/name"})
    assert document.data["model"]["source"] == "org/name"
