import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.checkpoints.artifact import file_digest
from compress.errors import StoreError
from compress.files import disk_errors, write_json
from compress.pipeline.store import Store
from compress.pipeline.store_entries import Origin


def nothing() -> None:
    return None


def fill(store: Store, key: str, text: str = "content") -> None:
    with store.lock(key, nothing), store.write(key, "a step") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file.txt").write_text(text, encoding="utf-8")


def interrupt(store: Store, key: str) -> None:
    """Leave what an interrupted step keeps, to go on from."""
    origin = Origin("org/model", "the recipe")
    with pytest.raises(KeyboardInterrupt), store.lock(key, nothing), store.write(key, "a step", origin, resume=True) as folder:
        (folder / "block-0").write_text("done", encoding="utf-8")
        raise KeyboardInterrupt


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k1")
    entry = Store(tmp_path).find("k1", pytest.fail)
    assert entry is not None
    assert (entry.folder / "sub" / "file.txt").read_text(encoding="utf-8") == "content"
    assert entry.bytes == len("content")
    assert store.find("k2", pytest.fail) is None


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="broke"), store.lock("k", nothing), store.write("k", "a step") as folder:
        (folder / "half").write_text("x", encoding="utf-8")
        raise ValueError("broke")
    assert store.find("k", pytest.fail) is None
    assert list((tmp_path / "aside").iterdir()) == []


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "record"])
def test_a_damaged_entry_is_a_miss_with_a_warning(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    path = tmp_path / "entries" / "k" / "data" / "sub" / "file.txt"
    match damage:
        case "shorter":
            path.write_text("con", encoding="utf-8")
        case "other":
            path.write_text("CONTENT", encoding="utf-8")
        case "gone":
            path.unlink()
        case _:
            (tmp_path / "entries" / "k" / "entry.json").write_text("{", encoding="utf-8")
    warnings: list[str] = []
    assert store.find("k", warnings.append) is None
    assert len(warnings) == 1
    assert "made again" in warnings[0]
    fill(store, "k")
    assert store.find("k", pytest.fail) is not None


def test_a_touched_but_unchanged_file_is_still_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    os.utime(tmp_path / "entries" / "k" / "data" / "sub" / "file.txt", (1, 1))
    assert store.find("k", pytest.fail) is not None


def change_unseen(path: Path) -> None:
    """Give a file other content of the same size and time."""
    before = path.stat()
    path.write_text("CONTENT", encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_verify_reads_what_a_hit_trusts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    change_unseen(tmp_path / "entries" / "k" / "data" / "sub" / "file.txt")
    assert store.find("k", pytest.fail) is not None
    assert "digest" in store.verify()["k"]
    warnings: list[str] = []
    assert store.find("k", warnings.append) is None
    assert "made again" in warnings[0]


def test_what_another_version_may_have_written_is_told_of_but_kept_until_it_is_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    entry = tmp_path / "entries" / "k" / "entry.json"
    entry.write_text('{"format": "another"}', encoding="utf-8")
    assert store.verify() == {"k": "no readable entry.json"}
    assert entry.exists()
    store.prune(unused_for=3600, keep_bytes=None)
    assert entry.exists()
    store.prune(unused_for=0, keep_bytes=None)
    assert not entry.exists()


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.prepare()
    (tmp_path / "aside" / "k").mkdir()
    (tmp_path / "aside" / "k.dead").mkdir()
    (tmp_path / "aside" / "other.dead").mkdir()
    fill(store, "k")
    assert [path.name for path in (tmp_path / "aside").iterdir()] == ["other.dead"]
    store.prune(unused_for=1e9, keep_bytes=None)
    assert list((tmp_path / "aside").iterdir()) == []


def test_a_resumable_step_finds_what_a_killed_one_had_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.lock("k", nothing), store.write("k", "a step", resume=True) as folder:
        (folder / "block-0").write_text("done", encoding="utf-8")
        raise KeyboardInterrupt
    assert store.find("k", pytest.fail) is None
    with store.lock("k", nothing), store.write("k", "a step", resume=True) as folder:
        assert (folder / "block-0").read_text(encoding="utf-8") == "done"
    with store.lock("k", nothing), store.write("k", "a step") as folder:
        assert list(folder.iterdir()) == []


def test_prune_spares_what_a_living_run_uses(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "used")
    fill(store, "unused")
    with store.using(["used"]):
        assert [entry.key for entry in Store(tmp_path).prune(unused_for=0, keep_bytes=None)] == ["unused"]
    assert [entry.key for entry in store.prune(unused_for=0, keep_bytes=None)] == ["used"]


def test_prune_forgets_the_mark_of_a_dead_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    write_json(tmp_path / "active" / "dead.json", ["k"])
    assert [entry.key for entry in store.prune(unused_for=0, keep_bytes=None)] == ["k"]


def test_a_run_sweeps_the_marks_of_killed_ones_and_leaves_those_of_living_ones(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from compress.pipeline.store import Store\n"
        "with Store(Path(sys.argv[1])).using(['k']): os.kill(os.getpid(), 9)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    active = tmp_path / "active"
    (active / ".half.json.abcd").write_text("[", encoding="utf-8")
    assert len(list(active.iterdir())) >= 3
    with Store(tmp_path).using(["mine"]):
        with Store(tmp_path).using(["other"]):
            assert sorted(json.loads(path.read_text(encoding="utf-8"))[0] for path in active.glob("*.json")) == ["mine", "other"]
            assert len(list(active.iterdir())) == 4
        assert [json.loads(path.read_text(encoding="utf-8")) for path in active.glob("*.json")] == [["mine"]]
    assert list(active.iterdir()) == []


def test_while_a_living_runs_mark_cannot_be_read_nothing_is_pruned(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    with store.using(["k"]):
        (mark,) = (tmp_path / "active").glob("*.json")
        mark.write_text("3", encoding="utf-8")
        with pytest.raises(StoreError, match="end the run that uses this store first"):
            store.prune(unused_for=0, keep_bytes=None)
    assert store.find("k", pytest.fail) is not None


def test_prune_of_what_is_unused_for_no_time_takes_all(tmp_path: Path) -> None:
    """Also what a clock that was ahead has dated in the future, what cannot be read, and what interrupted steps keep."""
    store = Store(tmp_path)
    fill(store, "ahead")
    os.utime(tmp_path / "entries" / "ahead" / "entry.json", (1e11, 1e11))
    fill(store, "unreadable")
    (tmp_path / "entries" / "unreadable" / "entry.json").write_text("[]", encoding="utf-8")
    os.utime(tmp_path / "entries" / "unreadable", (1e11, 1e11))
    interrupt(store, "half")
    would = store.prune(unused_for=0, keep_bytes=None, dry=True)
    assert {item.key for item in would} == {"ahead", "unreadable", "half"}
    assert {item.key for item in store.items()} == {"ahead", "unreadable", "half"}
    assert {item.key for item in store.prune(unused_for=0, keep_bytes=None)} == {"ahead", "unreadable", "half"}
    assert store.items() == []
    assert [*(tmp_path / "entries").iterdir(), *(tmp_path / "aside").iterdir()] == []


def test_what_an_interrupted_step_keeps_is_counted_and_kept_as_long_as_outputs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    interrupt(store, "half")
    (item,) = store.items()
    assert (item.kind, item.step, item.origin, item.key) == ("unfinished", "a step", Origin("org/model", "the recipe"), "half")
    assert item.bytes >= len("done")
    assert store.prune(unused_for=3600, keep_bytes=None) == []
    assert (tmp_path / "aside" / "half" / "data" / "block-0").exists()
    with store.lock("half", nothing):
        assert store.prune(unused_for=0, keep_bytes=None) == []
    assert store.prune(unused_for=0, keep_bytes=None) == [item]


def test_an_entry_says_for_which_model_and_recipe_it_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock("k", nothing), store.write("k", "a step", Origin("org/model", "the recipe")) as folder:
        (folder / "file").write_text("x", encoding="utf-8")
    (item,) = store.items()
    assert (item.kind, item.origin) == ("output", Origin("org/model", "the recipe"))
    assert sorted(path.name for path in (tmp_path / "entries" / "k").iterdir()) == ["data", "entry.json"]


ROW: dict[str, object] = {"size": 7, "sha256": "0" * 64, "changed": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["sub/file.txt"]},
        {"files": {}},
        {"files": {"../../outside": ROW}},
        {"files": {"/etc/hostname": ROW}},
        {"files": {"sub/file.txt": ROW | {"size": "many"}}},
        {"files": {"sub/file.txt": ROW | {"sha256": None}}},
        {"key": "another"},
        {"made": None},
        {"warnings": 3},
        {"something": "else"},
    ],
)
def test_a_record_written_by_hand_is_a_miss_with_a_warning(tmp_path: Path, change: dict[str, object]) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    path = tmp_path / "entries" / "k" / "entry.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | change)
    warnings: list[str] = []
    assert store.find("k", warnings.append) is None
    assert len(warnings) == 1
    assert "no readable entry.json; the step is made again" in warnings[0]
    assert [item.kind for item in store.items()] == ["unreadable"]


def test_a_file_that_was_put_into_an_entry_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    (tmp_path / "entries" / "k" / "data" / "more.txt").write_text("x", encoding="utf-8")
    warnings: list[str] = []
    assert store.find("k", warnings.append) is None
    assert "more.txt is no part of it; the step is made again" in warnings[0]


def test_a_thorough_look_reads_what_a_hit_trusts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "k")
    change_unseen(tmp_path / "entries" / "k" / "data" / "sub" / "file.txt")
    assert store.find("k", pytest.fail) is not None
    warnings: list[str] = []
    assert store.find("k", warnings.append, thorough=True) is None
    assert "its digest is not the recorded one; the step is made again" in warnings[0]
    assert store.find("k", warnings.append) is None


@pytest.mark.parametrize("content", ["[1]", '{"PATH": 3}', '{"PATH": [1, 2]}', "{", '{"PATH": []}'])
def test_damaged_fingerprints_cost_only_time(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    path = tmp_path / "file"
    path.write_bytes(b"one" * 1_000_000)
    (store.folder / "fingerprints.json").write_text(content.replace("PATH", str(path)), encoding="utf-8")
    assert store.fingerprint(path) == file_digest(path)


def test_prune_keeps_to_a_size_and_drops_the_longest_unused_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for age, key in enumerate(("old", "middle", "new")):
        fill(store, key, "x" * 100)
        os.utime(tmp_path / "entries" / key / "entry.json", (1000 + age, 1000 + age))
    assert [entry.key for entry in store.prune(unused_for=1e12, keep_bytes=150)] == ["old", "middle"]


def test_fingerprints_follow_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    path = tmp_path / "file"
    path.write_bytes(b"one" * 1_000_000)
    first = store.fingerprint(path)
    assert store.fingerprint(path) == first
    path.write_bytes(b"two!" * 1_000_000)
    assert store.fingerprint(path) != first
    assert str(path) in json.loads((tmp_path / "store" / "fingerprints.json").read_text(encoding="utf-8"))


def test_a_store_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match=r"file.*name a folder you can write.*--store"):
        Store(tmp_path / "file").prepare()


def test_a_full_disk_is_told_as_one() -> None:
    with pytest.raises(StoreError, match=r"free some space"), disk_errors(Path("/dev")), Path("/dev/full").open("w") as file:
        file.write("x" * 100_000)
