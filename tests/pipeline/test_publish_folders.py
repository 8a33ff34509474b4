"""Publishing replaces what was published, and never what was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.checkpoints.artifact import write_record
from compress.errors import StoreError
from compress.pipeline.publish_folders import check_publish_folders, publish_folder, published_files, replace_folder


def put(target: Path, text: str = "first") -> None:
    """Publish a small artifact."""
    with replace_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text("card", encoding="utf-8")
        write_record(folder, {"artifact": target.name})


def tree(folder: Path) -> dict[str, str]:
    """Return the content of every file below a folder, links as where they lead."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_text(encoding="utf-8")
        for path in paths
    }


def test_what_was_published_is_replaced_whole(tmp_path: Path) -> None:
    target = publish_folder(tmp_path, "recipe", "artifact")
    put(target)
    first = tree(target)
    put(target, "second")
    assert tree(target) == first | {
        "sub/weights": "second",
        "compress.json": (target / "compress.json").read_text(encoding="utf-8"),
    }
    assert sorted(path.name for path in target.parent.iterdir()) == [".publishing.lock", "artifact"]
    (target / "README.md").unlink()
    put(target, "third")
    assert (target / "README.md").exists()


def add_a_file(target: Path) -> None:
    (target / "sub" / "notes.txt").write_text("mine", encoding="utf-8")


def add_an_empty_folder(target: Path) -> None:
    (target / "mine").mkdir()


def add_a_link(target: Path) -> None:
    (target / "mine").symlink_to("README.md")


def replace_a_file_by_a_link(target: Path) -> None:
    (target / "README.md").rename(target.parent / "card")
    (target / "README.md").symlink_to(target.parent / "card")


def edit_the_card(target: Path) -> None:
    (target / "README.md").write_text("my own words", encoding="utf-8")


def empty_the_record(target: Path) -> None:
    (target / "compress.json").write_text("{}", encoding="utf-8")


def damage_the_record(target: Path) -> None:
    (target / "compress.json").write_text('{"files": ', encoding="utf-8")


def remove_the_record(target: Path) -> None:
    (target / "compress.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        add_a_file,
        add_an_empty_folder,
        add_a_link,
        replace_a_file_by_a_link,
        edit_the_card,
        empty_the_record,
        damage_the_record,
        remove_the_record,
    ],
    ids=lambda change: change.__name__,
)
def test_what_was_not_published_is_never_removed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    target = publish_folder(tmp_path, "recipe", "artifact")
    put(target)
    change(target)
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"artifact.*move it away, or name another publish.to"):
        check_publish_folders(tmp_path, "recipe", ["artifact"])
    with pytest.raises(StoreError, match=r"artifact.*move it away, or name another publish.to"):
        put(target, "second")
    assert tree(tmp_path) == before


def test_what_comes_while_an_artifact_is_copied_is_not_removed(tmp_path: Path) -> None:
    target = publish_folder(tmp_path, "recipe", "artifact")
    put(target)
    before = tree(target)
    with pytest.raises(StoreError, match=r"notes.txt: was not published"), replace_folder(target) as folder:
        (folder / "weights").write_text("second", encoding="utf-8")
        add_a_file(target)
    assert tree(target) == before | {"sub/notes.txt": "mine"}


def test_a_record_that_names_files_elsewhere_removes_none_of_them(tmp_path: Path) -> None:
    own_file = tmp_path / "mine.txt"
    own_file.write_text("mine", encoding="utf-8")
    target = publish_folder(tmp_path, "recipe", "artifact")
    target.mkdir(parents=True)
    (target / "compress.json").write_text(
        json.dumps({"files": {"../../mine.txt": "0" * 64, str(own_file): "0" * 64}}), encoding="utf-8"
    )
    put(target)
    assert own_file.read_text(encoding="utf-8") == "mine"
    assert (target / "sub" / "weights").exists()


def test_an_empty_folder_may_be_published_to(tmp_path: Path) -> None:
    target = publish_folder(tmp_path, "recipe", "artifact")
    target.mkdir(parents=True)
    check_publish_folders(tmp_path, "recipe", ["artifact"])
    put(target)
    assert (target / "README.md").exists()


def test_folders_with_names_as_temporary_ones_had_are_left_alone(tmp_path: Path) -> None:
    target = publish_folder(tmp_path, "recipe", "artifact")
    for name in (".artifact.new", ".artifact.old", ".publishing-mine"):
        (target.parent / name).mkdir(parents=True)
        (target.parent / name / "mine.txt").write_text("mine", encoding="utf-8")
    (target.parent / ".publishing-mine" / "place.json").write_text('{"place": "artifact", "work": "other"}', encoding="utf-8")
    put(target)
    put(target, "second")
    for name in (".artifact.new", ".artifact.old", ".publishing-mine"):
        assert (target.parent / name / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_symlinked_place_is_replaced_where_it_leads(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "current"
    put(real)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "artifact").symlink_to(real)
    target = publish_folder(tmp_path, "recipe", "artifact")
    assert target == real
    put(target, "second")
    assert (tmp_path / "recipe" / "artifact").readlink() == real
    assert (tmp_path / "recipe" / "artifact" / "sub" / "weights").read_text(encoding="utf-8") == "second"
    (tmp_path / "recipe" / "other").symlink_to("artifact")
    with pytest.raises(StoreError, match="both artifact and other would be published there"):
        check_publish_folders(tmp_path, "recipe", ["artifact", "other"])
    (tmp_path / "recipe" / "round").symlink_to("round")
    with pytest.raises(StoreError, match="round in a circle"):
        check_publish_folders(tmp_path, "recipe", ["round"])


@pytest.mark.parametrize("moment", ["marked", "copied", "moved away", "in place"])
def test_what_a_killed_call_left_is_cleared_and_what_it_had_moved_away_goes_back(tmp_path: Path, moment: str) -> None:
    target = publish_folder(tmp_path, "recipe", "artifact")
    put(target)
    work = target.with_name(".publishing-" + "0" * 32)
    work.mkdir()
    (work / "place.json").write_text(json.dumps({"place": "artifact", "work": work.name}), encoding="utf-8")
    if moment != "marked":
        (work / "new").mkdir()
        (work / "new" / "weights").write_text("half", encoding="utf-8")
    if moment in ("moved away", "in place"):
        target.rename(work / "old")
    if moment == "in place":
        put(tmp_path / "other" / "artifact", "second")
        (tmp_path / "other" / "artifact").rename(target)
    put(target.with_name("another"))
    assert sorted(path.name for path in target.parent.iterdir()) == [".publishing.lock", "another", "artifact"]
    assert (target / "sub" / "weights").read_text(encoding="utf-8") == ("second" if moment == "in place" else "first")
    assert published_files(target)


def test_a_copy_that_fails_leaves_what_was_published(tmp_path: Path) -> None:
    target = publish_folder(tmp_path, "recipe", "artifact")
    put(target)
    before = tree(target)
    with pytest.raises(ValueError, match="broke"), replace_folder(target) as folder:
        (folder / "half").write_text("x", encoding="utf-8")
        raise ValueError("broke")
    assert tree(target) == before
    assert sorted(path.name for path in target.parent.iterdir()) == [".publishing.lock", "artifact"]
