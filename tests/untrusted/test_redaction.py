"""Keys that servers repeat, in whatever form, and where they must not arrive."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from compress.checkpoints.artifact import write_record
from compress.cli.display import Display
from compress.cli.main import main
from compress.errors import RecipeError, ServerError
from compress.pipeline.events import EventLog
from compress.untrusted.redaction import redact, redact_answer, redact_value, remember_secret

KEY = "sk-Proj/abc+def=0123456789&xyz"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"

FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "shouted": str.upper,
    "percent": lambda key: quote(key, safe=""),
    "path": quote,
    "json": json.dumps,
    "html": html.escape,
    "hex": lambda key: key.encode().hex(),
    "cut": lambda key: key[:-7],
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "urlsafe": lambda key: base64.urlsafe_b64encode(key.encode()).decode(),
    "within-base64": lambda key: base64.b64encode(b"Bearer " + key.encode() + b" was sent").decode(),
    "basic": lambda key: base64.b64encode(b"u:" + key.encode()).decode(),
}


def holds(text: str, secret: str) -> bool:
    """Return whether eight characters of a secret, or of what base64 makes of it, stand anywhere in a text."""
    encoded = [base64.b64encode(b"\0" * before + secret.encode()).decode()[4:-4] for before in range(3)]
    pieces = [form[place : place + 8] for form in (secret, *encoded) for place in range(len(form) - 7)]
    return any(piece.casefold() in text.casefold() for piece in pieces)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["401: Incorrect API key provided: {}", "{}", "<a href='{}'>x</a>"])
def test_no_form_of_a_key_is_left(form: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", KEY)
    text = where.format(FORMS[form](KEY))
    assert text != redact(text)
    assert not holds(redact(text), KEY)
    assert redact(text).startswith(where.partition("{")[0])
    assert redact(text).endswith(where.rpartition("}")[2])


def test_an_artifacts_record_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", KEY)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_record(tmp_path, {"recipe": {"name": "tiny", "prompt": f"say {KEY}"}, "command": ["--header", f"Bearer {KEY}"]})
    record = (tmp_path / "compress.json").read_text(encoding="utf-8")
    assert json.loads(record)["recipe"]["name"] == "tiny"
    assert not holds(record, KEY)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "GH_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "MODELSCOPE_TOKEN",
        "MODELSCOPE_API_TOKEN",
        "OPENAI_API_KEY",
        "VLLM_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
    ],
)
def test_variables_hold_secrets_by_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, TOKEN)
    assert redact(f"refused {TOKEN}!") == "refused …!"
    monkeypatch.setenv(name, "")
    assert redact(f"refused {TOKEN}!") == f"refused {TOKEN}!"


def test_the_stored_token_of_the_hub_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_storedstoredstored\n")
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redact("with hf_storedstoredstored") == "with …"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("proxy http://user:pass@proxy:3128 is down", "proxy http://…@proxy:3128 is down"),
        ("https://hf_token@mirror/org/name", "https://…@mirror/org/name"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer …'}"),
        ("authorization: Basic YTpi, next", "authorization: Basic …, next"),
        ("https://host/x?size=3&X-Amz-Signature=abc&part=1", "https://host/x?size=3&X-Amz-Signature=…&part=1"),
        ("see https://host/a/b.json: line 3 of a@b.c", "see https://host/a/b.json: line 3 of a@b.c"),
    ],
)
def test_credentials_are_known_by_where_they_stand(text: str, left: str) -> None:
    assert redact(text) == left


def test_a_word_for_no_key_stays_in_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers without keys are given EMPTY; a question about an empty glass is answered with that word."""
    monkeypatch.setattr("compress.untrusted.redaction._noted", dict[str, None]())
    remember_secret("EMPTY")
    assert redact("401: wrong key EMPTY") == "401: wrong key …"
    assert redact("the glass is empty, NOT_EMPTY") == "the glass is empty, NOT_EMPTY"
    assert redact_answer("EMPTY") == "EMPTY"


def test_errors_and_values_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert str(ServerError(f"said {TOKEN}")) == "said …"
    assert RecipeError([f"a.b: got {TOKEN}", "c"]).faults == ("a.b: got …", "c")
    assert redact_value({"a": [1, None, {TOKEN: (f"x{TOKEN}", 0.5)}]}) == {"a": [1, None, {"…": ["x…", 0.5]}]}


def test_events_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    log = EventLog(tmp_path / "events.jsonl", Display(Console()))
    warnings: list[str] = []
    with log.collecting(warnings):
        log.warn(f"warned of {TOKEN}")
    log.say(f"said {TOKEN}")
    log.write("started", settings={"model.source": f"https://u:{TOKEN}@host"}, path=Path(f"/{TOKEN}"), deep=[{"a": TOKEN}])
    text = (tmp_path / "events.jsonl").read_text() + capsys.readouterr().out + repr([warnings, log.warnings])
    assert not holds(text, TOKEN)
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["warning", "message", "started"]
    assert rows[2]["settings"] == {"model.source": "https://…@host"}
    assert log.warnings == warnings == ["warned of …"]


def test_the_command_line_shows_none_and_no_control_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'name: "{TOKEN}\\e[2J\\x9b"\n')
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(recipe)])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert not holds(said.out + said.err, TOKEN)
    assert "\x1b" not in said.err
    assert "\x9b" not in said.err


def test_a_recipe_cannot_hold_a_servers_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [
        "name: keyed",
        "eval:",
        "  runtime: {runtime: vllm, arguments: [--api_key, sk-in-the-recipe-0123]}",
        "  tasks: []",
    ]
    recipe.write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(recipe)])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "arguments: --api-key is followed by a secret" in said.err
    assert "sk-in-the-recipe" not in said.err + said.out
