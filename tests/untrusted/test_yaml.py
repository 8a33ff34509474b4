"""YAML from outside is read within limits, aliases counted as often as they are used."""

import pytest

from compress.untrusted.yaml import YamlError, parse_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"line 5: has too many values, aliases counted \(limit yaml_values = 20,000"),
        (MERGES, "too many values, aliases counted"),
        ("[" * 65 + "]" * 65, r"nests too deep \(limit json_depth = 64"),
        ("[" * 100_000, "nests too deep"),
        ("a:\n\tb: 1", "line 2: .*cannot start any token; indent with spaces"),
        ("a: &a [*a]", "an alias stands within what it stands for"),
        ("a: " + "x" * 256_000, r"has 256,003 bytes \(limit yaml_bytes = 256,000"),
        ("a: " + "9" * 5000, "5000 digits|4300 digits"),
        ("a: 0x" + "f" * 300, "an integer has more digits than any float"),
        ("a: 2024-13-45", "month must be in"),
        ("a: .inf", "a number is infinite"),
        ("a: [.nan]", "a number is infinite"),
        ('a: "\\0"', "NUL"),
        ('a: "\\ud800"', "surrogate"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("? [a, b]\n: c", "unhashable key"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
    ],
)
def test_yaml_that_nothing_could_bear_is_one_message(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        parse_yaml(text)


def test_aliases_are_read_where_they_are_few() -> None:
    assert parse_yaml("a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: 3}").data == {
        "a": {"b": [1, 2]},
        "c": {"b": [1, 2]},
        "d": {"b": [1, 2], "e": 3},
    }
    assert parse_yaml("[" * 64 + "]" * 64).data is not None
    assert parse_yaml("").root is None


def test_lines_count_from_one() -> None:
    with pytest.raises(YamlError) as caught:
        parse_yaml("a: 1\nb: [1, 2")
    assert caught.value.line == 2
