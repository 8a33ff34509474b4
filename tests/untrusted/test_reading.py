"""Files of a folder, JSON and text from outside pass one guard."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from compress.errors import CheckpointError, DataError
from compress.untrusted.reading import inside, parse_json, printable, read_bytes, read_object


def test_what_would_steer_a_terminal_is_shown_as_an_escape() -> None:
    assert (
        printable("red\x1b[2J\x07 \u202e\u061cblue\ud800\nnext\tone é") == "red\\x1b[2J\\x07 \\u202e\\u061cblue\\ud800\nnext\tone é"
    )


def test_a_link_out_of_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("{}")
    (folder / "config.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"config\.json: leads out of its folder, to .*secret"):
        inside(folder, folder / "config.json")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        read_object(folder / "config.json", root=folder)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs_and_to_no_others(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--demo/snapshots/abc"
    snapshot.mkdir(parents=True)
    for repository in ("models--acme--demo", "models--acme--other"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs/123").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "other.json").symlink_to("../../../models--acme--other/blobs/123")
    assert read_object(snapshot / "config.json", root=snapshot) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"other\.json: leads out of its folder"):
        inside(snapshot, snapshot / "other.json")


def test_only_blobs_of_the_hubs_own_cache_may_be_led_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may lie below a folder that is called blobs itself, and holds more than blobs."""
    cache, folder = tmp_path / "blobs" / "hub", tmp_path / "model"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for place in ("models--acme--demo/blobs", "models--acme--demo/refs"):
        (cache / place).mkdir(parents=True)
        (cache / place / "123").write_text('{"a": 1}')
    folder.mkdir()
    (folder / "config.json").symlink_to(cache / "models--acme--demo/blobs/123")
    (folder / "other.json").symlink_to(cache / "models--acme--demo/refs/123")
    assert read_object(folder / "config.json", root=folder) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"other\.json: leads out of its folder"):
        inside(folder, folder / "other.json")


def test_links_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        inside(tmp_path, tmp_path / "a")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_bytes(tmp_path / "config.json", 100)


def test_a_file_that_is_too_large_names_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    with pytest.raises(DataError, match=r"a\.json: has 9 bytes \(limit json_bytes = .*COMPRESS_LIMIT_JSON_BYTES"):
        read_bytes(tmp_path / "a.json", 8, DataError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', r"not readable as JSON \(.*line 1, column"),
        ("[" * 65 + "1" + "]" * 65, r"nests too deep \(limit json_depth = 64"),
        ("[" * 100_000, "nests too deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nests too deep"),
        ("1" * 310, "an integer of 310 digits; limit integer_digits = 309"),
        ("9" * 5000, "an integer of 5,000 digits"),
        ("NaN", "NaN is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"),
        ("1e999", "too large for a float"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"a\\u0000": 1}', "NUL"),
        (b"\xff", "not readable as JSON"),
        (b"", "not readable as JSON"),
    ],
)
def test_json_that_nothing_could_bear_is_one_message(text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^row 3: {message}|^row 3: .*{message}"):
        parse_json(text, "row 3", DataError)


def test_json_as_people_have_it_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1000000000000000019884624838656, -1.5e3, "\\ud83d\\ude00", null]}', "x") == {
        "a": [1000000000000000019884624838656, -1500.0, "😀", None]
    }
    assert parse_json("[" * 64 + "1" + "]" * 64, "x") is not None


def test_a_value_that_is_no_object_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        read_object(tmp_path / "config.json")
