"""What foreign templates and patterns make a program do is tried apart first."""

import pytest

from compress.errors import CheckpointError
from compress.untrusted.trial import try_patterns, try_template

TURNS = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]]
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


def attempt(template: object) -> None:
    try_template(template, TURNS, {"bos_token": "<s>"}, "model")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FOREVER, r"^model: its chat template takes too long \(limit trial_seconds = 1,"),
        ({"default": "ok", "tool_use": FOREVER}, "takes too long"),
        ("{{ 2 ** (2 ** 40) }}", "takes too long|too much memory"),
        ("{{ 'a' * 4000000000 }}", r"takes too much memory \(limit trial_bytes = 512,000,000"),
        ("{{ '%01000000000d' % 1 }}", "too much memory"),
        ("x" * 1_000_001, r"has 1,000,001 bytes \(limit template_bytes"),
        (["a"], "is no text"),
    ],
)
def test_a_template_that_takes_too_much_is_refused(template: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_LIMIT_TRIAL_SECONDS", "1")
    with pytest.raises(CheckpointError, match=message):
        attempt(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m | tojson }}{% generation %}x{% endgeneration %}{% break %}{% endfor %}{{ bos_token }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%d %b %Y') }}",
        "{% if %}",
        "{{ missing.of.all }}",
        "{" * 5000,
        "{% if a %}" * 2000,
    ],
)
def test_a_template_that_only_does_not_work_passes(template: str) -> None:
    attempt(template)


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_LIMIT_TRIAL_SECONDS", "1")
    with pytest.raises(CheckpointError, match=r"config.json: a pattern in it takes too long \(limit trial_seconds"):
        try_patterns(["(a+)+$"], ["a" * 40 + "b"], "config.json")
    try_patterns([r".*mlp\.(gate|up)_proj$", "("], ["model.layers.0.mlp.up_proj"] * 3, "config.json")
