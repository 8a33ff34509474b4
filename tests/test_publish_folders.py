"""Publishing replaces what was published, and never what was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifact import write_record
from compress.errors import StoreError
from compress.publish_folders import check_publish_folders, publish_folder, published_files, replace_folder


def put(place: Path, text: str = "first") -> None:
    """Publish a small artifact."""
    with replace_folder(place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text("card", encoding="utf-8")
        write_record(folder, {"artifact": place.name})


def tree(folder: Path) -> dict[str, str]:
    """Return the content of every file below a folder, links as where they lead."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_text(encoding="utf-8")
        for path in paths
    }


def test_what_was_published_is_replaced_whole(tmp_path: Path) -> None:
    place = publish_folder(tmp_path, "recipe", "artifact")
    put(place)
    first = tree(place)
    put(place, "second")
    assert tree(place) == first | {"sub/weights": "second", "compress.json": (place / "compress.json").read_text(encoding="utf-8")}
    assert sorted(path.name for path in place.parent.iterdir()) == [".publishing.lock", "artifact"]
    (place / "README.md").unlink()
    put(place, "third")
    assert (place / "README.md").exists()


def add_a_file(place: Path) -> None:
    (place / "sub" / "notes.txt").write_text("mine", encoding="utf-8")


def add_an_empty_folder(place: Path) -> None:
    (place / "mine").mkdir()


def add_a_link(place: Path) -> None:
    (place / "mine").symlink_to("README.md")


def replace_a_file_by_a_link(place: Path) -> None:
    (place / "README.md").rename(place.parent / "card")
    (place / "README.md").symlink_to(place.parent / "card")


def edit_the_card(place: Path) -> None:
    (place / "README.md").write_text("my own words", encoding="utf-8")


def empty_the_record(place: Path) -> None:
    (place / "compress.json").write_text("{}", encoding="utf-8")


def damage_the_record(place: Path) -> None:
    (place / "compress.json").write_text('{"files": ', encoding="utf-8")


def remove_the_record(place: Path) -> None:
    (place / "compress.json").unlink()


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
    place = publish_folder(tmp_path, "recipe", "artifact")
    put(place)
    change(place)
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=r"artifact.*move it away, or name another publish.to"):
        check_publish_folders(tmp_path, "recipe", ["artifact"])
    with pytest.raises(StoreError, match=r"artifact.*move it away, or name another publish.to"):
        put(place, "second")
    assert tree(tmp_path) == before


def test_what_comes_while_an_artifact_is_copied_is_not_removed(tmp_path: Path) -> None:
    place = publish_folder(tmp_path, "recipe", "artifact")
    put(place)
    before = tree(place)
    with pytest.raises(StoreError, match=r"notes.txt: was not published"), replace_folder(place) as folder:
        (folder / "weights").write_text("second", encoding="utf-8")
        add_a_file(place)
    assert tree(place) == before | {"sub/notes.txt": "mine"}


def test_a_record_that_names_files_elsewhere_removes_none_of_them(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    place = publish_folder(tmp_path, "recipe", "artifact")
    place.mkdir(parents=True)
    (place / "compress.json").write_text(json.dumps({"files": {"../../mine.txt": "0" * 64, str(mine): "0" * 64}}), encoding="utf-8")
    put(place)
    assert mine.read_text(encoding="utf-8") == "mine"
    assert (place / "sub" / "weights").exists()


def test_an_empty_folder_may_be_published_to(tmp_path: Path) -> None:
    place = publish_folder(tmp_path, "recipe", "artifact")
    place.mkdir(parents=True)
    check_publish_folders(tmp_path, "recipe", ["artifact"])
    put(place)
    assert (place / "README.md").exists()


def test_folders_with_names_as_temporary_ones_had_are_left_alone(tmp_path: Path) -> None:
    place = publish_folder(tmp_path, "recipe", "artifact")
    for name in (".artifact.new", ".artifact.old", ".publishing-mine"):
        (place.parent / name).mkdir(parents=True)
        (place.parent / name / "mine.txt").write_text("mine", encoding="utf-8")
    (place.parent / ".publishing-mine" / "place.json").write_text('{"place": "artifact", "work": "other"}', encoding="utf-8")
    put(place)
    put(place, "second")
    for name in (".artifact.new", ".artifact.old", ".publishing-mine"):
        assert (place.parent / name / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_symlinked_place_is_replaced_where_it_leads(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "current"
    put(real)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "artifact").symlink_to(real)
    place = publish_folder(tmp_path, "recipe", "artifact")
    assert place == real
    put(place, "second")
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
    place = publish_folder(tmp_path, "recipe", "artifact")
    put(place)
    work = place.with_name(".publishing-" + "0" * 32)
    work.mkdir()
    (work / "place.json").write_text(json.dumps({"place": "artifact", "work": work.name}), encoding="utf-8")
    if moment != "marked":
        (work / "new").mkdir()
        (work / "new" / "weights").write_text("half", encoding="utf-8")
    if moment in ("moved away", "in place"):
        place.rename(work / "old")
    if moment == "in place":
        put(tmp_path / "other" / "artifact", "second")
        (tmp_path / "other" / "artifact").rename(place)
    put(place.with_name("another"))
    assert sorted(path.name for path in place.parent.iterdir()) == [".publishing.lock", "another", "artifact"]
    assert (place / "sub" / "weights").read_text(encoding="utf-8") == ("second" if moment == "in place" else "first")
    assert published_files(place)


def test_a_copy_that_fails_leaves_what_was_published(tmp_path: Path) -> None:
    place = publish_folder(tmp_path, "recipe", "artifact")
    put(place)
    before = tree(place)
    with pytest.raises(ValueError, match="broke"), replace_folder(place) as folder:
        (folder / "half").write_text("x", encoding="utf-8")
        raise ValueError("broke")
    assert tree(place) == before
    assert sorted(path.name for path in place.parent.iterdir()) == [".publishing.lock", "artifact"]
